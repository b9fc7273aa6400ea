"""When the impressions and events of a log happened, and whether those times can be meant.

A log whose times were read in the wrong unit is no broken row: seconds read as milliseconds are valid moments in
January 1970, before every impression, and would fill histories with a future that looks like the past. (The other way
round, times end after 2200 and are set aside as broken rows.) So the spans of all logs are looked at together:

* **error**: at least 99 of 100 times of a log lie before 1990, and would lie between 1990 and 2100 if they counted
  1,000, 1,000,000 or 1,000,000,000 times as long. Times that only number the rows of a log that has none (seconds,
  counted from 1970) are not taken for that: they would not fit whatever they counted.
* **error**: at least 99 of 100 events lie more than ten years before the first impression; or of the events of one
  type, where these are at least 1 of 100 events.
* **note**: at least 99 of 100 times of a log lie before 1990, and fit no unit; or fewer, but at least one of 1,000,
  so that two units may be mixed.
* **note**: of the events of a type, fewer than one of 100 lie before the last impression, so that histories cannot
  hold the others; or all lie more than a year before the first impression.

A log may be of any size: :class:`TimeCounts` counts, block by block, what these checks ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

import numpy as np
import polars as pl

from recsys.errors import SourceError
from recsys.schema import TimeUnit
from recsys.times import EARLIEST

YEAR = 31_557_600_000_000
"""365.25 days in microseconds."""

MAX_GAP_YEARS = 10
"""Between an event log and the first impression."""

MAX_TYPES = 50
"""Event types that a summary tells the spans of: the most frequent ones."""

_FIRST_YEAR, _LAST_YEAR = 1990, 2100
_SHARE = 0.99
_MIXED = 0.001
_MERGED_AT = 1024  # rows of counts that are not yet merged: once a block would cost more than counting it
_FACTORS = (1_000, 1_000_000, 1_000_000_000)
_UNITS: tuple[TimeUnit, ...] = ("ns", "us", "ms", "s")
_BEGIN, _END = EARLIEST, int(datetime(_LAST_YEAR, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000


@dataclass(frozen=True)
class TimeColumn:
    """A column of times, as messages name it.

    Attributes:
        place: file or folder of the view.
        field: of the schema, such as ``views.events``.
        column: its name.
        unit: declared unit of integers; None where the values are no integers.
        name: of the time within the field.
    """

    place: str
    field: str
    column: str
    unit: TimeUnit | None
    name: str = "time"


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


class TimeCounts:
    """How many times of each type lie before each of some moments: all that the checks ask, in memory for the types.

    The moments are those that the checks compare with; another one is asked for in vain (``KeyError``) until it is
    added here.

    Args:
        impressions: time of the first and of the last, UTC microseconds; None if there are none.
        is_typed: whether times have a type.

    Attributes:
        impressions: as given.
        is_typed: as given.
    """

    def __init__(self, impressions: tuple[int, int] | None = None, *, is_typed: bool = False) -> None:
        self.impressions = impressions
        self.is_typed = is_typed
        moments = [_BEGIN, *(edge // factor for factor in _FACTORS for edge in (_BEGIN, _END))]
        if impressions is not None:
            first, last = impressions
            moments += [first - MAX_GAP_YEARS * YEAR, last]
        self._moments = sorted(set(moments))
        columns = ["rows", "first", "last", *(f"before {moment}" for moment in self._moments)]
        self._parts = [pl.DataFrame(schema={"type": pl.String, **dict.fromkeys(columns, pl.Int64)})]

    @classmethod
    def of(cls, times: np.ndarray, types: pl.Series | None = None, impressions: tuple[int, int] | None = None) -> Self:
        """Counts of times that are all there.

        Args:
            times: ``(n,)`` int64, UTC microseconds.
            types: type of each; None if they have none.
            impressions: time of the first and of the last.
        """
        counts = cls(impressions, is_typed=types is not None)
        counts.add(pl.Series(times, dtype=pl.Int64), types)
        return counts

    def add(self, times: pl.Series, types: pl.Series | None) -> None:
        """Counts more times.

        Args:
            times: ``n`` int64, UTC microseconds.
            types: ``n`` texts or nulls; None if they have none.
        """
        if len(times) == 0:
            return
        names = pl.Series([None], dtype=pl.String).new_from_index(0, len(times)) if types is None else types
        first, last = int(times.min()), int(times.max())  # type: ignore[arg-type]
        time = pl.col("time")
        counted = {"rows": pl.len(), "first": time.min(), "last": time.max()}
        known = {}
        for moment in self._moments:  # of most, all times of a block are on one side
            if first < moment <= last:
                counted[f"before {moment}"] = (time < moment).sum()
            else:
                known[f"before {moment}"] = pl.col("rows") if last < moment else pl.lit(0)
        block = pl.LazyFrame({"type": names, "time": times}).group_by("type").agg(**counted).with_columns(**known)
        self.merge(block.select(pl.col("type").cast(pl.String), pl.exclude("type").cast(pl.Int64)).collect())

    def merge(self, by_type: pl.DataFrame) -> None:
        """Adds the counts of other times with the same moments."""
        self._parts.append(by_type.select(self._parts[0].columns))
        if sum(part.height for part in self._parts[1:]) > max(_MERGED_AT, self._parts[0].height):
            self._merge()

    @property
    def by_type(self) -> pl.DataFrame:
        """One row a type: ``type``, ``rows``, ``first`` and ``last`` time; for each moment, ``before <moment>``."""
        self._merge()
        return self._parts[0]

    def _merge(self) -> None:
        names = self._parts[0].columns
        if len(self._parts) > 1:
            columns = {name: pl.col(name).sum() for name in names if name not in ("type", "first", "last")}
            columns |= {"first": pl.col("first").min(), "last": pl.col("last").max()}
            self._parts = [pl.concat(self._parts).group_by("type").agg(**columns).select(names)]

    @property
    def num_rows(self) -> int:
        """Times of all types."""
        return int(self.by_type["rows"].sum())

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last of them, if there are any."""
        return int(self.by_type["first"].min()), int(self.by_type["last"].max())  # type: ignore[arg-type]

    def before(self, moment: int) -> int:
        """Times of all types before one of the moments."""
        if moment not in self._moments:
            raise KeyError(f"nothing was counted before {moment}")
        return int(self.by_type[f"before {moment}"].sum())


