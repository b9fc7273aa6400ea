"""Views as they lie on disk: Parquet or CSV, a file, a folder of parts or a pattern, checked against the schema.

Parquet keeps its types. CSV has none: every column is staged as text, surrounding blanks removed, empty cells missing,
and is converted by what the schema reads it for, so that both formats give the same training set:

* **keys** are integers or text, one type for all views that share them (:func:`settle_key_type`);
* **times** are integers in the declared unit, or ISO 8601 text; without an offset it is UTC;
* **labels** are numbers, ``true`` or ``false``; **numbers** are numbers;
* other **values** are integers if every one is written as an integer, else text.

What cannot be converted is a broken row, and is set aside with its reason (:mod:`feature_store.quarantine`). A missing
file, a missing column or a column of the wrong type is a :class:`~recsys.errors.SourceError`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
from polars.exceptions import PolarsError

from recsys.errors import SourceError, nearest
from recsys.schema import (
    Categorical,
    DayOfWeek,
    Dense,
    HourOfDay,
    LogBuckets,
    MultiCategorical,
    QuantileBuckets,
    Schema,
    TimeUnit,
)

Kind = Literal["integer", "number", "boolean", "text", "timestamp", "date", "list", "null", "other"]
Role = Literal["key", "time", "type", "label", "value", "number", "instant", "bag", "vector"]

MAX_TIME = 7_258_118_400_000_000
"""2200-01-01 in UTC microseconds; times must lie before it."""

_ACCEPTED: dict[Role, tuple[Kind, ...]] = {
    "key": ("integer", "text"),
    "time": ("integer", "timestamp"),
    "type": ("integer", "text"),
    "label": ("integer", "number", "boolean"),
    "value": ("integer", "text", "boolean", "number"),
    "number": ("integer", "number", "boolean"),
    "instant": ("integer", "timestamp", "date"),
    "bag": ("list",),
    "vector": ("list",),
}
_UNITS_IN_SECOND: dict[str, int] = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_INTEGER_TEXT = r"^(0|-?[1-9][0-9]{0,18})$"
_FORMATS = {"parquet": "Parquet", "csv": "CSV", None: "data"}
_CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")


@dataclass(frozen=True)
class Use:
    """One thing that the schema reads a column for.

    Attributes:
        column: name of the column in the view.
        role: how its values are read.
        reader: who reads it, as messages name it.
        time_unit: unit of integer times.
        separator: of text that holds several values.
    """

    column: str
    role: Role
    reader: str
    time_unit: TimeUnit = "us"
    separator: str | None = None


def feature_use(schema: Schema, feature: Categorical | MultiCategorical | Dense) -> Use:
    """How a feature reads its column."""
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
        num_rows: rows of all files together; a row's number among them is its *source row*.
        frame: the columns in use, lazily, in file order.
        is_text: whether the columns are the untyped text of a CSV.
        key_types: type of each key column, once settled.
    """

    view: str
    files: tuple[Path, ...]
    num_rows: int
    frame: pl.LazyFrame
    kinds: Mapping[str, Kind]
    is_text: bool
    key_types: Mapping[str, Kind]

    def read(self, expressions: Mapping[str, pl.Expr]) -> pl.DataFrame:
        """Evaluates expressions over all rows, in order.

        Raises:
            SourceError: a file cannot be read after all.
        """
        try:
            return self.frame.select(**expressions).collect()
        except (PolarsError, OSError) as err:
            raise SourceError(f"{self.place} cannot be read: {_first_line(err)}") from err

    def column(self, use: Use) -> pl.Series:
        """One typed column over all rows."""
        return self.read({use.column: self.typed(use)}).to_series()

    @property
    def place(self) -> str:
        """The view's files, as messages name them."""
        return str(self.files[0]) if len(self.files) == 1 else f"{self.files[0].parent} ({len(self.files)} files)"

    def typed(self, use: Use) -> pl.Expr:
        """The column as its role reads it; what cannot be converted is null, and one of :meth:`problems`."""
        raw = pl.col(use.column)
        kind = self.kinds[use.column]
        role: Role = "key" if use.role == "value" and use.column in self.key_types else use.role
        if role == "key":
            return raw.cast(pl.Int64 if self.key_types.get(use.column, kind) == "integer" else pl.String, strict=False)
        if kind == "null":
            return raw.cast(_NULL_AS[role])
        if role == "time":
            return _clipped_microseconds(raw, kind, use.time_unit)
        if role == "instant":
            return _microseconds(raw, kind)
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
        found: list[tuple[str, pl.Expr]] = []
        if use.role in ("key", "time"):
            found.append((f"{name} is null", raw.is_null()))
        if use.role == "time":
            found.append((f"{name} is not a time", unreadable))
            found.append((f"{name} is negative", typed < 0))
            found.append((f"{name} is not before 2200", typed >= MAX_TIME))
        elif use.role == "instant" and self.is_text:
            found.append((f"{name} is not a time", unreadable))
        elif use.role in ("label", "number") and self.is_text:
            found.append((f"{name} is not a number", unreadable))
        elif use.role in ("key", "value") and self.kinds[name] in ("integer", "text"):
            found.append((f"{name} is not a signed 64-bit integer", unreadable))
        return found

    def integer_counts(self, column: str) -> tuple[int, int]:
        """How many values of a text column are written as integers, and how many there are."""
        text = pl.col(column)
        is_integer = text.str.contains(_INTEGER_TEXT) & text.cast(pl.Int64, strict=False).is_not_null()
        counted = self.read({"integers": is_integer.sum(), "values": text.count()})
        return int(counted["integers"][0]), int(counted["values"][0])

    def rows(self, source_rows: np.ndarray) -> pl.DataFrame:
        """Some rows as they are in the source, by their numbers."""
        wanted = pl.Series(source_rows, dtype=pl.UInt32 if self.num_rows < 2**32 else pl.UInt64)
        return self.frame.with_row_index("@row").filter(pl.col("@row").is_in(wanted.implode())).drop("@row").collect()


