"""Measures how often the statistics of a study are right, on simulated studies with known true effects.

    python -m xception_jax.tools.simulate_statistics [--studies 100000]

It prints the table in docs/explanation/studies.md.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

from xception_jax.study.analysis import ANALYSES, Sample, resample_images, versus
from xception_jax.study.inference import CONFIDENCE, bootstrap_intervals, t_intervals

_IMAGE_RESAMPLES = 200
_POINTS = np.array([0.0, 2.7, 3.4, 4.2, 4.9, 5.4])  # log2 of the channels per segment in the spectrum study, size cpu


def measure(*, studies: int, seeds: int, comparisons: int, noise: str = "normal") -> dict[str, float]:
    """Simulates studies and returns the share in which each statistic is right or wrong.

    Args:
      studies: number of studies.
      seeds: number of pairs in each comparison.
      comparisons: number of comparisons in each study, all against the same baseline. Their differences are therefore
        correlated.
      noise: distribution of an accuracy, with unit standard deviation: 'normal', 'skewed' (exponential) or 'heavy' (t
        with 3 degrees of freedom).

    Returns:
      coverage_t, coverage_bootstrap: share of 95 % intervals that contain the true difference;
      family_error_uncorrected, family_error_holm: share of studies without any true difference that claim one;
      false_equivalence_at_margin: share of pairs called equivalent when the true difference equals the margin;
      false_flip: share of studies that claim a change of sign when the effect reaches zero at one end only;
      flip_found: share of studies that find a true change of sign, with ends 4 standard deviations from zero.
    """
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        if noise == "skewed":
            return rng.exponential(1.0, shape) - 1.0
        return rng.standard_t(3, shape) / np.sqrt(3) if noise == "heavy" else rng.normal(0, 1, shape)

    baseline = draw(studies, 1, seeds)
    differences = draw(studies, comparisons, seeds) - baseline
    flat = differences.reshape(-1, seeds)
    low, high, p = t_intervals(flat)
    bootstrap_low, bootstrap_high = bootstrap_intervals(differences[:20_000, 0])
    p = p.reshape(studies, comparisons)
    alpha = 1 - CONFIDENCE
    margin = 4.0
    at_low, at_high, _ = t_intervals(differences[:, 0] + margin)

    def claims(truth: np.ndarray) -> np.ndarray:
        effects = draw(studies, seeds, len(_POINTS)) - draw(studies, seeds, len(_POINTS)) + truth
        x = _POINTS - _POINTS.mean()
        slope_low, _, _ = t_intervals(effects @ x / (x @ x))
        _, first_high, _ = t_intervals(effects[:, :, 0])
        last_low, _, _ = t_intervals(effects[:, :, -1])
        return (slope_low > 0) & (first_high < 0) & (last_low > 0)

    rise = (_POINTS - _POINTS[0]) / _POINTS[-1]
    far = 4 * np.sqrt(2)  # the standard deviation of a difference is the square root of two
    return {
        "coverage_t": float(((low <= 0) & (high >= 0)).mean()),
        "coverage_bootstrap": float(((bootstrap_low <= 0) & (bootstrap_high >= 0)).mean()),
        "family_error_uncorrected": float((p < alpha).any(1).mean()),
        # Holm rejects something if and only if the smallest p is below alpha / k.
        "family_error_holm": float((p.min(1) * comparisons < alpha).mean()),
        "false_equivalence_at_margin": float(((at_low > -margin) & (at_high < margin)).mean()),
        "false_flip": float(claims(far * rise).mean()),
        "flip_found": float(claims(2 * far * (rise - 0.5)).mean()),
    }


def measure_analyses(*, studies: int, seeds: int, images: int = 100, unequal: bool = False) -> dict[str, float]:
    """Simulates answers of three arms on the same images, and returns the coverage of the first two arms' difference.

    An answer is right if the sum of effects of image, image and arm, seed, and both together is above zero. The images
    of one study favour one of two arms that are equal over all images.

    Args:
      studies: number of studies.
      seeds: number of seeds of each arm.
      images: number of images of the test split.
      unequal: whether the seeds of the second arm vary three times as much.

    Returns:
      the share of 95 % intervals that contain the true difference. It is that on the images of the study for 'paired',
      'welch' and 'pooled', and that over all images for 'crossed', its bootstrap, and 'paired_other_images'.
    """
    rng = np.random.default_rng(0)
    spread = np.array([0.15, 0.45 if unequal else 0.15, 0.15])[:, None, None]  # of the seeds
    hits: dict[str, list[bool]] = {}
    for _ in range(studies):
        difficulty = rng.normal(1, 1, images) + rng.normal(0, 1, (3, 1, images))
        right = difficulty + spread * rng.normal(0, 1, (3, seeds, 1)) + 0.5 * rng.normal(0, 1, (3, seeds, images)) > 0
        # The probability of a right answer on each image, over other seeds.
        expected = stats.norm.cdf(difficulty / np.sqrt(spread**2 + 0.25)).mean((1, 2))
        truth = expected[0] - expected[1]
        again = [resample_images(cells, _IMAGE_RESAMPLES) for cells in right]
        samples = {
            name: Sample(cells.mean(1), cells, means) for name, cells, means in zip("abc", right, again, strict=True)
        }
        found = {name: analysis(versus("a", "b"), samples) for name, analysis in ANALYSES.items()}
        for name in ("paired", "welch", "pooled"):
            hits.setdefault(name, []).append(found[name].low <= truth <= found[name].high)
        paired, crossed = found["paired"], found["crossed"]
        overall = 0.0 if not unequal else _mean_right(spread[0].item()) - _mean_right(spread[1].item())
        hits.setdefault("paired_other_images", []).append(paired.low <= overall <= paired.high)
        hits.setdefault("crossed", []).append(crossed.low <= overall <= crossed.high)
        hits.setdefault("crossed_bootstrap", []).append(crossed.bootstrap_low <= overall <= crossed.bootstrap_high)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def _mean_right(spread: float) -> float:
    """Returns the probability of a right answer over all images and seeds."""
    return float(stats.norm.cdf(1 / np.sqrt(1 + 1 + spread**2 + 0.25)))


def main() -> None:
    """Prints the measurements for several numbers of seeds and noise distributions, as Markdown tables."""
    parser = argparse.ArgumentParser(prog="python -m xception_jax.tools.simulate_statistics", description=__doc__)
    parser.add_argument("--studies", type=int, default=100_000, help="number of simulated studies in each row")
    studies = parser.parse_args().studies
    rows = [(noise, seeds) for noise in ("normal", "skewed", "heavy") for seeds in (3, 5, 10)]
    for number, (noise, seeds) in enumerate(rows):
        found = measure(studies=studies, seeds=seeds, comparisons=6, noise=noise)
        if number == 0:
            print(f"| noise | seeds | {' | '.join(name.replace('_', ' ') for name in found)} |")
            print("|---" * (len(found) + 2) + "|")
        print(f"| {noise} | {seeds} | {' | '.join(f'{share:.3f}' for share in found.values())} |", flush=True)
    print()
    for number, (unequal, seeds) in enumerate((unequal, seeds) for unequal in (False, True) for seeds in (3, 5, 10)):
        found = measure_analyses(studies=max(studies // 50, 1), seeds=seeds, unequal=unequal)
        if number == 0:
            print(f"| variances | seeds | {' | '.join(name.replace('_', ' ') for name in found)} |")
            print("|---" * (len(found) + 2) + "|")
        kind = "unequal" if unequal else "equal"
        print(f"| {kind} | {seeds} | {' | '.join(f'{share:.3f}' for share in found.values())} |", flush=True)
    error = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(0.05 * 0.95 / studies)
    print(f"\n{studies:,} studies of six comparisons per row; a share of 0.05 has a 95 % interval of +-{error:.4f}.")


if __name__ == "__main__":
    main()
