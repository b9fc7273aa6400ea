"""From a training set, or from views, to the online store: items, users, and the users' newest events before a time.

A training set's log is the truth about what happened before that time: it replaces what was pushed. What was pushed at
or after that time stays; so do the histories of users that the log does not know. So materialising is idempotent, and
materialising often gives the same as materialising once.

Derived values need the views (:mod:`feature_store.snapshot`): rows of users that count are treated as histories are,
numbers of users and items are written as of the time, with it.

It works in chunks. A chunk is written together with the place where the next one begins, so that a run that is killed
at any moment goes on there. Of a log that the store has materialised before, up to an earlier time, only users with
events since are visited; everything is compared first, and only what differs is written. Values that expire are all
written, since that renews them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from feature_store.online.codec import ranges, take_rows
from feature_store.online.derived import AS_OF, ITEM_VALUES, USER_VALUES, Family, Rows
from feature_store.online.store import ITEM, META, USER, Events, OnlineStore
from recsys.encoding.columns import offsets_of
from recsys.encoding.encoder import EncodedColumn, Encoder
from recsys.errors import ArtifactError, ConfigError
from recsys.schema import Schema
from recsys.training_set import ITEM_ROW, TIME, Table, end_column, start_column

PROGRESS = b"p"
"""Key of how far an unfinished run has come."""
CHUNK = 2048

Progress = Callable[[str, int, int], None]
"""Called with what is being written, how many of it are done, and of how many."""


class DerivedSource(Protocol):
    """Derived values of a log, for the store.

    Attributes:
        last: the latest time of a row that any of them reads; -1 without rows.
        column_types: of the events' columns that they read: names of Polars types.
    """

    last: int
    column_types: dict[str, str]

    def values(self, of: str, until: int) -> dict[str, EncodedColumn]:
        """What is kept with every row of the table of ``"item"`` or ``"user"``, as of a time, by column."""

    def rows(self, family: Family) -> Rows:
        """All rows that count, of every row of the table of users, without marks; each user's in order of time."""


class Source(Protocol):
    """What a store is filled from: a training set, or views encoded for it.

    Attributes:
        folder: names it in messages.
        schema: what the data is.
        encoder: of the model.
    """

    folder: Path
    schema: Schema
    encoder: Encoder

    @property
    def users(self) -> Table:
        """Encoded users."""

    @property
    def items(self) -> Table:
        """Encoded items."""

    @property
    def events(self) -> dict[str, Table]:
        """The log of each history."""

    @property
    def fingerprint(self) -> str:
        """Of all of it."""


@dataclass
class Summary:
    """What a run did.

    Attributes:
        until: events before this time are materialised, UTC microseconds; None for all of them.
        written: values that were new or differed, by kind: items, users, each history, derived values.
        visited: values that were compared, by kind.
        resumed: whether an unfinished run was gone on with.
        swept: expired values that were removed.
        cut_users: users of whose rows ``keep_rows`` left some out that a window reaches, by kind: requests that need
            these rows are refused.
    """

    until: int | None
    written: dict[str, int] = field(default_factory=dict)
    visited: dict[str, int] = field(default_factory=dict)
    resumed: bool = False
    swept: int = 0
    cut_users: dict[str, int] = field(default_factory=dict)


