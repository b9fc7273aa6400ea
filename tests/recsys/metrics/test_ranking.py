"""AUC, GAUC, NDCG and MRR agree with their definitions by pairs and lists."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import DataError
from recsys.metrics import auc, gauc, mrr, ndcg_at_k, rela_impr
from tests.references import metrics as reference

ROWS = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, math.nan]), st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=25
)


def columns(rows: list[tuple[float, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, scores, groups = (np.array(column) for column in zip(*rows, strict=True))
    return labels.astype(np.float64), scores.astype(np.float64), groups


@given(ROWS)
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[float, int, int]]) -> None:
    labels, scores, _ = columns(rows)
    assert auc(labels, scores) == pytest.approx(reference.auc(labels, scores), abs=1e-12, nan_ok=True)


@given(ROWS, st.lists(st.just(0.0) | st.floats(1e-3, 10), min_size=25, max_size=25))
def test_weighted_auc_is_the_weighted_share_of_ordered_pairs(
    rows: list[tuple[float, int, int]], weights: list[float]
) -> None:
    labels, scores, _ = columns(rows)
    w = np.array(weights[: len(rows)])
    assert auc(labels, scores, w) == pytest.approx(reference.auc(labels, scores, w), abs=1e-9, nan_ok=True)


@given(ROWS, st.integers(0, 10))
def test_a_whole_weight_is_a_row_repeated(rows: list[tuple[float, int, int]], first_weight: int) -> None:
    labels, scores, _ = columns(rows)
    weights = np.array([first_weight, *[1] * (len(rows) - 1)])
    repeated = auc(np.repeat(labels, weights), np.repeat(scores, weights))
    assert auc(labels, scores, weights) == pytest.approx(repeated, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_tiny_and_huge_weights_count(scale: float) -> None:
    assert auc([1, 0, 1, 0], [3, 2, 1, 0], [scale, scale, scale, 3 * scale]) == pytest.approx((4 + 3) / 8, rel=1e-15)


@given(ROWS)
def test_auc_sees_only_the_order_of_scores(rows: list[tuple[float, int, int]]) -> None:
    labels, scores, _ = columns(rows)
    np.testing.assert_equal(auc(labels, np.exp(3 * scores) - 7), auc(labels, scores))


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing_at_all(rows: list[tuple[float, int, int]], random: object) -> None:
    shuffled = rows.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for metric in (lambda y, s, g: auc(y, s), gauc, lambda y, s, g: ndcg_at_k(y, s, g, 3), mrr):
        assert repr(metric(*columns(rows))) == repr(metric(*columns(shuffled)))


@given(ROWS)
def test_gauc_is_the_mean_of_each_groups_auc(rows: list[tuple[float, int, int]]) -> None:
    labels, scores, groups = columns(rows)
    assert gauc(labels, scores, groups).value == pytest.approx(
        reference.gauc(labels, scores, groups), abs=1e-12, nan_ok=True
    )


@given(ROWS)
def test_gauc_of_one_group_is_auc(rows: list[tuple[float, int, int]]) -> None:
    labels, scores, groups = columns(rows)
    value = gauc(labels, scores, np.full_like(groups, 2)).value
    assert value == pytest.approx(auc(labels, scores), rel=1e-15, abs=0, nan_ok=True)


@given(ROWS)
def test_groups_may_be_text_or_large_whole_numbers(rows: list[tuple[float, int, int]]) -> None:
    labels, scores, groups = columns(rows)
    expected = repr(gauc(labels, scores, groups))
    assert repr(gauc(labels, scores, np.array([f"user {g}" for g in groups]))) == expected
    assert repr(gauc(labels, scores, groups.astype(np.int64) + 2**53)) == expected


def test_gauc_counts_impressions_and_leaves_out_users_of_one_class() -> None:
    labels = [1, 0, 0, 0, 1, 1, 0]
    scores = [0.9, 0.1, 0.2, 0.3, 0.1, 0.5, 0.9]
    users = [1, 1, 1, 1, 2, 3, 3]  # AUC of 1 is 1, of 2 is not defined, of 3 is 0
    result = gauc(labels, scores, users)
    assert result.value == (4 * 1.0 + 2 * 0.0) / (4 + 2)
    assert (result.num_groups_used, result.num_groups, result.num_rows_used) == (2, 3, 6)


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0], [], [math.nan, 1.0]])
def test_one_class_is_not_a_number(labels: list[float]) -> None:
    scores = np.arange(len(labels))
    assert math.isnan(auc(labels, scores))
    assert math.isnan(gauc(labels, scores, np.zeros(len(labels), int)).value)


def test_auc_keeps_tiny_differences_and_infinities() -> None:
    close = np.nextafter(1.0, 2.0)
    assert auc([1, 0], [close, 1.0]) == 1.0
    assert auc([1, 0, 1], [math.inf, 0.0, -math.inf]) == 0.5


def test_auc_tells_ids_of_float32_width_apart() -> None:
    assert auc([1, 0], np.array([2**24 + 1, 2**24])) == 1.0


@given(ROWS, st.integers(1, 6))
def test_ndcg_is_the_mean_over_all_orders_of_ties(rows: list[tuple[float, int, int]], k: int) -> None:
    labels, scores, groups = columns(rows[:7])
    values = []
    for group in set(groups.tolist()):
        members = [i for i in range(len(labels)) if groups[i] == group and not math.isnan(labels[i])]
        if not any(labels[i] == 1 for i in members):
            continue
        orders = [
            o for o in itertools.permutations(members) if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))
        ]
        values.append(np.mean([reference.ndcg_of_list([labels[i] for i in order], k) for order in orders]))
    expected = float(np.mean(values)) if values else math.nan
    assert ndcg_at_k(labels, scores, groups, k).value == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(ROWS)
def test_mrr_is_of_the_first_positive_only(rows: list[tuple[float, int, int]]) -> None:
    labels, scores, groups = columns(rows)
    present = ~np.isnan(labels)
    values = []
    for group in set(groups[present].tolist()):
        mine = present & (groups == group)
        values.append(reference.reciprocal_rank(labels[mine].tolist(), scores[mine].tolist()))
    values = [v for v in values if not math.isnan(v)]
    expected = float(np.mean(values)) if values else math.nan
    assert mrr(labels, scores, groups).value == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_constant_score_earns_no_rank() -> None:
    assert mrr([1, 0, 0, 0], [0.5] * 4, [1] * 4).value == 1 / 4


def test_relative_improvement_of_the_paper() -> None:
    assert rela_impr(0.8818, 0.8624) == pytest.approx(5.35, abs=0.005)
    assert math.isnan(rela_impr(0.6, 0.5))


@pytest.mark.parametrize(
    ("labels", "scores", "groups", "message"),
    [
        ([1, 2], [0.1, 0.2], [1, 1], "labels must be 0, 1 or NaN .* position 1"),
        ([1, 0], [0.1, math.nan], [1, 1], "scores must not be NaN, got NaN at position 1"),
        ([1, 0], [0.1], [1, 1], "scores must have one value a label"),
        ([1, 0], [0.1, 0.2], [1], "groups must have one value a label"),
        ([1, 0], [0.1, 0.2], [1.5, 2.5], "groups must be whole numbers or text"),
        ([[1, 0]], [[0.1, 0.2]], [[1, 1]], "labels must have one axis"),
        ([1, 0], ["a", "b"], [1, 1], "scores must be numbers"),
    ],
)
def test_broken_inputs_are_named(labels: list, scores: list, groups: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        gauc(labels, scores, groups)


def test_broken_weights_are_named() -> None:
    with pytest.raises(DataError, match="weights must be finite and at least 0"):
        auc([1, 0], [0.1, 0.2], [1.0, -1.0])


def test_a_million_rows_of_a_hundred_thousand_users() -> None:
    generator = np.random.default_rng(0)
    users = generator.integers(0, 100_000, 1_000_000)
    scores = generator.normal(size=len(users)).round(1)
    labels = generator.random(len(users)) < 0.2
    result = gauc(labels, scores, users)
    few = users < 200
    assert gauc(labels[few], scores[few], users[few]).value == pytest.approx(
        reference.gauc(labels[few].astype(float).tolist(), scores[few].tolist(), users[few].tolist()), abs=1e-12
    )
    assert result.num_groups == len(np.unique(users))
    assert result.value == pytest.approx(0.5, abs=0.005)  # scores are noise
