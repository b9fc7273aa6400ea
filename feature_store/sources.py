"""Opened views, read column by column; how they are found and opened, :mod:`feature_store.opening` says.

Formats that have types (Parquet, Arrow, JSON lines) keep them. Text (CSV, ``::``, libfm) has none: its columns are
converted by what the schema reads them for, so that every format gives the same training set:

* **keys** are integers or text, one type for all views that share them (:func:`settle_key_types`);
  ``007`` is no integer;
* **times** are integers in the declared unit, or ISO 8601 text; without a zone or an offset they are in the view's
  time zone, UTC if none is declared;
* **sequences** are integers;
* **labels** are numbers, ``true`` or ``false``; **numbers** are numbers;
* other **values** are integers if every one is written as an integer, else text.

What cannot be converted is a broken row, and is set aside with its reason (:mod:`feature_store.quarantine`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
from polars.exceptions import PolarsError

from feature_store.expressions import missing_for_nan
from feature_store.formats import READ_ERRORS, DataFile, reason_of, unreadable
from recsys.errors import SourceError
from recsys.schema import (
    Categorical,
    DayOfWeek,
    Dense,
    HourOfDay,
    LogBuckets,
    MultiCategorical,
    QuantileBuckets,
    Schema,
    Scope,
    TimeUnit,
)
from recsys.times import MAX_TIME

Kind = Literal["integer", "number", "boolean", "text", "timestamp", "local", "date", "list", "null", "other"]
Role = Literal["key", "time", "sequence", "type", "label", "value", "number", "instant", "bag", "vector"]

_UNITS_IN_SECOND: dict[str, int] = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
INTEGER_TEXT = r"^(0|-?[1-9][0-9]{0,18})$"
"""An integer as text: ``007`` is none."""
_DAY = 86_400_000_000
_BLOCK_ROWS = 1 << 19


IN_ORDER = pl.QueryOptFlags(check_order_observe=False)
"""What every reading of rows is optimised by: a row is known by its number, so none may come before another.