_NULL_AS: dict[Role, pl.DataType | type[pl.DataType]] = {
    "time": pl.Int64,
    "type": pl.String,
    "label": pl.Float64,
    "value": pl.Int64,
    "number": pl.Float64,
    "instant": pl.Int64,
    "bag": pl.List(pl.Int64),
    "vector": pl.List(pl.Float32),
}


def _clipped_microseconds(raw: pl.Expr, kind: Kind, unit: str) -> pl.Expr:
    """Times as UTC microseconds; those outside 1970 to 2200 end just outside: none wraps around or looks valid."""
    if kind == "timestamp":
        return raw.to_physical().clip(-1, MAX_TIME)
    clipped = raw.cast(pl.Int64, strict=False).clip(-1, MAX_TIME // 1_000_000 * _UNITS_IN_SECOND[unit])
    scaled = clipped // 1_000 if unit == "ns" else clipped * (1_000_000 // _UNITS_IN_SECOND[unit])
    return pl.coalesce(scaled, _parsed(raw).clip(-1, MAX_TIME)) if kind == "text" else scaled


def _microseconds(raw: pl.Expr, kind: Kind) -> pl.Expr:
    """Times that only features read: any year, integers in microseconds."""
    if kind in ("timestamp", "date"):
        return raw.cast(pl.Datetime("us")).to_physical()
    whole = raw.cast(pl.Int64, strict=False)
    return pl.coalesce(whole, _parsed(raw)) if kind == "text" else whole


def _parsed(text: pl.Expr) -> pl.Expr:
    """ISO 8601 text as UTC microseconds; UTC where it has no offset."""
    iso = text.str.replace(" ", "T", literal=True)
    zoned = iso.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%#z", time_unit="us", time_zone="UTC", strict=False)
    naive = iso.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False)
    return pl.coalesce(zoned.to_physical(), naive.to_physical())


