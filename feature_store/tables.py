"""Encodes joined data column by column and writes the tables of a training set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa

from feature_store.joined import Joined
from feature_store.point_in_time import history_slices
from feature_store.tied_events import TieRule
from recsys.encoding import EncodedColumn, Encoder, Ragged
from recsys.files import sha256_of, sync
from recsys.schema import Dense, Feature
from recsys.training_set import (
    ITEM_ROW,
    ROW_START,
    SEQUENCE,
    SOURCE_ROW,
    TIME,
    USER_ROW,
    end_column,
    label_column,
    start_column,
    write_table,
)


class Write(Protocol):
    """Who writes a table: :func:`~recsys.training_set.write_table`, or a :class:`TableWriter`."""

    def __call__(self, path: Path, columns: Mapping[str, EncodedColumn], *, keys: pa.Array[Any] | None = None) -> None:
        """See :func:`~recsys.training_set.write_table`."""


class TableWriter:
    """Writes tables and takes their checksums beside the work: while one is written, the next is encoded.

    Two tables at most are in memory. Used as a context, at whose end all are written.

    Attributes:
        described: of each file, what :func:`describe_file` says; once all are written.
    """

    def __init__(self) -> None:
        self.described: dict[Path, dict[str, Any]] = {}
        self._threads = ThreadPoolExecutor(2)  # one writes, one describes what is written
        self._writing: Future[None] | None = None
        self._describing: dict[Path, Future[dict[str, Any]]] = {}

    def write(self, path: Path, columns: Mapping[str, EncodedColumn], *, keys: pa.Array[Any] | None = None) -> None:
        """Waits for the table before, and begins to write this one, whose columns may not change any more."""
        self._wait()
        self._writing = self._threads.submit(self._write, path, columns, keys)

    def _write(self, path: Path, columns: Mapping[str, EncodedColumn], keys: pa.Array[Any] | None) -> None:
        write_table(path, columns, keys=keys)
        self._describing[path] = self._threads.submit(describe_file, path)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._threads:
            if kind is None:
                self._wait()
                self.described = {path: described.result() for path, described in self._describing.items()}


def describe_file(path: Path) -> dict[str, Any]:
    """Size, checksum and, of a table, rows of a file, which is made durable if it was not."""
    sync(path)
    entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    if path.suffix == ".arrow":
        with pa.memory_map(str(path), "r") as file:
            entry["rows"] = pa.ipc.open_file(file).get_batch(0).num_rows
    return entry


def write_tables(
    folder: Path, joined: Joined, encoder: Encoder, splits: Mapping[str, slice], *, stage: Callable[[str], None]
) -> dict[Path, dict[str, Any]]:
    """Writes every table of a training set.

    Args:
        folder: of the training set.
        joined: the data.
        encoder: fitted on it.
        splits: requests of each split.
        stage: called with the name of each stage as it begins.

    Returns:
        Of each file, what :func:`describe_file` says.
    """
    long_histories = LongHistories(joined)
    with TableWriter() as writer:
        write_entities(folder, joined, encoder, stage=stage, write=writer.write)
        for name, requests in splits.items():
            stage(f"Writing {name}")
            impressions, rows = folder / name / "impressions.arrow", joined.rows_of(requests)
            write_impressions(impressions, joined, encoder, rows, write=writer.write)
            columns = _request_columns(joined, encoder, requests, long_histories)
            writer.write(folder / name / "requests.arrow", columns)
    joined.views.notes += long_histories.notes
    return writer.described


def write_entities(
    folder: Path, joined: Joined, encoder: Encoder, *, stage: Callable[[str], None], write: Write = write_table
) -> None:
    """Writes users, items and event logs; arguments as for :func:`write_tables`."""
    stage("Writing users")
    _write_users(folder / "users.arrow", joined, encoder, write)
    stage("Writing items")
    _write_items(folder / "items.arrow", joined, encoder, write)
    for history in joined.schema.histories:
        stage(f"Writing events of {history.name}")
        _write_events(folder / "events" / f"{history.name}.arrow", joined, encoder, history.name, write)


def _write_users(path: Path, joined: Joined, encoder: Encoder, write: Write) -> None:
    """Beside its features, a user has the slice of each event log that is theirs: what serving reads histories from."""
    columns: dict[str, EncodedColumn] = {}
    for name, log in joined.logs.items():
        columns[start_column(name)] = log.user_offsets[:-1]
        columns[end_column(name)] = log.user_offsets[1:]
    for feature in joined.schema.features_of("user"):
        columns[feature.name] = encoded(encoder, feature, joined.entity_column(feature))
    write(path, columns, keys=joined.users.table_keys)


def _write_items(path: Path, joined: Joined, encoder: Encoder, write: Write) -> None:
    columns = {
        feature.name: encoded(encoder, feature, joined.entity_column(feature))
        for feature in joined.schema.features_of("item")
    }
    write(path, columns, keys=joined.items.table_keys)


def _write_events(path: Path, joined: Joined, encoder: Encoder, history: str, write: Write) -> None:
    """From here on, the events of the log are in the order that is written, tied ones too."""
    log, spec = joined.logs[history], joined.schema.history(history)
    columns: dict[str, EncodedColumn] = {ITEM_ROW: log.item_row, TIME: log.time}
    sequence = joined.event_sequence(history)
    if sequence is not None:
        columns[SEQUENCE] = sequence
    for feature in spec.event_features:
        columns[feature.name] = encoded(encoder, feature, joined.event_column(feature, history))
    columns = TieRule(encoder, spec).settle({**columns, SOURCE_ROW: log.source_row}, log.user_offsets)
    write(path, {name: column for name, column in columns.items() if name != SOURCE_ROW})


def write_impressions(
    path: Path, joined: Joined, encoder: Encoder, rows: slice, *, first_row: int = 0, write: Write = write_table
) -> None:
    """Writes impressions.

    Args:
        path: of the file.
        joined: the data.
        encoder: fitted.
        rows: of the impressions.
        first_row: the source row of the first row of the view's files, if others came before them.
        write: writes the table.
    """
    source_row = joined.source_row[rows]
    row_of_all = source_row + first_row if first_row else source_row
    columns: dict[str, EncodedColumn] = {ITEM_ROW: joined.item_row[rows], SOURCE_ROW: row_of_all}
    for task in joined.schema.tasks:
        labels = joined.views.labels(task, source_row)
        if 0 < len(labels) == np.count_nonzero(np.isnan(labels)):
            joined.views.notes.append(
                f"task {task.name!r}: column {task.label!r} is empty in all {len(labels):,} rows of {path.parent.name}"
            )
        columns[label_column(task.name)] = labels
    for feature in joined.schema.features_of("candidate"):
        columns[feature.name] = encoded(encoder, feature, joined.candidate_column(feature, rows))
    write(path, columns)


class LongHistories:
    """Counts the requests whose history is longer than what a batch reads of it.

    Args:
        joined: the data.
    """

    def __init__(self, joined: Joined) -> None:
        self._limits = {history.name: history.max_length for history in joined.schema.histories}
        self._longer = dict.fromkeys(self._limits, 0)
        self._longest = dict.fromkeys(self._limits, 0)
        self._seen = dict.fromkeys(self._limits, 0)

    def see(self, name: str, length: np.ndarray) -> None:
        """Counts some requests.

        Args:
            name: of the history.
            length: ``(R,)`` int64, of each request's.
        """
        self._seen[name] += len(length)
        self._longer[name] += int(np.count_nonzero(length > self._limits[name]))
        self._longest[name] = max(self._longest[name], int(length.max(initial=0)))

    @property
    def notes(self) -> list[str]:
        """One line a history that is cut somewhere."""
        return [
            f"history {name!r}: {longer:,} of {self._seen[name]:,} requests have one longer than max_length "
            f"{self._limits[name]} (up to {self._longest[name]:,}): all is stored, a batch reads the newest "
            f"{self._limits[name]}"
            for name, longer in self._longer.items()
            if longer
        ]


def _request_columns(
    joined: Joined, encoder: Encoder, requests: slice, long_histories: LongHistories
) -> dict[str, EncodedColumn]:
    time, user_row = joined.requests.time[requests], joined.user_row[requests]
    columns: dict[str, EncodedColumn] = {
        USER_ROW: user_row,
        TIME: time,
        ROW_START: joined.requests.row_start[requests] - joined.rows_of(requests).start,
    }
    for name, log in joined.logs.items():
        max_age = joined.schema.history(name).max_age_us
        start, end = history_slices(log, user_row, time, max_age=max_age)
        columns[start_column(name)], columns[end_column(name)] = start, end
        long_histories.see(name, end - start)
    for feature in joined.schema.features_of("context"):
        columns[feature.name] = encoded(encoder, feature, joined.context_column(feature, requests))
    return columns


def encoded(encoder: Encoder, feature: Feature, raw: pa.Array[Any]) -> EncodedColumn:
    """A column as it is stored: dense features of one number as a plain column."""
    column = encoder.encode(feature.name, raw)
    if isinstance(feature, Dense) and feature.dim == 1:
        assert not isinstance(column, Ragged)
        return column.reshape(-1)
    return column