With its default, Polars 2.1 takes it that the order does not matter to a column that is made of literals, such as
``CASE WHEN type = 'cart' THEN 3 ELSE 1 END``, and gives the row groups of a Parquet file as they happen to be read.
"""

VIEW_OF_SCOPE: dict[Scope, str] = {
    "user": "users",
    "item": "items",
    "context": "impressions",
    "candidate": "impressions",
    "event": "events",
}
"""The view that features of a scope read."""


@dataclass(frozen=True)
class Use:
    """One thing that the schema reads a column for.

    Attributes:
        column: name of the column in the view.
        role: how its values are read.
        reader: who reads it, as messages name it.
        time_unit: unit of integer times.
        separator: of text that holds several values.
        time_zone: of times without zone or offset.
        is_negative_kept: whether a negative key is a key.
    """

    column: str
    role: Role
    reader: str
    time_unit: TimeUnit = "us"
    separator: str | None = None
    time_zone: str = "UTC"
    is_negative_kept: bool = False


def feature_use(schema: Schema, feature: Categorical | MultiCategorical | Dense) -> Use:
    """How a feature reads its column."""
    view = getattr(schema.views, VIEW_OF_SCOPE[feature.scope])
    return replace(_feature_use(schema, feature), time_zone="UTC" if view is None else view.time_zone)


def _feature_use(schema: Schema, feature: Categorical | MultiCategorical | Dense) -> Use:
    reader = f"feature {feature.name!r}"
    if isinstance(feature, Dense):
        return Use(feature.source_column, "number" if feature.dim == 1 else "vector", reader)
    if isinstance(feature, MultiCategorical):
        return Use(feature.source_column, "bag", reader, separator=feature.separator)
    encoder = schema.table_encoders[feature.table_name]
    if isinstance(encoder, (QuantileBuckets, LogBuckets)):
        return Use(feature.source_column, "number", reader)
    if isinstance(encoder, (HourOfDay, DayOfWeek)):
        return Use(feature.source_column, "instant", reader)
    return Use(feature.source_column, "value", reader)


@dataclass(frozen=True)
class Source:
    """A checked view, read column by column.

    Attributes:
        view: its name in the schema.
        files: what it was found in, in reading order.
        file_rows: rows of each.
        scans: the columns in use of each, lazily.
        is_text: whether the columns are untyped text.
        key_types: type of each key column, once settled.
        notes: what is no fault, but worth knowing.
    """

    view: str
    files: tuple[DataFile, ...]
    file_rows: tuple[int, ...]
    scans: tuple[pl.LazyFrame, ...]
    kinds: Mapping[str, Kind]
    is_text: bool
    key_types: Mapping[str, Kind]
    notes: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of all files together; a row's number among them is its *source row*."""
        return sum(self.file_rows)

    @property
    def frame(self) -> pl.LazyFrame:
        """The columns in use, lazily, in file order."""
        return _concatenated(self.scans)

    def read(self, expressions: Mapping[str, pl.Expr]) -> pl.DataFrame:
        """Evaluates expressions over all rows, in order.

        Raises:
            SourceError: a file cannot be read after all.
        """
        return self._collected(self.frame, expressions)

    def _collected(self, frame: pl.LazyFrame, expressions: Mapping[str, pl.Expr]) -> pl.DataFrame:
        try:
            return frame.select(**expressions).collect(optimizations=IN_ORDER)
        except READ_ERRORS as err:
            raise self._unreadable(err) from err

    def blocks(self, expressions: Mapping[str, pl.Expr]) -> Iterator[pl.DataFrame]:
        """Evaluates expressions over all rows, in order, some rows at a time; memory does not grow with the view.

        Raises:
            SourceError: a file cannot be read after all.
        """
        frame = self.frame.select(**expressions)
        try:
            if self.num_rows <= _BLOCK_ROWS:
                yield frame.collect(optimizations=IN_ORDER)
            else:
                yield from frame.collect_batches(chunk_size=_BLOCK_ROWS, maintain_order=True, optimizations=IN_ORDER)
        except READ_ERRORS as err:
            raise self._unreadable(err) from err

    def _between(self, first: int, stop: int) -> pl.LazyFrame:
        """Rows ``first`` to ``stop - 1``; each file is cut by itself, for a cut of all would read what precedes it."""
        begins = [0, *accumulate(self.file_rows)]
        cuts = [(max(first - begin, 0), stop - begin) for begin in begins[:-1]]
        return _concatenated([s.slice(a, max(b - a, 0)) for s, (a, b) in zip(self.scans, cuts, strict=True)])

    def computed(
        self, expression: pl.Expr, uses: Sequence[Use], reader: str, *, text: str, as_numbers: Collection[str] = ()
    ) -> pl.Series:
        """An expression over all rows, in order, of columns as their uses read them, with nulls for NaN.

        Args:
            expression: of the columns.
            text: the expression as it is written.
            uses: how each is read.
            reader: as messages name it.
            as_numbers: columns whose integers are read as fractions.

        Raises:
            SourceError: it cannot be computed of what the columns hold.
        """
        columns = {use.column: self.typed(use) for use in uses}
        columns |= {name: column.cast(pl.Float64) for name, column in columns.items() if name in as_numbers}
        typed = missing_for_nan(self.frame.select(**columns))
        try:
            return typed.select(value=expression).collect(optimizations=IN_ORDER).to_series()
        except PolarsError as err:
            kinds = ", ".join(f"{use.column}: {words_of(self.kinds[use.column])}" for use in uses)
            raise SourceError(
                f"{self.place}: {reader} must fit its columns ({kinds}), got {type(err).__name__}",
                hint=self.cast_advice(text, [use.column for use in uses])
                or "compare numbers with numbers and text with text; CAST(x AS DOUBLE) makes a number of text",
            ) from err

    def cast_advice(self, text: str, columns: Iterable[str]) -> str | None:
        """An expression rewritten so that columns of numbers that lie in text are numbers; None if there are none.

        Args:
            text: SQL.
            columns: that it reads.
        """
        held = [c for c in columns if self.kinds[c] == "text" and self._holds_numbers(c)]
        parts = re.split(r"('(?:[^']|'')*')", text)  # every other one is a text in quotes
        for column in held:
            name = re.escape(column)
            plain = rf'(?<![\w"])("{name}"|{name})(?![\w"])(?!\s+AS\b)'
            parts[::2] = [re.sub(plain, r"CAST(\1 AS DOUBLE)", part, flags=re.IGNORECASE) for part in parts[::2]]
        written = "".join(parts)
        if written == text:
            return None
        said = (
            f"column {held[0]!r} holds numbers"
            if len(held) == 1
            else f"columns {', '.join(map(repr, held))} hold numbers"
        )
        return f"{said} as text{', for such files have no types' if self.is_text else ''}: write {written}"

    def _holds_numbers(self, column: str) -> bool:
        """Whether every value of a text column is written as a number."""
        text = pl.col(column).cast(pl.String)
        counted = self.read({"numbers": text.cast(pl.Float64, strict=False).count(), "values": text.count()})
        return 0 < int(counted["values"][0]) == int(counted["numbers"][0])

    def num_nan(self, columns: Iterable[str]) -> dict[str, int]:
        """How many rows hold NaN, of each column of fractions."""
        of_fractions = [c for c in columns if self.kinds[c] == "number" and not self.is_text]
        if not of_fractions:
            return {}
        counted = self.read({c: pl.col(c).cast(pl.Float64).is_nan().sum() for c in of_fractions})
        return {c: int(counted[c][0]) for c in of_fractions}

    def _unreadable(self, err: BaseException) -> SourceError:
        """The error of the first file that cannot be read by itself; of all of them if each can."""
        for file, scan in zip(self.files, self.scans, strict=True):
            try:
                scan.collect()
            except READ_ERRORS as own:
                return unreadable(file, own)
        return SourceError(f"{self.place} cannot be read: {reason_of(err)}")

    def column(self, use: Use) -> pl.Series:
        """One typed column over all rows."""
        return self.read({use.column: self.typed(use)}).to_series()

    def read_in(self, rows: np.ndarray, expression: pl.Expr) -> pl.Series:
        """Evaluates an expression in some rows; nothing is read of what lies before the first or behind the last.

        Args:
            rows: ``(n,)`` int64, in any order; those of a period lie together where a log is in the order of time.
            expression: of each row by itself.
        """
        first = int(rows.min(initial=self.num_rows))
        frame = self._between(first, int(rows.max(initial=-1)) + 1)
        column = self._collected(frame, {"value": expression}).to_series()
        if len(rows) > len(column) // 4:
            column = column.rechunk()  # in one piece, each row is found several times faster than in many
        return column.gather(rows - first if first else rows)

    @property
    def place(self) -> str:
        """The view's files, as messages name them."""
        first = self.files[0].name
        return first if len(self.files) == 1 else f"{first.rpartition('/')[0]} ({len(self.files)} files)"

    def typed(self, use: Use) -> pl.Expr:
        """The column as its role reads it; what cannot be converted is null, and one of :meth:`problems`."""
        raw = pl.col(use.column)
        kind = self.kinds[use.column]
        role: Role = "key" if use.role == "value" and use.column in self.key_types else use.role
        if role == "key":
            if self.key_types.get(use.column, kind) != "integer":
                return raw.cast(pl.String, strict=False)
            return _whole(raw) if kind == "text" else raw.cast(pl.Int64, strict=False)
        if kind == "null":
            return raw.cast(_NULL_AS[role])
        if role == "sequence":
            return _whole(raw) if kind == "text" else raw.cast(pl.Int64, strict=False)
        if role == "time":
            return _clipped_microseconds(raw, kind, use)
        if role == "instant":
            return _microseconds(raw, kind, use)
        if role == "type":
            return raw.cast(pl.String)
        if role in ("label", "number") and kind == "text":
            lower = raw.str.to_lowercase()
            number = raw.cast(pl.Float64, strict=False)
            words = pl.when(lower == "true").then(1.0).when(lower == "false").then(0.0)
            return pl.coalesce(number, words) if role == "label" else number
        if role == "label":
            return raw.cast(pl.Float64)
        return raw.cast(pl.Int64, strict=False) if kind in ("integer", "boolean") else raw

    def problems(self, use: Use) -> list[tuple[str, pl.Expr]]:
        """What can be wrong with a row's value: reasons, and expressions that are true where it is."""
        name, raw, typed = use.column, pl.col(use.column), self.typed(use)
        unreadable = raw.is_not_null() & typed.is_null()
        kind = self.kinds[name]
        found: list[tuple[str, pl.Expr]] = []
        if use.role in ("key", "time"):
            found.append((f"{name} is null", raw.is_null()))
        if use.role in ("time", "instant") and use.time_zone != "UTC" and kind in ("local", "text"):
            clock = _local_clock(raw, kind)
            zoned = {"ambiguous": "earliest", "non_existent": "null"}
            is_skipped = clock.is_not_null() & clock.dt.replace_time_zone(use.time_zone, **zoned).is_null()  # type: ignore[arg-type]
            found.append((f"{name} does not exist in {use.time_zone}", is_skipped))
            is_shown_twice = clock.is_not_null() & _in_zone(clock, use.time_zone).is_null()
            found.append((f"{name} is ambiguous in {use.time_zone}", is_shown_twice))
        if use.role == "time":
            found.append((f"{name} is not a time", unreadable))
            found.append((f"{name} is negative", typed < 0))
            found.append((f"{name} is not before 2200", typed >= MAX_TIME))
        elif use.role == "instant" and kind == "text":
            found.append((f"{name} is not a time", unreadable))
        elif use.role in ("label", "number"):
            if kind == "text":
                found.append((f"{name} is not a number", unreadable))
            if kind in ("text", "number"):
                found.append((f"{name} is infinite", typed.is_infinite()))
        elif use.role == "vector" and kind == "list":
            components = pl.element().cast(pl.Float64, strict=False)
            found.append((f"{name} is infinite", raw.list.eval(components.is_infinite()).list.any()))
        elif use.role in ("key", "value", "sequence") and kind in ("integer", "text"):
            found.append((f"{name} is not a signed 64-bit integer", unreadable))
            if use.role == "key" and self.key_types.get(name, kind) == "text":
                found.append((f"{name} is empty", typed == ""))
            elif use.role == "key" and not use.is_negative_kept:
                found.append((f"{name} is negative", typed < 0))
        return found

    def integer_counts(self, column: str) -> tuple[int, int]:
        """How many values of a text column are written as integers, and how many there are."""
        text = pl.col(column)
        is_integer = text.str.contains(INTEGER_TEXT) & text.cast(pl.Int64, strict=False).is_not_null()
        counted = self.read({"integers": is_integer.sum(), "values": text.count()})
        return int(counted["integers"][0]), int(counted["values"][0])

    def begins_with_integer(self, column: str) -> bool:
        """Whether the first value of a text column is written as an integer."""
        values = self.frame.select(pl.col(column).drop_nulls().head(1)).head(1)
        first = values.collect(optimizations=IN_ORDER).to_series()
        return bool(first.str.contains(INTEGER_TEXT).any())

    def rows(self, source_rows: np.ndarray) -> pl.DataFrame:
        """Some rows as they are in the source, by their numbers."""
        wanted = pl.Series(source_rows, dtype=pl.UInt32 if self.num_rows < 2**32 else pl.UInt64)
        numbered = self.frame.with_row_index("@row").filter(pl.col("@row").is_in(wanted.implode()))
        return numbered.drop("@row").collect(optimizations=IN_ORDER)


