from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.drift import MISSING, REST, histogram, js_distance, psi, psi_noise
from tests.references import drift as slow

COUNTS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), min_size=1, max_size=30)


@given(COUNTS)
def test_both_measures_equal_their_formulas(pairs: list[tuple[int, int]]) -> None:
    reference, current = np.array([p for p, _ in pairs]), np.array([q for _, q in pairs])
    assert psi(reference, current) == pytest.approx(slow.psi(*zip(*pairs, strict=True)), abs=1e-12)
    assert js_distance(reference, current) == pytest.approx(slow.js_distance(*zip(*pairs, strict=True)), abs=1e-7)
    assert psi(reference, current) >= -1e-12
    assert 0.0 <= js_distance(reference, current) <= 1.0
    assert psi(reference, current) == pytest.approx(psi(current, reference), abs=1e-12)
    assert js_distance(reference, reference) == pytest.approx(0.0, abs=1e-7)


def test_values_by_hand() -> None:
    """Shares 3/4 and 1/4 against 1/4 and 3/4, the half rows included."""
    reference, current = np.array([7, 2]), np.array([2, 7])
    assert psi(reference, current) == pytest.approx(2 * (0.5 * math.log(3)))
    expected = 0.75 * math.log2(0.75 / 0.5) + 0.25 * math.log2(0.25 / 0.5)
    assert js_distance(reference, current) == pytest.approx(math.sqrt(expected))


def test_noise_is_what_two_samples_of_one_distribution_have_on_average() -> None:
    rng = np.random.default_rng(0)
    shares = np.full(20, 1 / 20)
    samples = [(rng.multinomial(2_000, shares), rng.multinomial(500, shares)) for _ in range(400)]
    measured = np.mean([psi(a, b) for a, b in samples])
    assert measured == pytest.approx(19 * (1 / 2_000 + 1 / 500), rel=0.1)
    assert psi_noise(*samples[0]) == pytest.approx(19 * (1 / 2_000 + 1 / 500))


def test_numbers_are_counted_between_quantiles_of_the_reference() -> None:
    reference = pl.Series(np.arange(100.0))
    current = pl.Series([*np.arange(0.0, 50.0), None, float("nan")])
    counted = histogram(reference, current)
    assert counted.labels[-1] == MISSING
    assert counted.reference.tolist() == [5] * 20 + [0]
    assert counted.current.tolist() == [5] * 10 + [0] * 10 + [2]
    assert counted.unseen is None


def test_values_and_lists() -> None:
    counted = histogram(pl.Series(["a", "a", "b", None]), pl.Series(["a", "c", "c", "d"]))
    by_label = {n: (r, c) for n, r, c in zip(counted.labels, counted.reference, counted.current, strict=True)}
    assert by_label == {"a": (2, 1), "b": (1, 0), REST: (0, 3), MISSING: (1, 0)}
    assert counted.unseen == 0.75
    bags = histogram(pl.Series([[1, 2], [], None]), pl.Series([[2, 2, 3]]))
    assert dict(zip(bags.labels, bags.current.tolist(), strict=True)) == {"1": 0, "2": 2, REST: 1, MISSING: 0}


@pytest.mark.parametrize("dtype", [pl.Float64, pl.Int64, pl.String])
def test_a_column_without_values(dtype: type[pl.DataType]) -> None:
    empty = pl.Series([None, None], dtype=dtype)
    counted = histogram(empty, empty)
    assert psi(counted.reference, counted.current) == 0.0
    assert counted.reference.sum() == 2
