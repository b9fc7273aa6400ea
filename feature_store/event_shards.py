"""Event logs of any size, sorted shard by shard in bounded memory.

Users belong to one of :data:`NUM_SHARDS` shards by the hash of their key. The table of users is ordered by shard, then
key, and an event log by user row, so that each shard is one run of rows of the log: it can be sorted, written, mapped
or handed to another process by itself.

Two passes over the events view: the first checks rows and finds the keys
(:meth:`feature_store.joined.Happened.scan`), the second numbers users and items and spills each event to its shard, in
memory up to :data:`MEMORY_BYTES`, then on disk. Then one shard at a time is sorted. Peak memory is that of the largest
shard, whatever the number of events.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from feature_store.event_log import EventLog, stable_order
from feature_store.sources import to_arrow
from recsys.encoding import hash_keys

SHARD_BITS = 6
NUM_SHARDS = 1 << SHARD_BITS
"""A constant of the format: the order of the users depends on it."""

MEMORY_BYTES = 256 << 20
"""What all shards together keep in memory before they spill."""

MAX_HISTORIES = 63
_BLOCK = 1 << 16


def shard_of_keys(keys: pa.Array[Any]) -> np.ndarray:
    """``(n,)`` uint8: the shard of each user.

    Args:
        keys: integers or text, none null.

    Example:
        >>> shard_of_keys(pa.array([1, 2, 3])).tolist()
        [36, 37, 7]
    """
    shards: np.ndarray = (hash_keys(keys) >> np.uint64(64 - SHARD_BITS)).astype(np.uint8)
    return shards


def in_shard_order(keys: pl.Series) -> pl.Series:
    """Different keys, by shard, then by value."""
    keys = keys.sort()
    return keys.gather(np.argsort(shard_of_keys(to_arrow(keys)), kind="stable"))


def shard_bounds(keys: pa.Array[Any]) -> np.ndarray:
    """``(NUM_SHARDS + 1,)`` int64: positions in keys in shard order where each shard begins, and their number."""
    return np.searchsorted(shard_of_keys(keys), np.arange(NUM_SHARDS + 1)).astype(np.int64)


def runs_of_rows(num_users: int) -> np.ndarray:
    """``(NUM_SHARDS + 1,)`` int64: about equal runs of user rows, for users that are in no order of shards."""
    return np.linspace(1, num_users, NUM_SHARDS + 1).astype(np.int64)


@dataclass(frozen=True)
class EventBlock:
    """Some valid events, in the order of the view.

    Attributes:
        source_row: ``(n,)`` integers, rows of the events view.
        user_row: ``(n,)`` integers, rows of the users table.
        item_row: ``(n,)`` integers, rows of the items table.
        time: ``(n,)`` int64, UTC microseconds.
        histories: ``(n,)`` integers, bit ``h`` is set if the event belongs to history ``h``.
    """

    source_row: np.ndarray
    user_row: np.ndarray
    item_row: np.ndarray
    time: np.ndarray
    histories: np.ndarray

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """All columns, in the order of declaration."""
        return self.source_row, self.user_row, self.item_row, self.time, self.histories

    @property
    def num_events(self) -> int:
        """How many."""
        return len(self.time)


class EventShards:
    """Takes events in the order of the view, gives each shard's back in that order.

    Args:
        user_bounds: ``(S + 1,)`` int64, the first user row of each shard; row 0, the unknown user, has no events.
        num_items: rows of the items table.
        num_events: rows of the view.
        num_histories: how many there are.
        folder: for spilled events; a file of each shard.

    Attributes:
        counts: ``(H, S)`` int64, events of each history in each shard.
    """

    def __init__(
        self, user_bounds: np.ndarray, *, num_items: int, num_events: int, num_histories: int, folder: Path
    ) -> None:
        if num_histories > MAX_HISTORIES:
            raise ValueError(f"at most {MAX_HISTORIES} histories, got {num_histories}")
        self.user_bounds = user_bounds
        self.num_histories = num_histories
        self.counts = np.zeros((num_histories, self.num_shards), dtype=np.int64)
        self._folder = folder
        self._types: tuple[type[np.integer[Any]], ...] = (
            _smallest(num_events),
            _smallest(int(user_bounds[-1])),
            _smallest(num_items),
            np.int64,
            bits_type(num_histories),
        )
        self._shard_of_user = np.repeat(
            np.arange(-1, self.num_shards), np.diff(user_bounds, prepend=0).clip(min=0)
        ).astype(np.uint8)
        self._held: list[list[EventBlock]] = [[] for _ in range(self.num_shards)]
        self._held_bytes = 0
        self._spilled: list[list[int]] = [[] for _ in range(self.num_shards)]

    @property
    def num_shards(self) -> int:
        """S."""
        return len(self.user_bounds) - 1

    def add(self, block: EventBlock) -> None:
        """Takes events."""
        shard = self._shard_of_user[block.user_row]
        order = np.argsort(shard, kind="stable")
        edges = np.zeros(self.num_shards + 1, dtype=np.int64)
        np.cumsum(np.bincount(shard, minlength=self.num_shards), out=edges[1:])
        columns: list[np.ndarray] = [
            c.astype(t, copy=False)[order] for c, t in zip(block.columns, self._types, strict=True)
        ]
        for history in range(self.num_histories):
            is_in = (block.histories >> history) & 1
            self.counts[history] += np.bincount(shard, is_in, minlength=self.num_shards).astype(np.int64)
        for number, (start, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            if start < stop:
                self._held[number].append(EventBlock(*(c[start:stop] for c in columns)))
        self._held_bytes += sum(c.nbytes for c in columns)
        if self._held_bytes > MEMORY_BYTES:
            self._spill()

    def _spill(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for number, blocks in enumerate(self._held):
            if blocks:
                with self._path(number).open("ab") as file:
                    for column in _joined(blocks).columns:
                        file.write(column.data)
                self._spilled[number].append(sum(b.num_events for b in blocks))
        self._held = [[] for _ in range(self.num_shards)]
        self._held_bytes = 0

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:03d}.bin"

    def take(self, shard: int) -> EventBlock:
        """The events of a shard in the order of the view; they are forgotten here."""
        blocks: list[EventBlock] = []
        if self._spilled[shard]:
            with self._path(shard).open("rb") as file:
                blocks = [
                    EventBlock(*(np.fromfile(file, dtype=t, count=count) for t in self._types))
                    for count in self._spilled[shard]
                ]
            self._path(shard).unlink()
        blocks += self._held[shard]
        self._held[shard], self._spilled[shard] = [], []
        return _joined(blocks) if blocks else EventBlock(*(np.empty(0, dtype=t) for t in self._types))

    def logs(self) -> list[EventLog]:
        """The event log of each history, shard after shard; columns larger than memory should hold lie on disk."""
        totals = self.counts.sum(axis=1).tolist()
        is_large = sum(totals) * len(EventLog.COLUMNS) * 8 > MEMORY_BYTES
        folder = self._folder if is_large else None
        columns = [{name: _array(total, folder) for name in EventLog.COLUMNS} for total in totals]
        offsets = [np.zeros(int(self.user_bounds[-1]) + 1, dtype=np.int64) for _ in totals]
        begun = [0] * self.num_histories
        for shard in range(self.num_shards):
            events = self.take(shard)
            users = slice(int(self.user_bounds[shard]), int(self.user_bounds[shard + 1]))
            for history in range(self.num_histories):
                log = sorted_events(events, history, users)
                place = slice(begun[history], begun[history] + log.num_events)
                for name in EventLog.COLUMNS:
                    columns[history][name][place] = getattr(log, name)
                offsets[history][users.start + 1 : users.stop + 1] = log.user_offsets[1:] + begun[history]
                begun[history] += log.num_events
            for arrays in columns:
                for array in arrays.values():
                    release(array)
        return [EventLog(**arrays, user_offsets=o) for arrays, o in zip(columns, offsets, strict=True)]


def sorted_events(events: EventBlock, history: int, users: slice) -> EventLog:
    """The log of one history and consecutive users.

    Args:
        events: all events of these users, in the order of the view.
        history: bit of the history.
        users: their rows; offsets count from the first.
    """
    is_in = ((events.histories >> history) & 1).astype(bool)
    if not is_in.all():
        events = EventBlock(*(c[is_in] for c in events.columns))
    order = stable_order(events.user_row.astype(np.int64), events.time)
    offsets = np.zeros(users.stop - users.start + 1, dtype=np.int64)
    np.cumsum(np.bincount(events.user_row - users.start, minlength=users.stop - users.start), out=offsets[1:])
    return EventLog(events.source_row[order], events.item_row[order], events.time[order], offsets)


def _joined(blocks: Sequence[EventBlock]) -> EventBlock:
    return EventBlock(*(np.concatenate(c) for c in zip(*(b.columns for b in blocks), strict=True)))


def _smallest(count: int) -> type[np.integer[Any]]:
    return np.int32 if count < 2**31 else np.int64


def bits_type(num_histories: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type with a bit for each history."""
    return np.uint8 if num_histories <= 8 else np.uint64