_NULL_AS: dict[Role, pl.DataType | type[pl.DataType]] = {
    "time": pl.Int64,
    "sequence": pl.Int64,
    "type": pl.String,
    "label": pl.Float64,
    "value": pl.Int64,
    "number": pl.Float64,
    "instant": pl.Int64,
    "bag": pl.List(pl.Int64),
    "vector": pl.List(pl.Float32),
}


def _whole(text: pl.Expr) -> pl.Expr:
    """Integers of text that is written as one; ``007`` and ``+7`` are other texts than ``7``, not the same key."""
    return pl.when(text.str.contains(INTEGER_TEXT)).then(text.cast(pl.Int64, strict=False))


def _clipped_microseconds(raw: pl.Expr, kind: Kind, use: Use) -> pl.Expr:
    """Times as UTC microseconds; those outside 1970 to 2200 end just outside: none wraps around or looks valid."""
    if kind == "timestamp":
        return raw.to_physical().clip(-1, MAX_TIME)
    if kind == "local":
        return _in_zone(_local_clock(raw, kind), use.time_zone).clip(-1, MAX_TIME)
    unit = use.time_unit
    clipped = raw.cast(pl.Int64, strict=False).clip(-1, MAX_TIME // 1_000_000 * _UNITS_IN_SECOND[unit])
    scaled = clipped // 1_000 if unit == "ns" else clipped * (1_000_000 // _UNITS_IN_SECOND[unit])
    return pl.coalesce(scaled, _parsed(raw, use.time_zone).clip(-1, MAX_TIME)) if kind == "text" else scaled


def _microseconds(raw: pl.Expr, kind: Kind, use: Use) -> pl.Expr:
    """Times that only features read: any year, integers in microseconds."""
    if kind in ("timestamp", "date"):
        return raw.cast(pl.Datetime("us")).to_physical()
    if kind == "local":
        return _in_zone(_local_clock(raw, kind), use.time_zone)
    whole = raw.cast(pl.Int64, strict=False)
    return pl.coalesce(whole, _parsed(raw, use.time_zone)) if kind == "text" else whole


def _parsed(text: pl.Expr, zone: str) -> pl.Expr:
    """ISO 8601 text as UTC microseconds; in ``zone`` where it has no offset."""
    zoned = _iso(text).str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%#z", time_unit="us", time_zone="UTC", strict=False)
    naive = _naive_clock(text)
    return pl.coalesce(zoned.to_physical(), naive.to_physical() if zone == "UTC" else _in_zone(naive, zone))


def _iso(text: pl.Expr) -> pl.Expr:
    return text.str.replace(" ", "T", literal=True)


def _naive_clock(text: pl.Expr) -> pl.Expr:
    """What the clock showed, of text without an offset."""
    return _iso(text).str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False)


