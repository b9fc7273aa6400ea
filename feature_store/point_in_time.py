"""What was known at the time of a request: which rows belong to it, and which events came strictly before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import polars as pl

from feature_store.event_log import EventLog, stable_order


@dataclass(frozen=True)
class Requests:
    """Impressions grouped into requests, requests sorted by time.

    A request's time is the earliest time of its impressions: what came after it cannot have been known when the list
    was ranked. Equal times are ordered by the request's key, or by user where impressions are not grouped; the rows of
    a request by item. Rows equal in all of these keep the order of the view.

    Attributes:
        order: ``(N,)`` int64, positions of the impressions, request after request.
        row_start: ``(R,)`` int64, the first row of each request.
        time: ``(R,)`` int64, UTC microseconds, non-decreasing.
    """

    order: np.ndarray
    row_start: np.ndarray
    time: np.ndarray

    @classmethod
    def group(
        cls, time: np.ndarray, user_row: np.ndarray, item_row: np.ndarray, request: np.ndarray | None = None
    ) -> Self:
        """Groups impressions given in the order of the view.

        Args:
            time: ``(N,)`` int64, UTC microseconds.
            user_row: ``(N,)`` int64.
            item_row: ``(N,)`` int64.
            request: ``(N,)`` int64, number of each impression's request: 0, 1, ... in the order of the keys, none left
                out; without it each impression is a request of its own.
        """
        if request is None:
            order = stable_order(time, user_row, item_row)
            return cls(order, np.arange(len(order), dtype=np.int64), time[order])
        earliest = np.full(int(request.max(initial=-1)) + 1, np.iinfo(np.int64).max)
        np.minimum.at(earliest, request, time)
        by_time = stable_order(earliest, np.arange(len(earliest)))
        place = np.empty(len(earliest), dtype=np.int64)
        place[by_time] = np.arange(len(earliest))
        order = stable_order(place[request], item_row)
        row_start = np.searchsorted(place[request][order], np.arange(len(earliest)))
        return cls(order, row_start.astype(np.int64, copy=False), earliest[by_time])

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.time)

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.order)

    @property
    def row_counts(self) -> np.ndarray:
        """``(R,)`` int64: impressions of each request."""
        return np.diff(self.row_start, append=self.num_rows)

    def where_differing(self, column: pl.Series) -> np.ndarray:
        """``(R,)`` bool: whether a request's impressions differ in a column; null equals only null.

        Args:
            column: ``(N,)`` values of any type, in the order of the view.
        """
        ordered = column.gather(self.order)
        request_of_row = np.repeat(np.arange(self.num_requests), self.row_counts)
        first = ordered.gather(self.row_start[request_of_row])
        differs = (~ordered.eq_missing(first)).to_numpy()
        found = np.zeros(self.num_requests, dtype=bool)
        found[request_of_row[differs]] = True
        return found

    def without(self, dropped: np.ndarray) -> Self:
        """The same without some requests and their rows.

        Args:
            dropped: ``(R,)`` bool.
        """
        counts = self.row_counts
        order = self.order[~np.repeat(dropped, counts)]
        kept = counts[~dropped]
        return type(self)(order, np.cumsum(kept) - kept, self.time[~dropped])


def history_slices(
    log: EventLog, user_row: np.ndarray, time: np.ndarray, *, max_age: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The events of each request's user strictly before the request.

    An event at the same microsecond is left out: it may be the request's own effect.

    Args:
        log: the history's event log.
        user_row: ``(R,)`` int64.
        time: ``(R,)`` int64, UTC microseconds, in any order.
        max_age: microseconds; events older than that at the request are left out. Any age if not given.

    Returns:
        ``(start, end)``, ``(R,)`` int64 each: the slice ``[start, end)`` of the log. ``start`` is the user's first
        event that is not too old; how many of the newest are read is up to the reader.
    """
    start = log.starts(user_row)
    end = first_not_before(log.time, start, log.stops(user_row), time)
    return start if max_age is None else first_not_before(log.time, start, end, time - max_age), end


def first_not_before(times: np.ndarray, start: np.ndarray, stop: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Binary search in many slices of one array at once.

    Args:
        times: ``(E,)`` int64, non-decreasing within each slice.
        start: ``(R,)`` int64, first position of each slice.
        stop: ``(R,)`` int64, one past its last.
        time: ``(R,)`` int64.

    Returns:
        ``(R,)`` int64: the first position ``p`` in the slice with ``times[p] >= time``, else ``stop``.

    Example:
        >>> times = np.array([1, 3, 3, 7, 2])
        >>> first_not_before(times, np.array([0, 4]), np.array([4, 5]), np.array([3, 9]))
        array([1, 5])
    """
    low, high = start.copy(), stop.copy()
    searched = np.flatnonzero(low < high)
    while len(searched):
        middle = (low[searched] + high[searched]) >> 1
        is_before = times[middle] < time[searched]
        low[searched[is_before]] = middle[is_before] + 1
        high[searched[~is_before]] = middle[~is_before]
        searched = searched[low[searched] < high[searched]]
    return low
