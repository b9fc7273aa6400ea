from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config import validate
from recsys.derived import AsOf, Count, Mean, Ratio, Recency, Sum, Windowed, duration_us
from recsys.windows import GroupedRows, LatestVersion, Timeline, WindowedValue, in_units, ratio
from tests.references import derived as reference

SECOND = 1_000_000
KINDS: dict[str, type[Windowed]] = {"count": Count, "sum": Sum, "mean": Mean, "recency": Recency}
GROUPS = 4

row = st.fixed_dictionaries(
    {
        "key": st.integers(0, GROUPS - 1),
        "time": st.integers(0, 12).map(lambda s: s * SECOND),
        "created": st.integers(0, 14).map(lambda s: s * SECOND),
        "x": st.none() | st.sampled_from([0.1, 0.25, -3.7, 1e-7, 12.0, 1.0]),
        "is_counted": st.booleans(),
    }
)
rows_of_a_log = st.lists(row, max_size=40)
asked = st.lists(
    st.tuples(st.integers(-1, GROUPS), st.integers(-1, 15).map(lambda s: s * SECOND)), min_size=1, max_size=12
)


@st.composite
def specs(draw: st.DrawFn) -> Windowed:
    kind = draw(st.sampled_from(sorted(KINDS)))
    delay = draw(st.sampled_from([None, 1, 3]))
    window = draw(st.none() | st.integers((delay or 0) + 1, 9))
    mapping: dict[str, Any] = {"name": "v", "by": ("user",), "window": None if window is None else f"{window}s"}
    mapping["known_after"] = None if delay is None else f"{delay}s"
    if kind in ("sum", "mean"):
        mapping |= {"value": "x", "decimals": draw(st.integers(0, 7))}
    if kind == "mean":
        mapping |= {"prior": draw(st.sampled_from([0.0, 0.25])), "prior_count": draw(st.sampled_from([0.0, 0.5, 8.0]))}
    return KINDS[kind](**mapping)


