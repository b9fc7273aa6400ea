"""Times that cannot be meant end a build; times that hardly overlap are told."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from feature_store import sources
from feature_store.build import BuildSummary, build_training_set
from feature_store.time_spans import MAX_TYPES, YEAR, TimeColumn, TimeCounts, check_overlap, check_unit, span
from recsys.errors import QuarantineError, SourceError
from tests.feature_store.small_views import (
    DAY,
    SPLIT,
    START,
    config,
    make_schema,
    make_views,
    schema_mapping,
    write_views,
)

HERE = 1_600_000_000_000_000
"""A moment of 2020."""

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def column(unit: str | None = "us") -> TimeColumn:
    return TimeColumn("events.parquet", "views.events", "at", unit)  # type: ignore[arg-type]


def build(
    folder: Path, frames: dict[str, pl.DataFrame], units: dict[str, str], *, suffix: str = ".parquet"
) -> BuildSummary:
    views = schema_mapping()["views"]
    for view, unit in units.items():
        views[view]["time_unit"] = unit
    for view in views:
        views[view]["path"] = f"{view}{suffix}"
    write_views(folder / "views", frames, suffix=suffix)
    return build_training_set(make_schema(views=views), config(folder))


def counted_in(frames: dict[str, pl.DataFrame], unit: str, *views: str) -> dict[str, pl.DataFrame]:
    time = pl.col("time") * 1000 if unit == "ns" else pl.col("time") // (1_000_000 // PER_SECOND[unit])
    return {name: frame.with_columns(time) if name in views else frame for name, frame in frames.items()}


@pytest.mark.parametrize(("actual", "declared"), [("s", "ms"), ("ms", "us"), ("us", "ns"), ("s", "us"), ("s", "ns")])
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("view", ["events", "impressions"])
def test_too_fine_a_unit_is_an_error_that_names_the_likely_one(
    tmp_path: Path, view: str, suffix: str, actual: str, declared: str
) -> None:
    frames = counted_in(make_views(), actual, view)
    with pytest.raises(SourceError, match=rf"{view}\.{suffix[1:]}: views\.{view}\.time: column 'time'") as error:
        build(tmp_path, frames, {view: declared}, suffix=suffix)
    assert f"must hold times in {declared}, its declared unit" in error.value.message
    assert "are 1970-01-" in error.value.message
    assert f"; in {actual} they would be 2020-09-" in error.value.message
    assert error.value.hint == f"declare views.{view}.time_unit: {actual}"
    assert not (tmp_path / "training_set").exists()


@pytest.mark.parametrize(("actual", "declared"), [("ms", "s"), ("us", "ms"), ("ns", "us")])
def test_too_coarse_a_unit_ends_after_2200_and_is_told_with_the_unit(
    tmp_path: Path, actual: str, declared: str
) -> None:
    with pytest.raises(QuarantineError, match="time is not before 2200") as error:
        build(tmp_path, counted_in(make_views(), actual, "events"), {"events": declared})
    assert error.value.hint is not None
    assert error.value.hint.startswith("check views.events.time_unit")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_the_right_unit_gives_the_same_spans_and_no_notes(tmp_path: Path, unit: str) -> None:
    frames = make_views()
    summary = build(tmp_path, counted_in(frames, unit, "events"), {"events": unit})
    assert not [note for note in summary.notes if "time" in note or "last" in note]
    clicks = frames["events"].filter(type="click")["time"]
    first, last = (datetime.fromisoformat(t).timestamp() for t in summary.time_spans["events of type 'click'"])
    assert (first, last) == (clicks.min() // 10**6, clicks.max() // 10**6)  # type: ignore[operator]
    assert set(summary.time_spans) == {
        "impressions",
        *(f"events of type '{kind}'" for kind in ("click", "like", "share")),
    }


def test_spans_are_told_again_where_nothing_changed(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make_views())
    first, again = (build_training_set(make_schema(), config(tmp_path)) for _ in range(2))
    assert again.skipped
    assert first.time_spans == again.time_spans


def test_timestamps_that_were_made_in_the_wrong_unit_are_an_error(tmp_path: Path) -> None:
    frames = make_views()
    frames["events"] = frames["events"].with_columns((pl.col("time") // 1000).cast(pl.Datetime("us", "UTC")))
    with pytest.raises(SourceError, match="counted 1,000 times as long they would be 2020-09-") as error:
        build(tmp_path, frames, {})
    assert error.value.hint is not None
    assert "time_unit" not in error.value.hint


def test_a_few_odd_times_decide_nothing() -> None:
    right = np.full(10_000, HERE)
    right[:9] = HERE // 1000
    assert check_unit(right, column()) == []
    wrong = np.full(1000, HERE // 1000)
    wrong[:9] = HERE
    with pytest.raises(SourceError, match="in ms they would be"):
        check_unit(wrong, column())


@pytest.mark.parametrize("num_rows", [1, 100, 5_000, 200_000])
def test_rows_numbered_from_1970_are_a_note(num_rows: int) -> None:
    numbers = np.arange(num_rows, dtype=np.int64) * 1_000_000
    (note,) = check_unit(numbers, column())
    assert "before 1990" in note
    assert "order of the rows" in note


def test_nothing_coarser_than_seconds_is_proposed() -> None:
    (note,) = check_unit(np.full(10, HERE // 1000), column("s"))
    assert "before 1990" in note


def test_no_times_have_no_span() -> None:
    none = np.empty(0, dtype=np.int64)
    assert span(none) is None
    assert check_unit(none, column()) == []
    assert check_overlap(none, None, (HERE, HERE), column()) == ({}, [])


@pytest.mark.parametrize(("years", "fails"), [(10.1, True), (9.9, False)])
def test_events_long_before_every_impression_are_an_error(years: float, fails: bool) -> None:
    events = np.full(200, HERE - int(years * YEAR))
    events[0] = HERE  # one of 200 is no reason to believe the others
    if fails:
        with pytest.raises(SourceError, match=r"views\.events\.time: column 'at' \(integers in us, as declared\)"):
            check_overlap(events, None, (HERE, HERE + DAY), column())
    else:
        spans, _ = check_overlap(events, None, (HERE, HERE + DAY), column())
        assert spans["events"][1].startswith("2020-09-13")


@pytest.mark.parametrize("merged_at", [0, 10_000])
def test_counts_of_blocks_are_counts_of_all(merged_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_store.time_spans._MERGED_AT", merged_at)
    rng = np.random.default_rng(0)
    shown = (HERE, HERE + DAY)
    # Moments themselves, and their neighbours: a block may begin, end or lie wholly at any of them.
    edges = [HERE - 10 * YEAR, HERE + DAY, HERE // 1000, HERE // 10**6, 631_152_000, 4_102_444_800]
    times = pl.Series(np.concatenate([rng.choice(edges, 400) + rng.integers(-1, 2, 400), np.full(100, HERE)]))
    types = pl.Series(rng.choice(["click", "like", ""], 500)).replace("", None)
    counts, merged = TimeCounts(shown, is_typed=True), TimeCounts(shown, is_typed=True)
    for begin in range(0, 500, 25):
        part = slice(begin, begin + 25)
        counts.add(times[part], types[part])
        other = TimeCounts(shown, is_typed=True)
        other.add(times[part], types[part])
        merged.merge(other.by_type)
    for found in (counts, merged):
        for row in found.by_type.iter_rows(named=True):
            chosen = times.filter(types.eq_missing(row["type"])).to_numpy()
            assert (row["rows"], row["first"], row["last"]) == (len(chosen), chosen.min(), chosen.max())
            moments = {int(name.split()[1]): n for name, n in row.items() if name.startswith("before ")}
            assert moments == {moment: np.count_nonzero(chosen < moment) for moment in moments}
        assert found.by_type["type"].sort().to_list() == [None, "click", "like"]
        assert check_overlap(found, None, shown, column()) == check_overlap(times.to_numpy(), types, shown, column())
    with pytest.raises(KeyError):
        counts.before(HERE + 1)


def test_events_in_many_blocks_give_the_spans_and_notes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = make_views()
    stale = frames["events"].head(30).with_columns(type=pl.lit("stale"), time=pl.col("time") - 2 * YEAR)
    frames["events"] = pl.concat([frames["events"], stale])
    whole = build(tmp_path / "whole", frames, {})
    monkeypatch.setattr(sources, "_BLOCK_ROWS", 7)
    blocks = build(tmp_path / "blocks", frames, {})
    assert blocks.time_spans == whole.time_spans
    assert blocks.notes == whole.notes
    assert [note for note in whole.notes if note.startswith("events of type 'stale': the last, 2018-")]
    wrong = counted_in(frames, "ms", "events")
    with pytest.raises(SourceError, match="; in ms they would be 20"):
        build(tmp_path / "wrong", wrong, {"events": "us"})


def test_types_that_hardly_overlap_are_named_each() -> None:
    types = ["old"] * 3 + ["late"] * 3 + ["good"] * 4 + [None]
    times = [HERE - 2 * YEAR] * 3 + [HERE + DAY] * 3 + [HERE - DAY, HERE, HERE + DAY, HERE + DAY] + [HERE]
    spans, notes = check_overlap(np.array(times), pl.Series(types), (HERE, HERE + DAY), column())
    assert list(spans) == [*(f"events of type '{n}'" for n in ("good", "late", "old")), "events without a type"]
    late, old = sorted(notes)
    assert late.startswith("events of type 'late': none lie before the last impression, 2020-09-14")
    assert old.startswith("events of type 'old': the last, 2018-09-")
    assert old.endswith("views.events.time_unit says us")


def test_no_more_types_are_told_than_can_be_read() -> None:
    types = pl.Series([f"t{n}" for n in range(2 * MAX_TYPES)] + ["often"] * 2)
    spans, _ = check_overlap(np.full(len(types), HERE), types, (HERE, HERE + DAY), column())
    assert len(spans) == MAX_TYPES
    assert next(iter(spans)) == "events of type 'often'"


def test_the_moments_of_the_small_views_are_what_these_tests_take_them_for() -> None:
    assert START == HERE
    assert SPLIT["test_end"] == HERE + 10 * DAY


@pytest.mark.parametrize("written", ["Click", " click", "CLICK "])
def test_an_event_type_written_otherwise_is_an_error(tmp_path: Path, written: str) -> None:
    histories = [{**schema_mapping()["histories"][0], "event_types": ["like", written]}]
    write_views(tmp_path / "views", make_views())
    with pytest.raises(SourceError, match="must name event types as they are written") as error:
        build_training_set(make_schema(histories=histories), config(tmp_path))
    assert error.value.hint == "did you mean 'click'?"


def test_every_type_that_never_occurs_is_named(tmp_path: Path) -> None:
    histories = [{**schema_mapping()["histories"][0], "event_types": ["click", "clik", "buy"]}]
    write_views(tmp_path / "views", make_views())
    notes = build_training_set(make_schema(histories=histories), config(tmp_path)).notes
    assert [note.split(" (")[0] for note in notes] == [
        f"history 'clicked': there is no event of type {name!r}" for name in ("buy", "clik")
    ]
    assert "did you mean 'click'" in notes[1]


def test_two_units_in_one_column_are_a_note() -> None:
    times = np.full(1000, HERE)
    times[:400] = HERE // 1_000_000
    assert check_unit(times, column()) == [
        (
            "views.events.time: 400 of 1,000 times of column 'at' lie before 1990, from 1970-01-01T00:26:40+00:00 on, "
            "and the others do not: two units may be mixed"
        )
    ]


def test_one_type_in_another_unit_is_an_error_that_names_it() -> None:
    times = np.full(1000, HERE - YEAR // 12)
    types = pl.Series(["view"] * 900 + ["click"] * 100)
    times[900:] //= 1000
    with pytest.raises(SourceError, match="for events of type 'click', times of which some lie within 10 years"):
        check_overlap(times, types, (HERE, HERE + YEAR), column())


def test_a_rare_old_type_is_a_note() -> None:
    times = np.full(1000, HERE - YEAR // 12)
    types = pl.Series(["view"] * 995 + ["odd"] * 5)
    times[995:] -= 11 * YEAR
    _, notes = check_overlap(times, types, (HERE, HERE + YEAR), column())
    assert len(notes) == 1
    assert "'odd'" in notes[0]
