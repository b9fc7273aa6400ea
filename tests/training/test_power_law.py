"""The saturating power law is found again where it was planted, with intervals that hold it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recsys.errors import DataError
from training.power_law import fit_power_law

X = np.repeat(np.logspace(3, 6, 7), 3)


def planted(noise: float, seed: int = 0) -> np.ndarray:
    return np.asarray(0.78 - 1.5 * X**-0.4 + noise * np.random.default_rng(seed).standard_normal(len(X)))


def test_an_exact_curve_is_found_exactly() -> None:
    law = fit_power_law(X, planted(0.0), num_resamples=10)
    assert math.isclose(law.limit.value, 0.78, rel_tol=1e-6)
    assert math.isclose(law.scale.value, 1.5, rel_tol=1e-4)
    assert math.isclose(law.exponent.value, 0.4, rel_tol=1e-4)
    assert law.r2 > 1 - 1e-9
    assert (law.num_points, round(law.decades, 9)) == (21, 3.0)
    assert math.isclose(law.predict(1e4), 0.78 - 1.5 * 1e4**-0.4, rel_tol=1e-5)


def test_the_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = np.zeros(2)
    for seed in range(20):
        law = fit_power_law(X, planted(0.002, seed), num_resamples=60, seed=seed)
        held += law.limit.low <= 0.78 <= law.limit.high, law.exponent.low <= 0.4 <= law.exponent.high
    assert (held >= 16).all()  # 95 % of 20 is 19; 15 or fewer has a chance below one in a thousand


def test_what_it_takes_to_reach_a_target() -> None:
    law = fit_power_law(X, planted(0.0), num_resamples=10)
    needed = law.needed(0.77)
    assert needed is not None
    assert math.isclose(needed, (1.5 / 0.01) ** 2.5, rel_tol=1e-3)
    assert law.needed(0.79) is None


def test_the_seed_decides_the_intervals() -> None:
    laws = [fit_power_law(X, planted(0.002), num_resamples=20, seed=seed) for seed in (1, 1, 2)]
    assert laws[0] == laws[1]
    assert laws[0].limit != laws[2].limit


def test_a_metric_that_falls_has_the_same_law_mirrored() -> None:
    rising, falling = planted(0.002), 1.0 - planted(0.002)
    up = fit_power_law(X, rising, bound=1.0, num_resamples=20)
    down = fit_power_law(X, falling, bound=0.0, is_falling=True, num_resamples=20)
    assert math.isclose(down.limit.value, 1.0 - up.limit.value, rel_tol=1e-9)
    assert math.isclose(down.limit.low, 1.0 - up.limit.high, rel_tol=1e-9)
    assert math.isclose(down.scale.value, up.scale.value, rel_tol=1e-6)
    assert math.isclose(down.predict(1e4), down.limit.value + down.scale.value * 1e4**-down.exponent.value)
    needed, mirrored = up.needed(0.77), down.needed(0.23)
    assert needed is not None
    assert mirrored is not None
    assert math.isclose(mirrored, needed, rel_tol=1e-6)
    assert down.needed(down.limit.value - 0.01) is None
    assert down.not_identified is None


FIVE = np.array([0.01, 0.03, 0.1, 0.3, 1.0])


@pytest.mark.parametrize(
    ("y", "reason"),
    [
        ([0.5504, 0.615, 0.662, 0.719, 0.7579], "A ends at its bound 1"),  # an unbounded fit has A = 1.07, R2 = 0.997
        ([0.5, 0.6, 0.6, 0.6, 0.6], "gamma ends at its bound 8"),
        ([0.6, 0.6, 0.6, 0.6, 0.6], "c ends at 0"),
        ([0.7, 0.65, 0.62, 0.61, 0.6], "c ends at 0"),
    ],
)
def test_points_that_do_not_tell_a_law_are_not_given_one(y: list[float], reason: str) -> None:
    law = fit_power_law(FIVE, np.array(y), bound=1.0, num_resamples=20)
    assert law.not_identified is not None
    assert law.not_identified.startswith(reason)
    assert law.limit.high <= 1.0
    assert law.needed(0.99) is None
    mirrored = fit_power_law(FIVE, 1.0 - np.array(y), bound=0.0, is_falling=True, num_resamples=20)
    assert mirrored.not_identified is not None
    assert mirrored.not_identified[:5] == reason[:5]
    assert mirrored.limit.low >= 0.0


def test_without_a_bound_a_line_over_log_x_ends_at_the_bound_of_the_exponent() -> None:
    law = fit_power_law(FIVE, 0.7 + 0.1 * np.log10(FIVE), num_resamples=20)
    assert law.not_identified == "gamma ends at its bound 0.001: no levelling off is seen"


def test_a_limit_at_its_bound_leaves_the_least_squares_of_the_other_two() -> None:
    y = np.array([0.5504, 0.615, 0.662, 0.719, 0.7579])
    law = fit_power_law(FIVE, y, bound=1.0, num_resamples=20)
    # With A = 1 given, a finer search in gamma: c by the normal equation.
    powers = FIVE ** -np.linspace(0.05, 0.5, 20_001)[:, None]
    scales = (powers * (1 - y)).sum(1) / (powers**2).sum(1)
    misfit = ((y - 1 + scales[:, None] * powers) ** 2).sum(1)
    best = misfit.argmin()
    assert math.isclose(law.exponent.value, 0.05 + 0.45 * best / 20_000, rel_tol=1e-3)
    assert math.isclose(law.scale.value, scales[best], rel_tol=1e-3)
    assert 0 <= law.r2 - (1 - misfit[best] / ((y - y.mean()) ** 2).sum()) < 1e-6


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], "at least 4 different x, got 3"),
        ([1.0, 1.0, 2.0, 3.0], [0.1, 0.1, 0.2, 0.3], "at least 4 different x, got 3"),
        ([0.0, 1.0, 2.0, 3.0], [0.1, 0.1, 0.2, 0.3], "x above 0"),
        ([1.0, 2.0, 3.0, 4.0], [0.1, math.nan, 0.2, 0.3], "finite"),
    ],
)
def test_too_little_to_fit(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_power_law(np.array(x), np.array(y))
