"""Statistics of methods over seeds and datasets: accuracies, intervals, paired tests. Pure functions.

Outcomes of one policy in one mode are arrays of shape (seeds, images): 1 correct, 0 wrong, NaN where
a seed has no such image (a set that is split anew for each seed). All methods are resampled with
the same draws of images, so differences are paired. Intervals are at 95 %, for the draw of test
images with fixed seeds. The spread over seeds is a figure of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import signal, stats

from tasks.evaluation.metrics import RESAMPLES, harmonic, percentiles

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """One figure of one policy: `by_seed` has shape (seeds,), and `drawn` (resamples,)."""

    by_seed: Floats
    drawn: Floats

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(self.by_seed.mean())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None for one seed."""
        return float(self.by_seed.std(ddof=1)) if len(self.by_seed) > 1 else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval for the draw of images."""
        return percentiles(self.drawn)

    def values(self) -> dict[str, Any]:
        """The figure as JSON values."""
        return {
            "mean": self.mean,
            "interval": list(self.interval),
            "by_seed": self.by_seed.tolist(),
            "spread": self.spread,
        }


def draw_images(images: int, *, seed: int, resamples: int = RESAMPLES) -> NDArray[np.float32]:
    """How often each image is drawn, with replacement, in each resample: (resamples, images)."""
    if images < 1:
        raise ValueError("there are no images to draw from")
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float32)


def accuracy(outcomes: ArrayLike, draws: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Accuracy by seed, shape (seeds,), and in each resample, shape (resamples, seeds).

    `outcomes` has shape (seeds, images), `draws` (resamples, images).
    """
    right = np.atleast_2d(np.asarray(outcomes, dtype=np.float32))
    there = ~np.isnan(right)
    right = np.where(there, right, 0).astype(np.float32)
    counts = there.sum(axis=1)
    if not counts.all():
        raise ValueError("a seed has no images")
    # Sums of whole numbers are exact in 32 bits; the division is done in 64.
    drawn_right = (draws @ right.T).astype(np.float64)
    drawn_there = (draws @ there.T.astype(np.float32)).astype(np.float64)
    by_seed = right.sum(axis=1, dtype=np.float64) / counts
    return by_seed, drawn_right / np.maximum(drawn_there, 1)


def figures(
    outcomes: Mapping[str, ArrayLike], draws: Mapping[str, NDArray[np.float32]]
) -> dict[str, Figure]:
    """The accuracy of each group and, of two groups, their harmonic mean, computed seed by seed."""
    parts = {group: accuracy(values, draws[group]) for group, values in outcomes.items()}
    result = {g: Figure(seeds, drawn.mean(axis=1)) for g, (seeds, drawn) in parts.items()}
    if len(parts) == 2:
        (first, first_drawn), (second, second_drawn) = parts.values()
        result["harmonic_mean"] = Figure(
            harmonic(first, second), harmonic(first_drawn, second_drawn).mean(axis=1)
        )
    return result


def over_datasets(sets: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """The mean of each group over the sets, and two summaries of base and novel accuracy.

    `mean_of_harmonic_means` averages the sets' harmonic means, and `harmonic_mean_of_means` is the
    harmonic mean of the average accuracies. Papers mix up the two. All sets have the same weight,
    whatever their size.
    """
    shared = [key for key in sets[0] if all(key in one for one in sets)]
    result: dict[str, Figure] = {}
    for key in shared:
        mean = Figure(
            np.mean([one[key].by_seed for one in sets], axis=0),
            np.mean([one[key].drawn for one in sets], axis=0),
        )
        result["mean_of_harmonic_means" if key == "harmonic_mean" else f"mean_{key}"] = mean
    groups = [result[f"mean_{key}"] for key in shared if key != "harmonic_mean"]
    if len(groups) == 2 and "mean_of_harmonic_means" in result:
        result["harmonic_mean_of_means"] = Figure(
            harmonic(groups[0].by_seed, groups[1].by_seed),
            harmonic(groups[0].drawn, groups[1].drawn),
        )
    return result


def sign_flip(before: ArrayLike, after: ArrayLike) -> float:
    """Two-sided p value of the exact sign-flip test over images, both of shape (seeds, images).

    The null hypothesis: an image's difference, summed over seeds, has either sign with the same
    probability. With one seed this is McNemar's exact test. 1.0 when nothing changed.
    """
    change = np.nansum(
        np.atleast_2d(np.asarray(after, dtype=float) - np.asarray(before, dtype=float)), axis=0
    )
    sizes, counts = np.unique(np.abs(np.rint(change)).astype(int), return_counts=True)
    observed = abs(int(np.rint(change.sum())))
    chances = np.ones(1)  # of each total, from -reach to +reach
    reach = 0
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        if size == 0:
            continue
        one = np.zeros(2 * size * count + 1)
        one[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = signal.convolve(chances, one)
        reach += size * count
    totals = np.arange(-reach, reach + 1)
    return float(min(1.0, max(0.0, chances[np.abs(totals) >= observed].sum())))


def bootstrap_p(drawn: ArrayLike) -> float:
    """Two-sided p value of a difference, from the share of its resamples beyond zero."""
    values = np.asarray(drawn, dtype=float)
    low, high = (1 + (values <= 0).sum()), (1 + (values >= 0).sum())
    return float(min(1.0, 2 * min(low, high) / (len(values) + 1)))


def align(by_seed: Sequence[Mapping[str, bool]], order: Sequence[str]) -> Floats:
    """Outcomes by image id, one mapping a seed, as (seeds, images) in `order`; NaN where absent."""
    return np.array([[float(seed.get(i, math.nan)) for i in order] for seed in by_seed])
