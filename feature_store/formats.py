"""Files of every format as lazy frames.

Parquet and Arrow files are read where they lie. Text has no types that could be trusted, and lines that can break: it
is read once, strictly, into a Parquet file beside the result (*staged*). A line with too few or too many fields, an
open quote, other bytes than the encoding has, a repeated column: each is a :class:`~recsys.errors.SourceError` that
names the file and the place in it.

CSV, multi-character separators (``::``) and libfm are staged as text, surrounding blanks removed, empty cells missing;
JSON lines and Arrow streams are staged with their types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from polars.exceptions import PolarsError

from recsys.errors import SourceError
from recsys.files import damage_of
from recsys.schema import ArrowFormat, CsvFormat, FormatSpec, JsonLinesFormat, LibfmFormat, ParquetFormat

SUFFIXES: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "csv": (".csv", ".csv.gz", ".tsv", ".tsv.gz"),
    "arrow": (".arrow", ".ipc", ".feather"),
    "json_lines": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"),
    "libfm": (".libfm", ".libfm.gz"),
}
WORDS = {"parquet": "Parquet", "csv": "CSV", "arrow": "Arrow", "json_lines": "JSON lines", "libfm": "libfm"}
"""Names of the formats, as messages give them."""

Typing = Literal["typed", "json", "text"]
"""Whether columns have types; JSON has, save that it writes times as text."""

READ_ERRORS = (PolarsError, pl.exceptions.PanicException, pa.ArrowException, OSError)
"""What reading a broken file raises."""

_BY_KIND: dict[str, FormatSpec] = {
    "parquet": ParquetFormat(),
    "arrow": ArrowFormat(),
    "json_lines": JsonLinesFormat(),
    "libfm": LibfmFormat(),
}
_BLOCK_BYTES = 8 << 20
_SHOWN = 3
_BLANK, _BEYOND_ASCII = 0x20, 0x80
_IN_LINE = "\x01"
"""A separator that no text holds: makes each line one field."""


@dataclass(frozen=True)
class DataFile:
    """One file of a view.

    Attributes:
        path: where it can be read.
        name: as messages give it: the path, or the address that it was fetched from.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class Opened:
    """A file as a lazy frame.

    Attributes:
        scan: columns, lazily, rows in order; of staged text, those that were asked for.
        names: all columns of the file.
        typing: how far their types can be trusted.
    """

    scan: pl.LazyFrame
    names: tuple[str, ...]
    typing: Typing


def format_of(name: str, declared: FormatSpec | None = None) -> FormatSpec | None:
    """The format of a file: as declared, else by the end of its name; None if that says nothing."""
    if declared is not None:
        return declared
    lower = name.lower()
    kind = next((kind for kind, ends in SUFFIXES.items() if lower.endswith(ends)), None)
    if kind is None:
        return None
    if kind == "csv":
        return CsvFormat(separator="\t" if lower.endswith((".tsv", ".tsv.gz")) else ",")
    return _BY_KIND[kind]


def open_file(file: DataFile, spec: FormatSpec, target: Path, wanted: Container[str]) -> Opened:
    """Opens one file.

    Args:
        file: what to read.
        spec: its format.
        target: where its staged form may be written.
        wanted: columns that will be read.

    Raises:
        SourceError: it is not of the format, is cut short, or has a column twice.
    """
    try:
        if isinstance(spec, ParquetFormat):
            return _opened(_parquet(file), "typed")
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(spec, ArrowFormat):
            return _opened(_arrow(file, target), "typed")
        if isinstance(spec, JsonLinesFormat):
            return _opened(_json_lines(file, target), "json")
        _check_encoding(file)
        if isinstance(spec, LibfmFormat):
            return _opened(_lines(file, "utf-8", target, lambda chunks: _split_entries(file, chunks)), "text")
        if len(spec.separator.encode()) > 1:
            split = _lines(file, spec.encoding, target, lambda chunks: _split_fields(file, spec, chunks))
            return _opened(split, "text")
        names = list(spec.columns) if spec.columns is not None else _header(file, spec)
        _check_once(file, names)
        return Opened(_csv(file, spec, target, names, wanted), tuple(names), "text")
    except READ_ERRORS as err:
        raise unreadable(file, err, spec.kind) from err


def unreadable(file: DataFile, err: BaseException, kind: str | None = None) -> SourceError:
    """The error of a file that cannot be read: whether it is cut short, damaged or of another format, and what to do.

    Args:
        file: which one.
        err: what its reader raised.
        kind: its format; by its name if not given.
    """
    if kind is None:
        spec = format_of(file.name)
        kind = "parquet" if spec is None else spec.kind
    words, hint = damage_of(file.path, kind, reason_of(err))
    return SourceError(f"{file.name} cannot be read as {WORDS[kind]}: {words}", hint=hint)


