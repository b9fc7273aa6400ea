"""The training set on disk: encoded once, memory-mapped ever after.

::

    manifest.json                    what it is, how it was made, a checksum of every file
    encoder/                         the fitted encoder
    users.arrow  items.arrow         one row an entity; row 0 is the unknown entity
    events/<history>.arrow           the event log of one history, sorted by user, then time
    <split>/requests.arrow           one row a request: user row, time, slices of the event logs, context features
    <split>/impressions.arrow        one row an impression: item row, labels, candidate features
    events/<history>.<n>.arrow       what the n-th append added to the log (:mod:`feature_store.append`)
    derived/                         what derived values carry to the next append (:mod:`feature_store.carried`)
    parts/<n>/                       its requests and impressions, of all splits; the manifest says which are whose

**A history is a reference**: a request stores ``@start.<history>`` and ``@end.<history>``, a slice of the event log
that ends strictly before the request, whatever the length. Storage is O(events + requests).

Every table is an Arrow IPC file with one uncompressed record batch, so a column is a numpy view of the mapped file:
opening a set reads nothing, and processes on one machine share one copy. Names that begin with ``@`` are ours; the
others are features. Parquet would be smaller, but must be decoded, whole row groups at a time, on every epoch.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from recsys.config import fingerprint, validate
from recsys.encoding.encoder import EncodedColumn, Encoder, Ragged
from recsys.errors import ConfigError, IntegrityError, SchemaError
from recsys.files import read_object, replacing_file, sha256_of, write_json
from recsys.schema import Schema

FORMAT = "recsys.training_set"
FORMAT_VERSION = 1
_FIELDS: dict[str, type] = {
    "schema": dict,
    "schema_fingerprint": str,
    "encoder_fingerprint": str,
    "split": dict,
    "rows": dict,
    "quarantined": dict,
    "inputs": dict,
    "summary": dict,
    "files": dict,
}
_REBUILD = "build it again with `recsys build CONFIG`"
SPLITS = ("train", "validation", "test")

KEY = "@key"
USER_ROW = "@user_row"
ITEM_ROW = "@item_row"
TIME = "@time"
ROW_START = "@row_start"
SOURCE_ROW = "@source_row"
SEQUENCE = "@sequence"


def start_column(history: str) -> str:
    """Column of requests: the first event of the user in the history's log."""
    return f"@start.{history}"


def end_column(history: str) -> str:
    """Column of requests: one past the last event strictly before the request."""
    return f"@end.{history}"


def label_column(task: str) -> str:
    """Column of impressions: the task's label, 0, 1, or NaN where it is missing."""
    return f"@label.{task}"


@dataclass(frozen=True)
class Table:
    """Equally long columns, memory-mapped.

    Attributes:
        num_rows: rows.
        columns: encoded columns by name; numpy views of the mapped file, read-only.
        keys: raw key of each row in the tables of users and items, else None.
    """

    num_rows: int
    columns: Mapping[str, EncodedColumn]
    keys: pa.Array[Any] | None = None

    def array(self, name: str) -> np.ndarray:
        """A column that is not ragged."""
        column = self.columns[name]
        assert isinstance(column, np.ndarray)
        return column


