"""When the impressions and events of a log happened, and whether those times can be meant.

A log whose times were read in the wrong unit is no broken row: seconds read as milliseconds are valid moments in
January 1970, before every impression, and would fill histories with a future that looks like the past. (The other way
round, times end after 2200 and are set aside as broken rows.) So the spans of all logs are looked at together:

* **error**: at least 99 of 100 times of a log lie before 1990, and would lie between 1990 and 2100 if they counted
  1,000, 1,000,000 or 1,000,000,000 times as long. Times that only number the rows of a log that has none (seconds,
  counted from 1970) are not taken for that: they would not fit whatever they counted.
* **error**: at least 99 of 100 events lie more than ten years before the first impression.
* **note**: at least 99 of 100 times of a log lie before 1990, and fit no unit.
* **note**: of the events of a type, fewer than one of 100 lie before the last impression, so that histories cannot
  hold the others; or all lie more than a year before the first impression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import polars as pl

from recsys.errors import SourceError
from recsys.schema import TimeUnit

YEAR = 31_557_600_000_000
"""365.25 days in microseconds."""

MAX_GAP_YEARS = 10
"""Between an event log and the first impression."""

MAX_TYPES = 50
"""Event types that a summary tells the spans of: the most frequent ones."""

_FIRST_YEAR, _LAST_YEAR = 1990, 2100
_SHARE = 0.99
_FACTORS = (1_000, 1_000_000, 1_000_000_000)
_UNITS: tuple[TimeUnit, ...] = ("ns", "us", "ms", "s")


@dataclass(frozen=True)
class TimeColumn:
    """A column of times, as messages name it.

    Attributes:
        place: file or folder of the view.
        field: of the schema, such as ``views.events``.
        column: its name.
        unit: declared unit of integers; None where the values are no integers.
    """

    place: str
    field: str
    column: str
    unit: TimeUnit | None


def span(times: np.ndarray) -> tuple[str, str] | None:
    """First and last of some times as ISO 8601 text in UTC, to the second; None if there are none.

    Args:
        times: ``(n,)`` int64, UTC microseconds.
    """
    return (iso(int(times.min())), iso(int(times.max()))) if len(times) else None


def iso(time: int) -> str:
    """UTC microseconds as ISO 8601 text, to the second.

    Example:
        >>> iso(1_600_000_000_000_000)
        '2020-09-13T12:26:40+00:00'
    """
    return datetime.fromtimestamp(time // 1_000_000, UTC).isoformat()


def check_unit(times: np.ndarray, of: TimeColumn) -> list[str]:
    """Looks for times that were read in too fine a unit.

    Args:
        times: ``(n,)`` int64, UTC microseconds.
        of: where they come from.

    Returns:
        Notes.

    Raises:
        SourceError: they were; it names the column, its unit and the likely one.
    """
    begin, end = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000 for year in (_FIRST_YEAR, _LAST_YEAR))
    if not len(times) or np.count_nonzero(times < begin) < _SHARE * len(times):
        return []
    first, last = int(times.min()), int(times.max())
    read = f"{of.place}: {of.field}.time: column {of.column!r}"
    for factor in _FACTORS:
        fitting = np.count_nonzero((times >= begin // factor) & (times < end // factor))
        if fitting < _SHARE * len(times):
            continue
        meant = f"{iso(max(first, begin // factor) * factor)} to {iso(min(last, end // factor - 1) * factor)}"
        if of.unit is None:
            raise SourceError(
                f"{read} must hold the times that are meant, got {iso(first)} to {iso(last)}; counted {factor:,} times "
                f"as long they would be {meant}",
                hint="its times were written in the wrong unit: write the column again",
            )
        likely = _UNITS[_UNITS.index(of.unit) + _FACTORS.index(factor) + 1 :][:1]
        if likely:
            raise SourceError(
                f"{read} must hold times in {of.unit}, its declared unit, but read so they are {iso(first)} to "
                f"{iso(last)}; in {likely[0]} they would be {meant}",
                hint=f"declare {of.field}.time_unit: {likely[0]}",
            )
    note = f"{of.field}.time: {iso(first)} to {iso(last)}, before {_FIRST_YEAR}"
    return [f"{note}, is right only if the times of column {of.column!r} tell nothing but the order of the rows"]


def check_overlap(
    events: np.ndarray, types: pl.Series | None, impressions: tuple[int, int], of: TimeColumn
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Compares the events of each type with the impressions.

    Args:
        events: ``(E,)`` int64, UTC microseconds.
        types: type of each; None if they have none.
        impressions: time of the first and of the last, UTC microseconds.
        of: where the events come from.

    Returns:
        Span of each type by name (``events`` if there are none), the most frequent first, at most :data:`MAX_TYPES`;
        and notes.

    Raises:
        SourceError: (nearly) all events lie more than ten years before the first impression.
    """
    if not len(events):
        return {}, []
    first, last = impressions
    long_before = np.count_nonzero(events < first - MAX_GAP_YEARS * YEAR)
    if long_before >= _SHARE * len(events):
        unit = "" if of.unit is None else f" (integers in {of.unit}, as declared)"
        raise SourceError(
            f"{of.place}: {of.field}.time: column {of.column!r}{unit} must hold times of which some lie within "
            f"{MAX_GAP_YEARS} years of the first impression, {iso(first)}, got {iso(int(events.min()))} to "
            f"{iso(int(events.max()))}",
            hint=f"check {of.field}.time_unit and {of.field}.path; if the events have no times of their own, give them "
            "times shortly before the first impression",
        )
    names = pl.Series([None], dtype=pl.String).new_from_index(0, len(events)) if types is None else types
    found = (
        pl.DataFrame({"type": names, "time": events})
        .group_by("type")
        .agg(
            rows=pl.len(),
            first=pl.col("time").min(),
            last=pl.col("time").max(),
            before=(pl.col("time") < last).sum(),
        )
        .sort("rows", "type", descending=[True, False])
        .head(MAX_TYPES)
    )
    spans, notes = {}, []
    for kind in found.iter_rows(named=True):
        name = _name(kind["type"], typed=types is not None)
        spans[name] = (iso(kind["first"]), iso(kind["last"]))
        note = _note(kind, first, last)
        if note is not None:
            notes.append(f"{name}: {note}; {of.field}.time_unit says {of.unit}" if of.unit else f"{name}: {note}")
    return spans, notes


def _name(kind: str | None, *, typed: bool) -> str:
    if not typed:
        return "events"
    return "events without a type" if kind is None else f"events of type {kind!r}"


def _note(kind: Mapping[str, int], first: int, last: int) -> str | None:
    """What is odd about the times of one type."""
    if kind["before"] < (1 - _SHARE) * kind["rows"]:
        share = f"{kind['before']:,} of {kind['rows']:,}" if kind["before"] else "none"
        return f"{share} lie before the last impression, {iso(last)}, so that histories cannot hold the others"
    if kind["last"] < first - YEAR:
        return f"the last, {iso(kind['last'])}, lies more than a year before the first impression, {iso(first)}"
    return None
