"""Logloss, NE, ECE and reliability tables agree with their definitions, to the last bins and at the extremes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import DataError
from recsys.metrics import (
    ece,
    logloss,
    logloss_from_logits,
    normalised_entropy,
    reliability,
    reliability_by_quantile,
)
from tests.references import metrics as reference

ROWS = st.lists(st.tuples(st.integers(0, 1), st.floats(0.001, 0.999)), min_size=1, max_size=40)


def columns(rows: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return labels, probabilities


@given(ROWS)
def test_logloss_is_its_definition(rows: list[tuple[int, float]]) -> None:
    labels, p = columns(rows)
    assert logloss(labels, p) == pytest.approx(reference.logloss(labels, p), abs=1e-12)
    assert logloss_from_logits(labels, np.log(p) - np.log1p(-p)) == pytest.approx(
        reference.logloss(labels, p), abs=1e-9
    )


def test_logloss_by_hand() -> None:
    assert logloss([1, 0], [0.25, 0.5]) == (math.log(4) + math.log(2)) / 2
    assert logloss_from_logits([1, 0], [0.0, 0.0]) == pytest.approx(math.log(2), abs=1e-15)


def test_extreme_logits_stay_finite_and_exact() -> None:
    assert logloss_from_logits([1, 0], [1e4, -1e4]) == 0.0
    assert logloss_from_logits([0, 1], [1e4, -1e4]) == 1e4
    assert logloss_from_logits(np.array([0, 1], np.float32), np.array([1e4, -1e4], np.float32)) == 1e4


def test_a_certain_mistake_costs_infinity_and_a_certain_truth_nothing() -> None:
    assert logloss([1, 0], [1.0, 0.0]) == 0.0
    assert logloss([1, 0], [0.0, 0.0]) == math.inf


def test_missing_labels_take_no_part() -> None:
    assert logloss([1, math.nan, 0], [0.5, 0.99, 0.5]) == logloss([1, 0], [0.5, 0.5])
    assert ece([1, math.nan], [0.5, 0.0]) == ece([1], [0.5])
    assert math.isnan(logloss([math.nan], [0.5]))
    assert math.isnan(ece([], []))


def test_ne_of_the_base_rate_is_one() -> None:
    labels = np.array([1, 0, 0, 0, 0])
    assert normalised_entropy(labels, np.full(5, 0.2)) == pytest.approx(1.0, abs=1e-12)
    expected = -math.log(0.6) / -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert normalised_entropy(labels, [0.6, 0.4, 0.4, 0.4, 0.4]) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(normalised_entropy([1, 1], [0.5, 0.5]))


@given(ROWS, st.integers(1, 20))
def test_ece_is_its_definition(rows: list[tuple[int, float]], num_bins: int) -> None:
    labels, p = columns(rows)
    # Halves of 256ths are exact: bins by comparison and bins by multiplication then agree at every edge.
    p, num_bins = np.round(p * 256) / 256, 2 ** (num_bins % 5)
    assert ece(labels, p, num_bins) == pytest.approx(reference.ece(labels, p, num_bins), abs=1e-12)


def test_bins_hold_their_lower_edge_and_the_last_holds_one() -> None:
    table = reliability([0, 1, 1, 1], [0.0, 0.5, 0.75, 1.0], num_bins=2)
    assert table.count.tolist() == [1, 3]
    assert table.lower.tolist() == [0.0, 0.5]
    assert table.upper.tolist() == [0.5, 1.0]
    assert table.mean_probability.tolist() == [0.0, 0.75]
    assert table.mean_label.tolist() == [0.0, 1.0]


def test_empty_bins_are_not_numbers_and_cost_nothing() -> None:
    table = reliability([1], [0.95], num_bins=10)
    assert table.count.tolist() == [0] * 9 + [1]
    assert np.isnan(table.mean_label[:9]).all()
    assert ece([1], [0.95], num_bins=10) == pytest.approx(0.05, abs=1e-12)


@given(ROWS, st.integers(1, 10))
def test_quantile_bins_hold_every_row_once_and_split_no_ties(rows: list[tuple[int, float]], num_bins: int) -> None:
    labels, p = columns(rows)
    p = p.round(1)
    table = reliability_by_quantile(labels, p, num_bins)
    assert table.count.sum() == len(p)
    assert len(table.count) <= num_bins
    assert (table.count > 0).all()
    assert (table.count * table.mean_probability).sum() == pytest.approx(p.sum(), abs=1e-9)
    assert (table.count * table.mean_label).sum() == pytest.approx(labels.sum(), abs=1e-9)
    for value in np.unique(p):
        inside = (table.lower <= value) & (value < table.upper)
        inside[-1] = table.lower[-1] <= value <= table.upper[-1]
        assert inside.sum() == 1


def test_quantile_bins_of_distinct_values_are_even() -> None:
    p = np.random.default_rng(0).permutation(np.linspace(0.01, 0.02, 300))
    assert reliability_by_quantile(np.zeros(300), p, 15).count.tolist() == [20] * 15


@pytest.mark.parametrize("metric", [logloss, ece, normalised_entropy, reliability, reliability_by_quantile])
def test_what_is_not_a_probability_is_refused(metric: object) -> None:
    with pytest.raises(DataError, match=r"probabilities must be in \[0, 1\], got 1.5 at position 1"):
        metric([1, 0], [0.5, 1.5])  # type: ignore[operator]


def test_the_number_of_bins_is_checked() -> None:
    with pytest.raises(DataError, match="num_bins must be at least 1, got 0"):
        ece([1], [0.5], num_bins=0)
