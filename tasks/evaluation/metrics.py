"""Metrics and their intervals: accuracy, harmonic mean, Pass@k, paired differences, p values.

All reported figures are computed here or in `tasks/evaluation/diagnostics.py`. Accuracies are shares
in [0, 1]. Intervals are at 95 % unless `z` says otherwise. Outcomes are arrays of bool, one entry per
test image; failures are False. Resampling images with replacement only changes how often each
outcome occurs, so the bootstraps draw these counts directly: the same distribution at a thousandth
of the work.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.evaluation.diagnostics import (
    calibration,
    confusion_changes,
    letter_bias,
    per_class,
)

__all__ = [
    "bootstrap_harmonic_mean",
    "calibration",
    "confusion_changes",
    "harmonic",
    "harmonic_mean",
    "holm",
    "letter_bias",
    "mcnemar",
    "over_seeds",
    "paired_difference",
    "paired_harmonic_difference",
    "pass_at_k",
    "per_class",
    "percentiles",
    "wilson",
]

RESAMPLES = 2000
_TAILS = (2.5, 97.5)  # percent


class Spread(NamedTuple):
    """Mean over training seeds; deviation and t-interval are NaN when there is one seed."""

    seeds: int
    mean: float
    deviation: float
    low: float
    high: float


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of `correct` out of `total` (Wilson 1927); (0, 1) when total is 0."""
    if not 0 <= correct <= total:
        raise ValueError(f"correct must be between 0 and total; got {correct} of {total}")
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def harmonic_mean(base: float, novel: float) -> float:
    """2bn / (b + n) of base and novel accuracy; 0 when both are 0."""
    return float(harmonic(base, novel))


def harmonic(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """2ab / (a + b), element by element; 0 where both are 0."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    total = np.asarray(a + b)
    return np.divide(2 * a * b, total, out=np.zeros_like(total), where=total > 0)


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """The unbiased Pass@k of each image (Chen et al. 2021, section 2.1).

    `num_samples` and `num_correct` are counts of shape (images,), or anything that broadcasts to
    one shape, which is the shape of the result. It computes 1 - C(n - c, k) / C(n, k) as a product
    of k factors, so that nothing overflows. Raises ValueError unless 1 <= k <= num_samples and
    0 <= num_correct <= num_samples.
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct))
    if k < 1 or bool(np.any(n < k)):
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples of every image and k >= 1")
    if bool(np.any((c < 0) | (c > n))):
        raise ValueError("num_correct must be between 0 and num_samples")
    all_wrong = np.ones(n.shape)
    for drawn in range(k):
        all_wrong *= (n - c - drawn) / (n - drawn)
    return 1.0 - all_wrong


