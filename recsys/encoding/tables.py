"""Fitted encoders of embedding tables: raw values in, ids out.

Ids are int64: 1 is unknown (missing, rare or never seen), values start at 2, 0 is padding and never comes out.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from recsys.encoding.columns import Column, Float64s, Int64s, IntKeys, NoKeys, as_keys, as_numbers, as_times, valid_mask
from recsys.encoding.hashing import UInt64s, hash_integers, hash_texts
from recsys.encoding.key_index import KeyIndex
from recsys.schema import FIRST_ID, UNKNOWN_ID, LogBuckets

_MICROSECONDS_PER_HOUR = 3_600_000_000
_HOURS_PER_DAY = 24
_DAYS_PER_WEEK = 7
_WEEKDAY_OF_EPOCH = 3  # 1 January 1970 was a Thursday; Monday is 0


class TableEncoder(Protocol):
    """Encoder of one embedding table."""

    @property
    def size(self) -> int:
        """Rows of the table, padding and unknown included."""

    @property
    def state(self) -> dict[str, Any]:
        """What was fitted, as plain JSON; a vocabulary gives a digest of its keys."""

    def encode(self, column: Column, *, where: str) -> Int64s:
        """Ids (n,) of raw values (n,); ``where`` names the column in errors."""

    def decode(self, ids: Int64s) -> list[Any]:
        """What each of ``(n,)`` ids stands for, as JSON can say it: a value, or words; None if it is unknown."""


class VocabularyTable:
    """Ids by place in a fitted list: the value at place ``i`` has id ``2 + i``.

    Args:
        index: the values, most frequent first.
        digest: sha256 of the values.
    """

    def __init__(self, index: KeyIndex, digest: str) -> None:
        self.index = index
        self._digest = digest

    @property
    def size(self) -> int:
        """Rows of the table."""
        return FIRST_ID + len(self.index)

    @property
    def state(self) -> dict[str, Any]:
        """Type, number and digest of the values."""
        return {"key_type": self.index.key_type, "num_keys": len(self.index), "sha256": self._digest}

    def encode(self, column: Column, *, where: str) -> Int64s:
        """Ids of values; one that is not in the list is unknown."""
        ids = self.index.positions(column, where=where)
        ids += FIRST_ID  # absent is -1, and so becomes 1, unknown
        return ids

    def decode(self, ids: Int64s) -> list[Any]:
        """The values."""
        return [None if i < FIRST_ID else self.index.keys[i - FIRST_ID].as_py() for i in ids.tolist()]


class HashTable:
    """Ids by hash: ``2 + hash(value) mod num_buckets``, with the hash of :mod:`recsys.encoding.hashing`.

    Args:
        num_buckets: rows for values; two values may share one.
        seed: of the hash.
    """

    def __init__(self, num_buckets: int, seed: int) -> None:
        self._num_buckets = np.uint64(num_buckets)
        self._seed = seed

    @property
    def size(self) -> int:
        """Rows of the table."""
        return FIRST_ID + int(self._num_buckets)

    @property
    def state(self) -> dict[str, Any]:
        """Nothing is fitted."""
        return {}

    def encode(self, column: Column, *, where: str) -> Int64s:
        """Ids of values."""
        keys = as_keys(column, where=where)
        if isinstance(keys, NoKeys):
            return np.full(keys.length, UNKNOWN_ID, np.int64)
        if isinstance(keys, IntKeys):
            ids = self._ids(hash_integers(keys.values, seed=self._seed))
            if keys.valid is not None:
                ids[~keys.valid] = UNKNOWN_ID
            return ids
        ids = self._ids(hash_texts(keys.values, seed=self._seed))
        valid = valid_mask(keys.values)
        if valid is not None:
            ids[~valid] = UNKNOWN_ID
        return ids if keys.codes is None else np.append(ids, UNKNOWN_ID)[keys.codes]

    def decode(self, ids: Int64s) -> list[Any]:
        """The buckets: which values are in one, nobody has kept."""
        return [None if i < FIRST_ID else f"bucket {i - FIRST_ID}" for i in ids.tolist()]

    def _ids(self, hashed: UInt64s) -> Int64s:
        hashed %= self._num_buckets
        ids = hashed.view(np.int64)
        ids += FIRST_ID
        return ids


class QuantileTable:
    r"""Ids by bucket between boundaries :math:`b_1 < \dots < b_k`: :math:`2 + |\{i : b_i < x\}|`.

    A number equal to a boundary belongs to the bucket below it. Infinities fall into the outer buckets.

    Args:
        boundaries: float64, (k,), increasing, finite.
    """

    def __init__(self, boundaries: Float64s) -> None:
        self._boundaries = boundaries

    @property
    def size(self) -> int:
        """Rows of the table."""
        return FIRST_ID + len(self._boundaries) + 1

    @property
    def state(self) -> dict[str, Any]:
        """The boundaries."""
        return {"boundaries": self._boundaries.tolist()}

    def encode(self, column: Column, *, where: str) -> Int64s:
        """Ids of numbers; null and NaN are unknown."""
        numbers = as_numbers(column, where=where)
        return _bucket_ids(self._boundaries, numbers, numbers, side="left")

    def decode(self, ids: Int64s) -> list[Any]:
        """Intervals, such as ``(0.5, 2]``."""
        edges = [-np.inf, *self._boundaries.tolist(), np.inf]
        return [None if i < FIRST_ID else f"({edges[i - 2]:g}, {edges[i - 1]:g}]" for i in ids.tolist()]


class LogTable:
    r"""Ids by order of magnitude: :math:`2 + \min(\lfloor \log_{base}(1 + \max(x, 0)) \rfloor,\ num\_buckets - 1)`.

    Computed as the number of :math:`base^k \le 1 + x` with :math:`1 \le k < num\_buckets`, which is the same and has no
    rounding at powers of the base.

    Args:
        spec: base and number of buckets.
    """

    def __init__(self, spec: LogBuckets) -> None:
        self._num_buckets = spec.num_buckets
        with np.errstate(over="ignore"):
            powers = np.power(spec.base, np.arange(1, spec.num_buckets, dtype=np.float64))
        self._powers = powers[np.isfinite(powers)]

    @property
    def size(self) -> int:
        """Rows of the table."""
        return FIRST_ID + self._num_buckets

    @property
    def state(self) -> dict[str, Any]:
        """Nothing is fitted."""
        return {}

    def encode(self, column: Column, *, where: str) -> Int64s:
        """Ids of numbers; null and NaN are unknown."""
        numbers = as_numbers(column, where=where)
        return _bucket_ids(self._powers, 1.0 + np.maximum(numbers, 0.0), numbers, side="right")

    def decode(self, ids: Int64s) -> list[Any]:
        """Intervals, such as ``[3, 7)``; the first also holds what is below 0."""
        edges = [0.0, *(self._powers - 1.0).tolist(), np.inf]
        return [None if i < FIRST_ID else f"[{edges[i - 2]:g}, {edges[i - 1]:g})" for i in ids.tolist()]


class CalendarTable:
    """Ids of the hour of day or the day of week of UTC times, shifted by a fixed offset.

    Args:
        unit_hours: hours that one value lasts: 1 or 24.
        num_values: values in a cycle: 24 or 7.
        phase: value of the unit that holds 1970-01-01T00:00.
        utc_offset_minutes: local time less UTC.
    """

    def __init__(self, *, unit_hours: int, num_values: int, phase: int, utc_offset_minutes: int) -> None:
        self._unit = unit_hours * _MICROSECONDS_PER_HOUR
        self._num_values = num_values
        shift = phase * self._unit + utc_offset_minutes * (_MICROSECONDS_PER_HOUR // 60)
        self._shift = shift % (self._unit * num_values)

    @classmethod
    def hour_of_day(cls, utc_offset_minutes: int) -> CalendarTable:
        """24 values, midnight first."""
        return cls(unit_hours=1, num_values=_HOURS_PER_DAY, phase=0, utc_offset_minutes=utc_offset_minutes)

    @classmethod
    def day_of_week(cls, utc_offset_minutes: int) -> CalendarTable:
        """7 values, Monday first."""
        return cls(
            unit_hours=_HOURS_PER_DAY,
            num_values=_DAYS_PER_WEEK,
            phase=_WEEKDAY_OF_EPOCH,
            utc_offset_minutes=utc_offset_minutes,
        )

    @property
    def size(self) -> int:
        """Rows of the table."""
        return FIRST_ID + self._num_values

    @property
    def state(self) -> dict[str, Any]:
        """Nothing is fitted."""
        return {}

    def encode(self, column: Column, *, where: str) -> Int64s:
        """Ids of times (int64 UTC microseconds, or timestamps); null is unknown."""
        times = as_times(column, where=where)
        cycle = self._unit * self._num_values
        # The remainder first: times near the ends of int64 must not overflow when shifted.
        ids = (times.values % cycle + self._shift) % cycle // self._unit + FIRST_ID
        if times.valid is not None:
            ids[~times.valid] = UNKNOWN_ID
        return ids

    def decode(self, ids: Int64s) -> list[Any]:
        """The hours, from 0, or the days of the week, of which 0 is Monday."""
        return [None if i < FIRST_ID else i - FIRST_ID for i in ids.tolist()]


def _bucket_ids(boundaries: Float64s, placed: Float64s, numbers: Float64s, *, side: Any) -> Int64s:
    ids = np.searchsorted(boundaries, placed, side=side).astype(np.int64, copy=False)
    ids += FIRST_ID
    missing = np.isnan(numbers)
    if missing.any():
        ids[missing] = UNKNOWN_ID
    return ids
