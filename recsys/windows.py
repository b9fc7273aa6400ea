"""Totals over trailing windows, and the latest of what was known: two binary searches a look-up.

Rows of a log lie in groups, each group in order of time. How much had come before a moment is a difference of running
totals at two positions, so that a window costs the same whatever its length and however many rows it holds. The same
functions serve a training set of any size and one request.

Shapes: E rows, G groups, n look-ups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from recsys.derived import Mean, Ratio, Recency, Sum, Windowed, duration_us


@dataclass(frozen=True)
class Instants:
    """Moments as numbers from 0 on, so that a group and a moment make one sortable integer.

    Attributes:
        first: the earliest moment.
        size: one more than the greatest number.
        moments: ``(size,)`` int64, ascending; None where a moment's number is its distance from the first.
    """

    first: int
    size: int
    moments: np.ndarray | None

    @classmethod
    def of(cls, moments: np.ndarray, num_groups: int) -> Self:
        """Numbers that fit 63 bits together with those of groups."""
        if len(moments) == 0:
            return cls(0, 1, None)
        first, last = int(moments.min()), int(moments.max())
        if (num_groups + 1) * (last - first + 3) < 2**63:
            return cls(first, last - first + 1, None)
        distinct = np.unique(moments)
        return cls(first, len(distinct), distinct)

    def numbers(self, time: np.ndarray) -> np.ndarray:
        """``(n,)`` int64: the number of the first moment at or after each time; ``size`` where there is none."""
        if self.moments is not None:
            return np.searchsorted(self.moments, time).astype(np.int64, copy=False)
        clipped: np.ndarray = np.clip(time - self.first, 0, self.size)
        return clipped

    def times(self, numbers: np.ndarray) -> np.ndarray:
        """``(n,)`` int64: the moments of numbers."""
        found: np.ndarray = numbers + self.first if self.moments is None else self.moments[numbers]
        return found


@dataclass(frozen=True)
class Timeline:
    """Rows sorted by group, then by moment.

    Attributes:
        keys: ``(G,)`` int64, ascending: the key of each group.
        offsets: ``(G + 2,)`` int64: the rows of group ``g`` are ``offsets[g]:offsets[g + 1]``; group ``G`` is empty
            and stands for all keys without rows.
        instants: the moments.
        places: ``(E,)`` int64, ascending: ``group * (instants.size + 1) + number of the moment``.
    """

    keys: np.ndarray
    offsets: np.ndarray
    instants: Instants
    places: np.ndarray

    @classmethod
    def build(cls, key: np.ndarray, moment: np.ndarray) -> tuple[Self, np.ndarray]:
        """Sorts rows that are given in any order.

        Args:
            key: ``(E,)`` int64, not negative.
            moment: ``(E,)`` int64.

        Returns:
            The timeline, and ``(E,)`` int64: the positions of its rows among those given. Rows of one group and moment
            may have any order: no look-up parts them.
        """
        keys, places = _numbered(key)
        instants = Instants.of(moment, len(keys))
        places *= instants.size + 1
        places += instants.numbers(moment)
        order = np.argsort(places)
        places = places[order]
        edges = np.arange(len(keys) + 1, dtype=np.int64) * (instants.size + 1)
        offsets = np.append(np.searchsorted(places, edges), len(places))
        return cls(keys, offsets, instants, places), order

    def groups(self, key: np.ndarray) -> np.ndarray:
        """``(n,)`` int64: the group of each key; the empty one for keys without rows."""
        if len(self.keys) == 0:
            return np.zeros(len(key), np.int64)
        place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        return np.where(self.keys[place] == key, place, len(self.keys))

    def before(self, group: np.ndarray, time: np.ndarray) -> np.ndarray:
        """``(n,)`` int64: one past the last row of a group with a moment strictly before a time.

        Args:
            group: ``(n,)`` int64.
            time: ``(n,)`` int64.
        """
        wanted = group * (self.instants.size + 1)
        wanted += self.instants.numbers(time)
        return np.searchsorted(self.places, wanted)

    def starts(self, group: np.ndarray) -> np.ndarray:
        """``(n,)`` int64: the first row of each group."""
        first: np.ndarray = self.offsets[group]
        return first

    def latest(self, rank: np.ndarray) -> np.ndarray:
        """The greatest rank of a group up to each of its rows.

        Args:
            rank: ``(E,)`` int64 of each row, in the order of the timeline; -1 for rows that do not count.

        Returns:
            ``(E,)`` int64; -1 where no row so far counts.
        """
        if len(rank) == 0:
            return rank.copy()
        # One running maximum over all groups: each begins above everything that the earlier ones hold.
        step = int(rank.max()) + 2
        base = self.places // (self.instants.size + 1) * step
        highest: np.ndarray = np.maximum.accumulate(base + rank + 1) - base - 1
        return highest


def _numbered(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys, ascending, and the number of each row's key among them."""
    if len(key) and 0 <= int(key.max()) < 4 * len(key):
        is_present = np.zeros(int(key.max()) + 1, np.bool_)
        is_present[key] = True
        return np.flatnonzero(is_present), (np.cumsum(is_present) - 1)[key]
    order = np.argsort(key)
    ordered = key[order]
    is_first = np.append(True, ordered[1:] != ordered[:-1])[: len(key)]
    numbers = np.empty(len(key), np.int64)
    numbers[order] = np.cumsum(is_first) - 1
    return ordered[is_first], numbers


