"""Types of columns: equal values of any Arrow type encode alike, and what cannot be encoded is refused by name."""

from __future__ import annotations

import datetime as dt
import itertools
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.encoding import Ragged
from recsys.encoding.columns import (
    IntKeys,
    TextKeys,
    as_bags,
    as_keys,
    as_numbers,
    as_times,
    as_vectors,
    flatten_lists,
    offsets_of,
)
from recsys.errors import EncodingError
from tests.references import encoding as reference


def integers_of(column: pa.Array | pa.ChunkedArray) -> list[int | None]:
    keys = as_keys(column, where="feature 'x'")
    assert isinstance(keys, IntKeys)
    valid = np.ones(len(keys.values), bool) if keys.valid is None else keys.valid
    return [int(v) if ok else None for v, ok in zip(keys.values, valid, strict=True)]


def texts_of(column: pa.Array | pa.ChunkedArray) -> list[str | None]:
    keys = as_keys(column, where="feature 'x'")
    assert isinstance(keys, TextKeys)
    values = keys.values.to_pylist()
    return values if keys.codes is None else [None if c < 0 else values[c] for c in keys.codes.tolist()]


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(),
        pa.float16(), pa.float32(), pa.float64(), pa.decimal128(30, 3), pa.decimal256(60, 0),
        pa.dictionary(pa.int8(), pa.int64()),
    ],
    ids=str,
)  # fmt: skip
def test_whole_numbers_of_any_type(kind: pa.DataType) -> None:
    column = pa.array([1, None, 0, 100, 1], pa.int64())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    assert integers_of(column) == [1, None, 0, 100, 1]
    assert integers_of(column.slice(1, 3)) == [None, 0, 100]
    assert integers_of(pa.chunked_array([column, column.slice(3)])) == [1, None, 0, 100, 1, 100, 1]
    assert integers_of(column.slice(0, 0)) == []


def test_booleans_are_zero_and_one() -> None:
    assert integers_of(pa.array([True, None, False])) == [1, None, 0]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()], ids=str)
def test_not_a_number_is_missing(kind: pa.DataType) -> None:
    assert integers_of(pa.array([1.0, float("nan"), None, -3.0], kind)) == [1, None, None, -3]


@pytest.mark.parametrize("copies", [1, 1000])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_text_of_any_type(kind: pa.DataType, copies: int) -> None:
    texts = ["é", None, "", "日本", "é"] * copies
    column = pa.array(texts, kind)
    assert texts_of(column) == texts
    assert texts_of(column.slice(1)) == texts[1:]
    assert texts_of(pa.chunked_array([column, column.slice(2)])) == texts + texts[2:]
    coded = pa.array(texts).dictionary_encode()
    assert texts_of(coded) == texts
    assert texts_of(pa.chunked_array([coded, pa.array(["z", "é"]).dictionary_encode()])) == [*texts, "z", "é"]


@pytest.mark.parametrize("value", [2**53 - 1, -(2**53) + 1])
def test_float64_within_its_exact_range(value: int) -> None:
    assert integers_of(pa.array([float(value)])) == [value]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([0.5]), r"must hold whole numbers or text, got a double column with fractions"),
        (pa.array([2.0**53]), r"must hold whole numbers below 9007199254740992, the exact range of its type double"),
        (pa.array([-(2.0**24)], pa.float32()), r"below 16777216, the exact range of its type float"),
        (pa.array([float("inf")]), r"below 9007199254740992"),
        (pa.array([2**63], pa.uint64()), r"must hold integers below 2\^63, got larger ones in a uint64 column"),
        (pa.array([Decimal("1.5")]), r"must hold whole numbers below 2\^63, got decimals that are not"),
        (
            pa.array([dt.datetime(2020, 1, 1, tzinfo=dt.UTC)]),
            r"must hold integers or text, got a column of type timestamp",
        ),
        (pa.array([dt.date(2020, 1, 1)]), r"got a column of type date32"),
        (
            pa.array([[1]]),
            r"got a column of type list<item: int64>[\s\S]*Hint: declare the feature as multi_categorical",
        ),
        (pa.array([b"x"]), r"got a column of type binary"),
        (pa.array([{"a": 1}]), r"got a column of type struct"),
        (pa.array([dt.timedelta(1)]), r"got a column of type duration"),
        (pa.array([b"x"]).dictionary_encode(), r"got a column of type binary"),
    ],
    ids=lambda p: str(p.type) if isinstance(p, pa.Array) else "",
)
def test_keys_refuse(column: pa.Array, message: str) -> None:
    with pytest.raises(EncodingError, match=rf"^feature 'x' {message}|^feature 'x' [\s\S]*{message}") as caught:
        as_keys(column, where="feature 'x'")
    assert caught.value.hint


