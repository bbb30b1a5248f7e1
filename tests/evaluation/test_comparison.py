"""Statistics over methods, seeds and datasets, each against a figure found another way."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tasks.evaluation import comparison
from tasks.evaluation.metrics import harmonic, mcnemar, percentiles


def flags(*shape: int, share: float, seed: int):
    return np.random.default_rng(seed).random(shape) < share


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(deadline=None)
def test_with_one_seed_the_sign_flip_test_is_mcnemars(pairs):
    before, after = (np.array(side)[None, :] for side in zip(*pairs, strict=True))
    expected = mcnemar(before[0], after[0])
    assert comparison.sign_flip(before, after) == pytest.approx(expected, abs=1e-9)


def test_the_sign_flip_test_counts_every_way_to_flip():
    before = np.array([[0, 0, 1, 0, 1], [0, 0, 1, 1, 0]])
    after = np.array([[1, 1, 0, 0, 1], [1, 0, 1, 1, 0]])
    change = (after - before).sum(axis=0)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    expected = np.mean(np.abs(signs @ change) >= abs(change.sum()))
    assert comparison.sign_flip(before, after) == pytest.approx(expected)


def test_an_exact_test_agrees_with_scipys_permutations():
    before, after = flags(3, 80, share=0.5, seed=1), flags(3, 80, share=0.62, seed=2)
    sides = (after.sum(axis=0), before.sum(axis=0))
    sampled = stats.permutation_test(
        sides,
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    assert comparison.sign_flip(before, after) == pytest.approx(sampled.pvalue, abs=0.01)


def test_figures_are_means_over_seeds_and_their_intervals_hold_them():
    base, novel = flags(3, 400, share=0.7, seed=3), flags(3, 300, share=0.4, seed=4)
    draws = {
        "base": comparison.draw_images(400, seed=0),
        "novel": comparison.draw_images(300, seed=1),
    }
    found = comparison.figures({"base": base, "novel": novel}, draws)
    b, n = base.mean(axis=1), novel.mean(axis=1)
    assert found["base"].by_seed == pytest.approx(b)
    assert found["harmonic_mean"].by_seed == pytest.approx(2 * b * n / (b + n))
    assert found["harmonic_mean"].spread == pytest.approx(np.std(2 * b * n / (b + n), ddof=1))
    low, high = found["base"].interval
    # Of independent seeds the standard error is that of all their images together.
    error = math.sqrt(0.21 / 1200)
    assert low == pytest.approx(base.mean() - 1.96 * error, abs=0.006)
    assert high == pytest.approx(base.mean() + 1.96 * error, abs=0.006)


def test_the_same_draws_for_two_policies_make_their_difference_paired():
    before = flags(1, 500, share=0.5, seed=5)
    after = before.copy()
    after[0, :20] = True
    draws = comparison.draw_images(500, seed=0)
    one = comparison.figures({"base": before}, {"base": draws})["base"]
    two = comparison.figures({"base": after}, {"base": draws})["base"]
    low, high = percentiles(two.drawn - one.drawn)
    assert 0 < low < two.mean - one.mean < high < 0.05


def test_the_two_summaries_over_datasets_differ_as_they_must():
    def fixed(base, novel):
        values = {"base": np.array([base]), "novel": np.array([novel])}
        values["harmonic_mean"] = harmonic(values["base"], values["novel"])
        return {key: comparison.Figure(value, value) for key, value in values.items()}

    found = comparison.over_datasets([fixed(0.9, 0.3), fixed(0.5, 0.5)])
    assert found["mean_base"].mean == pytest.approx(0.7)
    assert found["mean_of_harmonic_means"].mean == pytest.approx((0.45 + 0.5) / 2)
    assert found["harmonic_mean_of_means"].mean == pytest.approx(2 * 0.7 * 0.4 / 1.1)


def test_images_that_a_seed_does_not_have_do_not_count_for_it():
    order = ["a", "b", "c"]
    outcomes = comparison.align([{"a": True, "b": False}, {"b": True, "c": True}], order)
    by_seed, drawn = comparison.accuracy(outcomes, comparison.draw_images(3, seed=0))
    assert by_seed == pytest.approx([0.5, 1.0])
    assert np.isfinite(drawn).all()
    assert comparison.sign_flip(outcomes, outcomes) == 1.0


def test_a_difference_that_never_crosses_zero_is_as_sure_as_the_resamples_allow():
    assert comparison.bootstrap_p(np.ones(1999)) == pytest.approx(2 / 2000)
    assert comparison.bootstrap_p(np.zeros(1999)) == 1.0