def running_totals(values: np.ndarray) -> np.ndarray:
    """``(E + 1,)`` int64: what has come before each row, and in all.

    Args:
        values: ``(E,)`` integers or booleans, in the order of a timeline.
    """
    totals = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=totals[1:])
    return totals


class GroupedRows:
    """Rows of a log, sorted once for all values that are computed of the same groups.

    Args:
        key: ``(E,)`` int64, the group of each row, not negative.
        time: ``(E,)`` int64, UTC microseconds.
        created: ``(E,)`` int64, since when each row is known; None if since its time.
    """

    def __init__(self, key: np.ndarray, time: np.ndarray, created: np.ndarray | None = None) -> None:
        self._key = key
        self._time = time
        self._created = None if created is None else np.maximum(time, created)
        self._sorted: dict[int, tuple[Timeline, np.ndarray]] = {}

    def window(self, length_us: int | None, delay_us: int) -> Window:
        """The rows that count at a time ``t``: known before ``t``, and not older than ``length_us``."""
        if self._created is None:
            # One order serves all: a row that enters or leaves so much later is looked for so much earlier.
            timeline, order = self._by_moment(0, self._time)
            leave = None if length_us is None else max(length_us, delay_us)
            return Window(timeline, order, None if leave is None else timeline, order, delay_us, leave or 0)
        known = np.maximum(self._created, self._time + delay_us)
        timeline, order = self._by_moment(delay_us, known)
        if length_us is None:
            return Window(timeline, order, None, order)
        left, left_order = Timeline.build(self._key, np.maximum(known, self._time + length_us))
        return Window(timeline, order, left, left_order)

    def _by_moment(self, delay_us: int, moment: np.ndarray) -> tuple[Timeline, np.ndarray]:
        if delay_us not in self._sorted:
            self._sorted = {delay_us: Timeline.build(self._key, moment)}
        return self._sorted[delay_us]

    def times(self, num_groups: int) -> tuple[Instants, np.ndarray]:
        """The rows' own times, and ``(E,)`` the number of each."""
        instants = Instants.of(self._time, num_groups)
        return instants, instants.numbers(self._time)


