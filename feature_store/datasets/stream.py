"""Reads large raw text files batch by batch, and writes views batch by batch: memory does not grow with the file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, Self

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from feature_store.datasets.raw import require_folder
from recsys.errors import SourceError, nearest

BLOCK_BYTES = 16 << 20
"""Text of one batch."""
_MAX_LINE_BYTES = 64 << 20


def find_file(raw_dir: Path, names: Sequence[str]) -> Path:
    """The first of some file names that a raw folder holds; downloads are unpacked under different ones.

    Raises:
        SourceError: there is none.
    """
    require_folder(raw_dir)
    for name in names:
        if (raw_dir / name).is_file():
            return raw_dir / name
    held = [p.name for p in raw_dir.iterdir()]
    raise SourceError(f"{raw_dir} must hold {' or '.join(names)}", hint=nearest(names[0], held))


def text_batches(
    path: Path,
    columns: Sequence[str],
    *,
    separator: str,
    has_header: bool,
    is_quoted: bool = False,
    chosen: Sequence[str] | None = None,
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Reads delimited text, plain or ``.gz``, as text columns; an empty field is null.

    Args:
        columns: of the file, in order; of a file with a header, those that it must have, in any order.
        separator: one character.
        has_header: whether the first line names the columns.
        is_quoted: whether ``"`` may hold separators together; else it is a character like any other.
        chosen: those to read; all of ``columns`` if not given.

    Yields:
        The number of the batch's first row, from 1 and after the header, and the batch.

    Raises:
        SourceError: the file cannot be read, lacks a column, or a line has another number of fields.
    """
    chosen = list(columns if chosen is None else chosen)
    parse = partial(_parsed, path=path, chosen=chosen, separator=separator, is_quoted=is_quoted)
    names = list(columns)
    first_line = first_row = 1
    try:
        with open_text(path) as file:
            for block in _blocks(file, path):
                text = block
                if has_header and first_line == 1:
                    header, _, text = block.partition(b"\n")
                    names = _header_names(header, path, separator, chosen)
                    first_line = 2
                frame = parse(text, names, first_line)
                if frame.height:
                    yield first_row, frame
                first_row += frame.height
                first_line += text.count(b"\n")
    except OSError as err:
        raise SourceError(
            f"{path} cannot be read after row {first_row - 1}", hint="the file may be cut short: fetch it again"
        ) from err
    if first_row == 1:
        raise SourceError(f"{path} must have rows, got an empty file")


def _blocks(file: pa.NativeFile, path: Path) -> Iterator[bytes]:
    """Whole lines, about :data:`BLOCK_BYTES` at a time; ``pyarrow.csv.open_csv`` would read ahead without a bound."""
    rest = b""
    while block := file.read(BLOCK_BYTES):
        rest += block
        end = rest.rfind(b"\n") + 1
        if end:
            yield rest[:end]
            rest = rest[end:]
        elif len(rest) > _MAX_LINE_BYTES:
            raise SourceError(f"{path} must have lines of at most {_MAX_LINE_BYTES >> 20} MiB")
    if rest:
        yield rest


def _header_names(line: bytes, path: Path, separator: str, wanted: Sequence[str]) -> list[str]:
    text = line.decode("utf-8-sig", "replace").rstrip("\r")
    names = [name.strip('"') for name in text.split(separator)]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise SourceError(
            f"{path} must have the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
            hint=f"{missing[0]}: {nearest(missing[0], names)}",
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceError(f"{path} must name each column once, got {twice} twice")
    return names


def _parsed(
    text: bytes,
    names: Sequence[str],
    first_line: int,
    *,
    path: Path,
    chosen: Sequence[str],
    separator: str,
    is_quoted: bool,
) -> pl.DataFrame:
    """Some lines as a table of text."""
    if not text.strip():
        return pl.DataFrame(schema=dict.fromkeys(chosen, pl.String))
    wrong: list[tuple[int, int, int]] = []

    def refuse(row: pa.csv.InvalidRow) -> Literal["skip", "error"]:
        wrong.append((first_line - 1 + (row.number or 1), row.expected_columns, row.actual_columns))
        return "error"

    try:
        table = pa.csv.read_csv(
            io.BytesIO(text),
            read_options=pa.csv.ReadOptions(
                use_threads=False, block_size=len(text) + 1, column_names=list(names), encoding="utf8"
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=separator, quote_char='"' if is_quoted else False, invalid_row_handler=refuse
            ),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.large_string()),
                include_columns=list(chosen),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as err:
        if wrong:
            number, expected, actual = wrong[0]
            raise SourceError(f"{path}:{number} must have {expected} fields, got {actual}") from err
        last_line = first_line + text.count(b"\n")
        raise SourceError(
            f"{path}: lines {first_line:,} to {last_line:,} must be delimited UTF-8 text",
            hint="the file may be damaged: fetch it again",
        ) from err
    return pl.DataFrame(table)


def open_text(path: Path) -> pa.NativeFile:
    """A file's bytes as a stream, unpacked if its name says that they are packed."""
    return pa.input_stream(str(path), compression="detect")


def whole_numbers(
    frame: pl.DataFrame, columns: Sequence[str], path: Path, first_row: int, *, base: int = 10, required: bool = False
) -> pl.DataFrame:
    """The same with text columns as 64-bit integers; null stays null.

    Args:
        base: of the digits.
        required: whether every row must have a value.

    Raises:
        SourceError: a value is no whole number or missing; names the first such row.
    """
    for name in columns:
        if base == 10:
            numbers = frame[name].cast(pl.Int64, strict=False)
        else:
            numbers = frame[name].str.to_integer(base=base, dtype=pl.Int64, strict=False)
        broken = numbers.is_null() if required else numbers.is_null() & frame[name].is_not_null()
        if broken.any():
            row = first_row + int(broken.arg_true()[0])
            digits = "a whole number" if base == 10 else f"a number of base {base}"
            raise SourceError(f"{path}: row {row:,}: {name} must be {digits}; {broken.sum()} such rows from there")
        frame = frame.with_columns(numbers)
    return frame


def zero_or_one(frame: pl.DataFrame, column: str, path: Path, first_row: int) -> None:
    """Checks a label.

    Raises:
        SourceError: a value is neither 0 nor 1; names the first such row.
    """
    broken = ~frame[column].is_in([0, 1]).fill_null(value=False)
    if broken.any():
        raise SourceError(f"{path}: row {first_row + int(broken.arg_true()[0]):,}: {column} must be 0 or 1")


class ViewWriter:
    """Writes one Parquet file batch by batch; all batches have the types of the first.

    Attributes:
        num_rows: rows written.
    """

    def __init__(self, path: Path) -> None:
        self.num_rows = 0
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def write(self, frame: pl.DataFrame) -> None:
        """Appends rows."""
        table = frame.to_arrow()
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._writer.write_table(table)
        self.num_rows += frame.height

    def close(self) -> None:
        """Finishes the file."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def view_writers(folder: Path, views: Sequence[str]) -> Iterator[Mapping[str, ViewWriter]]:
    """Writers of ``<view>.parquet``, closed at the end."""
    writers = {view: ViewWriter(folder / f"{view}.parquet") for view in views}
    try:
        yield writers
    finally:
        for writer in writers.values():
            writer.close()
