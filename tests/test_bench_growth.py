"""The fits of the growth benchmark: exponents of known curves, and what is left out."""

import pytest

from tests.bench.growth import above_start, exponent


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_the_exponent_of_a_known_curve_is_its_power(power):
    slope, error = exponent([(rows, 3 * rows**power) for rows in (1000, 3162, 10_000, 100_000)])
    assert slope == pytest.approx(power)
    assert error == pytest.approx(0, abs=1e-6)


def test_the_start_of_a_process_does_not_pass_for_flat_growth():
    points = [(rows, 2 + rows / 10_000, 100.0) for rows in (500, 1000, 10_000, 100_000, 1_000_000)]
    slope, _ = exponent(above_start(points))
    assert slope == pytest.approx(1)
    assert exponent([(rows, took) for rows, took, _ in points])[0] < 0.7


def test_points_within_the_noise_of_the_start_are_left_out():
    points = [(500, 1.0, 9.0), (1000, 1.05, 9.0), (3162, 1.01, 9.0), (10_000, 1.5, 9.0)]
    assert above_start(points) == [(9500, 0.5)]
    assert exponent(above_start(points)) is None