@dataclass(frozen=True)
class Window:
    """Rows that enter at one moment and leave at another.

    Attributes:
        entered: rows by the moment since when they are known.
        entered_order: ``(E,)``, positions of its rows among those given.
        left: rows by the moment after which they do not count any more; None if that never comes.
        left_order: ``(E,)``, likewise; that of ``entered`` without it.
        enter_delay: added to every moment of ``entered``.
        leave_delay: added to every moment of ``left``.
    """

    entered: Timeline
    entered_order: np.ndarray
    left: Timeline | None
    left_order: np.ndarray
    enter_delay: int = 0
    leave_delay: int = 0

    def totals(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Running totals of what entered, and of what left.

        Args:
            values: ``(E,)`` integers or booleans, as the rows were given.
        """
        entered = running_totals(values[self.entered_order])
        is_one = self.left is None or self.left is self.entered
        return entered, entered if is_one else running_totals(values[self.left_order])

    def find(self, key: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(first, last)`` of n look-ups: what entered before ``last`` counts, less what left before ``first``.

        Args:
            key: ``(n,)`` int64; negative ones have no rows.
            time: ``(n,)`` int64.
        """
        group = self.entered.groups(key)
        last = self.entered.before(group, time - self.enter_delay)
        if self.left is None:
            return self.entered.starts(group), last
        return self.left.before(group, time - self.leave_delay), last


@dataclass(frozen=True)
class WindowedValue:
    """A count, sum, mean or recency, ready to be looked up.

    Attributes:
        spec: what it is.
        window: its rows.
        counts: running totals of the rows that count.
        sums: running totals of their values in units of ``10 ** -decimals``, of a sum and of a mean.
        latest: ``(E,)``, of a recency: the number of the latest time up to each row.
        instants: these times.
    """

    spec: Windowed
    window: Window
    counts: tuple[np.ndarray, np.ndarray] | None = None
    sums: tuple[np.ndarray, np.ndarray] | None = None
    latest: np.ndarray | None = None
    instants: Instants | None = None

    @classmethod
    def build(cls, spec: Windowed, rows: GroupedRows, is_counted: np.ndarray, units: np.ndarray | None = None) -> Self:
        """Prepares the look-ups.

        Args:
            spec: what to compute.
            rows: in groups.
            is_counted: ``(E,)`` bool: rows that the filters let through, and whose value is not missing. Or int64: how
                many of them each row stands for.
            units: ``(E,)`` int64: of a sum and of a mean, the values, 0 where not counted (:func:`in_units`).
        """
        length = None if spec.window is None else duration_us(spec.window)
        delay = 0 if spec.known_after is None else duration_us(spec.known_after)
        if isinstance(spec, Recency):
            window = rows.window(None, delay)
            instants, number = rows.times(len(window.entered.keys))
            ordered = np.where(is_counted, number, -1)[window.entered_order]
            return cls(spec, window, latest=window.entered.latest(ordered), instants=instants)
        window = rows.window(length, delay)
        counts = None if isinstance(spec, Sum) else window.totals(is_counted)
        return cls(spec, window, counts, None if units is None else window.totals(units))

    def at(self, key: np.ndarray, time: np.ndarray) -> np.ndarray:
        """The value at n times.

        Args:
            key: ``(n,)`` int64; negative for no group, whose value is missing.
            time: ``(n,)`` int64, UTC microseconds.

        Returns:
            ``(n,)`` float64, NaN where it is missing.
        """
        # Sorted by group, neighbouring look-ups read neighbouring memory: several times faster than at random.
        order = np.argsort(key)
        key, time = key[order], time[order]
        first, last = self.window.find(key, time)
        found = self._recency(first, last, time) if isinstance(self.spec, Recency) else self._aggregate(first, last)
        found[key < 0] = np.nan
        value = np.empty(len(key))
        value[order] = found
        return value

    def _aggregate(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        spec = self.spec
        if isinstance(spec, Sum):
            summed: np.ndarray = _between(self.sums, first, last) / 10**spec.decimals
            return summed
        count = _between(self.counts, first, last)
        if isinstance(spec, Mean):
            total = _between(self.sums, first, last) / 10**spec.decimals
            return divided(total + spec.prior * spec.prior_count, count + spec.prior_count)
        return count.astype(np.float64)

    def _recency(self, first: np.ndarray, last: np.ndarray, time: np.ndarray) -> np.ndarray:
        assert self.latest is not None
        assert self.instants is not None
        value = np.full(len(time), np.nan)
        some = np.flatnonzero(last > first)
        rank = self.latest[last[some] - 1]
        some, rank = some[rank >= 0], rank[rank >= 0]
        age = time[some] - self.instants.times(rank)
        if self.spec.window is not None:
            is_near = age <= duration_us(self.spec.window)
            some, age = some[is_near], age[is_near]
        value[some] = age / 1e6
        return value


def _between(totals: tuple[np.ndarray, np.ndarray] | None, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    assert totals is not None
    entered, left = totals
    total: np.ndarray = entered[last] - left[first]
    return total


def ratio(spec: Ratio, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The ratio of two values, with what is added to each."""
    return divided(numerator + spec.add_to_numerator, denominator + spec.add_to_denominator)


def divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """``numerator / denominator``, NaN where the latter is 0."""
    result = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=result, where=denominator != 0)
    return result


def in_units(values: np.ndarray, decimals: int) -> np.ndarray:
    """Numbers as whole multiples of ``10 ** -decimals``, whose sums are exact.

    Args:
        values: ``(E,)`` float64, NaN where missing.
        decimals: of the unit.

    Returns:
        ``(E,)`` int64, 0 where missing.

    Raises:
        ValueError: a value is infinite, or all together may pass 63 bits.
    """
    known = np.where(np.isnan(values), 0.0, values)
    with np.errstate(over="ignore"):
        units = np.rint(known * 10.0**decimals)
    if np.isinf(known).any():
        raise ValueError("must be finite, got an infinite number")
    check_units(units, decimals)
    return units.astype(np.int64)


def check_units(units: np.ndarray, decimals: int) -> None:
    """Refuses values whose sums might not be exact.

    Args:
        units: ``(E,)`` int64 or float64, whole multiples of ``10 ** -decimals``.
        decimals: of the unit.

    Raises:
        ValueError: all together may pass 63 bits.
    """
    with np.errstate(over="ignore"):
        total = float(np.abs(units).sum(dtype=np.float64))
    if not total < 2.0**62:
        raise ValueError(f"must add up to less than {2**62 // 10**decimals:.1e} with decimals {decimals}, got more")


@dataclass(frozen=True)
class LatestVersion:
    """Which version of an attribute was the latest known, ready to be looked up.

    Attributes:
        versions: by entity and by the moment since when each is known.
        latest: ``(E,)``, the rank of the latest up to each.
        row_of_rank: ``(E,)`` int64, the version of each rank, as they were given.
        time: ``(E,)`` int64, of each version, as they were given.
    """

    versions: Timeline
    latest: np.ndarray
    row_of_rank: np.ndarray
    time: np.ndarray

    @classmethod
    def build(cls, key: np.ndarray, time: np.ndarray, created: np.ndarray | None, value_rank: np.ndarray) -> Self:
        """Prepares the look-ups.

        The latest version is that of the greatest time; of those, that of the greatest created time; of those, that of
        the greatest values.

        Args:
            key: ``(E,)`` int64, the entity of each version, not negative.
            time: ``(E,)`` int64.
            created: ``(E,)`` int64, since when each is known; None if since its time.
            value_rank: ``(E,)`` int64, a total order of their values: equal only where the values are.
        """
        known = time if created is None else np.maximum(time, created)
        row_of_rank = np.lexsort((value_rank, time if created is None else created, time))
        rank = np.empty(len(time), np.int64)
        rank[row_of_rank] = np.arange(len(time))
        versions, order = Timeline.build(key, known)
        return cls(versions, versions.latest(rank[order]), row_of_rank, time)

    def at(self, key: np.ndarray, time: np.ndarray, max_age_us: int | None) -> np.ndarray:
        """The version at n times.

        Args:
            key: ``(n,)`` int64.
            time: ``(n,)`` int64.
            max_age_us: an older version counts as none; None for no limit.

        Returns:
            ``(n,)`` int64: its number among those given, -1 where there is none.
        """
        order = np.argsort(key)
        key, time = key[order], time[order]
        group = self.versions.groups(key)
        last = self.versions.before(group, time)
        found = np.full(len(key), -1, np.int64)
        some = np.flatnonzero(last > self.versions.starts(group))
        row = self.row_of_rank[self.latest[last[some] - 1]]
        if max_age_us is not None:
            is_near = time[some] - self.time[row] <= max_age_us
            some, row = some[is_near], row[is_near]
        found[order[some]] = row
        return found
