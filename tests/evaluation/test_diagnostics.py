"""Calibration, letter bias, classes and confusions against scipy and counts by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from tasks.evaluation.metrics import calibration, confusion_changes, letter_bias, per_class


def test_calibration_is_the_weighted_gap_by_hand():
    shares = [0.95, 1.0, 0.95, 0.3, 0.25, 0.0]
    correct = [True, True, False, True, False, False]
    bins, error = calibration(shares, correct)
    assert [each.images for each in bins] == [1, 0, 2, 0, 0, 0, 0, 0, 0, 3]
    assert bins[9].accuracy == pytest.approx(2 / 3)
    assert bins[9].mean_share == pytest.approx(2.9 / 3)
    assert bins[2].mean_share == pytest.approx(0.275), "0.3 ends the third bin"
    assert math.isnan(bins[1].accuracy)
    assert error == pytest.approx((3 * (2.9 / 3 - 2 / 3) + 2 * (0.5 - 0.275) + 0) / 6)


def test_votes_out_of_twenty_fall_where_they_belong():
    shares = np.arange(1, 21) / 20
    bins, _ = calibration(shares, np.ones(20, bool))
    assert [each.images for each in bins] == [2] * 10


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_a_share_on_an_edge_belongs_below_it_however_it_is_stored(precision):
    edges = (np.arange(1, 11) / 10).astype(precision).astype(float)
    bins, _ = calibration(edges, np.ones(10, bool))
    assert [each.images for each in bins] == [1] * 10


def test_a_policy_as_sure_as_it_is_right_is_calibrated():
    rng = np.random.default_rng(0)
    shares = rng.integers(0, 21, 200_000) / 20
    _, error = calibration(shares, rng.random(200_000) < shares)
    assert error < 0.005
    _, error = calibration([1.0] * 4, [True, False, False, False])
    assert error == 0.75


def test_letter_bias_of_equally_many_options_is_scipys_chi_square():
    chosen = list("AAAAAABBBCCDDE")
    found = letter_bias(chosen, ["A"] * 14, [5] * 14)
    wanted = stats.chisquare([6, 3, 2, 2, 1])
    assert found.statistic == pytest.approx(wanted.statistic)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.freedom == 4
    assert found.letters["A"] == (6, 14, pytest.approx(14 / 5))
    assert found.letters["E"].right == 0


def test_questions_of_different_lengths_are_tested_apart_and_added():
    chosen, counts = list("AABAACBA"), [2, 2, 2, 3, 3, 3, 3, 1]
    found = letter_bias(chosen, [""] * 8, counts)
    two, three = stats.chisquare([2, 1]), stats.chisquare([2, 1, 1])
    assert found.statistic == pytest.approx(two.statistic + three.statistic)
    assert found.freedom == 3
    assert found.p == pytest.approx(stats.chi2.sf(two.statistic + three.statistic, 3))
    assert found.letters["C"].expected == pytest.approx(4 / 3)


def test_letters_that_were_not_read_are_counted_apart():
    found = letter_bias(["A", "", "B"], ["B", "A", ""], [2, 2, 2])
    assert (found.unread, found.statistic) == (1, 0.0)
    assert {letter: each.right for letter, each in found.letters.items()} == {"A": 1, "B": 1}
    assert letter_bias([], [], []).p == 1.0


def test_a_liking_is_found_and_chance_is_not():
    rng = np.random.default_rng(3)
    fair = [str(letter) for letter in rng.choice(list("ABCDE"), 2000)]
    assert letter_bias(fair, fair, [5] * 2000).p > 0.01
    liked = ["A" if rng.random() < 0.1 else letter for letter in fair]
    assert letter_bias(liked, fair, [5] * 2000).p < 1e-4
    p_values = []
    for seed in range(200):
        drawn = np.random.default_rng(seed)
        counts = drawn.integers(2, 6, 300)
        letters = ["ABCDE"[drawn.integers(count)] for count in counts]
        p_values.append(letter_bias(letters, letters, counts.tolist()).p)
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.1


def test_classes_are_counted_one_by_one():
    assert per_class([3, 1, 3, 3], [True, False, False, True]) == {1: (0, 1), 3: (2, 3)}
    with pytest.raises(ValueError, match="4 images"):
        per_class([3, 1, 3, 3], [True])


def test_confusions_resolved_and_introduced():
    labels = [0, 0, 0, 1, 1, 2]
    before = [1, 1, 0, 0, 1, -1]
    after = [1, 0, 0, 2, 2, 2]
    resolved, introduced = confusion_changes(labels, before, after)
    assert resolved == [(0, 1, 2, 1), (1, 0, 1, 0)]
    assert introduced == [(1, 2, 0, 2)]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        confusion_changes(labels, before, after[1:])
