"""From a training set, or from views, to the online store: items, users, and the users' newest events before a time.

A training set's log is the truth about what happened before that time: it replaces what was pushed. What was pushed at
or after that time stays; so do the histories of users that the log does not know. So materialising is idempotent, and
materialising often gives the same as materialising once.

Derived values need the views (:mod:`feature_store.snapshot`): rows of users that count are treated as histories are,
numbers of users and items are written as of the time, with it. Numbers that have not changed keep the earlier time:
they are right as of both.

It works in chunks. A chunk is written together with the place where the next one begins, so that a run that is killed
at any moment goes on there. Of a log that the store has materialised before, up to an earlier time, only users with
events since are visited, and of derived values those whose rows came into a window since or left one, or whose number
has changed; everything is compared first, and only what differs is written. Values that expire are all written, since
that renews them.
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
from feature_store.online.keys import ITEM, META, USER
from feature_store.online.reading import Events
from feature_store.online.store import OnlineStore
from recsys.encoding.columns import offsets_of
from recsys.encoding.encoder import EncodedColumn, Encoder, Ragged
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
        self._values: dict[str, tuple[int, dict[str, EncodedColumn]]] = {}
        self._rows: dict[Family, tuple[Rows, _Order]] = {}

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
        is_renewed = self.store.limits.user_ttl_s is not None
        run = {"source": self._source, "until": end}
        unfinished = self._unfinished()
        place = unfinished if unfinished is not None and {**unfinished, **run} == unfinished else None
        summary.resumed = place is not None
        # What an unfinished run of other work has written, nobody knows: everything is visited then.
        is_torn = unfinished is not None and (place is None or place["is_torn"])
        is_known = before is not None and before["source"] == self._source and not is_torn
        since = before["until"] if is_known else None
        if (self.store.limits.user_ttl_s or self.store.limits.item_ttl_s) and not summary.resumed:
            summary.swept = self.store.sweep()
        kinds = ["items", "users", *self._logs]
        layout = self.store.layout
        families = {f.name: place for place, f in enumerate(layout.families)}
        if self._derived is not None:
            kinds += [f"derived values of {of}s" for of in ("item", "user") if layout.keeps(of)] + [*families]
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
                last_time = since if meta.get("derived") is not None else None
                if kind in families:
                    rows, write = self._users_of_rows(kind, None if is_renewed else last_time, end), self._write_rows
                    summary.cut_users[kind] = self._num_cut(kind, end)
                else:
                    rows, write = self._changed_values(kind, last_time, end), self._write_values
                total = len(rows)
            else:
                write = self._write_histories
                rows = self._logs[kind].users(since, end, everyone=is_renewed)
                total = len(rows)
            summary.written[kind], summary.visited[kind] = 0, total - done
            report(kind, done, total)
            for first in range(done, total, self._chunk):
                chunk = rows[first : first + self._chunk]
                state = _json({**run, "kind": number, "done": first + len(chunk), "is_torn": is_torn})
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

    def _unfinished(self) -> dict[str, Any] | None:
        """Where an unfinished run stopped."""
        (found,) = self.store.backend.get([PROGRESS])
        place: dict[str, Any] | None = None if found is None else json.loads(found)
        return place

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

    def _changed_values(self, kind: str, since: int | None, until: int) -> np.ndarray:
        """Rows of the users or items whose numbers are to be written: those that changed, of all without ``since``."""
        of = _whose(kind)
        ttl_s = self.store.limits.item_ttl_s if of == "item" else self.store.limits.user_ttl_s
        is_changed = np.zeros((self._set.items if of == "item" else self._set.users).num_rows, np.bool_)
        is_changed[1:] = since is None or ttl_s is not None
        if since is not None and ttl_s is None:
            before = self._values_at(of, since)
            for name, column in self._values_at(of, until).items():
                is_changed[1:] |= differing(before[name], column)[1:]
        return np.flatnonzero(is_changed)

    def _values_at(self, of: str, until: int) -> dict[str, EncodedColumn]:
        """The numbers of all items, or of all users, as of a time; the latest are kept."""
        assert self._derived is not None
        if of not in self._values or self._values[of][0] != until:
            self._values[of] = until, self._derived.values(of, until)
        return self._values[of][1]

    def _users_of_rows(self, kind: str, since: int | None, until: int) -> np.ndarray:
        """Rows of the users whose rows are to be written: those that changed, of all without ``since``."""
        _, family = self._family(kind)
        rows, order = self._rows_of(family)
        if since is None:
            has_any = np.diff(rows.offsets) > 0
            has_any[has_any] = rows.times[rows.offsets[:-1][has_any]] < until
            has_any[0] = False
            return np.flatnonzero(has_any)
        changed = order.users(since, until)
        if family.window_us is not None:
            changed = np.union1d(changed, order.users(since - family.window_us, until - family.window_us))
        return changed[changed > 0]

    def _rows_of(self, family: Family) -> tuple[Rows, _Order]:
        assert self._derived is not None
        if family not in self._rows:
            rows = self._derived.rows(family)
            self._rows[family] = (
                rows,
                _Order.of(rows.times, np.repeat(np.arange(len(rows.offsets) - 1), np.diff(rows.offsets))),
            )
        return self._rows[family]

    def _slices(self, family: Family, users: np.ndarray, until: int) -> tuple[np.ndarray, np.ndarray]:
        """First and last of the rows before a time that a window reaches."""
        rows, _ = self._rows_of(family)
        low, high = rows.offsets[users], rows.offsets[users + 1]
        last = _first_not_before(rows.times, low, high, until)
        if family.window_us is not None:
            low = _first_not_before(rows.times, low, last, until - family.window_us)
        return low, last

    def _num_cut(self, kind: str, until: int) -> int:
        keep = self.store.limits.keep_rows
        if keep is None:
            return 0
        low, high = self._slices(self._family(kind)[1], np.arange(1, self._set.users.num_rows), until)
        return int(np.count_nonzero(high - low > keep))

    def _write_rows(self, kind: str, users: np.ndarray, until: int, state: bytes) -> int:
        place, family = self._family(kind)
        rows, _ = self._rows_of(family)
        first, last = self._slices(family, users, until)
        # Before each user's rows the mark: since when all are there, which is just after the newest that is not.
        lengths = last - first + 1
        offsets = offsets_of(lengths)
        mark = offsets[:-1]
        is_row = np.ones(int(offsets[-1]), np.bool_)
        is_row[mark] = False
        places = ranges(first, last - first)
        times = np.empty(len(is_row), np.int64)
        times[mark] = np.where(first > rows.offsets[users], rows.times[first - 1] + 1, 0)
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
        of = _whose(kind)
        columns: dict[str, EncodedColumn] = {n: take_rows(c, rows) for n, c in self._values_at(of, until).items()}
        columns[AS_OF] = np.full(len(rows), until)
        table = self._set.items if of == "item" else self._set.users
        assert table.keys is not None
        prefix = ITEM_VALUES if of == "item" else USER_VALUES
        names = self.store.claim(f"{of}_id", table.keys.take(rows), prefix)
        values = self.store.encoded_values(of, columns, len(rows))
        time = self.store.layout.time_of_values(of)

        def is_same(old: bytes | None, new: bytes) -> bool:
            """Whether the numbers are: then they keep the time that they are of."""
            return old is not None and old[: time.start] == new[: time.start] and old[time.stop :] == new[time.stop :]

        return self._write(
            names,
            lambda stored: [old if is_same(old, new) else new for old, new in zip(stored, values, strict=True)],  # type: ignore[misc]
            state,
        )

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


def _whose(kind: str) -> str:
    return "item" if kind == "derived values of items" else "user"


def differing(one: EncodedColumn, other: EncodedColumn) -> np.ndarray:
    """``(n,)`` bool: the rows that are not the same in both columns; missing numbers are the same."""
    if isinstance(one, Ragged):
        assert isinstance(other, Ragged)
        is_differing: np.ndarray = np.diff(one.offsets) != np.diff(other.offsets)
        alike = np.flatnonzero(~is_differing)
        lengths = np.diff(one.offsets)[alike]
        ids = [bag.values[ranges(bag.offsets[:-1][alike], lengths)] for bag in (one, other)]
        is_differing[np.repeat(alike, lengths)[ids[0] != ids[1]]] = True
        return is_differing
    assert isinstance(other, np.ndarray)
    is_same = one == other
    if one.dtype.kind == "f":
        is_same |= np.isnan(one) & np.isnan(other)
    is_any: np.ndarray = ~is_same.reshape(len(one), -1).all(axis=1)
    return is_any


@dataclass(frozen=True)
class _Order:
    """Rows of users in order of time.

    Attributes:
        times: ``(E,)`` int64, sorted.
        user: ``(E,)`` int64, row of the user of each.
    """

    times: np.ndarray
    user: np.ndarray

    @classmethod
    def of(cls, times: np.ndarray, user: np.ndarray) -> _Order:
        """Of ``(E,)`` times and users in any order."""
        order = np.argsort(times, kind="stable")
        return cls(times[order], user[order])

    def users(self, since: int, until: int) -> np.ndarray:
        """Users with rows from a time on, and before another."""
        first, last = np.searchsorted(self.times, [since, until])
        return np.unique(self.user[first:last])


@dataclass(frozen=True)
class _Log:
    """An event log, and its events in order of time.

    Attributes:
        times: ``(E,)`` int64, sorted within each user.
        start: ``(U,)`` int64, first event of each row of the users table.
        stop: ``(U,)`` int64, one past the last.
        order: of time.
    """

    times: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    order: _Order

    @classmethod
    def open(cls, events: Table, users: Table, history: str) -> _Log:
        times, start, stop = events.array(TIME), users.array(start_column(history)), users.array(end_column(history))
        return cls(times, start, stop, _Order.of(times, np.repeat(np.arange(users.num_rows), stop - start)))

    @property
    def last(self) -> int:
        return int(self.order.times[-1]) if len(self.order.times) else -1

    def users(self, since: int | None, until: int, *, everyone: bool) -> np.ndarray:
        """Rows of users with events from ``since`` (None: ever) and before ``until``; the unknown user never."""
        rows = self.order.users(-1 if since is None or everyone else since, until)
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
