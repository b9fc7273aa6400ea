"""Encoders of tables that need no file: agreement with definitions in exact arithmetic."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.encoding.tables import CalendarTable, HashTable, LogTable, QuantileTable
from recsys.errors import EncodingError
from recsys.schema import LogBuckets
from tests.references import encoding as reference

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.none() | INT64, max_size=30), st.integers(1, 2**40), st.integers(0, 2**63 - 1))
def test_hash_ids_of_integers(values: list[int | None], num_buckets: int, seed: int) -> None:
    want = [1 if v is None else 2 + reference.hash_key(v, seed) % num_buckets for v in values]
    assert HashTable(num_buckets, seed).encode(pa.array(values, pa.int64()), where="x").tolist() == want


@given(st.lists(st.none() | st.text(max_size=9), max_size=30), st.integers(1, 2**40), st.sampled_from([1, 100]))
def test_hash_ids_of_text(values: list[str | None], num_buckets: int, copies: int) -> None:
    values = values * copies
    want = [1 if v is None else 2 + reference.hash_key(v, 5) % num_buckets for v in values]
    table = HashTable(num_buckets, 5)
    assert table.encode(pa.array(values, pa.string()), where="x").tolist() == want
    assert table.encode(pa.array(values, pa.string()).dictionary_encode(), where="x").tolist() == want
    assert table.size == num_buckets + 2


def test_hash_id_written_out() -> None:
    # splitmix64(0) = 0xE220A8397B1DCDAF, published with the generator
    assert HashTable(1000, 0).encode(pa.array([0]), where="x").tolist() == [2 + 0xE220A8397B1DCDAF % 1000]


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), unique=True, max_size=8),
    st.lists(st.none() | st.floats() | st.sampled_from([0.0, -0.0]), max_size=30),
)
def test_quantile_ids(boundaries: list[float], values: list[float | None]) -> None:
    boundaries.sort()
    asked = values + boundaries
    want = [reference.quantile_id(boundaries, v) for v in asked]
    table = QuantileTable(np.array(boundaries))
    assert table.encode(pa.array(asked, pa.float64()), where="x").tolist() == want
    assert table.size == len(boundaries) + 3


@pytest.mark.parametrize("base", [2.0, 10.0, 5.0, 1.5, np.e])
def test_log_ids_at_powers_of_the_base(base: float) -> None:
    values = [float(np.nextafter(base**k - 1, side)) for k in range(1, 20) for side in (-np.inf, base**k - 1, np.inf)]
    asked = [*values, None, float("nan"), -5.0, 0.0, float("inf"), float("-inf"), 1e308]
    table = LogTable(LogBuckets(base=base, num_buckets=16))
    got = table.encode(pa.array(asked), where="x").tolist()
    if base == int(base):  # other bases have powers that float64 rounds
        want = [reference.log_id(None if v is None else float(np.float64(1) + max(v, 0)) - 1, base, 16) for v in asked]
        assert got == want
    assert got[-7:] == [1, 1, 2, 2, 17, 2, 17]
    assert table.size == 18


@pytest.mark.parametrize(
    ("value", "bucket"), [(0, 0), (1, 1), (2, 1), (3, 2), (6, 2), (7, 3), (2**31 - 2, 30), (2**31 - 1, 31), (2**60, 31)]
)
def test_log_ids_by_hand(value: int, bucket: int) -> None:
    assert LogTable(LogBuckets()).encode(pa.array([value]), where="x").tolist() == [2 + bucket]


@given(
    st.lists(st.none() | st.integers(-60_000_000_000_000_000, 200_000_000_000_000_000), max_size=20),
    st.integers(-1440, 1440),
)
def test_calendar_ids(times: list[int | None], offset: int) -> None:
    want = [reference.calendar_ids(t, offset) for t in times]
    column = pa.array(times, pa.int64())
    for form in (column, column.cast(pa.timestamp("us")), column.cast(pa.timestamp("us", "UTC"))):
        assert CalendarTable.hour_of_day(offset).encode(form, where="x").tolist() == [h for h, _ in want]
        assert CalendarTable.day_of_week(offset).encode(form, where="x").tolist() == [d for _, d in want]


def test_calendar_ids_by_hand() -> None:
    thursday, minute = 2 + 3, 60_000_000
    times = pa.array([0, -1, 30 * minute])
    assert CalendarTable.day_of_week(0).encode(times, where="x").tolist() == [thursday, thursday - 1, thursday]
    assert CalendarTable.hour_of_day(0).encode(times, where="x").tolist() == [2, 25, 2]
    assert CalendarTable.hour_of_day(90).encode(times, where="x").tolist() == [3, 3, 4]
    assert (CalendarTable.hour_of_day(0).size, CalendarTable.day_of_week(0).size) == (26, 9)


@pytest.mark.parametrize("offset", [-1440, 1440])
def test_calendar_at_the_ends_of_int64(offset: int) -> None:
    for time in (-(2**63), 2**63 - 1):
        hour = (time + offset * 60_000_000) // 3_600_000_000 % 24
        assert CalendarTable.hour_of_day(offset).encode(pa.array([time]), where="x").tolist() == [2 + hour]


def test_errors_name_the_feature() -> None:
    for table in (QuantileTable(np.array([1.0])), LogTable(LogBuckets()), CalendarTable.hour_of_day(0)):
        with pytest.raises(EncodingError, match="feature 'x' must hold"):
            table.encode(pa.array(["a"]), where="feature 'x'")


@given(st.lists(st.floats(-1e6, 1e6), unique=True, min_size=1, max_size=8), st.lists(st.floats(-2e6, 2e6), min_size=1))
def test_a_decoded_interval_holds_the_number(boundaries: list[float], values: list[float]) -> None:
    boundaries = sorted(round(b, 3) for b in boundaries)
    boundaries = sorted(set(boundaries))
    tables = (QuantileTable(np.array(boundaries)), LogTable(LogBuckets(base=2.0, num_buckets=8)))
    for table in tables:
        words = table.decode(table.encode(pa.array(values), where="x"))
        for value, interval in zip(values, words, strict=True):
            low, high = (float(end) for end in interval[1:-1].split(", "))
            # Ends are shown to six digits.
            near = 1e-5 * abs(value) + 1e-3
            assert low - near <= max(value, 0.0 if isinstance(table, LogTable) else -np.inf) <= high + near


def test_decoded_ids_by_hand() -> None:
    asked = pa.array([None, 0.0, 1.0, 2.0, 2.5, 1e9])
    quantiles, logs = QuantileTable(np.array([0.5, 2.0])), LogTable(LogBuckets(base=2.0, num_buckets=3))
    assert quantiles.decode(quantiles.encode(asked, where="x")) == [
        None, "(-inf, 0.5]", "(0.5, 2]", "(0.5, 2]", "(2, inf]", "(2, inf]"
    ]  # fmt: skip
    assert logs.decode(logs.encode(asked, where="x")) == [None, "[0, 1)", "[1, 3)", "[1, 3)", "[1, 3)", "[3, inf)"]
    # 1970-01-01T05:00 was a Thursday, and three days later a Sunday.
    times = pa.array([None, 5 * 3_600_000_000, 77 * 3_600_000_000])
    for table, want in (
        (CalendarTable.hour_of_day(0), [None, 5, 5]),
        (CalendarTable.day_of_week(0), [None, 3, 6]),
    ):
        assert table.decode(table.encode(times, where="x")) == want
    # splitmix64(0), as above
    hashed = HashTable(1000, 0)
    assert hashed.decode(hashed.encode(pa.array([0, None]), where="x")) == [f"bucket {0xE220A8397B1DCDAF % 1000}", None]
