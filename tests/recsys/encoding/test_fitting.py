"""Fitting: agreement with exact definitions, whatever the order and the chunks that values come in."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config import validate
from recsys.encoding import Encoder, EncoderFitter, Ragged, fitting
from recsys.encoding.fitting import DistinctCounts, Moments, QuantileSketch
from recsys.errors import EncodingError, SchemaError
from recsys.schema import Schema
from tests.references import encoding as reference

INT64 = st.integers(-(2**63), 2**63 - 1)


def schema_of(*features: dict[str, Any], tables: dict[str, Any] | None = None) -> Schema:
    """A schema of item features."""
    return validate(
        Schema,
        {
            "name": "test",
            "views": {
                "impressions": {"user": "u", "item": "i", "time": "t"},
                "items": {"path": "items.parquet", "key": "i"},
            },
            "tables": tables or {},
            "features": [{"scope": "item", **f} for f in features],
            "tasks": [{"name": "click", "label": "click"}],
        },
        source="test",
    )


CATEGORY = {"kind": "categorical", "name": "x"}
DENSE = {"kind": "dense", "name": "x"}


def fit(schema: Schema, column: pa.Array, weights: Any = None) -> Encoder:
    """An encoder fitted on one column of feature x."""
    fitter = EncoderFitter(schema)
    fitter.update("x", column, weights)
    return fitter.finish()


def weighted(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[tuple[Any, int]]]:
    """Lists of values with weights."""
    return st.lists(st.tuples(st.none() | values, st.integers(0, 3)), max_size=40)


@given(
    st.one_of(
        weighted(st.integers(-5, 5)),
        weighted(INT64),
        weighted(st.sampled_from(["a", "b", "é", "日", "\U0001f600", "", "ab"])),
    ),
    st.integers(1, 3),
    st.none() | st.integers(1, 4),
    st.sampled_from([1, 60]),
    st.data(),
)
def test_vocabulary_agrees_with_the_definition(
    rows: list[tuple[Any, int]], min_count: int, max_size: int | None, copies: int, data: st.DataObject
) -> None:
    rows = rows * copies
    values, weights = [v for v, _ in rows], [w for _, w in rows]
    kind = pa.string() if any(isinstance(v, str) for v in values) else pa.int64()
    schema = schema_of(CATEGORY | {"encoder": {"kind": "vocabulary", "min_count": min_count, "max_size": max_size}})
    known = reference.vocabulary(values, weights, min_count=min_count, max_size=max_size)

    encoder = fit(schema, pa.array(values, kind), weights)
    assert encoder.table_sizes == {"x": 2 + len(known)}
    assert encoder.encode("x", pa.array(values, kind)).tolist() == [reference.vocabulary_id(known, v) for v in values]

    order = data.draw(st.permutations(range(len(rows)))) if len(rows) < 50 else range(len(rows))[::-1]
    cut = data.draw(st.integers(0, len(rows)))
    fitter = EncoderFitter(schema)
    for part in (order[:cut], order[cut:]):
        column = pa.array([values[i] for i in part], kind)
        fitter.update("x", column.dictionary_encode() if part is order[:cut] else column, [weights[i] for i in part])
    assert fitter.finish().fingerprint == encoder.fingerprint


def test_vocabulary_by_hand() -> None:
    encoder = fit(schema_of(CATEGORY), pa.array(["b", "a", "c", "c", None, "a", "b"]))
    assert encoder.encode("x", pa.array(["a", "b", "c", "d", None])).tolist() == [2, 3, 4, 1, 1]
    encoder = fit(schema_of(CATEGORY), pa.array([9, 5, 7]), weights=np.array([0, 1, 4]))
    assert encoder.encode("x", pa.array([7, 5, 9])).tolist() == [2, 3, 1]


def test_many_chunks_are_merged_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_COMPACT_EVERY", 100)
    counts = DistinctCounts()
    for _ in range(200):
        counts.add(pa.array(range(50)), np.ones(50, np.int64))
        assert counts._num_pending <= 150
    keys, sums = counts.result()
    assert sorted(keys.to_pylist()) == list(range(50))
    assert sums.tolist() == [200] * 50


def test_large_ids_stay_apart() -> None:
    values = [2**24, 2**24 + 1, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), -(2**53) - 1]
    encoder = fit(schema_of(CATEGORY), pa.array(values))
    ids = encoder.encode("x", pa.array(values)).tolist()
    assert sorted(ids) == list(range(2, 9))
    assert [values[i] for i in np.argsort(ids)] == sorted(values)


def test_features_of_one_table_share_values() -> None:
    schema = schema_of(
        {"kind": "categorical", "name": "x", "table": "t"},
        {"kind": "multi_categorical", "name": "y", "table": "t", "max_values": 2},
        tables={"t": {"encoder": {"kind": "vocabulary"}}},
    )
    fitter = EncoderFitter(schema)
    fitter.update("x", pa.array([1, 2]))
    fitter.update("y", pa.array([[3, 3, 9], None, [2]]), weights=[1, 5, 1])
    encoder = fitter.finish()
    assert encoder.table_sizes == {"t": 5}
    assert encoder.encode("x", pa.array([2, 3, 1, 9])).tolist() == [2, 3, 4, 1]  # 2 and 3 twice each, 1 once


def test_a_table_holds_one_type() -> None:
    schema = schema_of({"kind": "categorical", "name": "x"}, {"kind": "categorical", "name": "y", "table": "x"})
    fitter = EncoderFitter(schema)
    fitter.update("y", pa.nulls(3))
    fitter.update("y", pa.array([1]))
    with pytest.raises(
        EncodingError, match="feature 'x' must hold integers, as the earlier values of feature 'y', got text"
    ):
        fitter.update("x", pa.array(["a"]))


@pytest.mark.parametrize("copies", [1, 1000])
def test_bags_of_text_count_with_their_rows(copies: int) -> None:
    schema = schema_of({"kind": "multi_categorical", "name": "x", "separator": "|"})
    texts, weights = ["a||b", None, "b|c|c", "", "d"], [1, 5, 2, 5, 0]
    encoder = fit(schema, pa.array(texts * copies), weights * copies)
    known = ["c", "b", "a"]  # 4, 3 and 1 times the copies; d is not seen
    bags = encoder.encode("x", pa.array(texts * copies))
    assert isinstance(bags, Ragged)
    one = [reference.vocabulary_id(known, p) for t in texts for p in reference.split_bag(t, "|", None)]
    assert bags.values.tolist() == one * copies
    assert np.diff(bags.offsets).tolist() == [2, 0, 3, 0, 1] * copies


@given(
    weighted(st.sampled_from([-1.5, 0.0, -0.0, 1.0, 2.0, 1e300, math.inf, math.nan]) | st.floats()), st.integers(2, 7)
)
def test_quantiles_agree_with_the_definition(rows: list[tuple[float | None, int]], num_buckets: int) -> None:
    values = [v for v, _ in rows]
    schema = schema_of(CATEGORY | {"encoder": {"kind": "quantile", "num_buckets": num_buckets}})
    encoder = fit(schema, pa.array(values, pa.float64()), [w for _, w in rows])
    seen = [(v, w) for v, w in rows if v is not None]
    boundaries = reference.quantile_boundaries([v for v, _ in seen], [w for _, w in seen], num_buckets)
    assert encoder.table_sizes == {"x": len(boundaries) + 3}
    want = [reference.quantile_id(boundaries, v) for v in values]
    assert encoder.encode("x", pa.array(values, pa.float64())).tolist() == want


def test_quantiles_by_hand() -> None:
    schema = schema_of(CATEGORY | {"encoder": {"kind": "quantile", "num_buckets": 4}})
    encoder = fit(schema, pa.array(range(1, 9)))
    assert encoder.encode("x", pa.array(range(10))).tolist() == [2, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    encoder = fit(schema, pa.array([0, 0, 0, 0, 0, 0, 3, 5]))  # three quartiles fall on 0
    assert encoder.table_sizes == {"x": 4}
    assert encoder.encode("x", pa.array([0, 1, 3, 5, -1])).tolist() == [2, 3, 3, 3, 2]
    assert fit(schema, pa.array([7, 7])).table_sizes == {"x": 3}
    assert fit(schema, pa.nulls(0)).table_sizes == {"x": 3}


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e12])
def test_a_sketch_of_many_numbers_errs_by_one_cell(scale: float) -> None:
    generator = np.random.default_rng(1)
    numbers = (
        np.concatenate([generator.normal(size=60_000), np.zeros(20_000), generator.exponential(size=20_000)]) * scale
    )
    if scale == 1e12:
        numbers += 1.7e15  # microseconds of some months
    sketch, exact = QuantileSketch(max_cells=8192), QuantileSketch()
    sketch.add(numbers, None)
    exact.add(numbers, None)
    assert exact._dropped_bits == 0 < sketch._dropped_bits
    assert 4096 <= len(sketch._cells) <= 8192
    got, want = sketch.boundaries(20), np.sort(numbers)[np.arange(1, 20) * len(numbers) // 20 - 1]
    np.testing.assert_array_equal(exact.boundaries(20), np.unique(want))
    cells = [fitting._ordered(numbers) >> sketch._dropped_bits for numbers in (got, np.unique(want))]
    np.testing.assert_array_equal(*cells)
    top_bits = 52 - sketch._dropped_bits
    wrong = np.abs(got - np.unique(want))
    assert np.all(wrong <= np.maximum(np.abs(got) * 2.0**-top_bits, 1e-307))

    shuffled = QuantileSketch(max_cells=8192)
    for part in np.array_split(generator.permutation(numbers), 7):
        shuffled.add(part, None)
    np.testing.assert_array_equal(shuffled.boundaries(20), got)


def test_a_sketch_counts_weights() -> None:
    generator = np.random.default_rng(2)
    numbers, weights = generator.normal(size=20_000), generator.integers(0, 4, 20_000)
    one, repeated = QuantileSketch(8192), QuantileSketch(8192)
    one.add(numbers, weights)
    repeated.add(np.repeat(numbers, weights), None)
    np.testing.assert_array_equal(one.boundaries(50), repeated.boundaries(50))


@given(weighted(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, 3.0])), st.booleans())
def test_standardise_agrees_with_exact_arithmetic(rows: list[tuple[float | None, int]], log1p: bool) -> None:
    values, weights = [v for v, _ in rows], [w for _, w in rows]
    squash = (lambda v: math.log1p(max(v, 0.0))) if log1p else (lambda v: v)
    given_values = [squash(v) if v is not None and math.isfinite(v) else None for v in values]
    mean, std = reference.mean_and_std(given_values, weights)
    if std < 1e-9 * max(abs(v) for v in [*(v for v in given_values if v is not None), 1e-3]):
        return  # the values agree to nine digits: the result is their rounding
    schema = schema_of(DENSE | {"transform": {"kind": "standardise", "log1p": log1p, "clip": 3.0}})
    got = fit(schema, pa.array(values, pa.float64()), weights).encode("x", pa.array(values, pa.float64()))
    want = [0.0 if v is None else float(np.clip((v - mean) / std, -3.0, 3.0)) for v in given_values]
    assert got.dtype == np.float32
    assert got.shape == (len(rows), 1)
    np.testing.assert_allclose(got[:, 0], want, rtol=1e-6, atol=1e-6)


def test_standardise_by_hand() -> None:
    encoder = fit(schema_of(DENSE), pa.array([2.0, None, 6.0, 100.0]), [3, 7, 1, 0])
    # mean (3*2 + 6) / 4 = 3, variance (3*1 + 9) / 4 = 3
    want = np.array([[(2 - 3) / math.sqrt(3)], [0], [10.0]], np.float32)
    np.testing.assert_allclose(encoder.encode("x", pa.array([2.0, None, 100.0])), want, rtol=1e-7)
    constant = fit(schema_of(DENSE), pa.array([0.1] * 10))
    np.testing.assert_allclose(constant.encode("x", pa.array([0.1, 1.1])), [[0.0], [1.0]], rtol=1e-7)


def test_moments_do_not_cancel() -> None:
    numbers = 1.7e15 + np.tile([0.0, 1.0], 50_000)[:, None]  # sums of squares would lose everything
    moments = Moments(1)
    for part in np.array_split(numbers, 9):
        moments.add(part, None)
    assert moments.state == {"mean": [1.7e15 + 0.5], "std": [0.5]}


@pytest.mark.parametrize("size", [1e308, 1e200, 1e-200, 5e-324])
def test_moments_of_extreme_numbers(size: float) -> None:
    moments = Moments(1)
    moments.add(np.array([[size], [-size], [size], [-size]]), None)
    moments.add(np.array([[size], [-size]]), np.array([2**40 + 3, 2**40 + 3]))
    assert moments.state == {"mean": [0.0], "std": [pytest.approx(size, rel=1e-9, abs=0)]}


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_chunks_does_not_show(seed: int) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.normal([0.0, 5.0, 1e6, 0.1], [1.0, 3.0, 1e-1, 0.0], (3000, 4)) * 10.0 ** generator.integers(
        -6, 6
    )
    vectors[generator.random((3000, 4)) < 0.1] = np.nan
    states = []
    for parts in (1, 2, 7, 100):
        moments = Moments(4)
        for part in np.array_split(generator.permutation(vectors), parts):
            moments.add(part, None)
        states.append(moments.state)
    assert all(state == states[0] for state in states)
    for component in range(4):
        mean, std = reference.mean_and_std(vectors[:, component].tolist(), [1] * 3000)
        assert states[0]["mean"][component] == mean
        assert states[0]["std"][component] == pytest.approx(std, rel=2e-9)
    assert states[0]["std"][3] == 1.0


def test_vectors_have_moments_of_their_own() -> None:
    schema = schema_of(DENSE | {"dim": 2})
    column = pa.array([[1.0, 10.0], [3.0, None], None, [5.0, 30.0]])
    root = math.sqrt(8 / 3)
    want = [[-2 / root, -1], [0, 0], [0, 0], [2 / root, 1]]
    np.testing.assert_allclose(fit(schema, column).encode("x", column), want, rtol=1e-7)


def test_keep() -> None:
    schema = schema_of(DENSE | {"transform": {"kind": "keep"}})
    values = pa.array([1.5, None, math.nan, math.inf, -math.inf, -1e300, 2.0**24 + 2])
    got = fit(schema, values).encode("x", values)
    largest = float(np.finfo(np.float32).max)
    np.testing.assert_array_equal(got[:, 0], np.array([1.5, 0, 0, 0, 0, -largest, 2**24 + 2], np.float32))


def test_rows_without_weight_leave_no_trace() -> None:
    features = [
        {"kind": "categorical", "name": "a"},
        {"kind": "categorical", "name": "b", "encoder": {"kind": "quantile", "num_buckets": 3}},
        {"kind": "dense", "name": "c"},
        {"kind": "multi_categorical", "name": "d"},
    ]
    columns = {
        "a": pa.array([4, 5, 6]),
        "b": pa.array([1, 2, 9]),
        "c": pa.array([1.0, 2.0, 7.0]),
        "d": pa.array([[1], [2], [3]]),
    }
    with_rest, without = EncoderFitter(schema_of(*features)), EncoderFitter(schema_of(*features))
    for name, column in columns.items():
        with_rest.update(name, column, [1, 2, 0])
        without.update(name, pa.concat_arrays([column.slice(0, 1), column.slice(1, 1), column.slice(1, 1)]))
    assert with_rest.finish().fingerprint == without.finish().fingerprint


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], r"weights of feature 'x' must have shape \(3,\), got \(2,\)"),
        ([1, 2, -1], "weights of feature 'x' must be whole numbers >= 0"),
        ([1, 2, 0.5], "weights of feature 'x' must be whole numbers >= 0"),
        ([1, 2, math.nan], "weights of feature 'x' must be whole numbers >= 0"),
    ],
)
def test_weights_are_checked(weights: list[float], message: str) -> None:
    with pytest.raises(EncodingError, match=message):
        EncoderFitter(schema_of(CATEGORY)).update("x", pa.array([1, 2, 3]), np.array(weights))


@pytest.mark.parametrize("encoder", [{"kind": "log"}, {"kind": "hour_of_day"}, {"kind": "day_of_week"}])
def test_columns_are_checked_even_where_nothing_is_fitted(encoder: dict[str, Any]) -> None:
    with pytest.raises(EncodingError, match="feature 'x' must hold"):
        EncoderFitter(schema_of(CATEGORY | {"encoder": encoder})).update("x", pa.array(["a"]))


def test_unknown_features_are_refused() -> None:
    with pytest.raises(SchemaError, match=r"feature 'xx' must be declared[\s\S]*did you mean 'x'"):
        EncoderFitter(schema_of(CATEGORY)).update("xx", pa.array([1]))


def test_fitting_may_go_on_after_finish() -> None:
    fitter = EncoderFitter(schema_of(CATEGORY))
    fitter.update("x", pa.array([1]))
    assert fitter.finish().table_sizes == {"x": 3}
    fitter.update("x", pa.array([2, 2]))
    assert fitter.finish().encode("x", pa.array([2, 1])).tolist() == [2, 3]


@settings(max_examples=10)
@given(st.integers(0, 2**32))
def test_chunks_of_every_kind_give_one_fingerprint(seed: int) -> None:
    generator = np.random.default_rng(seed)
    schema = schema_of(
        {"kind": "categorical", "name": "a"},
        {"kind": "multi_categorical", "name": "b", "separator": ","},
        {"kind": "categorical", "name": "c", "encoder": {"kind": "quantile", "num_buckets": 5}},
        {"kind": "dense", "name": "d", "transform": {"kind": "standardise", "log1p": True}},
        {"kind": "categorical", "name": "e", "encoder": {"kind": "hash", "num_buckets": 50}},
    )
    rows = 300
    columns = {
        "a": pa.array(generator.integers(-9, 9, rows)),
        "b": pa.array([",".join(map(str, generator.integers(0, 9, generator.integers(0, 4)))) for _ in range(rows)]),
        "c": pa.array(generator.normal(size=rows)),
        "d": pa.array(generator.exponential(size=rows)),
        "e": pa.array(generator.integers(0, 99, rows)),
    }
    fingerprints = set()
    for cuts in ([], [100], sorted(generator.integers(0, rows, 5).tolist())):
        fitter = EncoderFitter(schema)
        for begin, end in itertools.pairwise([0, *cuts, rows]):
            for name, column in columns.items():
                fitter.update(name, column.slice(begin, end - begin))
        fingerprints.add(fitter.finish().fingerprint)
    assert len(fingerprints) == 1
