"""Diagnostics of predictions: calibration, letter bias, accuracy by class, confusions.

All functions are pure. Outcomes are arrays of bool, one entry per test image; failures are False.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.language.prompts import LETTERS


class Bin(NamedTuple):
    """The predictions whose vote share lies above `low` and at most at `high`; means are NaN in an
    empty bin."""

    low: float
    high: float
    images: int
    right: int
    mean_share: float
    accuracy: float


class Letter(NamedTuple):
    """How often a letter was chosen, how often it was right, and how often a policy without letter
    bias would choose it."""

    chosen: int
    right: int
    expected: float


class LetterBias(NamedTuple):
    """Counts by letter, with the chi-square statistic, its degrees of freedom and its p value.

    `unread` is the number of questions that were answered without a letter.
    """

    letters: dict[str, Letter]
    statistic: float
    freedom: int
    p: float
    unread: int


class Confusion(NamedTuple):
    """Images of the class `truth` answered as the class `answered`, before and after."""

    truth: int
    answered: int
    before: int
    after: int


def calibration(shares: ArrayLike, correct: ArrayLike, bins: int = 10) -> tuple[list[Bin], float]:
    """Equally wide bins of vote shares, and the expected calibration error (Guo et al. 2017).

    `shares` in [0, 1] and `correct` have one entry an image. The error is the mean distance of a
    bin's accuracy from its mean share, weighted by counts. Raises ValueError when they are empty,
    differ in length, or a share lies outside.
    """
    share = np.asarray(shares, dtype=np.float64)
    right = _outcomes(correct, len(share))
    if not bool(np.all((share >= 0) & (share <= 1))):
        raise ValueError("a vote share lies between 0 and 1")
    # 0.3 belongs to the third of ten bins, but as a 32-bit float 0.3 * 10 is a little above 3.
    place = np.clip(np.ceil(share * bins - 1e-6).astype(int) - 1, 0, bins - 1)
    result, error = [], 0.0
    for number in range(bins):
        here = place == number
        count = int(here.sum())
        hits = int(right[here].sum())
        mean = float(share[here].mean()) if count else math.nan
        accuracy = hits / count if count else math.nan
        error += count * abs(accuracy - mean) / len(share) if count else 0.0
        result.append(Bin(number / bins, (number + 1) / bins, count, hits, mean, accuracy))
    return result, error


def letter_bias(
    chosen: Sequence[str], right: Sequence[str], num_options: Sequence[int]
) -> LetterBias:
    """Test whether a policy prefers some letters to others in multiple-choice questions.

    Each list has one entry a question: the letter chosen and the right one ("" for none), and the
    number of options. Options stand in random order, so a policy without letter bias chooses each
    letter equally often, however accurate it is. Pearson's chi-square tests this, summed over groups
    of questions with the same number of options. Questions of one option are left out. Raises
    ValueError when the lists differ in length.
    """
    from scipy.stats import chi2

    asked = [each for each in zip(chosen, right, num_options, strict=True) if each[2] >= 2]
    read = [(letter, count) for letter, _, count in asked if letter]
    expected: dict[str, float] = {}
    statistic, freedom = 0.0, 0
    for count, total in Counter(count for _, count in read).items():
        each = total / count
        seen = Counter(letter for letter, options in read if options == count)
        for letter in LETTERS[:count]:
            expected[letter] = expected.get(letter, 0.0) + each
            statistic += (seen[letter] - each) ** 2 / each
        freedom += count - 1
    picks = Counter(letter for letter, _ in read)
    truths = Counter(letter for _, letter, _ in asked if letter)
    letters = {
        letter: Letter(picks[letter], truths[letter], expected.get(letter, 0.0))
        for letter in sorted({*picks, *truths, *expected})
    }
    p = float(chi2.sf(statistic, freedom)) if freedom else 1.0
    return LetterBias(letters, float(statistic), freedom, p, len(asked) - len(read))


def per_class(labels: Iterable[int], correct: ArrayLike) -> dict[int, tuple[int, int]]:
    """Class id -> (right, images), by class id."""
    classes = np.asarray(list(labels), dtype=np.int64)
    right = _outcomes(correct, len(classes))
    return {
        int(label): (int(right[classes == label].sum()), int((classes == label).sum()))
        for label in np.unique(classes)
    }


def confusion_changes(
    labels: Sequence[int], before: Sequence[int], after: Sequence[int]
) -> tuple[list[Confusion], list[Confusion]]:
    """Confusions that became rarer and those that became more frequent, most changed first.

    Class ids of the same images in the same order; answers below 0 are no class and no confusion.
    """
    counts = [
        Counter(
            (truth, answer)
            for truth, answer in zip(labels, answers, strict=True)
            if answer != truth and answer >= 0
        )
        for answers in (before, after)
    ]
    changes = [
        Confusion(truth, answered, counts[0][truth, answered], counts[1][truth, answered])
        for truth, answered in sorted({*counts[0], *counts[1]})
    ]
    ranked = sorted(changes, key=lambda pair: -abs(pair.after - pair.before))
    resolved = [pair for pair in ranked if pair.after < pair.before]
    return resolved, [pair for pair in ranked if pair.after > pair.before]


def _outcomes(values: ArrayLike, wanted: int) -> NDArray[np.bool_]:
    outcomes = np.asarray(values, dtype=bool)
    if outcomes.ndim != 1 or len(outcomes) != wanted or not wanted:
        raise ValueError(f"expected one outcome for each of {wanted} images, got {outcomes.shape}")
    return outcomes