def _opened(scan: pl.LazyFrame, typing: Typing) -> Opened:
    return Opened(scan, tuple(scan.collect_schema()), typing)


def reason_of(err: BaseException) -> str:
    """The first line of what a reader says; without what it quotes from the file."""
    text = str(err).strip()
    line = text.splitlines()[0] if text else type(err).__name__
    return line.split("`")[0].strip(" :") if "`" in line else line


def _check_once(file: DataFile, names: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise SourceError(
            f"{file.name}: column {repeated[0]!r} must exist once, got it twice or more",
            hint="rename or drop the repeated columns",
        )


def _parquet(file: DataFile) -> pl.LazyFrame:
    scan = pl.scan_parquet(file.path, glob=False, hive_partitioning=False)
    try:
        scan.collect_schema()
    except PolarsError:
        _check_once(file, pq.read_schema(file.path).names)
        raise
    return scan


def _arrow(file: DataFile, target: Path) -> pl.LazyFrame:
    with file.path.open("rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
    if is_file:
        with pa.memory_map(str(file.path)) as mapped:
            _check_once(file, pa.ipc.open_file(mapped).schema.names)
        scan = pl.scan_ipc(file.path, glob=False, hive_partitioning=False)
        scan.collect_schema()
        return scan
    with pa.OSFile(str(file.path), "rb") as source, pa.ipc.open_stream(source) as reader:
        _check_once(file, reader.schema.names)
        return _staged(reader.schema, reader, target)


def _staged(schema: pa.Schema, batches: Any, target: Path) -> pl.LazyFrame:
    """Record batches as a Parquet file, written in bounded memory."""
    with _writer(target, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return pl.scan_parquet(target, glob=False, hive_partitioning=False)


def _writer(target: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Of files that are read once, soon: dictionaries, statistics and compression would cost more than they save."""
    return pq.ParquetWriter(target, schema, compression="none", use_dictionary=False, write_statistics=False)


def _check_encoding(file: DataFile) -> None:
    with file.path.open("rb") as stream:
        start = stream.read(2)
    if not start:
        raise SourceError(f"{file.name} must hold text, but is empty")
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise SourceError(f"{file.name} must be UTF-8, got UTF-16", hint="convert it: iconv -f UTF-16 -t UTF-8")


def _input(file: DataFile) -> Any:
    with file.path.open("rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    compression: Any = "gzip" if is_gzip else None
    return pa.input_stream(str(file.path), compression=compression)


def _csv(file: DataFile, spec: CsvFormat, target: Path, names: list[str], wanted: Container[str]) -> pl.LazyFrame:
    kept = [name for name in names if name in wanted]
    read = list(dict.fromkeys([*kept, names[-1]]))  # the last field is where an open quote shows
    text = pa.schema([(name, pa.large_string()) for name in kept])
    last = None
    with _writer(target, text) as writer:
        for batch in _csv_batches(file, spec, names, read, threads=True):
            columns = [_stripped(batch.column(name)) for name in kept]
            writer.write_batch(pa.record_batch(columns, schema=text))
            last = batch.column(names[-1])[-1].as_py() if len(batch) else last
    if last and "\n" in last and not _ends_with_quote(file):
        raise SourceError(f"{file.name}: the quote in the last field of the last row must be closed, but never is")
    return pl.scan_parquet(target, glob=False, hive_partitioning=False)


def _stripped(texts: Any) -> Any:
    """Texts without the blanks around them; nothing is done where no text can have any."""
    content = texts.buffers()[2]
    held = np.empty(0, np.uint8) if content is None else np.frombuffer(content, np.uint8)
    if not ((held <= _BLANK) | (held >= _BEYOND_ASCII)).any():
        return texts
    frame = pl.DataFrame({"text": pl.Series(texts, dtype=pl.String)}).select(_cleaned())
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest()).column(0).combine_chunks()


def _cleaned() -> pl.Expr:
    stripped = pl.all().str.strip_chars()
    return pl.when(stripped == "").then(None).otherwise(stripped).name.keep()


def _header(file: DataFile, spec: CsvFormat) -> list[str]:
    """Names in the first line; of many columns of a wrong separator, one."""
    parse = pa_csv.ParseOptions(delimiter=spec.separator, newlines_in_values=True, invalid_row_handler=lambda _: "skip")
    read = pa_csv.ReadOptions(encoding=spec.encoding, use_threads=False, block_size=1 << 20)
    try:
        with pa_csv.open_csv(_input(file), read_options=read, parse_options=parse) as reader:
            return list(reader.schema.names)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        with _input(file) as stream:
            line = stream.read(1 << 20).split(b"\n")[0].decode(spec.encoding, errors="replace")
        return [name.strip().strip('"') for name in line.lstrip("\ufeff").split(spec.separator)]


def _csv_batches(
    file: DataFile, spec: CsvFormat, names: list[str], read_names: list[str], *, threads: bool
) -> Iterator[pa.RecordBatch]:
    found: list[tuple[int | None, int]] = []

    def refuse(row: Any) -> Literal["skip", "error"]:
        found.append((row.number, row.actual_columns))
        return "error" if len(found) == _SHOWN or threads else "skip"

    read = pa_csv.ReadOptions(
        use_threads=threads,
        block_size=_BLOCK_BYTES,
        encoding=spec.encoding,
        column_names=names,
        skip_rows=0 if spec.columns is not None else 1,
    )
    parse = pa_csv.ParseOptions(delimiter=spec.separator, newlines_in_values=True, invalid_row_handler=refuse)
    convert = pa_csv.ConvertOptions(
        column_types={name: pa.large_string() for name in names},
        include_columns=read_names,
        strings_can_be_null=True,
        null_values=[""],
        check_utf8=True,
    )
    try:
        with pa_csv.open_csv(_input(file), read_options=read, parse_options=parse, convert_options=convert) as reader:
            yield from reader
    except (pa.ArrowInvalid, UnicodeDecodeError) as err:
        if not found:
            _explain(file, names, err)
    if found and threads:
        for _ in _csv_batches(
            file, spec, names, read_names, threads=False
        ):  # once more, slowly, for the numbers of the rows
            pass
    if found:
        row, got = found[0]
        model = "as the first row has" if spec.columns is None else "as format.columns has"
        raise SourceError(
            f"{file.name}: row {row} must have {len(names)} fields, {model}, got {got}"
            + ("; more such rows follow" if len(found) > 1 else ""),
            hint="the file may be cut short, a field with the separator may lack its quotes, or a quote its end "
            "(row 1 is the first line, blank lines are not counted)",
        )


def _explain(file: DataFile, names: Sequence[str], err: Exception) -> None:
    """Raises what a CSV reader's error means."""
    text = str(err)
    if "Empty CSV" in text or "nothing to read" in text.lower() or "Could not skip initial" in text:
        return  # a header and nothing else
    if isinstance(err, UnicodeDecodeError) or "invalid UTF8" in text:
        column = text.partition("column #")[2].partition(":")[0]
        row = text.partition("Row #")[2].partition(":")[0]
        place = f"column {names[int(column)]!r}" if column.isdecimal() else "the text"
        raise SourceError(
            f"{file.name}: {place} must be UTF-8" + (f" in row {row}" if row else "") + ", got other bytes",
            hint="if it is Western European text, declare format: {kind: csv, encoding: latin-1} for the view",
        ) from err
    if "straddl" in text or "out of sync" in text:
        raise SourceError(f"{file.name}: a quote must be closed within {_BLOCK_BYTES >> 20} MiB, but is not") from err
    if "Row #" in text and "Expected" in text:  # a row whose bytes are no text; what follows quotes it
        row, _, rest = text.partition("Row #")[2].partition(":")
        got = rest.partition("got ")[2].split(":")[0]
        raise SourceError(
            f"{file.name}: row {row} must have {len(names)} fields of text, got {got} and other bytes",
            hint="the file may be damaged: write or copy it again (row 1 is the first line)",
        ) from err
    raise unreadable(file, err, "csv") from err


def _ends_with_quote(file: DataFile) -> bool:
    tail = b""
    with _input(file) as stream:
        while chunk := stream.read(1 << 20):
            tail = (tail + chunk)[-64:]
    return tail.rstrip(b"\r\n").endswith(b'"')


Chunks = Iterator[tuple[int, pl.Series]]
"""Lines of a file, a chunk at a time, each with the number of its first line from 1."""


def _lines(
    file: DataFile, encoding: str, target: Path, split: Callable[[Chunks], Iterator[pl.DataFrame]]
) -> pl.LazyFrame:
    """A file cut into fields line by line, as Parquet of text columns; blank lines are left out."""
    read = pa_csv.ReadOptions(use_threads=True, block_size=_BLOCK_BYTES, encoding=encoding, column_names=["line"])
    parse = pa_csv.ParseOptions(delimiter=_IN_LINE, quote_char=False, ignore_empty_lines=False)
    convert = pa_csv.ConvertOptions(column_types={"line": pa.large_string()}, strings_can_be_null=False)

    def chunks() -> Chunks:
        number = 1
        with pa_csv.open_csv(_input(file), read_options=read, parse_options=parse, convert_options=convert) as reader:
            for batch in reader:
                yield number, pl.Series("line", batch.column(0))
                number += len(batch)

    writer = None
    try:
        for frame in split(chunks()):
            table = frame.select(_cleaned()).to_arrow()
            if writer is None:
                writer = _writer(target, table.schema)
            writer.write_table(table)
    except (pa.ArrowInvalid, UnicodeDecodeError) as err:
        _explain(file, ["line"], err)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise SourceError(f"{file.name} must hold at least one line, got none")
    return pl.scan_parquet(target, glob=False, hive_partitioning=False)


def _split_fields(file: DataFile, spec: CsvFormat, chunks: Chunks) -> Iterator[pl.DataFrame]:
    names = spec.columns
    for number, lines in chunks:
        rows = _numbered(lines, number)
        if names is None:
            if len(rows) == 0:
                continue
            names = tuple(rows["line"][0].split(spec.separator))
            _check_once(file, names)
            rows = rows[1:]
        found = rows.select("number", got=pl.col("line").str.count_matches(spec.separator, literal=True) + 1)
        _check_widths(file, found, len(names), f"fields between {spec.separator}")
        fields = rows["line"].str.split_exact(spec.separator, len(names) - 1)
        yield fields.struct.rename_fields(list(names)).struct.unnest()


def _numbered(lines: pl.Series, first: int) -> pl.DataFrame:
    frame = pl.DataFrame({"line": lines}).with_row_index("number", offset=first)
    return frame.filter(pl.col("line").str.strip_chars() != "")


def _check_widths(file: DataFile, found: pl.DataFrame, wanted: int, words: str) -> None:
    wrong = found.filter(pl.col("got") != wanted)
    if len(wrong):
        raise SourceError(
            f"{file.name}: line {wrong['number'][0]} must have {wanted} {words}, got {wrong['got'][0]}"
            + ("; more such lines follow" if len(wrong) > 1 else "")
        )


def _split_entries(file: DataFile, chunks: Chunks) -> Iterator[pl.DataFrame]:
    width = 0
    row = 0
    for number, lines in chunks:
        cleaned = lines.str.strip_chars().str.replace_all(r"\s+", " ")
        entries = _numbered(cleaned, number).with_columns(pl.col("line").str.split(" "))
        if len(entries) == 0:
            continue
        width = width or len(entries["line"][0])
        found = entries.select("number", got=pl.col("line").list.len())
        _check_widths(file, found, width, "entries (a label and index:value)")
        columns = [
            (pl.int_range(pl.len()) + row).cast(pl.String).alias("row"),
            pl.col("line").list.get(0).alias("label"),
        ]
        for j in range(1, width):
            pair = pl.col("line").list.get(j).str.split_exact(":", 1)
            columns += [pair.struct[0].alias(f"x{j}"), pair.struct[1].alias(f"v{j}")]
        entry = r"^[0-9]+:[-+0-9.eE]+$"
        is_pair = pl.col("line").list.slice(1).list.eval(pl.element().str.contains(entry).all()).list.first()
        wrong = entries.filter(~is_pair) if width > 1 else entries[:0]
        if len(wrong):
            raise SourceError(f"{file.name}: line {wrong['number'][0]} must hold a label and entries index:value")
        yield entries.select(columns)
        row += len(entries)


def _json_lines(file: DataFile, target: Path) -> pl.LazyFrame:
    read = pa_json.ReadOptions(use_threads=True, block_size=_BLOCK_BYTES)
    try:
        table = pa_json.read_json(_input(file), read_options=read)
    except pa.ArrowInvalid as err:
        text = str(err)
        if "Empty JSON" in text:
            raise SourceError(f"{file.name} must hold at least one line, but is empty") from err
        column, row = text.partition("Column(/")[2].partition(")")[0], text.partition(" in row ")[2].split("\n")[0]
        place = f"{file.name}: row {int(row) + 1}" if row.isdecimal() else file.name
        if "changed from" in text and column:
            kinds = text.partition("changed from ")[2].partition(" in row")[0]
            raise SourceError(
                f"{place}: column {column!r} must hold one type in all lines, but changed from {kinds}",
                hint="write it as a number, or as text, everywhere (rows count from 1 within a block of the file)",
            ) from err
        if "specified twice" in text and column:
            raise SourceError(f"{place}: column {column!r} must exist once in a line, got it twice") from err
        if "compressed" in text or "zlib" in text:
            raise
        raise SourceError(
            f"{place} must hold one JSON object a line: {reason_of(err)}",
            hint="if it is the last row, the file is cut short: write or copy it again",
        ) from err
    return _staged(table.schema, table.to_batches(max_chunksize=1 << 18), target)
