"""The event log of a history: every user's events once, oldest first.

A history of a request is a slice ``[start, end)`` of the log, so that it costs two integers however long it is, and a
slice that ends before the request cannot hold its future (:mod:`feature_store.point_in_time`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Self

import numpy as np

_BLOCK = 1 << 16


@dataclass(frozen=True)
class EventLog:
    """Events sorted by user, then time; what orders equal times, :mod:`feature_store.tied_events` says.

    Attributes:
        source_row: ``(E,)`` int64, row of each event in the events view.
        item_row: ``(E,)`` int64, row of the items table.
        time: ``(E,)`` int64, UTC microseconds.
        user_offsets: ``(U + 1,)`` int64, the events of the user in row ``u`` of the users table are
            ``user_offsets[u]:user_offsets[u + 1]``.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("source_row", "item_row", "time")

    source_row: np.ndarray
    item_row: np.ndarray
    time: np.ndarray
    user_offsets: np.ndarray

    @classmethod
    def build(
        cls, source_row: np.ndarray, user_row: np.ndarray, item_row: np.ndarray, time: np.ndarray, *, num_users: int
    ) -> Self:
        """Sorts events given in the order of the view.

        Args:
            source_row: ``(E,)`` int64.
            user_row: ``(E,)`` int64, below ``num_users``.
            item_row: ``(E,)`` int64.
            time: ``(E,)`` int64, UTC microseconds, not negative.
            num_users: rows of the users table.
        """
        order = stable_order(user_row, time)
        offsets = np.zeros(num_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(user_row, minlength=num_users), out=offsets[1:])
        return cls(source_row[order], item_row[order], time[order], offsets)

    def filtered(self, is_kept: np.ndarray) -> Self:
        """The log of some of the events.

        Args:
            is_kept: ``(E,)`` bool, in the order of the log.
        """
        kept_before = np.zeros(self.num_events + 1, dtype=np.int64)
        np.cumsum(is_kept, out=kept_before[1:])
        offsets = kept_before[self.user_offsets]
        return type(self)(self.source_row[is_kept], self.item_row[is_kept], self.time[is_kept], offsets)

    @property
    def num_events(self) -> int:
        """E."""
        return len(self.time)

    def starts(self, user_row: np.ndarray) -> np.ndarray:
        """``(R,)`` int64: the first event of each user."""
        first: np.ndarray = self.user_offsets[user_row]
        return first

    def stops(self, user_row: np.ndarray) -> np.ndarray:
        """``(R,)`` int64: one past the last event of each user."""
        last: np.ndarray = self.user_offsets[user_row + 1]
        return last


def stable_order(*keys: np.ndarray) -> np.ndarray:
    """Positions that sort rows by several keys, the first being the most significant; equal rows keep their order.

    Keys whose ranges fit 63 bits together are packed into one integer first, which sorts several times faster. Last
    keys that never fall need no sorting: rows that are equal in the others keep their order anyway.

    Args:
        keys: ``(n,)`` int64 each.

    Returns:
        ``(n,)`` int64.

    Example:
        >>> stable_order(np.array([1, 0, 1]), np.array([5, 9, 3]))
        array([1, 2, 0])
    """
    num_rows = len(keys[0])
    while keys and never_falls(keys[-1]):
        keys = keys[:-1]
    if not keys:
        return np.arange(num_rows, dtype=np.int64)
    lowest = [int(k.min()) for k in keys]
    spans = [int(k.max()) - low + 1 for k, low in zip(keys, lowest, strict=True)]
    capacity = prod(spans)
    if capacity > 2**63 - 1:
        order: np.ndarray = np.lexsort(keys[::-1])
        return order
    room = 1 << num_rows.bit_length()
    if capacity * room > 2**63 - 1:
        return _stable_argsort(_packed(keys, lowest, spans))
    # The position fits, too: numbers are sorted faster than their positions, and none are equal.
    numbers = _packed(keys, lowest, spans, room)
    numbers.sort()
    numbers &= room - 1
    return numbers


def _packed(keys: Sequence[np.ndarray], lowest: Sequence[int], spans: Sequence[int], room: int = 1) -> np.ndarray:
    """One integer a row, which sorts as all keys do; with room for the row's position, this comes last in it."""
    packed = np.empty(len(keys[0]), dtype=np.int64)
    for begin in range(0, len(packed), _BLOCK):  # so that what is halfway stays in the cache
        part = packed[begin : begin + _BLOCK]
        part[:] = 0
        for key, low, span in zip(keys, lowest, spans, strict=True):
            part *= span
            part += key[begin : begin + _BLOCK] - low
        if room > 1:
            part *= room
            part += np.arange(begin, begin + len(part))
    return packed


def never_falls(values: np.ndarray) -> bool:
    """Whether numbers are in order already.

    Args:
        values: ``(n,)``.
    """
    return bool((values[1:] >= values[:-1]).all())


def _stable_argsort(keys: np.ndarray) -> np.ndarray:
    """Vectorised sorting is not stable but several times faster: runs of equal keys are put in order after it."""
    order = np.argsort(keys)
    ordered = keys[order]
    is_tied = ordered[1:] == ordered[:-1]
    if is_tied.any():
        tied = np.flatnonzero(np.append(is_tied, False) | np.append(False, is_tied))
        # The run of each tied row, then its position in the input.
        order[tied] = order[tied][np.lexsort((order[tied], ordered[tied]))]
    return order
