"""Computes confidence intervals of proportions."""

from __future__ import annotations

import math


def wilson_interval(share: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Returns the Wilson interval (1927) of a share in `count` independent trials, 95 % with the default z."""
    if not count:
        return 0.0, 1.0
    share = min(max(share, 0.0), 1.0)  # rounding, or a file, can lead out of the range
    center = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = (center - half) / (1 + z * z / count), (center + half) / (1 + z * z / count)
    return max(low, 0.0), min(high, 1.0)  # rounding leads out of the range