def test_values_under_nulls_are_not_looked_at() -> None:
    largest = pa.Array.from_buffers(
        pa.uint64(), 2, [pa.py_buffer(b"\x01"), pa.py_buffer(np.array([5, 2**64 - 1], np.uint64).tobytes())]
    )
    assert integers_of(largest) == [5, None]
    fraction = pa.Array.from_buffers(
        pa.float64(), 2, [pa.py_buffer(b"\x01"), pa.py_buffer(np.array([5, 0.5]).tobytes())]
    )
    assert integers_of(fraction) == [5, None]


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.decimal128(30, 3), pa.dictionary(pa.int8(), pa.int64())],
    ids=str,
)
def test_numbers_of_any_type(kind: pa.DataType) -> None:
    column = pa.array([1, None, 2], pa.int64())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    np.testing.assert_array_equal(as_numbers(column, where="x"), [1.0, np.nan, 2.0])
    np.testing.assert_array_equal(as_numbers(column.slice(1), where="x"), [np.nan, 2.0])


def test_missing_numbers() -> None:
    np.testing.assert_array_equal(as_numbers(pa.array([True, None, False]), where="x"), [1.0, np.nan, 0.0])
    np.testing.assert_array_equal(as_numbers(pa.nulls(2), where="x"), [np.nan, np.nan])


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["1"]),
        pa.array([[1]]),
        pa.array([dt.date(2020, 1, 1)]),
        pa.array([b"x"]),
        pa.array(["a"]).dictionary_encode(),
    ],
    ids=lambda c: str(c.type),
)
def test_numbers_refuse(column: pa.Array) -> None:
    with pytest.raises(EncodingError, match=r"feature 'x' must hold numbers, got a column of type") as caught:
        as_numbers(column, where="feature 'x'")
    assert caught.value.hint


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.large_list(pa.int64()), pa.list_(pa.float64(), 2)], ids=str
)
def test_vectors(kind: pa.DataType) -> None:
    column = pa.array([[1, 2], None, [3, None]], kind)
    want = np.array([[1, 2], [np.nan, np.nan], [3, np.nan]])
    np.testing.assert_array_equal(as_vectors(column, 2, where="x"), want)
    np.testing.assert_array_equal(as_vectors(column.slice(1), 2, where="x"), want[1:])
    np.testing.assert_array_equal(as_vectors(column.slice(2), 2, where="x"), want[2:])
    assert as_vectors(column.slice(0, 0), 2, where="x").shape == (0, 2)


def test_a_number_is_a_vector_of_one() -> None:
    np.testing.assert_array_equal(as_vectors(pa.array([1, None]), 1, where="x"), [[1], [np.nan]])
    np.testing.assert_array_equal(as_vectors(pa.array([[1], None]), 1, where="x"), [[1], [np.nan]])
    assert as_vectors(pa.nulls(3), 4, where="x").shape == (3, 4)


def test_vectors_refuse() -> None:
    with pytest.raises(EncodingError, match=r"feature 'x' must hold lists of 2 numbers, got one of 3"):
        as_vectors(pa.array([[1, 2], [1, 2, 3]]), 2, where="feature 'x'")
    with pytest.raises(EncodingError, match=r"feature 'x' must hold lists of 2 numbers, got a column of type int64"):
        as_vectors(pa.array([1]), 2, where="feature 'x'")
    with pytest.raises(EncodingError, match=r"feature 'x' must hold numbers, got a column of type string"):
        as_vectors(pa.array([["a"]]), 1, where="feature 'x'")


MOMENT = dt.datetime(1969, 12, 31, 23, 59, 58, 500_001, tzinfo=dt.UTC)  # before the epoch: rounding down shows


@pytest.mark.parametrize(
    ("column", "want"),
    [
        (pa.array([MOMENT, None], pa.timestamp("us", "UTC")), -1_499_999),
        (pa.array([MOMENT, None], pa.timestamp("us", "Asia/Tokyo")), -1_499_999),
        (pa.array([-1_499_999, None]).cast(pa.timestamp("us")), -1_499_999),
        (pa.array([-1_499_999_001, None]).cast(pa.timestamp("ns")), -1_500_000),
        (pa.array([-1499, None]).cast(pa.timestamp("ms")), -1_499_000),
        (pa.array([-2, None]).cast(pa.timestamp("s")), -2_000_000),
        (pa.array([dt.date(1970, 1, 2), None]), 86_400_000_000),
        (pa.array([dt.date(1970, 1, 2), None]).cast(pa.date64()), 86_400_000_000),
        (pa.array([-1_499_999, None]), -1_499_999),
        (pa.array([-1_499_999.0, None]), -1_499_999),
        (pa.array([MOMENT, None], pa.timestamp("us", "UTC")).dictionary_encode(), -1_499_999),
    ],
    ids=lambda p: str(p.type) if isinstance(p, pa.Array) else "",
)
def test_times(column: pa.Array, want: int) -> None:
    times = as_times(column, where="x")
    assert times.values[0] == want
    assert times.valid is not None
    assert times.valid.tolist() == [True, False]


