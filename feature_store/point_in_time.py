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
        cls, time: np.ndarray, user_row: np.ndarray, item_row: np.ndarray, request: pl.Series | None = None
    ) -> Self:
        """Groups impressions given in the order of the view.

        Args:
            time: ``(N,)`` int64, UTC microseconds.
            user_row: ``(N,)`` int64.
            item_row: ``(N,)`` int64.
            request: ``(N,)`` key of each impression's request, none null; without it each impression is a request of
                its own.
        """
        if request is None:
            order = stable_order(time, user_row, item_row)
            return cls(order, np.arange(len(order), dtype=np.int64), time[order])
        # The rows of a request mostly follow one another: what can be done once a run is not done once a row.
        runs = request.rle().struct.unnest()
        sizes = runs["len"].cast(pl.Int64).to_numpy()
        number = runs["value"].rank("dense").cast(pl.Int64).to_numpy() - 1
        row_counts = np.bincount(number, sizes).astype(np.int64)
        earliest = np.full(len(row_counts), np.iinfo(np.int64).max)
        np.minimum.at(earliest, number, np.minimum.reduceat(time, np.cumsum(sizes) - sizes))
        by_time = stable_order(earliest)
        place = np.empty(len(earliest), dtype=np.int64)
        place[by_time] = np.arange(len(earliest))
        order = stable_order(np.repeat(place[number], sizes), item_row)
        row_counts = row_counts[by_time]
        return cls(order, np.cumsum(row_counts) - row_counts, earliest[by_time])

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
        if self.num_requests == 0:
            return np.zeros(0, dtype=bool)
        first, last = (outermost.reduceat(self.order, self.row_start) for outermost in (np.minimum, np.maximum))
        if (last - first + 1 != self.row_counts).any():  # the rows of a request do not follow one another in the view
            column = column.gather(self.order)
            first, last = self.row_start, self.row_start + self.row_counts - 1
        run = column.rle_id().to_numpy()
        differing: np.ndarray = run[first] != run[last]
        return differing

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
