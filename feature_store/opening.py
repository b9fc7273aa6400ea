"""Finds the files of a view, opens them, and checks their columns against what the schema reads.

A missing file, a missing column or a column of the wrong type is a :class:`~recsys.errors.SourceError`, as are columns
of one name and two types in several files. Columns of hive partitions (``date=2020-01-01/part.parquet``) are integers
if every one is written as an integer, else text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import polars as pl

from feature_store.files import Located, locate, partition_values
from feature_store.formats import READ_ERRORS, DataFile, Opened, format_of, open_file, reason_of, unreadable
from feature_store.sources import INTEGER_TEXT, Kind, Role, Source, Use, inner_of, kind_of, words_of
from recsys.errors import SourceError, nearest
from recsys.schema import FormatSpec

_ACCEPTED: dict[Role, tuple[Kind, ...]] = {
    "key": ("integer", "text"),
    "time": ("integer", "timestamp", "local"),
    "sequence": ("integer",),
    "type": ("integer", "text", "boolean"),
    "label": ("integer", "number", "boolean"),
    "value": ("integer", "text", "boolean", "number"),
    "number": ("integer", "number", "boolean"),
    "instant": ("integer", "timestamp", "local", "date"),
    "bag": ("list",),
    "vector": ("list",),
}
_SEPARATORS = ("::", ";", "\t", "|", ",")


def open_source(
    view: str,
    root: str | Path,
    pattern: str,
    uses: Sequence[Use],
    *,
    staging: Path,
    declared: FormatSpec | None = None,
    is_wanted: Callable[[Located], bool] = lambda _: True,
    last: Sequence[str] = (),
    reserved: Collection[str] = (),
) -> Source:
    """Opens a view.

    Args:
        view: its name in the schema.
        root: folder or address that ``pattern`` is relative to.
        pattern: a file, a folder of parts, or a glob pattern.
        uses: what the schema reads.
        staging: folder for files that are fetched or that have to be read once as a whole.
        declared: format of the files; by their names if None.
        is_wanted: which of the files to read; at least one.
        last: files, as their identities name them, that come after the others, in this order.
        reserved: names that no column may have, for features read derived values of these names.

    Raises:
        SourceError: no file, a file that cannot be read, a missing column, one of the wrong type or of a reserved name;
            all columns of a file at once.
    """
    located = [f for f in locate(view, root, pattern, declared, cache=staging / "fetched") if is_wanted(f)]
    rank = {name: number for number, name in enumerate(last)}
    located.sort(key=lambda found: rank.get(str(found.identity["file"]), -1))
    names = list(dict.fromkeys(u.column for u in uses))
    files, opened = _open_all(view, located, declared, names, staging)
    partitions = _partitions(files, opened, names)
    scans = [_with_partitions(o.scan, p) for o, p in zip(opened, partitions, strict=True)]
    schemas = [_schema_of(file, scan) for file, scan in zip(files, scans, strict=True)]
    is_text = opened[0].typing == "text"
    zones = {u.column: u.time_zone for u in uses}
    for file, one, columns in zip(files, opened, schemas, strict=True):
        _check(file, [*one.names, *(partitions[0] if partitions else ())], columns, uses, one, reserved)
    kinds = _agreed_kinds(files, schemas, names, zones)
    if not is_text:
        scans = [
            scan.select(_uniform(c, columns[c], kinds[c]) for c in names)
            for scan, columns in zip(scans, schemas, strict=True)
        ]
    try:
        counted = pl.concat([s.select(pl.len()) for s in scans]).collect().to_series().to_list()
    except READ_ERRORS as err:
        if len(files) == 1:
            raise unreadable(files[0], err) from err
        raise SourceError(f"{files[0].name}: {view} cannot be read: {reason_of(err)}") from err
    notes = [f"{f.name} holds no rows" for f, n in zip(files, counted, strict=True) if n == 0]
    return Source(view, files, tuple(counted), tuple(scans), kinds, is_text, {}, tuple(notes))


def _open_all(
    view: str, located: Sequence[Located], declared: FormatSpec | None, names: Sequence[str], staging: Path
) -> tuple[tuple[DataFile, ...], list[Opened]]:
    files, opened = [], []
    for position, found in enumerate(located):
        spec = format_of(found.file.name, declared)
        assert spec is not None
        file = found.fetch()
        files.append(file)
        opened.append(open_file(file, spec, staging / f"{view}-{position:05d}.parquet", names))
    return tuple(files), opened


def _partitions(
    files: Sequence[DataFile], opened: Sequence[Opened], names: Sequence[str]
) -> list[dict[str, pl.Series]]:
    """The partition columns that are read, one value a file, all files of one type."""
    found = [partition_values(file) for file in files]
    keys = [name for name in names if any(name in values for values in found)]
    model = {key: next(f for f, values in zip(files, found, strict=True) if key in values) for key in keys}
    for file, one, values in zip(files, opened, found, strict=True):
        for key in keys:
            if key in values and key in one.names:
                raise SourceError(f"{file.name}: column {key!r} must be in the file or in its path, got both")
            if key not in values and key not in one.names:
                raise SourceError(
                    f"{file.name}: column {key!r} must be in the path as in that of {model[key].name}, but is not",
                    hint=f"move the file to a folder {key}=<value>",
                )
    typed: dict[str, pl.DataType] = {}
    for key in keys:
        given = [values[key] for values in found if values.get(key) is not None]
        is_whole = all(re.match(INTEGER_TEXT, value) and -(2**63) <= int(value) < 2**63 for value in given if value)
        typed[key] = pl.Int64() if is_whole and given and opened[0].typing != "text" else pl.String()
    return [
        {key: pl.Series(key, [values[key]], dtype=pl.String).cast(typed[key]) for key in keys if key in values}
        for values in found
    ]


def _with_partitions(scan: pl.LazyFrame, values: Mapping[str, pl.Series]) -> pl.LazyFrame:
    return scan.with_columns(pl.lit(v[0], dtype=v.dtype).alias(key) for key, v in values.items()) if values else scan


def _schema_of(file: DataFile, scan: pl.LazyFrame) -> dict[str, pl.DataType]:
    try:
        return dict(scan.collect_schema())
    except READ_ERRORS as err:
        raise unreadable(file, err) from err


def _check(
    file: DataFile,
    names: Sequence[str],
    columns: Mapping[str, pl.DataType],
    uses: Sequence[Use],
    opened: Opened,
    reserved: Collection[str],
) -> None:
    problems, hints = [], []
    for use in uses:
        if use.column not in columns:
            problems.append(f"column {use.column!r} must exist ({use.reader} reads it)")
            hints.append(f"{use.column!r}: {nearest(use.column, names)}")
            continue
        problem = _type_problem(use, columns[use.column], opened)
        if problem is not None:
            problems.append(problem)
    other = _other_separator(names) if opened.typing == "text" else None
    if other is not None:
        hints = [f"fields seem to be separated by {other!r}: declare format: {{kind: csv, separator: {other!r}}}"]
    taken = [name for name in dict.fromkeys([*names, *partition_values(file)]) if name in reserved]
    problems += [f"column {name!r} must not exist: it has the name of a derived value" for name in taken]
    if taken:
        hints.append("features read the derived value, not the column: rename one of the two, or leave the column out")
    problems = list(dict.fromkeys(problems))  # one derived value may read a column twice
    hint = "; ".join(dict.fromkeys(hints)) or None
    if len(problems) == 1:
        raise SourceError(f"{file.name}: {problems[0]}", hint=hint)
    if problems:
        raise SourceError(f"{file.name}: {len(problems)} problems\n  " + "\n  ".join(problems), hint=hint)


def _other_separator(names: Sequence[str]) -> str | None:
    """What separates the fields of a text file that seems to have one column only."""
    return next((c for c in _SEPARATORS if c in names[0]), None) if len(names) == 1 else None


def _type_problem(use: Use, dtype: pl.DataType, opened: Opened) -> str | None:
    kind = kind_of(dtype)
    name = f"column {use.column!r} ({use.reader})"
    if use.role == "bag" and kind == "text":
        return None if use.separator else f"{name} must be a list, or its feature must give a separator, got text"
    if opened.typing == "text":
        return f"{name} must be a list, which text cannot hold: use Parquet" if use.role == "vector" else None
    if opened.typing == "json" and kind == "text" and use.role in ("time", "instant"):
        return None
    if kind == "null" or kind in _ACCEPTED[use.role]:
        return None
    accepted = " or ".join(words_of(k) for k in _ACCEPTED[use.role] if k != "local")
    return f"{name} must hold {accepted}, got {str(dtype).lower()}"


def _agreed_kinds(
    files: Sequence[DataFile],
    schemas: Sequence[Mapping[str, pl.DataType]],
    names: Sequence[str],
    zones: Mapping[str, str],
) -> dict[str, Kind]:
    """What each column holds in all parts; an all-null part takes the kind of the others."""
    kinds: dict[str, Kind] = {}
    for name in names:
        chosen: Kind = "null"
        for file, columns in zip(files, schemas, strict=True):
            kind = kind_of(columns[name], zones[name])
            if {kind, chosen} == {"integer", "number"}:
                kind = chosen = "number"
            if chosen == "null":
                chosen = kind
            elif kind not in ("null", chosen):
                raise SourceError(
                    f"{file.name}: column {name!r} must hold {words_of(chosen)} as in {files[0].path.name}, "
                    f"got {words_of(kind)}",
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
    if isinstance(dtype, (pl.List, pl.Array)) and isinstance(inner_of(dtype), (pl.Categorical, pl.Enum)):
        return column.cast(pl.List(pl.String))
    return column
