"""Decides which checkpoints are kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp


@dataclasses.dataclass
class LatestOrBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest steps, the steps with the highest scores, and those that a run that diverges goes back to.

    The latter are the newest regular step, and the newest one before `last_good`, the last step that changed the
    parameters. Its update may be the cause of the divergence.

    Orbax's own policies read the metrics of earlier runs from files without a digest, and a damaged file makes the
    constructor of the manager fail.
    """

    keep_latest: int
    keep_best: int
    regular_every: int
    scores: dict[int, float]
    last_good: float = math.inf

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept = self.kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]

    def is_regular(self, step: int) -> bool:
        """Returns whether every run of the config saves this step, interrupted or not."""
        return step > 0 and step % self.regular_every == 0

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Returns the steps that are kept."""
        steps = sorted(steps)
        scored = sorted((step for step in steps if step in self.scores), key=self.scores.__getitem__)
        kept = set(steps[-self.keep_latest :]) | set(
            scored[max(0, len(scored) - self.keep_best) :] if self.keep_best else ()
        )
        regular = [step for step in steps if self.is_regular(step)]
        return kept | set(regular[-1:]) | set([step for step in regular if step < self.last_good][-1:])