class Materializer:
    """Brings a store up to a training set, again and again if wanted.

    Args:
        store: where to; of the training set's encoder.
        training_set: where from.
        chunk: values written at once.
        derived: of the same users and items; without it, a store that holds no derived values stays without them.

    Raises:
        ArtifactError: the training set has another encoder than the store.
    """

    def __init__(
        self, store: OnlineStore, training_set: Source, *, chunk: int = CHUNK, derived: DerivedSource | None = None
    ) -> None:
        if store.encoder.fingerprint != training_set.encoder.fingerprint:
            raise ArtifactError(
                f"{training_set.folder} must have the store's encoder, got another",
                hint="materialize it into a store of its own",
            )
        self.store = store
        self._set = training_set
        self._chunk = chunk
        self._derived = derived
        self._values: tuple[str, int, dict[str, EncodedColumn]] | None = None
        self._rows: tuple[Family, Rows] | None = None

    @cached_property
    def _source(self) -> str:
        return self._set.fingerprint

    @cached_property
    def _logs(self) -> dict[str, _Log]:
        return {name: _Log.open(events, self._set.users, name) for name, events in self._set.events.items()}

    def run(self, until: int | None = None, *, progress: Progress | None = None) -> Summary:
        """Materialises what happened strictly before a time.

        Args:
            until: UTC microseconds; None for all that the training set holds.
            progress: told how far it is.

        Raises:
            ConfigError: the store has been materialised up to a later time.
            UnavailableError: the store does not answer.
        """
        report = progress or (lambda _kind, _done, _total: None)
        lasts = [log.last for log in self._logs.values()] + ([self._derived.last] if self._derived else [])
        last = max(lasts, default=-1) + 1
        end = last if until is None else until
        meta = self.store.meta()
        before = meta["materialized"]
        if self._derived is None and meta.get("derived") is not None:
            raise ConfigError(
                "the store holds derived values, which a training set alone does not give",
                hint="materialize from the views, as before",
            )
        if before is not None and end < before["until"]:
            if until is not None:
                raise ConfigError(
                    f"until must not be before {before['until']}, up to which the store is materialised, got {until}",
                    hint="what was evicted cannot be put back: materialize into a new store",
                )
            end = before["until"]
        summary = Summary(until)
        since = before["until"] if before is not None and before["source"] == self._source else None
        is_renewed = self.store.limits.user_ttl_s is not None
        run = {"source": self._source, "until": end}
        place = self._resumed(run)
        summary.resumed = place is not None
        if (self.store.limits.user_ttl_s or self.store.limits.item_ttl_s) and not summary.resumed:
            summary.swept = self.store.sweep()
        kinds = ["items", "users", *self._logs]
        families = {f.name: place for place, f in enumerate(self.store.layout.families)}
        if self._derived is not None:
            kinds += ["derived values of items", "derived values of users", *families]
        for number, kind in enumerate(kinds):
            done = 0
            if place is not None:
                if number < place["kind"]:
                    continue
                done = place["done"] if number == place["kind"] else 0
            if kind in ("items", "users"):
                # Of the same training set they are the same, unless they are to be renewed.
                ttl = self.store.limits.item_ttl_s if kind == "items" else self.store.limits.user_ttl_s
                total = 0 if since is not None and ttl is None else self._table(kind).num_rows - 1
                write: Callable[[str, np.ndarray, int, bytes], int] = self._write_entities
                rows = np.arange(1, total + 1)
            elif kind not in self._logs:
                rows, write = self._derived_rows(kind, end), self._write_values
                total = len(rows)
                if kind in families:
                    write = self._write_rows
                    summary.cut_users[kind] = self._num_cut(kind, rows, end)
            else:
                write = self._write_histories
                rows = self._logs[kind].users(since, end, everyone=is_renewed)
                total = len(rows)
            summary.written[kind], summary.visited[kind] = 0, total - done
            report(kind, done, total)
            for first in range(done, total, self._chunk):
                chunk = rows[first : first + self._chunk]
                state = _json({**run, "kind": number, "done": first + len(chunk)})
                summary.written[kind] += write(kind, chunk, end, state)
                report(kind, first + len(chunk), total)
        self._finish(run)
        return summary

    def _finish(self, run: dict[str, Any]) -> None:
        def finished(old: list[bytes | None]) -> list[bytes | None]:
            assert old[0] is not None
            meta = json.loads(old[0])
            meta["materialized"] = run
            if self._derived is not None:
                meta["derived"] = {"as_of": run["until"], "columns": self._derived.column_types}
            return [_json(meta), None if old[1] is None else b""]

        self.store.backend.update([META, PROGRESS], finished)

    def _resumed(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """Where an unfinished run of the same work stopped."""
        (found,) = self.store.backend.get([PROGRESS])
        if found is None:
            return None
        place: dict[str, Any] = json.loads(found)
        return place if {name: place[name] for name in run} == run else None

    def _table(self, kind: str) -> Table:
        return self._set.items if kind == "items" else self._set.users

    def _write_entities(self, kind: str, rows: np.ndarray, _until: int, state: bytes) -> int:
        table, store = self._table(kind), self.store
        scope = self._set.schema.features_of("item" if kind == "items" else "user")
        columns: dict[str, EncodedColumn] = {f.name: take_rows(table.columns[f.name], rows) for f in scope}
        assert table.keys is not None
        keys = table.keys.slice(int(rows[0]), len(rows))
        if kind == "items":
            names, values = store.claim("item_id", keys, ITEM), store.encoded_items(columns, len(rows))
        else:
            names, values = store.claim("user_id", keys, USER), store.encoded_users(columns, len(rows))
        return self._write(names, lambda _: values, state)

    def _write_histories(self, history: str, rows: np.ndarray, until: int, state: bytes) -> int:
        keys = self._set.users.keys
        assert keys is not None
        names = self.store.claim("user_id", keys.take(rows), self.store.history_prefix(history))
        log = self._logs[history]
        events = log.newest(rows, until, self.store.keep(history))
        offsets, places = events
        items = take_rows(self._set.events[history].array(ITEM_ROW), places)
        assert isinstance(items, np.ndarray)
        spec = self._set.schema.history(history)
        columns = {f: take_rows(self._set.items.columns[f], items) for f in spec.attributes}
        table = self._set.events[history]
        columns.update({f.name: take_rows(table.columns[f.name], places) for f in spec.event_features})
        logged = Events(offsets, log.times[places], columns)
        return self._write(names, lambda old: self.store.merged(history, old, logged, since=until), state)

    # Derived values

    def _family(self, kind: str) -> tuple[int, Family]:
        return next((n, f) for n, f in enumerate(self.store.layout.families) if f.name == kind)

    def _derived_rows(self, kind: str, until: int) -> np.ndarray:
        """Rows of the users or items of which something is to be written."""
        if kind == "derived values of items":
            return np.arange(1, self._set.items.num_rows)
        if kind == "derived values of users":
            return np.arange(1, self._set.users.num_rows)
        _, family = self._family(kind)
        rows = self._rows_of(family)
        first_of = rows.offsets[:-1]
        has_any = np.diff(rows.offsets) > 0
        has_any[has_any] = rows.times[first_of[has_any]] < until
        has_any[0] = False
        return np.flatnonzero(has_any)

    def _rows_of(self, family: Family) -> Rows:
        assert self._derived is not None
        if self._rows is None or self._rows[0] != family:
            self._rows = family, self._derived.rows(family)
        return self._rows[1]

    def _slices(self, family: Family, users: np.ndarray, until: int) -> tuple[np.ndarray, np.ndarray]:
        """First and last of the rows before a time that a window reaches."""
        rows = self._rows_of(family)
        low, high = rows.offsets[users], rows.offsets[users + 1]
        last = _first_not_before(rows.times, low, high, until)
        if family.window_us is not None:
            low = _first_not_before(rows.times, low, last, until - family.window_us)
        return low, last

    def _num_cut(self, kind: str, users: np.ndarray, until: int) -> int:
        low, high = self._slices(self._family(kind)[1], users, until)
        keep = self.store.limits.keep_rows
        return 0 if keep is None else int(np.count_nonzero(high - low > keep))

    def _write_rows(self, kind: str, users: np.ndarray, until: int, state: bytes) -> int:
        place, family = self._family(kind)
        rows = self._rows_of(family)
        first, last = self._slices(family, users, until)
        # Before each user's rows the mark: since when all are there.
        lengths = last - first + 1
        offsets = offsets_of(lengths)
        mark = offsets[:-1]
        is_row = np.ones(int(offsets[-1]), np.bool_)
        is_row[mark] = False
        places = ranges(first, last - first)
        times = np.empty(len(is_row), np.int64)
        times[mark] = 0 if family.window_us is None else max(until - family.window_us, 0)
        times[is_row] = rows.times[places]
        columns: dict[str, EncodedColumn] = {}
        for name, column in rows.columns.items():
            assert isinstance(column, np.ndarray)
            columns[name] = np.full(len(is_row), -1 if name.startswith("@code.") else 0, column.dtype)
            columns[name][is_row] = column[places]  # type: ignore[index]
        keys = self._set.users.keys
        assert keys is not None
        names = self.store.claim("user_id", keys.take(users), self.store.rows_prefix(place))
        logged = Rows(offsets, times, columns)
        return self._write(names, lambda old: self.store.merged_rows(place, old, logged, until=until), state)

    def _write_values(self, kind: str, rows: np.ndarray, until: int, state: bytes) -> int:
        assert self._derived is not None
        of = "item" if kind == "derived values of items" else "user"
        if self._values is None or self._values[:2] != (of, until):
            self._values = of, until, self._derived.values(of, until)
        columns: dict[str, EncodedColumn] = {n: take_rows(c, rows) for n, c in self._values[2].items()}
        columns[AS_OF] = np.full(len(rows), until)
        table = self._set.items if of == "item" else self._set.users
        assert table.keys is not None
        keys = table.keys.slice(int(rows[0]), len(rows))
        prefix = ITEM_VALUES if of == "item" else USER_VALUES
        names = self.store.claim(f"{of}_id", keys, prefix)
        values = self.store.encoded_values(of, columns, len(rows))
        return self._write(names, lambda _: values, state)

    def _write(self, keys: list[bytes], values: Callable[[list[bytes | None]], list[bytes]], state: bytes) -> int:
        """Writes what differs, and the state with it; returns how many values those were."""
        num_written = 0

        def change(old: list[bytes | None]) -> list[bytes | None]:
            nonlocal num_written
            stored = old[:-1]
            differing = [None if new == had else new for new, had in zip(values(stored), stored, strict=True)]
            num_written = sum(value is not None for value in differing)
            return [*differing, state]

        self.store.backend.update([*keys, PROGRESS], change)
        return num_written


@dataclass(frozen=True)
class _Log:
    """An event log, and its events in order of time.

    Attributes:
        times: ``(E,)`` int64, sorted within each user.
        start: ``(U,)`` int64, first event of each row of the users table.
        stop: ``(U,)`` int64, one past the last.
        sorted_times: ``(E,)`` int64.
        sorted_users: ``(E,)`` int64, row of the user of each.
    """

    times: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    sorted_times: np.ndarray
    sorted_users: np.ndarray

    @classmethod
    def open(cls, events: Table, users: Table, history: str) -> _Log:
        times, start, stop = events.array(TIME), users.array(start_column(history)), users.array(end_column(history))
        order = np.argsort(times, kind="stable")
        user = np.repeat(np.arange(users.num_rows), stop - start)
        return cls(times, start, stop, times[order], user[order])

    @property
    def last(self) -> int:
        return int(self.sorted_times[-1]) if len(self.sorted_times) else -1

    def users(self, since: int | None, until: int, *, everyone: bool) -> np.ndarray:
        """Rows of users with events from ``since`` (None: ever) and before ``until``; the unknown user never."""
        first = 0 if since is None or everyone else np.searchsorted(self.sorted_times, since)
        rows = np.unique(self.sorted_users[first : np.searchsorted(self.sorted_times, until)])
        return rows[rows > 0]

    def newest(self, users: np.ndarray, until: int, keep: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in the log of the users' newest events before a time, and the offsets of each user's."""
        last = _first_not_before(self.times, self.start[users], self.stop[users], until)
        lengths = np.minimum(last - self.start[users], keep)
        places = ranges(last - lengths, lengths)
        return offsets_of(lengths), places


def _first_not_before(times: np.ndarray, low: np.ndarray, high: np.ndarray, time: int) -> np.ndarray:
    """``(n,)``: in slices ``[low, high)`` of sorted times, the first place that is not before a time; else ``high``."""
    while (is_open := low < high).any():
        middle = (low + high) >> 1
        is_before = times[np.where(is_open, middle, 0)] < time
        low = np.where(is_open & is_before, middle + 1, low)
        high = np.where(is_open & ~is_before, middle, high)
    return low


def materialize(
    store: OnlineStore,
    training_set: Source,
    until: int | None = None,
    *,
    progress: Progress | None = None,
    chunk: int = CHUNK,
    derived: DerivedSource | None = None,
) -> Summary:
    """Brings a store up to a training set; see :class:`Materializer`."""
    return Materializer(store, training_set, chunk=chunk, derived=derived).run(until, progress=progress)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