def _local_clock(raw: pl.Expr, kind: Kind) -> pl.Expr:
    """What the clock showed; years outside 1970 to 2200, which no zone database knows, end just outside."""
    naive = _naive_clock(raw) if kind == "text" else raw
    return naive.to_physical().clip(-_DAY, MAX_TIME + _DAY).cast(pl.Datetime("us"))


def _in_zone(clock: pl.Expr, zone: str) -> pl.Expr:
    """What the clock showed in a zone, as UTC microseconds; null where it never showed that, or did twice."""
    zoned = clock.dt.replace_time_zone(zone, ambiguous="null", non_existent="null")
    return zoned.dt.convert_time_zone("UTC").to_physical()


def settle_key_types(sources: Iterable[tuple[Source, str]], *, tolerance: float) -> list[Source]:
    """Gives the key columns of several views one type.

    A column that has a type decides; all of them must agree. Where there is only text, keys are integers if all but
    ``tolerance`` of the values are written as integers (the others are broken rows), else text.

    Args:
        sources: views with the key column of each.

    Returns:
        The sources, in the same order, with the type set.

    Raises:
        SourceError: one file has integers, another text.
    """
    sources = list(sources)
    typed = [(s, c) for s, c in sources if not s.is_text and s.kinds[c] != "null"]
    if typed:
        first_source, first_column = typed[0]
        settled = first_source.kinds[first_column]
        for source, column in typed[1:]:
            if source.kinds[column] != settled:
                raise SourceError(
                    f"{source.place}: column {column!r} must hold {words_of(settled)} as {first_source.place} column "
                    f"{first_column!r} does, got {words_of(source.kinds[column])}",
                    hint="write the keys with one type in every view",
                )
    else:
        counts = [s.integer_counts(c) for s, c in sources if s.is_text]
        integers, values = sum(i for i, _ in counts), sum(v for _, v in counts)
        settled = "integer" if integers >= (1.0 - tolerance) * values else "text"
    return [replace(s, key_types={**s.key_types, c: settled}) for s, c in sources]


