from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.event_log import EventLog, stable_order
from feature_store.point_in_time import Requests, first_not_before, history_slices
from tests.references.point_in_time import history_before

SMALL = st.integers(0, 4)


@given(st.lists(st.tuples(SMALL, SMALL), max_size=40))
def test_stable_order_is_that_of_sorted(rows: list[tuple[int, int]]) -> None:
    keys = [np.array([r[i] for r in rows], dtype=np.int64) for i in range(2)]
    assert stable_order(*keys).tolist() == sorted(range(len(rows)), key=lambda i: rows[i])


@given(st.lists(st.tuples(st.integers(-(2**62), 2**62), st.integers(-(2**62), 2**62)), min_size=2, max_size=20))
def test_stable_order_of_keys_too_wide_to_pack(rows: list[tuple[int, int]]) -> None:
    keys = [np.array([r[i] for r in rows], dtype=np.int64) for i in range(2)]
    assert stable_order(*keys).tolist() == sorted(range(len(rows)), key=lambda i: rows[i])


@given(st.lists(st.tuples(SMALL, st.integers(0, 2**55)), min_size=2, max_size=300))
def test_stable_order_of_keys_that_leave_no_room_for_the_position(rows: list[tuple[int, int]]) -> None:
    keys = [np.array([r[i] for r in rows], dtype=np.int64) for i in range(2)]
    assert stable_order(*keys).tolist() == sorted(range(len(rows)), key=lambda i: rows[i])


@given(
    st.lists(st.tuples(SMALL, st.integers(0, 6), st.sampled_from("ab")), max_size=40),
    st.lists(st.tuples(SMALL, st.integers(0, 7)), max_size=20),
    st.sampled_from([None, ("a",), ("a", "b")]),
)
def test_slices_agree_with_a_double_loop(
    events: list[tuple[int, int, str]], requests: list[tuple[int, int]], types: tuple[str, ...] | None
) -> None:
    user, time = (np.array([e[i] for e in events], dtype=np.int64) for i in range(2))
    row = np.arange(len(events), dtype=np.int64)
    log = EventLog.build(row, user, row, time, num_users=5)
    if types is not None:
        log = log.filtered(np.array([events[i][2] in types for i in log.source_row], dtype=bool))
    start, end = history_slices(log, *(np.array([r[i] for r in requests], dtype=np.int64) for i in range(2)))
    rows = [{"user": u, "time": t, "type": kind, "row": row} for row, (u, t, kind) in enumerate(events)]
    for (wanted_user, wanted_time), a, b in zip(requests, start, end, strict=True):
        assert tuple(log.source_row[a:b]) == history_before(rows, wanted_user, wanted_time, types, ["row"])
        assert a == log.user_offsets[wanted_user]


def test_an_event_at_the_same_microsecond_is_left_out() -> None:
    log = EventLog.build(*(np.array(c) for c in ([0, 1], [0, 0], [7, 8], [99, 100])), num_users=1)
    _, end = history_slices(log, np.array([0, 0, 0]), np.array([99, 100, 101]))
    assert end.tolist() == [0, 1, 2]


def test_search_in_many_slices_agrees_with_searchsorted_of_each() -> None:
    rng = np.random.default_rng(3)
    times = rng.integers(0, 50, 500)
    edges = np.sort(rng.integers(0, 501, 40))
    start, stop = edges[:-1], edges[1:]
    for a, b in zip(start, stop, strict=True):
        times[a:b].sort()
    wanted = rng.integers(-1, 52, len(start))
    expected = [a + np.searchsorted(times[a:b], t) for a, b, t in zip(start, stop, wanted, strict=True)]
    assert first_not_before(times, start, stop, wanted).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), SMALL), max_size=30))
def test_requests_hold_their_rows_at_their_earliest_time(rows: list[tuple[int, int, int]]) -> None:
    present = sorted({r[0] for r in rows})
    request = np.array([present.index(r[0]) for r in rows], dtype=np.int64)
    time, item = (np.array([r[i] for r in rows], dtype=np.int64) for i in (1, 2))
    grouped = Requests.group(time, request, item, pl.Series(request))
    assert grouped.num_requests == len(present)
    assert sorted(grouped.order.tolist()) == list(range(len(rows)))
    keys = []
    for number, (start, count) in enumerate(zip(grouped.row_start, grouped.row_counts, strict=True)):
        members = grouped.order[start : start + count]
        (key,) = set(request[members].tolist())
        assert sorted(members) == [i for i in range(len(rows)) if request[i] == key]
        assert members.tolist() == sorted(members, key=lambda i: (item[i], i))
        assert grouped.time[number] == min(time[members])
        keys.append((grouped.time[number], key))
    assert keys == sorted(keys)


def test_impressions_without_a_request_are_sorted_by_time_then_user_then_item() -> None:
    time, user, item = np.array([5, 3, 3, 3]), np.array([0, 2, 1, 2]), np.array([0, 1, 9, 0])
    grouped = Requests.group(time, user, item)
    assert grouped.order.tolist() == [2, 3, 1, 0]
    assert grouped.row_start.tolist() == [0, 1, 2, 3]
    assert grouped.time.tolist() == [3, 3, 3, 5]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pl.Series([1, 1, 2, 3]), [False, True]),
        (pl.Series(["a", "b", "c", "c"]), [True, False]),
        (pl.Series([None, None, 1, None], dtype=pl.Int64), [False, True]),
        (pl.Series([float("nan"), float("nan"), 1.0, 1.0]), [False, False]),
        (pl.Series([[1], [1], [1, 2], [2, 1]]), [False, True]),
    ],
)
def test_requests_that_differ_in_a_column(column: pl.Series, expected: list[bool]) -> None:
    requests = Requests.group(np.zeros(4, int), np.zeros(4, int), np.arange(4), pl.Series([0, 0, 1, 1]))
    assert requests.where_differing(column).tolist() == expected
    apart = Requests.group(np.zeros(4, int), np.zeros(4, int), np.arange(4), pl.Series(["b", "a", "b", "a"]))
    assert apart.where_differing(column.gather([2, 0, 3, 1])).tolist() == expected


def test_without_drops_whole_requests() -> None:
    requests = Requests.group(np.array([3, 1, 1, 2]), np.zeros(4, int), np.arange(4), pl.Series([0, 1, 1, 2]))
    kept = requests.without(np.array([False, True, False]))
    assert kept.order.tolist() == [1, 2, 0]
    assert kept.row_start.tolist() == [0, 2]
    assert kept.time.tolist() == [1, 3]
