"""Encodes joined data column by column and writes the tables of a training set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.joined import Joined
from feature_store.point_in_time import history_slices
from recsys.encoding import EncodedColumn, Encoder, Ragged
from recsys.schema import Dense, Feature
from recsys.training_set import (
    ITEM_ROW,
    ROW_START,
    SOURCE_ROW,
    TIME,
    USER_ROW,
    end_column,
    label_column,
    start_column,
    write_table,
)


def write_tables(
    folder: Path, joined: Joined, encoder: Encoder, splits: Mapping[str, slice], *, stage: Callable[[str], None]
) -> None:
    """Writes every table of a training set.

    Args:
        folder: of the training set.
        joined: the data.
        encoder: fitted on it.
        splits: requests of each split.
        stage: called with the name of each stage as it begins.
    """
    write_entities(folder, joined, encoder, stage=stage)
    long_histories = LongHistories(joined)
    for name, requests in splits.items():
        stage(f"Writing {name}")
        write_impressions(folder / name / "impressions.arrow", joined, encoder, joined.rows_of(requests))
        _write_requests(folder / name / "requests.arrow", joined, encoder, requests, long_histories)
    joined.views.notes += long_histories.notes


def write_entities(folder: Path, joined: Joined, encoder: Encoder, *, stage: Callable[[str], None]) -> None:
    """Writes users, items and event logs; arguments as for :func:`write_tables`."""
    stage("Writing users")
    _write_users(folder / "users.arrow", joined, encoder)
    stage("Writing items")
    _write_items(folder / "items.arrow", joined, encoder)
    for history in joined.schema.histories:
        stage(f"Writing events of {history.name}")
        _write_events(folder / "events" / f"{history.name}.arrow", joined, encoder, history.name)


def _write_users(path: Path, joined: Joined, encoder: Encoder) -> None:
    """Beside its features, a user has the slice of each event log that is theirs: what serving reads histories from."""
    columns: dict[str, EncodedColumn] = {}
    for name, log in joined.logs.items():
        columns[start_column(name)] = log.user_offsets[:-1]
        columns[end_column(name)] = log.user_offsets[1:]
    for feature in joined.schema.features_of("user"):
        columns[feature.name] = encoded(encoder, feature, joined.entity_column(feature))
    write_table(path, columns, keys=joined.users.table_keys)


def _write_items(path: Path, joined: Joined, encoder: Encoder) -> None:
    columns = {
        feature.name: encoded(encoder, feature, joined.entity_column(feature))
        for feature in joined.schema.features_of("item")
    }
    write_table(path, columns, keys=joined.items.table_keys)


def _write_events(path: Path, joined: Joined, encoder: Encoder, history: str) -> None:
    log = joined.logs[history]
    columns: dict[str, EncodedColumn] = {ITEM_ROW: log.item_row, TIME: log.time}
    for feature in joined.schema.history(history).event_features:
        columns[feature.name] = encoded(encoder, feature, joined.event_column(feature, history))
    write_table(path, columns)


def write_impressions(path: Path, joined: Joined, encoder: Encoder, rows: slice, first_row: int = 0) -> None:
    """Writes impressions.

    Args:
        path: of the file.
        joined: the data.
        encoder: fitted.
        rows: of the impressions.
        first_row: the source row of the first row of the view's files, if others came before them.
    """
    source_row = joined.source_row[rows]
    columns: dict[str, EncodedColumn] = {ITEM_ROW: joined.item_row[rows], SOURCE_ROW: source_row + first_row}
    for task in joined.schema.tasks:
        labels = joined.views.labels(task, source_row)
        if 0 < len(labels) == np.count_nonzero(np.isnan(labels)):
            joined.views.notes.append(
                f"task {task.name!r}: column {task.label!r} is empty in all {len(labels):,} rows of {path.parent.name}"
            )
        columns[label_column(task.name)] = labels
    for feature in joined.schema.features_of("candidate"):
        columns[feature.name] = encoded(encoder, feature, joined.candidate_column(feature, rows))
    write_table(path, columns)


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


def _write_requests(
    path: Path, joined: Joined, encoder: Encoder, requests: slice, long_histories: LongHistories
) -> None:
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
    write_table(path, columns)


def encoded(encoder: Encoder, feature: Feature, raw: pa.Array[Any]) -> EncodedColumn:
    """A column as it is stored: dense features of one number as a plain column."""
    column = encoder.encode(feature.name, raw)
    if isinstance(feature, Dense) and feature.dim == 1:
        assert not isinstance(column, Ragged)
        return column.reshape(-1)
    return column