def bootstrap_harmonic_mean(
    base: ArrayLike, novel: ArrayLike, *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile interval of the harmonic mean, resampling base and novel images apart.

    `base` is bool of shape (base images,), `novel` of shape (novel images,). Raises ValueError
    when either is empty.
    """
    outcomes = [_outcomes("base", base), _outcomes("novel", novel)]
    rng = np.random.default_rng(seed)
    shares = [rng.binomial(len(o), o.mean(), size=resamples) / len(o) for o in outcomes]
    return percentiles(harmonic(*shares))


def paired_difference(
    before: ArrayLike, after: ArrayLike, *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Accuracy after minus accuracy before on the same images: (difference, low, high).

    Both are bool of shape (images,), in the same order of images; pairs are resampled together.
    Raises ValueError when they are empty or differ in length.
    """
    pairs = _pairs("images", before, after)
    drawn = _draw_pairs(pairs, np.random.default_rng(seed), resamples)
    low, high = percentiles(drawn[1] - drawn[0])
    shares = _shares(pairs)
    return float(shares[1] - shares[0]), low, high


def paired_harmonic_difference(
    base_before: ArrayLike,
    base_after: ArrayLike,
    novel_before: ArrayLike,
    novel_after: ArrayLike,
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """Harmonic mean after minus before on the same images: (difference, low, high).

    The base arrays are bool of shape (base images,), the novel ones of shape (novel images,);
    pairs are resampled together, base and novel apart. Raises ValueError when a group is empty or
    its two arrays differ in length.
    """
    groups = [
        _pairs("base images", base_before, base_after),
        _pairs("novel images", novel_before, novel_after),
    ]
    rng = np.random.default_rng(seed)
    base, novel = (_draw_pairs(pairs, rng, resamples) for pairs in groups)
    low, high = percentiles(harmonic(base[1], novel[1]) - harmonic(base[0], novel[0]))
    base_was, base_is = _shares(groups[0])
    novel_was, novel_is = _shares(groups[1])
    return harmonic_mean(base_is, novel_is) - harmonic_mean(base_was, novel_was), low, high


def percentiles(drawn: ArrayLike) -> tuple[float, float]:
    """The central 95 % of resamples."""
    low, high = np.percentile(np.asarray(drawn, dtype=np.float64), _TAILS)
    return float(low), float(high)


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """Two-sided p value of McNemar's exact test: did as many images turn correct as wrong?

    Both are bool of shape (images,), in the same order. Images whose outcome did not change carry
    no weight; 1.0 when none changed. It computes with integers up to the last division, so that
    nothing underflows. Raises ValueError when the arrays are empty or differ in length.
    """
    first, second = _both("images", before, after)
    gained = int(np.count_nonzero(~first & second))
    lost = int(np.count_nonzero(first & ~second))
    changed = gained + lost
    term = tail = 1
    for i in range(min(gained, lost)):
        term = term * (changed - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**changed)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p values (Holm 1979), in the order of `p_values`.

    They bound the chance of any false rejection among all tests. Raises ValueError for anything but
    p values.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not bool(np.all((p >= 0) & (p <= 1))):
        raise ValueError(f"expected a list of p values, got {p_values!r}")
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def over_seeds(values: ArrayLike, level: float = 0.95) -> Spread:
    """Mean over training seeds, standard deviation (n - 1), and Student's t-interval of the mean.

    Raises ValueError when there are no values.
    """
    by_seed = np.asarray(values, dtype=np.float64)
    if by_seed.ndim != 1 or not len(by_seed):
        raise ValueError(f"expected one value a seed, got shape {by_seed.shape}")
    mean, count = float(by_seed.mean()), len(by_seed)
    if count == 1:
        return Spread(1, mean, math.nan, math.nan, math.nan)
    from scipy.stats import t

    deviation = float(by_seed.std(ddof=1))
    half = float(t.ppf((1 + level) / 2, count - 1)) * deviation / math.sqrt(count)
    return Spread(count, mean, deviation, mean - half, mean + half)


def _outcomes(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    outcomes = np.asarray(values, dtype=bool)
    if outcomes.ndim != 1 or len(outcomes) == 0:
        raise ValueError(f"{name}: expected one outcome per image, got shape {outcomes.shape}")
    return outcomes


def _both(name: str, before: ArrayLike, after: ArrayLike) -> tuple[NDArray, NDArray]:
    first, second = _outcomes(f"{name} before", before), _outcomes(f"{name} after", after)
    if len(first) != len(second):
        raise ValueError(f"{name}: {len(first)} outcomes before, {len(second)} after; pair them")
    return first, second


def _pairs(name: str, before: ArrayLike, after: ArrayLike) -> NDArray[np.int64]:
    """How many images were (wrong, wrong), (wrong, right), (right, wrong), (right, right)."""
    first, second = _both(name, before, after)
    return np.bincount(2 * first.astype(np.int64) + second, minlength=4)


def _draw_pairs(pairs: NDArray, rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """Resampled accuracies, shape (2, resamples): before, after."""
    return _shares(rng.multinomial(pairs.sum(), pairs / pairs.sum(), size=resamples).T)


def _shares(pairs: NDArray) -> NDArray[np.float64]:
    """Accuracies before and after from the four counts along the first axis."""
    return np.stack([pairs[2] + pairs[3], pairs[1] + pairs[3]]) / pairs.sum(axis=0)
