"""What is known of users, items and their histories without being told in a request.

A :class:`FeatureSource` answers with encoded columns. :class:`SnapshotFeatures` reads them from memory-mapped tables:
those that an artifact carries, or a whole training set; :mod:`serving.online_features` from an online store. Sources
never guess: who is not known gets the unknown values, and is reported as such.

Shapes: n entities, R requests, S events of all requests together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from recsys.batch import concatenated_ranges
from recsys.encoding.columns import Array
from recsys.encoding.encoder import EncodedColumn, Encoder, Ragged
from recsys.encoding.key_index import KeyIndex
from recsys.errors import ArtifactError
from recsys.schema import Schema
from recsys.training_set import (
    ITEM_ROW,
    TIME,
    Table,
    end_column,
    event_log_paths,
    open_event_log,
    open_table,
    start_column,
)


class Known(NamedTuple):
    """What is known of some entities.

    Attributes:
        columns: encoded columns of n rows, by feature.
        is_known: ``(n,)`` bool; False where every column holds the unknown value.
    """

    columns: Mapping[str, EncodedColumn]
    is_known: np.ndarray


class Events(NamedTuple):
    """Stored events of R requests, oldest first.

    Attributes:
        offsets: ``(R + 1,)`` int64.
        times: ``(S,)`` int64, UTC microseconds.
        columns: encoded columns of S events: the history's attributes and event features.
    """

    offsets: np.ndarray
    times: np.ndarray
    columns: Mapping[str, EncodedColumn]


class Derived(NamedTuple):
    """Derived values of R requests and N candidates.

    Attributes:
        columns: encoded, by feature; of R or N rows by its scope.
        refused: why others cannot be given, by feature; of those in neither nothing is known.
    """

    columns: Mapping[str, EncodedColumn]
    refused: Mapping[str, str]


class FeatureSource(Protocol):
    """Where a service takes from what a request does not say. Safe to call from several threads.

    Attributes:
        has_users: whether anything is known of users.
        has_items: whether anything is known of items.
        has_derived: whether derived values are.
    """

    has_users: bool
    has_items: bool
    has_derived: bool

    def at(self, users: Array, items: Array) -> FeatureSource:
        """A source for one batch, which may have read all about its users and items at once; else this one.

        Args:
            users: ``(R,)`` keys, as they will be asked for.
            items: ``(N,)`` keys, likewise.
        """

    def users(self, keys: Array, features: Sequence[str]) -> Known:
        """User features of ``(n,)`` keys; null is an unknown user."""

    def items(self, keys: Array, features: Sequence[str]) -> Known:
        """Item features of ``(n,)`` keys; null is an unknown item."""

    def history(self, name: str, users: Array, before: np.ndarray, max_length: int) -> Events:
        """The newest events of each user strictly before a time.

        Args:
            name: of the history.
            users: ``(R,)`` keys.
            before: ``(R,)`` int64, UTC microseconds.
            max_length: of each history.
        """

    def derived(self, users: Array, items: Array, time: np.ndarray, request_of_row: np.ndarray) -> Derived:
        """Derived values, as of each request's time.

        Args:
            users: ``(R,)`` keys.
            items: ``(N,)`` keys.
            time: ``(R,)`` int64, UTC microseconds.
            request_of_row: ``(N,)`` int64.
        """


class DerivedSource(Protocol):
    """Where derived values come from that no stored features hold."""

    def derived(
        self, users: Array, items: Array, time: np.ndarray, request_of_row: np.ndarray
    ) -> tuple[Mapping[str, EncodedColumn], Mapping[str, str]]:
        """See :meth:`FeatureSource.derived`."""


class WithDerived:
    """A feature source whose derived values come from elsewhere.

    Args:
        source: of everything else.
        values: of these.
    """

    has_derived = True

    def __init__(self, source: FeatureSource, values: DerivedSource) -> None:
        self._source = source
        self._values = values
        self.has_users = source.has_users
        self.has_items = source.has_items

    def at(self, users: Array, items: Array) -> FeatureSource:
        """See :class:`FeatureSource`."""
        return WithDerived(self._source.at(users, items), self._values)

    def users(self, keys: Array, features: Sequence[str]) -> Known:
        """See :class:`FeatureSource`."""
        return self._source.users(keys, features)

    def items(self, keys: Array, features: Sequence[str]) -> Known:
        """See :class:`FeatureSource`."""
        return self._source.items(keys, features)

    def history(self, name: str, users: Array, before: np.ndarray, max_length: int) -> Events:
        """See :class:`FeatureSource`."""
        return self._source.history(name, users, before, max_length)

    def derived(self, users: Array, items: Array, time: np.ndarray, request_of_row: np.ndarray) -> Derived:
        """See :class:`FeatureSource`."""
        return Derived(*self._values.derived(users, items, time, request_of_row))


def take_rows(column: EncodedColumn, rows: np.ndarray) -> EncodedColumn:
    """Some rows of an encoded column."""
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


@dataclass(frozen=True)
class _Entities:
    """A table of users or items, found by key."""

    table: Table
    index: KeyIndex

    def rows(self, keys: Array, where: str) -> np.ndarray:
        """``(n,)`` int64: row of each key, 0 if it is not known."""
        return np.maximum(self.index.positions(keys, where=where), 0)


class SnapshotFeatures:
    """Features from tables on disk, memory-mapped.

    The folder may hold ``users.arrow``, ``items.arrow`` and ``events/<history>.arrow`` of a training set, any of
    them; what is not there is unknown. Histories need all three.

    Args:
        folder: an artifact's ``features`` folder, or a training set.
        encoder: the artifact's. Nothing is read that another encoder encoded.

    Raises:
        ArtifactError: the folder holds no tables, or another encoder's.
    """

    def __init__(self, folder: str | Path, encoder: Encoder) -> None:
        self.has_derived = False
        self.folder = Path(folder)
        self._encoder = encoder
        self._schema: Schema = encoder.schema
        manifest = self.folder / "manifest.json"
        hint = "give the training set that the model was trained on, or export the artifact with its snapshot"
        try:
            fingerprint = json.loads(manifest.read_text(encoding="utf-8"))["encoder_fingerprint"]
        except FileNotFoundError as err:
            raise ArtifactError(f"{self.folder} must hold features, got no manifest.json", hint=hint) from err
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ArtifactError(f"{manifest} must say encoder_fingerprint", hint=hint) from err
        if fingerprint != encoder.fingerprint:
            raise ArtifactError(f"{self.folder} must be encoded by the model's encoder, got another one's", hint=hint)
        self.has_users = (self.folder / "users.arrow").is_file()
        self.has_items = (self.folder / "items.arrow").is_file()

    def at(self, users: Array, items: Array) -> FeatureSource:  # noqa: ARG002
        """See :class:`FeatureSource`."""
        return self

    def warm(self) -> None:
        """Opens the tables and indexes their keys, so that the first request need not."""
        if self.has_users:
            _ = self._users
        if self.has_items:
            _ = self._items
        _ = self._logs

    def some_users(self, n: int) -> list[Any]:
        """Keys of the first ``n`` users."""
        return self._some(self._users, n) if self.has_users else []

    def some_items(self, n: int) -> list[Any]:
        """Keys of the first ``n`` items."""
        return self._some(self._items, n) if self.has_items else []

    def _some(self, entities: _Entities, n: int) -> list[Any]:
        keys: list[Any] = entities.index.keys.slice(1, n).to_pylist()  # row 0 is the unknown one
        return keys

    @cached_property
    def _users(self) -> _Entities:
        return self._open("users")

    @cached_property
    def _items(self) -> _Entities:
        return self._open("items")

    @cached_property
    def _logs(self) -> dict[str, Table]:
        logs = {}
        for history in self._schema.histories:
            if event_log_paths(self.folder, history.name):
                logs[history.name] = open_event_log(self.folder, history.name)
        return logs

    def _open(self, name: str) -> _Entities:
        table = open_table(self.folder / f"{name}.arrow")
        assert table.keys is not None
        return _Entities(table, KeyIndex(table.keys))

    def users(self, keys: Array, features: Sequence[str]) -> Known:
        """See :class:`FeatureSource`."""
        return self._known(self._users if self.has_users else None, keys, features, "user_id")

    def items(self, keys: Array, features: Sequence[str]) -> Known:
        """See :class:`FeatureSource`."""
        return self._known(self._items if self.has_items else None, keys, features, "candidates")

    def derived(self, users: Array, items: Array, time: np.ndarray, request_of_row: np.ndarray) -> Derived:  # noqa: ARG002
        """See :class:`FeatureSource`."""
        return Derived({}, {})

    def _known(self, entities: _Entities | None, keys: Array, features: Sequence[str], where: str) -> Known:
        if entities is None:
            return unknown(self._encoder, features, len(keys))
        rows = entities.rows(keys, where)
        return Known({f: take_rows(entities.table.columns[f], rows) for f in features}, rows > 0)

    def history(self, name: str, users: Array, before: np.ndarray, max_length: int) -> Events:
        """See :class:`FeatureSource`."""
        log = self._logs.get(name)
        if log is None or not self.has_users or not self.has_items:
            return no_events(self._encoder, name, len(users))
        table = self._users.table
        rows = self._users.rows(users, "user_id")
        first, last = table.array(start_column(name))[rows], table.array(end_column(name))[rows]
        times = log.array(TIME)
        # Searched user by user: a binary search in the user's own slice, which is sorted.
        slices = zip(first.tolist(), last.tolist(), before.tolist(), strict=True)
        end = np.array([low + int(np.searchsorted(times[low:high], t)) for low, high, t in slices], np.int64)
        end = np.where(rows > 0, end, first)
        start = np.maximum(end - max_length, first)
        events = concatenated_ranges(start, end - start)
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(end - start, out=offsets[1:])
        history = self._schema.history(name)
        item_rows = log.array(ITEM_ROW)[events]
        columns = {f: take_rows(self._items.table.columns[f], item_rows) for f in history.attributes}
        columns.update({f.name: take_rows(log.columns[f.name], events) for f in history.event_features})
        return Events(offsets, times[events], columns)


class NoFeatures:
    """Nothing is known but what a request says.

    Args:
        encoder: the artifact's.
    """

    has_users = False
    has_items = False
    has_derived = False

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def at(self, users: Array, items: Array) -> FeatureSource:  # noqa: ARG002
        """See :class:`FeatureSource`."""
        return self

    def users(self, keys: Array, features: Sequence[str]) -> Known:
        """See :class:`FeatureSource`."""
        return unknown(self._encoder, features, len(keys))

    def items(self, keys: Array, features: Sequence[str]) -> Known:
        """See :class:`FeatureSource`."""
        return unknown(self._encoder, features, len(keys))

    def history(self, name: str, users: Array, before: np.ndarray, max_length: int) -> Events:  # noqa: ARG002
        """See :class:`FeatureSource`."""
        return no_events(self._encoder, name, len(users))

    def derived(self, users: Array, items: Array, time: np.ndarray, request_of_row: np.ndarray) -> Derived:  # noqa: ARG002
        """See :class:`FeatureSource`."""
        return Derived({}, {})


def unknown(encoder: Encoder, features: Sequence[str], n: int) -> Known:
    """``n`` entities of which nothing is known."""
    return Known({f: encoder.unknown_column(f, n) for f in features}, np.zeros(n, np.bool_))


def no_events(encoder: Encoder, name: str, num_requests: int) -> Events:
    """Empty histories."""
    history = encoder.schema.history(name)
    names = [*history.attributes, *(f.name for f in history.event_features)]
    columns = {f: encoder.unknown_column(f, 0) for f in names}
    return Events(np.zeros(num_requests + 1, np.int64), np.zeros(0, np.int64), columns)
