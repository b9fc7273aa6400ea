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
