"""Reported figures against closed forms, brute force and what they promise."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tasks.evaluation.metrics import (
    bootstrap_harmonic_mean,
    harmonic_mean,
    holm,
    mcnemar,
    over_seeds,
    paired_difference,
    paired_harmonic_difference,
    pass_at_k,
    wilson,
)

# No examples are kept between runs, and the same ones are tried in each.
SETTLED = settings(deadline=None, derandomize=True, database=None)
SHARES = st.floats(0, 1)


def outcomes(right: int, total: int) -> np.ndarray:
    return np.arange(total) < right


@pytest.mark.parametrize(("correct", "total"), [(1, 10), (5, 10), (81, 263), (5793, 5794)])
def test_wilson_ends_solve_the_equation_they_are_defined_by(correct, total):
    """An end p is where the observed share lies z standard errors of p away."""
    for end in wilson(correct, total):
        assert abs(correct / total - end) == pytest.approx(
            1.96 * math.sqrt(end * (1 - end) / total)
        )


def test_wilson_at_the_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10) == (0.0, pytest.approx(1.96**2 / (10 + 1.96**2)))
    assert wilson(10, 10) == (pytest.approx(10 / (10 + 1.96**2)), 1.0)
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    with pytest.raises(ValueError, match="11 of 10"):
        wilson(11, 10)


@given(st.integers(0, 500), st.integers(0, 500))
@SETTLED
def test_wilson_holds_the_share_and_mirrors(correct, wrong):
    total = correct + wrong
    low, high = wilson(correct, total)
    assert 0 <= low <= (correct / total if total else 0.5) <= high <= 1
    mirrored = wilson(wrong, total)
    assert (1 - high, 1 - low) == (pytest.approx(mirrored[0]), pytest.approx(mirrored[1]))


def test_harmonic_mean():
    assert harmonic_mean(0.5, 0.5) == 0.5
    assert harmonic_mean(1.0, 0.5) == pytest.approx(2 / 3)
    assert harmonic_mean(1.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 0.0) == 0.0


@given(SHARES, SHARES)
@SETTLED
def test_harmonic_mean_lies_between_and_below_the_mean(base, novel):
    mean = harmonic_mean(base, novel)
    assert mean == harmonic_mean(novel, base)
    assert min(base, novel) - 1e-12 <= mean <= (base + novel) / 2 + 1e-12 or mean == 0.0


@given(st.integers(1, 8), st.data())
@SETTLED
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_over_images():
    num_samples, num_correct = np.full(21, 20), np.arange(21)
    for k in (1, 5, 20):
        exact = [1 - math.comb(20 - c, k) / math.comb(20, k) for c in range(21)]
        np.testing.assert_allclose(pass_at_k(num_samples, num_correct, k), exact, atol=1e-15)
    assert pass_at_k([4, 20], [1, 1], 2).shape == (2,)  # failed rollouts leave fewer samples
    np.testing.assert_allclose(pass_at_k(20, num_correct, 1), num_correct / 20, atol=1e-15)


def test_pass_at_k_neither_overflows_nor_hides_mistakes():
    large = 1 - math.comb(90_000, 1000) / math.comb(100_000, 1000)
    assert pass_at_k(100_000, 10_000, 1000) == pytest.approx(large)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6)
    for samples, right, k in ((4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(ValueError, match=r"pass@|num_correct"):
            pass_at_k(samples, right, k)


def test_bootstrap_agrees_with_resampling_image_by_image():
    base, novel = outcomes(60, 90), outcomes(30, 80)
    rng = np.random.default_rng(1)
    drawn = [
        harmonic_mean(rng.choice(base, base.size).mean(), rng.choice(novel, novel.size).mean())
        for _ in range(4000)
    ]
    ours = bootstrap_harmonic_mean(base, novel, seed=0, resamples=20_000)
    assert ours == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=0.012)
    assert ours[0] < harmonic_mean(base.mean(), novel.mean()) < ours[1]


def test_bootstrap_covers_the_truth():
    """About 95 of 100 intervals hold the harmonic mean of the shares that images are drawn from."""
    rng = np.random.default_rng(2)
    truth, held = harmonic_mean(0.7, 0.4), 0
    for seed in range(300):
        base, novel = rng.random(400) < 0.7, rng.random(400) < 0.4
        low, high = bootstrap_harmonic_mean(base, novel, seed=seed, resamples=500)
        held += low <= truth <= high
    assert 0.90 <= held / 300 <= 0.99


def test_bootstraps_depend_on_the_seed_alone():
    base, novel = outcomes(60, 90), outcomes(30, 80)
    state = repr(np.random.get_state())
    first = bootstrap_harmonic_mean(base, novel, seed=3)
    assert first == bootstrap_harmonic_mean(base[::-1], novel, seed=3)
    assert first != bootstrap_harmonic_mean(base, novel, seed=4)
    assert repr(np.random.get_state()) == state


def test_certain_outcomes_have_no_width():
    right, wrong = outcomes(9, 9), outcomes(0, 9)
    assert bootstrap_harmonic_mean(right, right, seed=0) == (1.0, 1.0)
    assert bootstrap_harmonic_mean(wrong, wrong, seed=0) == (0.0, 0.0)
    assert paired_difference(wrong, right, seed=0) == (1.0, 1.0, 1.0)
    assert paired_harmonic_difference(wrong, right, wrong, right, seed=0) == (1.0, 1.0, 1.0)
    assert paired_harmonic_difference(right, right, wrong, wrong, seed=0) == (0.0, 0.0, 0.0)


def test_paired_difference_agrees_with_resampling_pair_by_pair():
    rng = np.random.default_rng(5)
    before = rng.random(200) < 0.5
    after = np.where(rng.random(200) < 0.2, ~before, before)
    mean, low, high = paired_difference(before, after, seed=0, resamples=20_000)
    changes = after.astype(float) - before
    drawn = rng.choice(changes, (4000, 200)).mean(axis=1)
    assert mean == pytest.approx(changes.mean())
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=0.008)


def test_paired_harmonic_difference_agrees_with_resampling_pair_by_pair():
    rng = np.random.default_rng(6)
    base, novel = rng.random((2, 150)) < 0.6, rng.random((2, 120)) < 0.4
    drawn = []
    for _ in range(3000):
        b, n = base[:, rng.integers(0, 150, 150)], novel[:, rng.integers(0, 120, 120)]
        means = np.stack([b.mean(axis=1), n.mean(axis=1)])
        drawn.append(harmonic_mean(*means[:, 1]) - harmonic_mean(*means[:, 0]))
    mean, low, high = paired_harmonic_difference(*base, *novel, seed=0, resamples=20_000)
    before, after = (harmonic_mean(base[i].mean(), novel[i].mean()) for i in (0, 1))
    assert mean == pytest.approx(after - before)
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=0.015)


def test_pairing_narrows_the_interval():
    """Two policies that mostly agree are told apart more sharply image by image."""
    before = outcomes(100, 200)
    after = before | (np.arange(200) >= 190)
    _, low, high = paired_difference(before, after, seed=0)
    assert low > 0
    assert high - low < wilson(110, 200)[1] - wilson(110, 200)[0]


@given(st.integers(0, 12), st.integers(0, 12))
@SETTLED
def test_mcnemar_counts_every_way_a_coin_could_have_fallen(gained, lost):
    before = np.array([False] * gained + [True] * lost + [True, False])
    after = np.array([True] * gained + [False] * lost + [True, False])
    changed = gained + lost
    as_uneven = [
        math.comb(changed, heads)
        for heads in range(changed + 1)
        if abs(2 * heads - changed) >= abs(gained - lost)
    ]
    assert mcnemar(before, after) == pytest.approx(sum(as_uneven) / 2**changed)
    assert mcnemar(before, after) == mcnemar(after, before)


def test_mcnemar_at_the_edges():
    assert mcnemar(outcomes(5, 9), outcomes(5, 9)) == 1.0
    assert mcnemar(outcomes(0, 10), outcomes(10, 10)) == pytest.approx(2 / 2**10)
    assert 0.0 <= mcnemar(outcomes(0, 6000), outcomes(6000, 6000)) < 1e-300
    halves = np.concatenate([outcomes(1500, 3000), outcomes(1500, 3000)])
    assert mcnemar(halves, ~halves) == 1.0


def test_holm_by_hand():
    # Smallest first: 0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.04 x 1, never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.005, 0.6, 0.7]) == pytest.approx([0.015, 1.0, 1.0])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2]) == pytest.approx([0.2])
    assert len(holm([])) == 0
    with pytest.raises(ValueError, match="p values"):
        holm([0.1, 1.2])


@given(st.lists(SHARES, min_size=1, max_size=12))
@SETTLED
def test_holm_only_raises_p_values_and_keeps_their_order(p_values):
    adjusted = holm(p_values)
    assert (adjusted >= p_values).all()
    assert adjusted.max() <= 1
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


@given(st.lists(SHARES, max_size=8))
@SETTLED
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if p_values[index] * (len(p_values) - place) > level:
                break
            rejected.add(index)
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected


def test_means_over_seeds():
    values = [59.7, 60.1, 64.9]
    spread = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert spread == pytest.approx((3, np.mean(values), np.std(values, ddof=1), low, high))
    one = over_seeds([0.5])
    assert (one.seeds, one.mean) == (1, 0.5)
    assert math.isnan(one.deviation)
    assert math.isnan(one.low)
    with pytest.raises(ValueError, match="one value a seed"):
        over_seeds([])


def test_empty_and_unpaired_outcomes_are_refused():
    some, none = outcomes(3, 9), outcomes(0, 0)
    with pytest.raises(ValueError, match="novel"):
        bootstrap_harmonic_mean(some, none, seed=0)
    with pytest.raises(ValueError, match="9 outcomes before, 8 after"):
        paired_difference(some, some[1:], seed=0)
    with pytest.raises(ValueError, match="images"):
        mcnemar(some, some[1:])
    with pytest.raises(ValueError, match="novel images"):
        paired_harmonic_difference(some, some, none, none, seed=0)