def _array(length: int, folder: Path | None) -> np.ndarray:
    """Room for int64; in a file without a name if there is a folder."""
    if folder is None or length == 0:
        return np.empty(length, dtype=np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.truncate(file.fileno(), length * 8)
        return np.frombuffer(mmap.mmap(file.fileno(), length * 8), dtype=np.int64)


def release(array: np.ndarray) -> None:
    """Lets go of the memory that mapped pages of an array take; they are read again when they are used."""
    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    if isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)


class DistinctKeys:
    """Different keys of columns that come block by block."""

    _COMPACT_ROWS = 1 << 20

    def __init__(self) -> None:
        self._parts: list[pl.Series] = []
        self._num_pending = 0

    def add(self, keys: pl.Series) -> None:
        """Takes keys, repeated as they come."""
        part = distinct(keys)
        self._parts.append(part)
        self._num_pending += len(part)
        if self._num_pending > max(self._COMPACT_ROWS, len(self._parts[0])):
            self._parts = [pl.concat(self._parts).unique()]
            self._num_pending = 0

    def result(self) -> pl.Series:
        """The keys, in no particular order."""
        return pl.concat(self._parts).unique() if self._parts else pl.Series(dtype=pl.Null)


def distinct(keys: pl.Series) -> pl.Series:
    """Different keys, in no particular order, nulls among them.

    Integers that lie close together, as numbered users and items do, are ticked off a list, which is several times
    faster than hashing them.
    """
    if keys.dtype != pl.Int64 or keys.null_count() or keys.is_empty():
        return keys.unique()
    values = keys.to_numpy()
    lowest = int(values.min())
    span = int(values.max()) - lowest + 1
    if span > len(values):
        return keys.unique()
    is_there = np.zeros(span, dtype=bool)
    for begin in range(0, len(values), _BLOCK):  # so that the differences stay in the cache
        is_there[values[begin : begin + _BLOCK] - lowest] = True
    return pl.Series(keys.name, np.flatnonzero(is_there) + lowest)