def arrays(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    found = {name: np.array([r[name] for r in rows], np.int64) for name in ("key", "time", "created")}
    found["x"] = np.array([np.nan if r["x"] is None else r["x"] for r in rows], np.float64)
    found["is_counted"] = np.array([r["is_counted"] for r in rows], np.bool_)
    return found


def built(spec: Windowed, rows: list[dict[str, Any]], *, has_created: bool) -> WindowedValue:
    columns = arrays(rows)
    grouped = GroupedRows(columns["key"], columns["time"], columns["created"] if has_created else None)
    if not isinstance(spec, Sum | Mean):
        return WindowedValue.build(spec, grouped, columns["is_counted"])
    is_counted = columns["is_counted"] & ~np.isnan(columns["x"])
    units = in_units(np.where(is_counted, columns["x"], np.nan), spec.decimals)
    return WindowedValue.build(spec, grouped, is_counted, units)


def by_loops(spec: Windowed, rows: list[dict[str, Any]], key: int, time: int, *, has_created: bool) -> float | None:
    if key < 0:
        return None
    mine = [
        r if has_created else {n: v for n, v in r.items() if n != "created"}
        for r in rows
        if r["key"] == key and r["is_counted"]
    ]
    window = None if spec.window is None else duration_us(spec.window)
    delay = 0 if spec.known_after is None else duration_us(spec.known_after)
    if isinstance(spec, Recency):
        return reference.recency(mine, time, window=window, known_after=delay)
    if isinstance(spec, Sum):
        return reference.total(mine, time, window=window, known_after=delay, decimals=spec.decimals)
    if isinstance(spec, Mean):
        return reference.mean(
            mine,
            time,
            window=window,
            known_after=delay,
            decimals=spec.decimals,
            prior=spec.prior,
            prior_count=spec.prior_count,
        )
    return reference.count(mine, time, window=window, known_after=delay)


def look_up(value: WindowedValue, wanted: list[tuple[int, int]]) -> np.ndarray:
    return value.at(*(np.array([w[i] for w in wanted], np.int64) for i in range(2)))


@settings(deadline=None, max_examples=150)
@given(specs(), rows_of_a_log, asked, st.booleans())
def test_windows_agree_with_a_double_loop(
    spec: Windowed, rows: list[dict[str, Any]], wanted: list[tuple[int, int]], has_created: bool
) -> None:
    found = look_up(built(spec, rows, has_created=has_created), wanted)
    expected = [by_loops(spec, rows, key, time, has_created=has_created) for key, time in wanted]
    np.testing.assert_allclose(found, np.array(expected, np.float64), rtol=1e-14, atol=0)


@settings(deadline=None)
@given(specs(), rows_of_a_log, asked, st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_no_bit(
    spec: Windowed, rows: list[dict[str, Any]], wanted: list[tuple[int, int]], has_created: bool, random: Any
) -> None:
    mixed = list(rows)
    random.shuffle(mixed)
    first, second = (look_up(built(spec, r, has_created=has_created), wanted) for r in (rows, mixed))
    assert first.tobytes() == second.tobytes()


@settings(deadline=None)
@given(specs(), rows_of_a_log, rows_of_a_log, asked)
def test_what_happens_or_is_told_at_the_time_or_later_changes_no_bit(
    spec: Windowed, rows: list[dict[str, Any]], others: list[dict[str, Any]], wanted: list[tuple[int, int]]
) -> None:
    for key, time in wanted:
        past = [r for r in rows if max(r["time"], r["created"]) < time]
        future = [r | {"created": max(r["created"], time)} for r in others]
        found = look_up(built(spec, past + future, has_created=True), [(key, time)])
        assert found.tobytes() == look_up(built(spec, past, has_created=True), [(key, time)]).tobytes()


def test_edges_of_a_window() -> None:
    rows = GroupedRows(np.zeros(3, np.int64), np.array([10, 20, 30]) * SECOND)
    value = WindowedValue.build(Count(name="v", by=("user",), window="10s"), rows, np.ones(3, np.bool_))
    times = np.array([10, 11, 20, 21, 30, 31, 40, 41]) * SECOND
    # A row at the time itself does not count; one exactly as old as the window does.
    assert value.at(np.zeros(8, np.int64), times).tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    assert value.at(np.zeros(2, np.int64), np.array([20 * SECOND + 1, 20 * SECOND])).tolist() == [1, 1]


def test_a_rate_by_hand() -> None:
    rows = GroupedRows(np.zeros(4, np.int64), np.arange(4) * SECOND)
    clicked = np.array([1.0, 0.0, 0.0, 1.0])
    spec = Mean(name="v", by=("item",), value="is_click", prior=0.1, prior_count=10.0)
    value = WindowedValue.build(spec, rows, np.ones(4, np.bool_), in_units(clicked, spec.decimals))
    time = np.array([0, 1, 4]) * SECOND
    assert value.at(np.zeros(3, np.int64), time).tolist() == [0.1, (1 + 1) / 11, (2 + 1) / 14]


def test_a_sum_is_exact_where_floats_are_not() -> None:
    values = np.array([1e9, 0.1, 0.1, 0.1])
    rows = GroupedRows(np.zeros(4, np.int64), np.arange(4) * SECOND)
    spec = Sum(name="v", by=("user",), value="x", window="3s")
    value = WindowedValue.build(spec, rows, np.ones(4, np.bool_), in_units(values, spec.decimals))
    assert value.at(np.array([0]), np.array([4 * SECOND])).tolist() == [0.3]
    assert np.cumsum(values)[3] - np.cumsum(values)[0] != 0.3


def test_a_ratio_by_hand() -> None:
    spec = Ratio(name="v", numerator="a", denominator="b", add_to_numerator=1.0, add_to_denominator=4.0)
    found = ratio(spec, np.array([0.0, 3.0, np.nan]), np.array([0.0, 8.0, 2.0]))
    np.testing.assert_array_equal(found, [1 / 4, 4 / 12, np.nan])
    plain = Ratio(name="v", numerator="a", denominator="b")
    np.testing.assert_array_equal(ratio(plain, np.array([2.0, 2.0]), np.array([0.0, 4.0])), [np.nan, 0.5])


@settings(deadline=None, max_examples=150)
@given(rows_of_a_log, asked, st.sampled_from([None, 1, 4]), st.booleans(), st.randoms(use_true_random=False))
def test_versions_agree_with_a_double_loop_in_any_order(
    rows: list[dict[str, Any]],
    wanted: list[tuple[int, int]],
    max_age: int | None,
    has_created: bool,
    random: Any,
) -> None:
    limit = None if max_age is None else max_age * SECOND
    random.shuffle(rows)
    columns = arrays(rows)
    rank = np.unique(np.where(np.isnan(columns["x"]), -np.inf, columns["x"]), return_inverse=True)[1]
    created = columns["created"] if has_created else None
    latest = LatestVersion.build(columns["key"], columns["time"], created, rank)
    keys, times = (np.array([w[i] for w in wanted], np.int64) for i in range(2))
    found = latest.at(keys, times, limit)
    for (key, time), version in zip(wanted, found.tolist(), strict=True):
        mine = [r if has_created else {n: v for n, v in r.items() if n != "created"} for r in rows if r["key"] == key]
        expected = reference.as_of(mine, time, max_age=limit)
        assert (version < 0) == (expected is None)
        if expected is not None:
            assert {n: rows[version][n] for n in ("key", "time", "x")} == {n: expected[n] for n in ("key", "time", "x")}


@pytest.mark.parametrize("moments", [[0, 1, 2, 3, 4, 5], [0, 1, 2**40, 2**61, 2**62]])
@given(data=st.data())
def test_a_timeline_of_any_keys_and_times_finds_what_a_loop_finds(moments: list[int], data: st.DataObject) -> None:
    keys = [0, 1, 7, 10**15]
    rows = data.draw(st.lists(st.tuples(st.sampled_from(keys), st.sampled_from(moments)), max_size=20))
    key, time = (np.array([r[i] for r in rows], np.int64) for i in range(2))
    timeline, order = Timeline.build(key, time)
    wanted = np.array([-1, *keys, 2, 10**15 + 1])
    for moment in [-1, *moments, moments[-1] + 1]:
        group = timeline.groups(wanted)
        last = timeline.before(group, np.full(len(wanted), moment))
        for k, first, end in zip(wanted.tolist(), timeline.starts(group).tolist(), last.tolist(), strict=True):
            before = [i for i, (other, at) in enumerate(rows) if other == k and at < moment]
            assert sorted(order[first:end].tolist()) == before


@pytest.mark.parametrize(
    ("values", "message"), [([1.0, np.inf], "must be finite"), ([1e13, 1e13], "must add up to less than 4.6e\\+12")]
)
def test_values_that_cannot_be_summed_exactly_are_refused(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_units(np.array(values), 6)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Count, {"window": "7 days"}, "window"),
        (Count, {"window": "37000d"}, "at most 100 years"),
        (Count, {"window": "1h", "known_after": "1h"}, "window must be longer than known_after"),
        (Count, {"source": "impressions", "event_types": ["click"]}, "select impressions by where"),
        (Count, {"by": []}, "by"),
        (AsOf, {"max_age": "0d"}, "max_age"),
    ],
)
def test_what_can_never_hold_is_refused(kind: Any, changes: dict[str, Any], message: str) -> None:
    plain = {"name": "v", "view": "prices"} if kind is AsOf else {"name": "v", "by": ["user"]}
    with pytest.raises(ValueError, match=message):
        validate(kind, plain | changes, source="test")