def test_times_refuse() -> None:
    with pytest.raises(EncodingError, match=r"feature 'x' must hold times, got a column of type string"):
        as_times(pa.array(["2020-01-01"]), where="feature 'x'")
    with pytest.raises(EncodingError, match=r"feature 'x' must hold times within 292,000 years of 1970"):
        as_times(pa.array([2**62]).cast(pa.timestamp("s")), where="feature 'x'")
    assert as_times(pa.nulls(2), where="x").valid is not None


LISTS: list[Any] = [[1, 2], None, [], [3, None, 4], [5]]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_view(pa.int64()), pa.large_list_view(pa.int64())],
    ids=str,
)
def test_lists_of_any_kind(kind: pa.DataType) -> None:
    column = pa.array(LISTS, kind)
    for start in range(6):
        for length in range(6 - start):
            part = column.slice(start, length)
            elements, offsets = flatten_lists(part)
            got = [elements.to_pylist()[a:b] for a, b in itertools.pairwise(offsets)]
            assert got == [v or [] for v in LISTS[start : start + length]]


def bags_of(column: pa.Array | pa.ChunkedArray, **options: Any) -> list[list[Any]]:
    bags = as_bags(column, where="feature 'x'", **({"separator": None, "max_values": None} | options))
    elements = bags.elements.to_pylist()
    lists = [elements[a:b] for a, b in zip(bags.offsets[:-1], bags.offsets[1:], strict=True)]
    return lists if bags.codes is None else [lists[c] for c in bags.codes]


@pytest.mark.parametrize("max_values", [None, 1, 2, 3])
def test_bags_of_lists(max_values: int | None) -> None:
    want = [(v or [])[:max_values] for v in LISTS]
    assert bags_of(pa.array(LISTS), max_values=max_values) == want
    assert bags_of(pa.chunked_array([LISTS[:2], LISTS[2:]]), max_values=max_values) == want
    assert bags_of(pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2)), max_values=1) == [[1], [3]]
    assert bags_of(pa.nulls(2), max_values=max_values) == [[], []]
    assert bags_of(pa.array([[], []]), max_values=max_values) == [[], []]


@given(
    st.lists(st.none() | st.text("ab|,é", max_size=8), max_size=12),
    st.sampled_from(["|", ",", "||", "ab"]),
    st.none() | st.integers(1, 3),
    st.sampled_from([1, 200]),
)
def test_bags_of_text(texts: list[str | None], separator: str, max_values: int | None, copies: int) -> None:
    texts = texts * copies
    want = [reference.split_bag(t, separator, max_values) for t in texts]
    column = pa.array(texts, pa.string())
    for form in (column, column.cast(pa.large_string()), column.dictionary_encode()):
        assert bags_of(form, separator=separator, max_values=max_values) == want


def test_chunks_with_dictionaries_of_their_own() -> None:
    lists = pa.DictionaryArray.from_arrays(pa.array([1, None, 0]), pa.array([["a"], ["b", "c"]]))
    coded = pa.array([["b"], ["a", "b"]], pa.list_(pa.dictionary(pa.int32(), pa.string())))
    other = pa.array([["z"]], coded.type)
    assert bags_of(pa.chunked_array([lists, lists.slice(2)])) == [["b", "c"], [], ["a"], ["a"]]
    assert bags_of(pa.chunked_array([coded, other])) == [["b"], ["a", "b"], ["z"]]
    assert integers_of(pa.chunked_array([pa.array([5, 7]).dictionary_encode(), pa.array([7]).dictionary_encode()])) == [
        5,
        7,
        7,
    ]
    empty = pa.chunked_array([], pa.dictionary(pa.int32(), pa.int64()))
    assert integers_of(empty) == []


def test_bags_refuse() -> None:
    with pytest.raises(
        EncodingError, match=r"feature 'x' must hold lists, got a column of type string[\s\S]*separator"
    ):
        bags_of(pa.array(["a"]))
    with pytest.raises(EncodingError, match=r"feature 'x' must hold lists or text, got a column of type int64"):
        bags_of(pa.array([1]), separator="|")


@given(st.lists(st.lists(st.integers(), max_size=4), min_size=1, max_size=8), st.data())
def test_ragged_take(bags: list[list[int]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(bags) - 1), max_size=20))
    ragged = Ragged(
        np.array([hash(v) for b in bags for v in b], np.int64), offsets_of(np.array([len(b) for b in bags]))
    )
    taken = ragged.take(np.array(rows, np.int64))
    got = [taken.values[a:b].tolist() for a, b in zip(taken.offsets[:-1], taken.offsets[1:], strict=True)]
    assert got == [[hash(v) for v in bags[r]] for r in rows]