def check_unit(times: np.ndarray | TimeCounts, of: TimeColumn) -> list[str]:
    """Looks for times that were read in too fine a unit.

    Args:
        times: ``(n,)`` int64, UTC microseconds; or their counts.
        of: where they come from.

    Returns:
        Notes.

    Raises:
        SourceError: they were; it names the column, its unit and the likely one.
    """
    counts = times if isinstance(times, TimeCounts) else TimeCounts.of(times)
    num_rows = counts.num_rows
    early = counts.before(_BEGIN) if num_rows else 0
    if early < max(_MIXED * num_rows, 1):
        return []
    first, last = counts.span
    if early < _SHARE * num_rows:
        return [
            (
                f"{of.field}.{of.name}: {early:,} of {num_rows:,} times of column {of.column!r} lie before "
                f"{_FIRST_YEAR}, from {iso(first)} on, and the others do not: two units may be mixed"
            )
        ]
    read = f"{of.place}: {of.field}.{of.name}: column {of.column!r}"
    for factor in _FACTORS:
        begin, end = _BEGIN // factor, _END // factor
        if counts.before(end) - counts.before(begin) < _SHARE * num_rows:
            continue
        meant = f"{iso(max(first, begin) * factor)} to {iso(min(last, end - 1) * factor)}"
        if of.unit is None:
            raise SourceError(
                f"{read} must hold the times that are meant, got {iso(first)} to {iso(last)}; counted {factor:,} times "
                f"as long they would be {meant}",
                hint="its times were written in the wrong unit: write the column again",
            )
        likely = _UNITS[_UNITS.index(of.unit) + _FACTORS.index(factor) + 1 :][:1]
        if likely:
            hint = f"declare {of.field}.time_unit: {likely[0]}"
            raise SourceError(
                f"{read} must hold times in {of.unit}, its declared unit, but read so they are {iso(first)} to "
                f"{iso(last)}; in {likely[0]} they would be {meant}",
                hint=hint if of.name == "time" else f"{hint}; {of.field}.time must be in the same unit",
            )
    note = f"{of.field}.{of.name}: {iso(first)} to {iso(last)}, before {_FIRST_YEAR}"
    return [f"{note}, is right only if the times of column {of.column!r} tell nothing but the order of the rows"]


def check_overlap(
    events: np.ndarray | TimeCounts, types: pl.Series | None, impressions: tuple[int, int], of: TimeColumn
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Compares the events of each type with the impressions.

    Args:
        events: ``(E,)`` int64, UTC microseconds; or their counts, with the same impressions.
        types: type of each; None if they have none, or are counted.
        impressions: time of the first and of the last, UTC microseconds.
        of: where the events come from.

    Returns:
        Span of each type by name (``events`` if there are none), the most frequent first, at most :data:`MAX_TYPES`;
        and notes.

    Raises:
        SourceError: (nearly) all events, or those of a type, lie more than ten years before the first impression.
    """
    counts = events if isinstance(events, TimeCounts) else TimeCounts.of(events, types, impressions)
    if not counts.num_rows:
        return {}, []
    first, last = impressions
    if counts.before(first - MAX_GAP_YEARS * YEAR) >= _SHARE * counts.num_rows:
        unit = "" if of.unit is None else f" (integers in {of.unit}, as declared)"
        earliest, latest = counts.span
        raise SourceError(
            f"{of.place}: {of.field}.time: column {of.column!r}{unit} must hold times of which some lie within "
            f"{MAX_GAP_YEARS} years of the first impression, {iso(first)}, got {iso(earliest)} to {iso(latest)}",
            hint=f"check {of.field}.time_unit and {of.field}.path; if the events have no times of their own, give them "
            "times shortly before the first impression",
        )
    found = (
        counts.by_type.with_columns(before=pl.col(f"before {last}"))
        .sort("rows", "type", descending=[True, False])
        .head(MAX_TYPES)
    )
    spans, notes = {}, []
    for kind in found.iter_rows(named=True):
        name = _name(kind["type"], typed=counts.is_typed)
        spans[name] = (iso(kind["first"]), iso(kind["last"]))
        is_long_before = kind[f"before {first - MAX_GAP_YEARS * YEAR}"] >= _SHARE * kind["rows"]
        if is_long_before and kind["rows"] >= (1 - _SHARE) * counts.num_rows:
            raise SourceError(
                f"{of.place}: {of.field}.time: column {of.column!r} must hold, for {name}, times of which some lie "
                f"within {MAX_GAP_YEARS} years of the first impression, {iso(first)}, got {iso(kind['first'])} to "
                f"{iso(kind['last'])}",
                hint="the times of that type may have been written in another unit than the others: write them again",
            )
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
