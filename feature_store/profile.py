"""What the columns of a view hold: types, cardinalities, missing values, ranges, time spans.

Nothing is declared yet, so everything is counted: text that is written as integers, numbers or times is recognised as
such, integers whose size fits seconds, milliseconds, microseconds or nanoseconds since 1970 as possible times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from feature_store.files import is_address, locate, partition_values
from feature_store.formats import READ_ERRORS, DataFile, format_of, open_file, reason_of, unreadable
from feature_store.sources import kind_of
from recsys.errors import SourceError
from recsys.schema import CsvFormat, FormatSpec, TimeUnit

__all__ = ["ColumnProfile", "ViewProfile", "moment_of", "opened_view", "profile_view"]

EXACT_UP_TO = 5_000_000
"""Rows up to which distinct values are counted exactly; beyond, by HyperLogLog, within a few per cent."""

_SEPARATORS = ("|", ";", ",")
_INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"
_YEARS = (datetime(1980, 1, 1, tzinfo=UTC).timestamp(), datetime(2100, 1, 1, tzinfo=UTC).timestamp())
_UNITS: dict[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True)
class ColumnProfile:
    """One column.

    Attributes:
        name: of the column.
        kind: integer, number, boolean, text, timestamp, local (a timestamp without a zone), date, list, null, other.
        type: of the file; ``text`` of formats without types, whatever the kind.
        num_null: missing values; empty cells of text.
        distinct: values that differ; None of lists.
        lowest: smallest number or time; None of others.
        highest: largest.
        median: of numbers.
        time_unit: unit in which integers would be times after 1980 and before 2100.
        separator: that splits most texts into values that repeat.
        width: elements of every list, if all have as many; 0 otherwise.
        inner: kind of the elements of lists.
        mean_length: characters of text on average.
    """

    name: str
    kind: str
    type: str
    num_null: int
    distinct: int | None
    lowest: float | int | None = None
    highest: float | int | None = None
    median: float | None = None
    time_unit: TimeUnit | None = None
    separator: str | None = None
    width: int = 0
    inner: str | None = None
    mean_length: float = 0.0

    @property
    def span(self) -> tuple[str, str] | None:
        """First and last time as text, of columns that hold times."""
        if self.lowest is None or self.highest is None:
            return None
        if self.kind in ("timestamp", "local", "date"):
            scale = 10**6
        elif self.time_unit is not None:
            scale = _UNITS[self.time_unit]
        else:
            return None
        first, last = (datetime.fromtimestamp(int(t) / scale, UTC) for t in (self.lowest, self.highest))
        zone = "" if self.kind == "local" else "Z"
        return tuple(t.strftime("%Y-%m-%d %H:%M:%S") + zone for t in (first, last))  # type: ignore[return-value]


@dataclass(frozen=True)
class ViewProfile:
    """One view.

    Attributes:
        path: as given.
        files: how many.
        num_rows: of all files.
        format: of the files, where their names do not tell it.
        columns: by name, in the order of the file.
    """

    path: str
    files: int
    num_rows: int
    format: FormatSpec | None
    columns: Mapping[str, ColumnProfile]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        columns = [asdict(c) | ({"span": c.span} if c.span else {}) for c in self.columns.values()]
        declared = None if self.format is None else self.format.model_dump(mode="json")
        return {"path": self.path, "files": self.files, "rows": self.num_rows, "format": declared, "columns": columns}


@contextmanager
def opened_view(
    root: str | Path, pattern: str, declared: FormatSpec | None
) -> Iterator[tuple[pl.LazyFrame, bool, int, FormatSpec | None]]:
    """Opens files of which no schema is known yet.

    Yields:
        The rows, whether they are untyped text, how many files there are, and the format if it has to be declared.

    Raises:
        SourceError: there are none, they cannot be read, or their columns differ.
    """
    with tempfile.TemporaryDirectory(prefix="recsys-inspect-") as scratch:
        declared = declared or _sniffed(root, pattern)
        located = locate(None, root, pattern, declared, cache=Path(scratch) / "fetched")
        files: list[DataFile] = []
        scans: list[pl.LazyFrame] = []
        names: tuple[str, ...] = ()
        is_text = False
        for position, found in enumerate(located):
            file = found.fetch()
            spec = format_of(file.name, declared)
            assert spec is not None
            opened = open_file(file, spec, Path(scratch) / f"{position:05d}.parquet", _Everything())
            partitions = partition_values(file)
            scan = opened.scan.with_columns(pl.lit(v, pl.String).alias(k) for k, v in partitions.items())
            names = names or tuple(opened.names)
            if set(opened.names) != set(names):
                odd = min(set(opened.names) ^ set(names))
                raise SourceError(f"{file.name}: column {odd!r} must be in all files or in none")
            files.append(file)
            scans.append(scan.select(*names, *partitions))
            is_text = opened.typing == "text"
        try:
            yield pl.concat(scans, how="vertical_relaxed"), is_text, len(located), declared
        except READ_ERRORS as err:
            for file, scan in zip(files, scans, strict=True):
                try:
                    scan.collect()
                except READ_ERRORS as own:
                    raise unreadable(file, own, None if declared is None else declared.kind) from err
            raise SourceError(f"{pattern} cannot be read: {reason_of(err)}") from err


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


def _sniffed(root: str | Path, pattern: str) -> FormatSpec | None:
    """The format of text files whose names or commas do not tell it; None if they do."""
    if is_address(root) or is_address(pattern):
        return None
    path = Path(root) / pattern
    if path.is_dir():
        candidates = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "_")))
        path = candidates[0] if candidates else path
    if not path.is_file():
        return None
    known = format_of(path.name)
    if (known is not None and not isinstance(known, CsvFormat)) or path.suffix == ".gz":
        return None
    with path.open("rb") as stream:
        lines = stream.read(1 << 16).splitlines()[:20]
    encoding: Any = "utf-8"
    try:
        text = [line.decode("utf-8-sig") for line in lines[:-1] or lines]
    except UnicodeDecodeError:
        encoding = "latin-1"
        text = [line.decode("latin-1") for line in lines[:-1] or lines]
    text = [line for line in text if line.strip()]
    if not text:
        return None
    counts = {s: {line.count(s) for line in text} for s in ("::", "\t", ",", ";", "|")}
    separator = next((s for s, c in counts.items() if len(c) == 1 and min(c) > 0), None)
    separator = separator or max(counts, key=lambda s: min(counts[s]))
    fields = text[0].split(separator)
    is_header = all(f.strip() and not _is_number(f) for f in fields)
    columns = None if is_header else tuple(f"c{i}" for i in range(1, len(fields) + 1))
    found = CsvFormat(separator=separator, columns=columns, encoding=encoding)
    return None if found == known else found


def _is_number(text: str) -> bool:
    try:
        float(text.strip().strip('"'))
    except ValueError:
        return False
    return True


def profile_view(root: str | Path, pattern: str, declared: FormatSpec | None = None) -> ViewProfile:
    """Profiles the columns of a file, a folder of parts or a pattern.

    Raises:
        SourceError: the files cannot be read.
    """
    with opened_view(root, pattern, declared) as (frame, is_text, num_files, spec):
        num_rows = int(frame.select(pl.len()).collect().item())
        dtypes = dict(frame.collect_schema())
        columns = {name: _profile(frame, name, dtype, num_rows, is_text) for name, dtype in dtypes.items()}
        return ViewProfile(pattern, num_files, num_rows, spec, columns)


def _collected(frame: pl.LazyFrame, expressions: Sequence[pl.Expr]) -> dict[str, Any]:
    row: dict[str, Any] = frame.select(expressions).collect(engine="streaming").row(0, named=True)
    return row


def _profile(frame: pl.LazyFrame, name: str, dtype: pl.DataType, num_rows: int, is_text: bool) -> ColumnProfile:
    kind = str(kind_of(dtype, "local"))
    column = pl.col(name)
    written = "text" if is_text else str(dtype).lower()
    if kind == "text":
        column = column.cast(pl.String)
        seen = _collected(frame.filter(column.is_not_null()).head(1000), _text_counts(column))
        if seen["values"] and seen["values"] in (seen["integers"], seen["numbers"], seen["times"]):
            seen = _collected(frame, _text_counts(column))  # what holds for the first thousand may not hold for all
        values = seen["values"]
        if values and seen["integers"] == values:
            kind, column = "integer", column.cast(pl.Int64, strict=False)
        elif values and seen["numbers"] == values:
            kind, column = "number", column.cast(pl.Float64, strict=False)
        elif values and seen["times"] == values:
            kind, column = "timestamp" if seen["zoned"] == values else "local", moment_of(column)
        elif not values:
            kind = "null"
    if kind in ("list", "other", "null"):
        return _unordered(frame, column, name, kind, written, dtype)
    distinct = column.n_unique() if num_rows <= EXACT_UP_TO else column.approx_n_unique()
    wanted = [column.null_count().alias("nulls"), distinct.alias("distinct")]
    if kind == "text":
        wanted += _text_shape(column)
    else:
        ordered = column.cast(pl.Datetime("us")).to_physical() if kind in ("timestamp", "local", "date") else column
        finite = ordered.fill_nan(None) if kind == "number" else ordered
        wanted += [finite.min().alias("lowest"), finite.max().alias("highest")]
        if kind in ("integer", "number"):
            wanted.append(finite.median().alias("median"))
    seen = _collected(frame, wanted)
    nulls = int(seen["nulls"])
    found = ColumnProfile(name, kind, written, nulls, int(seen["distinct"]) - (nulls > 0))
    if kind == "text":
        return ColumnProfile(
            **{**asdict(found), "separator": _separator_of(frame, column, seen), "mean_length": seen["length"] or 0.0}
        )
    lowest, highest = _plain(seen["lowest"]), _plain(seen["highest"])
    unit = _unit_of(lowest, highest) if kind == "integer" else None
    return ColumnProfile(
        **{**asdict(found), "lowest": lowest, "highest": highest, "median": seen.get("median"), "time_unit": unit}
    )


def _plain(value: Any) -> Any:
    return float(value) if value is not None and not isinstance(value, (int, float)) else value


def _text_counts(text: pl.Expr) -> list[pl.Expr]:
    stripped = text.str.strip_chars()
    integer = stripped.str.contains(_INTEGER) & stripped.cast(pl.Int64, strict=False).is_not_null()
    zoned = stripped.str.contains(r"^\d{4}-\d\d-\d\d[T ].*(Z|[+-]\d\d:?\d\d)$") & moment_of(text).is_not_null()
    return [
        text.count().alias("values"),
        integer.sum().alias("integers"),
        stripped.cast(pl.Float64, strict=False).is_not_null().sum().alias("numbers"),
        moment_of(text).is_not_null().sum().alias("times"),
        zoned.sum().alias("zoned"),
    ]


def moment_of(text: pl.Expr) -> pl.Expr:
    """ISO 8601 text as a time, in UTC where it has an offset, else as the clock showed it."""
    iso = text.str.strip_chars().str.replace(" ", "T", literal=True)
    zoned = iso.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%#z", time_unit="us", time_zone="UTC", strict=False)
    naive = iso.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False)
    return pl.coalesce(zoned.dt.replace_time_zone(None), naive)


def _text_shape(text: pl.Expr) -> list[pl.Expr]:
    held = [text.str.contains(s, literal=True).sum().alias(f"with {s}") for s in _SEPARATORS]
    return [text.str.len_chars().mean().alias("length"), text.count().alias("values"), *held]


def _separator_of(frame: pl.LazyFrame, text: pl.Expr, seen: Mapping[str, Any]) -> str | None:
    """The separator that a fifth of the texts hold, if their pieces repeat more than the texts do."""
    held = {s: seen[f"with {s}"] for s in _SEPARATORS}
    best = max(held, key=lambda s: held[s])
    if not seen["values"] or held[best] < 0.2 * seen["values"]:
        return None
    pieces = text.str.split(best).explode(keep_nulls=True, empty_as_null=True)
    counted = frame.select(pieces=pieces.n_unique()).collect().item()
    spaced = frame.select(text.str.contains(best + " ", literal=True).sum()).collect().item()
    return best if counted < seen["distinct"] and spaced < 0.5 * held[best] else None


def _unit_of(lowest: Any, highest: Any) -> TimeUnit | None:
    if lowest is None:
        return None
    for unit, scale in _UNITS.items():
        if _YEARS[0] * scale <= lowest and highest < _YEARS[1] * scale:
            return unit
    return None


def _unordered(
    frame: pl.LazyFrame, column: pl.Expr, name: str, kind: str, written: str, dtype: pl.DataType
) -> ColumnProfile:
    nulls = int(_collected(frame, [column.null_count().alias("nulls")])["nulls"])
    if kind != "list":
        return ColumnProfile(name, kind, written, nulls, 0 if kind == "null" else None)
    assert isinstance(dtype, (pl.List, pl.Array))
    inner = dtype.inner if isinstance(dtype.inner, pl.DataType) else dtype.inner()
    lists = column.arr.to_list() if isinstance(dtype, pl.Array) else column
    seen = _collected(frame, [lists.list.len().min().alias("least"), lists.list.len().max().alias("most")])
    width = int(seen["most"]) if seen["most"] is not None and seen["least"] == seen["most"] else 0
    return ColumnProfile(name, kind, written, nulls, None, width=width, inner=str(kind_of(inner)))