def settle_key_types(sources: Iterable[tuple[Source, str]], *, tolerance: float) -> list[Source]:
    """Gives the key columns of several views one type.

    A Parquet column decides; all of them must agree. Where there is only CSV, keys are integers if all but
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
                    f"{source.place}: column {column!r} must hold {_words(settled)} as {first_source.place} column "
                    f"{first_column!r} does, got {_words(source.kinds[column])}",
                    hint="write the keys with one type in every view",
                )
    else:
        counts = [s.integer_counts(c) for s, c in sources if s.is_text]
        integers, values = sum(i for i, _ in counts), sum(v for _, v in counts)
        settled = "integer" if integers >= (1.0 - tolerance) * values else "text"
    return [replace(s, key_types={**s.key_types, c: settled}) for s, c in sources]


def settle_value_types(source: Source, uses: Iterable[Use]) -> Source:
    """Types the text columns of a CSV that hold plain values: integers if every one is, else text."""
    if not source.is_text:
        return source
    columns = {u.column for u in uses if u.role == "value"} - set(source.key_types)
    found: dict[str, Kind] = {}
    for column in sorted(columns):
        integers, values = source.integer_counts(column)
        found[column] = "integer" if integers == values else "text"
    kinds = {**source.kinds, **{c: k for c, k in found.items() if k == "integer"}}
    casts = [pl.col(c).cast(pl.Int64) for c, k in found.items() if k == "integer"]
    return replace(source, kinds=kinds, frame=source.frame.with_columns(casts))


def open_source(view: str, root: Path, pattern: str, uses: Sequence[Use], *, staging: Path) -> Source:
    """Finds a view's files and checks their columns.

    Args:
        view: its name in the schema.
        root: folder that ``pattern`` is relative to.
        pattern: a file, a folder of parts, or a glob pattern.
        uses: what the schema reads.
        staging: folder for the Parquet form of a CSV.

    Raises:
        SourceError: no file, a file that cannot be read, a missing column, or one of the wrong type; all columns of a
            file at once.
    """
    files = find_files(view, root, pattern)
    is_text = files[0].name.endswith(_CSV_SUFFIXES)
    scans = [_scan(file) for file in files]
    schemas = [_schema_of(file, scan) for file, scan in zip(files, scans, strict=True)]
    for file, columns in zip(files, schemas, strict=True):
        _check(file, columns, uses, is_text=is_text)
    names = list(dict.fromkeys(u.column for u in uses))
    kinds = _agreed_kinds(files, schemas, names)
    if is_text:
        scans = [
            _staged(file, scan.select(names), staging / f"{view}-{position:05d}.parquet")
            for position, (file, scan) in enumerate(zip(files, scans, strict=True))
        ]
    else:
        scans = [
            scan.select(_uniform(c, columns[c], kinds[c]) for c in names)
            for scan, columns in zip(scans, schemas, strict=True)
        ]
    frame = pl.concat(scans, how="vertical_relaxed") if len(scans) > 1 else scans[0]
    try:
        num_rows = int(pl.concat([s.select(pl.len()) for s in scans]).collect().sum().item())
    except (PolarsError, OSError) as err:
        raise SourceError(f"{files[0].parent}: {view} cannot be read: {_first_line(err)}") from err
    return Source(view, files, num_rows, frame, kinds, is_text, {})


def find_files(view: str, root: Path, pattern: str) -> tuple[Path, ...]:
    """The files of a view, in the order that numbers its rows.

    Raises:
        SourceError: there are none, or Parquet and CSV are mixed.
    """
    field = f"views.{view}.path"
    path = root / pattern
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path))]
        files = [p for p in files if _format_of(p) is not None]
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]  # noqa: PTH207 - any root
    if not files:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        place = "holds no Parquet or CSV file" if path.is_dir() else "does not exist"
        raise SourceError(f"{field}: {path} {place}", hint=nearest(path.name, beside) if beside else None)
    formats = {_format_of(f) for f in files}
    if None in formats:
        odd = next(f for f in files if _format_of(f) is None)
        raise SourceError(f"{field}: {odd} must end in .parquet or {', '.join(_CSV_SUFFIXES)}")
    if len(formats) > 1:
        raise SourceError(
            f"{field}: {path} must hold Parquet or CSV, got both", hint="give a pattern such as folder/*.parquet"
        )
    return tuple(sorted(files, key=lambda p: p.as_posix()))


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith((".", "_")) for part in relative.parts)


def _format_of(file: Path) -> str | None:
    if file.name.endswith((".parquet", ".pq")):
        return "parquet"
    return "csv" if file.name.endswith(_CSV_SUFFIXES) else None


def _scan(file: Path) -> pl.LazyFrame:
    if _format_of(file) == "parquet":
        return pl.scan_parquet(file, glob=False, hive_partitioning=False)
    separator = "\t" if ".tsv" in file.name else ","
    return pl.scan_csv(file, separator=separator, infer_schema=False, glob=False)


def _schema_of(file: Path, scan: pl.LazyFrame) -> dict[str, pl.DataType]:
    try:
        return dict(scan.collect_schema())
    except (PolarsError, OSError) as err:
        raise SourceError(f"{file} cannot be read as {_FORMATS[_format_of(file)]}: {_first_line(err)}") from err


def _staged(file: Path, scan: pl.LazyFrame, target: Path) -> pl.LazyFrame:
    """A CSV as Parquet of text columns, written in bounded memory."""
    stripped = pl.all().str.strip_chars()
    cleaned = pl.when(stripped == "").then(None).otherwise(stripped).name.keep()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        scan.select(cleaned).sink_parquet(target, compression="uncompressed", maintain_order=True)
    except (PolarsError, OSError) as err:
        raise SourceError(f"{file} cannot be read as CSV: {_first_line(err)}") from err
    return pl.scan_parquet(target, glob=False, hive_partitioning=False)


def _check(file: Path, columns: Mapping[str, pl.DataType], uses: Sequence[Use], *, is_text: bool) -> None:
    problems, hints = [], []
    for use in uses:
        if use.column not in columns:
            problems.append(f"column {use.column!r} must exist ({use.reader} reads it)")
            hints.append(f"{use.column!r}: {nearest(use.column, columns)}")
            continue
        problem = _type_problem(use, columns[use.column], is_text=is_text)
        if problem is not None:
            problems.append(problem)
    if len(problems) == 1:
        raise SourceError(f"{file}: {problems[0]}", hint="; ".join(hints) or None)
    if problems:
        raise SourceError(
            f"{file}: {len(problems)} problems\n  " + "\n  ".join(problems), hint="; ".join(hints) or None
        )


def _type_problem(use: Use, dtype: pl.DataType, *, is_text: bool) -> str | None:
    kind = kind_of(dtype)
    name = f"column {use.column!r} ({use.reader})"
    if use.role == "bag" and kind == "text":
        return None if use.separator else f"{name} must be a list, or its feature must give a separator, got text"
    if is_text:
        return f"{name} must be a list, which CSV cannot hold: use Parquet" if use.role == "vector" else None
    if kind == "null" or kind in _ACCEPTED[use.role]:
        return None
    accepted = " or ".join(_words(k) for k in _ACCEPTED[use.role])
    return f"{name} must hold {accepted}, got {str(dtype).lower()}"


def kind_of(dtype: pl.DataType) -> Kind:
    """What a Polars type holds, as far as the schema cares."""
    if dtype.is_integer():
        return "integer"
    if dtype.is_float() or dtype.is_decimal():
        return "number"
    if isinstance(dtype, pl.Boolean):
        return "boolean"
    if isinstance(dtype, (pl.String, pl.Categorical, pl.Enum)):
        return "text"
    if isinstance(dtype, pl.Datetime):
        return "timestamp"
    if isinstance(dtype, pl.Date):
        return "date"
    if isinstance(dtype, (pl.List, pl.Array)):
        return "list" if kind_of(_inner(dtype)) in ("integer", "number", "boolean", "text", "null") else "other"
    return "null" if isinstance(dtype, pl.Null) else "other"


def _inner(dtype: pl.List | pl.Array) -> pl.DataType:
    inner = dtype.inner
    return inner if isinstance(inner, pl.DataType) else inner()


def _agreed_kinds(
    files: Sequence[Path], schemas: Sequence[Mapping[str, pl.DataType]], names: Sequence[str]
) -> dict[str, Kind]:
    """What each column holds in all parts; an all-null part takes the kind of the others."""
    kinds: dict[str, Kind] = {}
    for name in names:
        chosen: Kind = "null"
        for file, columns in zip(files, schemas, strict=True):
            kind = kind_of(columns[name])
            if {kind, chosen} == {"integer", "number"}:
                kind = chosen = "number"
            if chosen == "null":
                chosen = kind
            elif kind not in ("null", chosen):
                raise SourceError(
                    f"{file}: column {name!r} must hold {_words(chosen)} as in {files[0].name}, got {_words(kind)}",
                    hint="write every part with the same types",
                )
        kinds[name] = chosen
    return kinds


def _uniform(name: str, dtype: pl.DataType, kind: Kind) -> pl.Expr:
    """A column with the one type that its kind has in all parts."""
    column = pl.col(name)
    if kind == "text":
        return column.cast(pl.String)
    if kind == "integer":
        # Wider types stay as they are: a value past 63 bits is a broken row, and must be seen.
        return column if isinstance(dtype, (pl.UInt64, pl.Int128)) else column.cast(pl.Int64)
    if kind == "number":
        return column.cast(pl.Float32 if isinstance(dtype, pl.Float32) else pl.Float64)
    if isinstance(dtype, pl.Datetime):
        # By hand, so that a zone means UTC, nanoseconds round down, and years past 290,000 do not wrap around.
        physical = column.to_physical()
        widest = 9 * 10**15
        micros = {"ms": physical.clip(-widest, widest) * 1_000, "us": physical, "ns": physical // 1_000}[
            dtype.time_unit
        ]
        return micros.cast(pl.Datetime("us"))
    if isinstance(dtype, pl.Array):
        column = column.arr.to_list()
    if isinstance(dtype, (pl.List, pl.Array)) and isinstance(_inner(dtype), (pl.Categorical, pl.Enum)):
        return column.cast(pl.List(pl.String))
    return column


def _words(kind: Kind) -> str:
    return {
        "integer": "integers",
        "number": "floating-point numbers",
        "boolean": "booleans",
        "text": "text",
        "timestamp": "timestamps",
        "date": "dates",
        "list": "lists of values",
        "null": "nothing",
        "other": "values of an unsupported type",
    }[kind]


def _first_line(err: BaseException) -> str:
    return str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__


def to_arrow(series: pl.Series) -> pa.Array[Any]:
    """A column in Arrow's plain types: text as large_string, lists as large_list."""
    return series.rechunk().to_arrow()