def write_table(path: str | Path, columns: Mapping[str, EncodedColumn], *, keys: pa.Array[Any] | None = None) -> None:
    """Writes equally long columns as one Arrow IPC file, atomically.

    Args:
        columns: int64 or float32 arrays of shape ``(n,)``, float32 of shape ``(n, dim)``, or :class:`Ragged`.
        keys: raw keys, for tables of entities.
    """
    names, arrays = [], []
    if keys is not None:
        names.append(KEY)
        arrays.append(keys)
    for name, column in columns.items():
        names.append(name)
        arrays.append(_to_arrow(name, column))
    batch = pa.record_batch(arrays, names=names)
    with (
        replacing_file(path) as draft,
        pa.OSFile(str(draft), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def _to_arrow(name: str, column: EncodedColumn) -> Any:
    if isinstance(column, Ragged):
        offsets: Any = pa.array(np.ascontiguousarray(column.offsets, dtype=np.int64))
        return pa.LargeListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(column.values, dtype=np.int64)))
    if column.dtype not in (np.dtype(np.int64), np.dtype(np.float32)):
        raise TypeError(f"column {name!r} must be int64 or float32, got {column.dtype}")
    if column.ndim == 1:
        return pa.array(np.ascontiguousarray(column))
    flat = pa.array(np.ascontiguousarray(column, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, column.shape[1])


def open_table(path: str | Path) -> Table:
    """Maps a file that :func:`write_table` wrote.

    Raises:
        IntegrityError: the file is missing, truncated, or not of this format.
    """
    try:
        with pa.memory_map(str(path), "r") as source:
            reader = pa.ipc.open_file(source)
            if reader.num_record_batches != 1:
                raise IntegrityError(f"{path} must hold one record batch, got {reader.num_record_batches}")
            batch = reader.get_batch(0)
    except FileNotFoundError as err:
        raise IntegrityError(f"{path} does not exist", hint="build the training set again") from err
    except (pa.ArrowInvalid, OSError) as err:
        raise IntegrityError(f"{path} cannot be read as an Arrow file: {err}", hint="build it again") from err
    keys = None
    columns: dict[str, EncodedColumn] = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        if name == KEY:
            keys = array
        else:
            columns[name] = _from_arrow(array)
    return Table(batch.num_rows, columns, keys)


def joined_tables(pieces: Sequence[tuple[Table, slice]]) -> Table:
    """Rows of several tables with the same columns, one after another.

    A single piece stays a view of its file. Columns of several are joined in memory, each when it is first asked for.

    Args:
        pieces: tables and the rows of each.
    """
    if len(pieces) == 1:
        table, rows = pieces[0]
        if rows == slice(0, table.num_rows):
            return table
    num_rows = sum(rows.stop - rows.start for _, rows in pieces)
    return Table(num_rows, _JoinedColumns(pieces), None)


class _JoinedColumns(Mapping[str, EncodedColumn]):
    def __init__(self, pieces: Sequence[tuple[Table, slice]]) -> None:
        self._pieces = pieces
        self._joined: dict[str, EncodedColumn] = {}

    def __getitem__(self, name: str) -> EncodedColumn:
        if name not in self._joined:
            self._joined[name] = joined_column([_rows(t.columns[name], rows) for t, rows in self._pieces])
        return self._joined[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces[0][0].columns)

    def __len__(self) -> int:
        return len(self._pieces[0][0].columns)


def joined_column(parts: Sequence[EncodedColumn]) -> EncodedColumn:
    """Columns of one kind, one after another; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    bags = [part for part in parts if isinstance(part, Ragged)]
    if not bags:
        return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])
    lengths = np.concatenate([np.diff(part.offsets) for part in bags])
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(np.concatenate([part.values[part.offsets[0] : part.offsets[-1]] for part in bags]), offsets)


def _rows(column: EncodedColumn, rows: slice) -> EncodedColumn:
    if not isinstance(column, Ragged):
        return column[rows]
    offsets = column.offsets[rows.start : rows.stop + 1]
    return Ragged(column.values[offsets[0] : offsets[-1]], offsets - offsets[0])


def event_log_paths(folder: Path, history: str) -> list[Path]:
    """The files of a history's event log, in the order in which they were built; none if there is no log."""
    base = folder / "events" / f"{history}.arrow"
    appended = [(int(p.name.split(".")[-2]), p) for p in base.parent.glob(f"{history}.*.arrow")]
    return [base, *(path for _, path in sorted(appended))] if base.is_file() else []


def open_event_log(folder: Path, history: str) -> Table:
    """Opens the event log of a history; see :func:`joined_tables`.

    Raises:
        IntegrityError: a file is missing or broken.
    """
    tables = [open_table(path) for path in event_log_paths(folder, history) or [folder / "events" / f"{history}.arrow"]]
    return joined_tables([(table, slice(0, table.num_rows)) for table in tables])


def _from_arrow(array: Any) -> EncodedColumn:
    if pa.types.is_large_list(array.type):
        return Ragged(array.values.to_numpy(), array.offsets.to_numpy())
    if pa.types.is_fixed_size_list(array.type):
        matrix: np.ndarray = array.values.to_numpy().reshape(len(array), array.type.list_size)
        return matrix
    column: np.ndarray = array.to_numpy()
    return column


@dataclass(frozen=True)
class Split:
    """The requests and impressions of one period."""

    name: str
    requests: Table
    impressions: Table

    @property
    def num_requests(self) -> int:
        """R over the whole split."""
        return self.requests.num_rows

    @property
    def num_rows(self) -> int:
        """N over the whole split."""
        return self.impressions.num_rows

    @cached_property
    def row_offsets(self) -> np.ndarray:
        """``(R + 1,)`` int64: rows of request ``r`` are ``row_offsets[r]`` up to ``row_offsets[r + 1]``."""
        return np.append(self.requests.array(ROW_START), self.num_rows)

    @property
    def is_flat(self) -> bool:
        """Whether every request has exactly one row."""
        return self.num_requests == self.num_rows


def _touched(path: Path) -> list[int]:
    """Changes whenever a file is written to or replaced: size, inode, times of change of content and of inode."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def is_training_set(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is that of a training set, of whatever version.

    Sets that were built before manifests had a ``format`` are known by their fields.
    """
    return manifest.get("format", FORMAT) == FORMAT and "format_version" in manifest and manifest.keys() >= {*_FIELDS}


def _no_training_set(folder: Path) -> IntegrityError:
    """What to tell of a folder that has no manifest: what happened to it, as far as can be seen."""
    place = folder.resolve()  # where a build works, if the folder is a link
    left = sorted(path.name for path in place.parent.glob(f"{glob.escape(place.name)}.tmp-*"))
    again = "`recsys build CONFIG` again: it clears away what was left and begins anew"
    if left and _is_locked(place.with_name(f"{place.name}.lock")):
        return IntegrityError(f"{folder} must hold a training set, got none yet: it is being built", hint="wait for it")
    if left:
        return IntegrityError(
            f"{folder} must hold a training set, got only {left[0]} beside it: a build was killed before its end",
            hint=f"run {again}",
        )
    whole, is_draft, _ = folder.name.partition(".tmp-")
    if is_draft and folder.is_dir():
        return IntegrityError(
            f"{folder} must hold a training set, got the unfinished work of a build of {whole}",
            hint=f"name {whole}; if it is not there, run {again}",
        )
    found = "files, but no manifest.json" if folder.is_dir() and any(folder.iterdir()) else "no manifest.json"
    return IntegrityError(f"{folder} must hold a training set, got {found}", hint=_REBUILD)


def _is_locked(path: Path) -> bool:
    """Whether a process holds a lock on a file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class EncodedTables:
    """The tables of users, items and event logs in a folder, each opened when it is first asked for.

    Attributes:
        folder: where they are.
        schema: what they hold.
    """

    def __init__(self, folder: Path, schema: Schema) -> None:
        self.folder = folder
        self.schema = schema

    @cached_property
    def users(self) -> Table:
        """Encoded user features; row 0 is the unknown user."""
        return open_table(self.folder / "users.arrow")

    @cached_property
    def items(self) -> Table:
        """Encoded item features; row 0 is the unknown item."""
        return open_table(self.folder / "items.arrow")

    @cached_property
    def events(self) -> dict[str, Table]:
        """Event log of each history."""
        return {h.name: open_event_log(self.folder, h.name) for h in self.schema.histories}


class TrainingSet(EncodedTables):
    """An opened training set.

    Example:
        >>> training_set = TrainingSet.open("runs/demo/training_set")  # doctest: +SKIP
        >>> training_set.split("train").num_rows  # doctest: +SKIP
        180000
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], schema: Schema, encoder: Encoder) -> None:
        super().__init__(folder, schema)
        self.manifest = manifest
        self.encoder = encoder
        self._splits: dict[str, Split] = {}

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Self:
        """Opens a training set without reading its rows.

        Args:
            verify: also compare every file's sha256 with the manifest.

        Raises:
            IntegrityError: it is absent, of another version, incomplete, damaged, or (with ``verify``) changed.
        """
        folder = Path(folder)
        rebuild = _REBUILD
        path = folder / "manifest.json"
        try:
            manifest = read_object(path, {}, hint=rebuild)
        except FileNotFoundError as err:
            raise _no_training_set(folder.absolute()) from err
        if manifest.get("format", FORMAT) != FORMAT:
            raise IntegrityError(f"{path} must be the manifest of a training set, got another file", hint=rebuild)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise IntegrityError(
                f"{folder} must be of format {FORMAT_VERSION}, got {manifest.get('format_version')}", hint=rebuild
            )
        manifest = read_object(path, _FIELDS, hint=rebuild)
        for relative, entry in manifest["files"].items():
            path = folder / relative
            if not path.is_file():
                raise IntegrityError(f"{path} is missing", hint=rebuild)
            if path.stat().st_size != entry["bytes"]:
                raise IntegrityError(
                    f"{path} must have {entry['bytes']} bytes, got {path.stat().st_size}", hint=rebuild
                )
            if verify and sha256_of(path) != entry["sha256"]:
                raise IntegrityError(f"{path} was changed after it was written", hint=rebuild)
        try:
            schema = validate(Schema, manifest["schema"], source=f"{folder / 'manifest.json'}: schema")
        except ConfigError as err:
            raise IntegrityError(err.message, hint=rebuild) from err
        encoder = Encoder.load(folder / "encoder")
        if encoder.fingerprint != manifest["encoder_fingerprint"]:
            raise IntegrityError(f"{folder / 'encoder'} must be the encoder that the set was built with", hint=rebuild)
        return cls(folder, manifest, schema, encoder)

    def verify_once(self) -> bool:
        """Compares every file's sha256 with the manifest, unless that was done since the files were last touched.

        What was compared is remembered in ``FOLDER.verified`` beside the folder, which is never written to after the
        build: size, inode and times of change of every file. So a file that anything has written to since is read
        again, and a second training run reads none; what a disk loses without anybody writing is noticed by the first
        reading only. Where the stamp cannot be written, every call compares.

        Reading costs 0.12 s for the 42 MiB of KuaiRand-Pure's training set on two busy cores, so about three seconds a
        gigabyte, once; with a stamp, one ``stat`` a file, under a millisecond.

        Returns:
            Whether the files were read.

        Raises:
            IntegrityError: a file was changed; it names the first.
        """
        folder = self.folder.resolve()
        stamp = folder.with_name(f"{folder.name}.verified")
        found = {name: _touched(folder / name) for name in ["manifest.json", *self.manifest["files"]]}
        try:
            if json.loads(stamp.read_text(encoding="utf-8")) == found:
                return False
        except (OSError, ValueError):
            pass
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            sums = pool.map(lambda name: sha256_of(folder / name), self.manifest["files"])
            for (name, entry), checksum in zip(self.manifest["files"].items(), sums, strict=True):
                if checksum != entry["sha256"]:
                    raise IntegrityError(
                        f"{self.folder / name} was changed after it was written: its sha256 must be "
                        f"{entry['sha256']}, got {checksum}",
                        hint="build it again with `recsys build CONFIG --force`",
                    )
        with suppress(OSError):
            write_json(stamp, found)
        return True

    @property
    def fingerprint(self) -> str:
        """sha256 over the schema, the encoder and the checksum of every file."""
        files = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return fingerprint(
            {"files": files, "schema": fingerprint(self.schema), "encoder": self.manifest["encoder_fingerprint"]}
        )

    def split(self, name: str) -> Split:
        """One of ``train``, ``validation``, ``test``.

        Raises:
            SchemaError: the split is none of these, or the set was built without it.
        """
        if name not in self._splits:
            if name not in SPLITS or not (self.folder / name / "requests.arrow").is_file():
                built = [s for s in SPLITS if (self.folder / s / "requests.arrow").is_file()]
                raise SchemaError(f"split must be one of {', '.join(built)}, got {name!r}")
            self._splits[name] = self._open_split(name)
        return self._splits[name]

    def _open_split(self, name: str) -> Split:
        whole = {"part": name, "requests": None}
        requests, impressions, row_starts, num_rows = [], [], [], 0
        for piece in self.manifest.get("pieces", {}).get(name, [whole]):
            of_requests = open_table(self.folder / piece["part"] / "requests.arrow")
            of_impressions = open_table(self.folder / piece["part"] / "impressions.arrow")
            first, stop = piece["requests"] or (0, of_requests.num_rows)
            edges = np.append(of_requests.array(ROW_START), of_impressions.num_rows)[[first, stop]].tolist()
            requests.append((of_requests, slice(first, stop)))
            impressions.append((of_impressions, slice(*edges)))
            row_starts.append(of_requests.array(ROW_START)[first:stop] - edges[0] + num_rows)
            num_rows += edges[1] - edges[0]
        table = joined_tables(requests)
        if table is not requests[0][0]:  # rows count from the first of the split
            counted = {ROW_START: np.concatenate(row_starts)}
            table = Table(table.num_rows, ChainMap(counted, table.columns))  # type: ignore[arg-type]
        return Split(name, table, joined_tables(impressions))
