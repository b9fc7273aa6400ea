"""The order of events of one user and one time: a rule of their values, so that the order of rows decides nothing.

Such events are *tied*. A history orders them by, each deciding only where those before it are equal:

1. the *sequence* of the events view (``views.events.sequence``), if one is declared; missing first;
2. the key of the item: numbers by size, text by its UTF-8 bytes;
3. the history's event features, in the order of declaration, as they are encoded: values of a vocabulary as keys of
   items are, unknown ones first; hashed ones by their bucket, buckets and hours by their number; numbers by size;
   several values, or several numbers, one after the other, and what ends first comes first.

Tied events that are equal in all of these are the same to who reads the history. The rule needs nothing but what a log
stores, so that an append puts new events among stored ones without reading what these were made of; and it gives one
order before and after a vocabulary grows, for values that had their ids already.

Most logs have few tied events: they are found by one look at the times, and only they are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.event_log import stable_order
from recsys.encoding import EncodedColumn, Encoder, Ragged
from recsys.schema import FIRST_ID, Dense, History
from recsys.training_set import ITEM_ROW, SEQUENCE, TIME

_BLOCK = 1 << 20
_LONGEST_PIECE = 1 << 20
"""About so many tied events are compared at once; those of one user and one time always are."""


class TieRule:
    """Puts the tied events of a history's log in order.

    Args:
        encoder: of the event features.
        history: whose log it is.
        item_keys: the key of each row of the items table; None if the rows are in the order of their keys.
    """

    def __init__(self, encoder: Encoder, history: History, *, item_keys: pa.Array[Any] | None = None) -> None:
        self._encoder = encoder
        self._history = history
        self._item_keys = item_keys
        self._ranks: dict[str, np.ndarray | None] = {}

    def moves(
        self, columns: Mapping[str, EncodedColumn], user_offsets: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What is to be moved in a log that is sorted by user and time.

        Args:
            columns: of the log, each ``(E,)``: items, times, the sequence if one is declared, event features.
            user_offsets: ``(U + 1,)`` int64, where the events of each user begin and end.

        Yields:
            ``(places, rows)``, int64 each: to the places belong the events that are at the rows. No place comes twice.
        """
        for places, run in _tied(np.asarray(columns[TIME]), user_offsets):
            keys = [run, *self._keys(columns, places)]
            order = stable_order(*keys)
            is_moved = order != np.arange(len(order))
            if is_moved.any():
                yield places[is_moved], places[order[is_moved]]

    def settle(self, columns: Mapping[str, EncodedColumn], user_offsets: np.ndarray) -> dict[str, EncodedColumn]:
        """The columns of a log with tied events in order.

        Args:
            columns: of the log, as for :meth:`moves`; columns of others go along. Arrays that can be written are
                changed in place.
            user_offsets: as for :meth:`moves`.
        """
        settled = dict(columns)
        order: np.ndarray | None = None
        for places, rows in self.moves(columns, user_offsets):
            for name, column in settled.items():
                if isinstance(column, Ragged):
                    if order is None:
                        order = np.arange(len(column.offsets) - 1)
                elif name != TIME:
                    if not column.flags.writeable:
                        settled[name] = column = column.copy()
                    column[places] = column[rows]
            if order is not None:
                order[places] = rows
        if order is not None:
            settled |= {name: column.take(order) for name, column in columns.items() if isinstance(column, Ragged)}
        return settled

    def _keys(self, columns: Mapping[str, EncodedColumn], places: np.ndarray) -> Iterator[np.ndarray]:
        """``(n,)`` int64 each: numbers that sort some events, the most significant first."""
        if SEQUENCE in columns:
            yield np.asarray(columns[SEQUENCE])[places]
        item_row = np.asarray(columns[ITEM_ROW])[places].astype(np.int64, copy=False)
        rank = self._rank_of_items()
        yield item_row if rank is None else rank[item_row]
        for feature in self._history.event_features:
            column = columns[feature.name]
            if isinstance(feature, Dense):
                assert isinstance(column, np.ndarray)
                yield from _ordered(column[places]).reshape(len(places), -1).T
            elif isinstance(column, Ragged):
                bags = column.take(places)
                yield _rank_of_bags(Ragged(self._ranked(feature.name, bags.values), bags.offsets))
            else:
                yield self._ranked(feature.name, column[places])

    def _rank_of_items(self) -> np.ndarray | None:
        if self._item_keys is None:
            return None
        if "@item" not in self._ranks:
            self._ranks["@item"] = _rank_of(self._item_keys)
        return self._ranks["@item"]

    def _ranked(self, feature: str, ids: np.ndarray) -> np.ndarray:
        """Ids as numbers that sort as their values do."""
        if feature not in self._ranks:
            values = self._encoder.vocabulary(feature)
            rank = None if values is None else _rank_of(values)
            self._ranks[feature] = None if rank is None else np.append(np.arange(FIRST_ID), rank + FIRST_ID)
        known = self._ranks[feature]
        return ids if known is None else known[ids]


def _tied(times: np.ndarray, user_offsets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tied events of a log, some at a time: their places, ascending, and the number of the tie of each."""
    after: list[np.ndarray] = []  # places of events that are tied with the one before them
    num_held = 0
    last = len(times)
    for begin in range(0, max(last - 1, 0), _BLOCK):
        stop = min(begin + _BLOCK, last - 1)
        found = np.flatnonzero(times[begin + 1 : stop + 1] == times[begin:stop]) + (begin + 1)
        if len(found):
            # The first event of a user is tied with none of another's.
            found = found[user_offsets[np.searchsorted(user_offsets, found)] != found]
            after.append(found)
            num_held += len(found)
        is_open = stop < last - 1 and times[stop] == times[stop + 1]
        if num_held and (stop == last - 1 or (num_held > _LONGEST_PIECE and not is_open)):
            yield _runs(np.concatenate(after))
            after, num_held = [], 0


def _runs(after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of ties, and the number of the tie of each, from the places that are tied with the one before them."""
    begins = np.flatnonzero(np.diff(after, prepend=-1) > 1)
    places = np.insert(after, begins, after[begins] - 1)
    is_first = np.zeros(len(places), np.int64)
    is_first[begins + np.arange(len(begins))] = 1
    return places, np.cumsum(is_first)


def _rank_of(values: pa.Array[Any]) -> np.ndarray:
    """``(n,)`` int64: the place of each value among all, missing first."""
    order = pc.array_sort_indices(values, order="ascending", null_placement="at_start").to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _ordered(numbers: np.ndarray) -> np.ndarray:
    """int64 that sort as float32 numbers do; of the zeros, the negative one first."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.int32)
    return np.where(bits < 0, bits ^ np.int32(2**31 - 1), bits).astype(np.int64)


def _rank_of_bags(bags: Ragged) -> np.ndarray:
    """``(n,)`` int64: equal for equal bags, and in the order of their values, one after the other."""
    # Big-endian bytes sort as the numbers do, for none is negative.
    content = pa.py_buffer(bags.values.astype(">i8").tobytes())
    offsets = pa.py_buffer((bags.offsets * 8).astype(np.int64).tobytes())
    texts = pa.Array.from_buffers(pa.large_binary(), len(bags.offsets) - 1, [None, offsets, content])
    rank: np.ndarray = pc.rank(texts, sort_keys="ascending", tiebreaker="dense").to_numpy().astype(np.int64)
    return rank