def settle_value_types(source: Source, uses: Iterable[Use]) -> Source:
    """Types untyped columns that hold plain values: integers if every one is, else text."""
    if not source.is_text:
        return source
    columns = {u.column for u in uses if u.role == "value"} - set(source.key_types)
    found: dict[str, Kind] = {}
    for column in sorted(columns):
        integers, values = source.integer_counts(column)
        found[column] = "integer" if integers == values else "text"
    kinds = {**source.kinds, **{c: k for c, k in found.items() if k == "integer"}}
    casts = [pl.col(c).cast(pl.Int64) for c, k in found.items() if k == "integer"]
    return replace(source, kinds=kinds, scans=tuple(scan.with_columns(casts) for scan in source.scans))


def _concatenated(scans: Sequence[pl.LazyFrame]) -> pl.LazyFrame:
    return pl.concat(scans, how="vertical_relaxed") if len(scans) > 1 else scans[0]


def kind_of(dtype: pl.DataType, zone: str = "UTC") -> Kind:
    """What a Polars type holds, as far as the schema cares; ``zone`` is that of timestamps without one."""
    if dtype.is_integer():
        return "integer"
    if dtype.is_float() or dtype.is_decimal():
        return "number"
    if isinstance(dtype, pl.Boolean):
        return "boolean"
    if isinstance(dtype, (pl.String, pl.Categorical, pl.Enum)):
        return "text"
    if isinstance(dtype, pl.Datetime):
        return "local" if dtype.time_zone is None and zone != "UTC" else "timestamp"
    if isinstance(dtype, pl.Date):
        return "date"
    if isinstance(dtype, (pl.List, pl.Array)):
        return "list" if kind_of(inner_of(dtype)) in ("integer", "number", "boolean", "text", "null") else "other"
    return "null" if isinstance(dtype, pl.Null) else "other"


def inner_of(dtype: pl.List | pl.Array) -> pl.DataType:
    """The type of the values of lists."""
    inner = dtype.inner
    return inner if isinstance(inner, pl.DataType) else inner()


def words_of(kind: Kind) -> str:
    """What a column holds, as messages say it."""
    return {
        "integer": "integers",
        "number": "floating-point numbers",
        "boolean": "booleans",
        "text": "text",
        "timestamp": "timestamps",
        "local": "timestamps without a zone",
        "date": "dates",
        "list": "lists of values",
        "null": "nothing",
        "other": "values of an unsupported type",
    }[kind]


def to_arrow(series: pl.Series) -> pa.Array[Any]:
    """A column in Arrow's plain types: text as large_string, lists as large_list."""
    return series.rechunk().to_arrow()
