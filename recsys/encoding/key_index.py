"""From a raw key to its place in a list of keys, for one key or for ten million."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys.encoding.columns import Array, Column, Int64s, IntKeys, NoKeys, as_keys
from recsys.encoding.hashing import FEW, hash_integer, hash_integers, hash_text, hash_texts
from recsys.errors import EncodingError

_BLOCK = 1 << 16
"""Rows looked up at a time, so that intermediate arrays stay in the cache."""
_COMPACT = 4
"""Integers are addressed directly if they span at most so many times their number."""


class KeyIndex:
    """Place of a raw key in a list of keys.

    Integers that lie close together are addressed directly; other keys are found by their hash in a table of buckets
    that hold half a key on average or less. Either way a look-up takes constant time, and a call does no work that
    grows with the list. Not changed after construction, so threads may share it.

    Args:
        keys: integers or text; nulls keep their place and are never found.

    Raises:
        EncodingError: the keys repeat, or are neither integers nor text.

    Example:
        >>> KeyIndex(pa.array([30, 10, 20])).positions(pa.array([10, 99, None])).tolist()
        [1, -1, -1]
    """

    def __init__(self, keys: Array) -> None:
        parsed = as_keys(keys, where="keys")
        self._keys: Array
        self.key_type: str | None = None
        """``"integer"``, ``"text"``, or ``None`` if there are no keys but nulls."""
        self._num_keys = len(keys)
        self._texts: Array = None  # the keys, if they are text
        self._direct: npt.NDArray[np.integer] | None = None
        self._lowest = 0
        if isinstance(parsed, NoKeys):
            self._keys = pa.nulls(len(keys), pa.int64())
            return
        if isinstance(parsed, IntKeys):
            self._keys = pa.array(parsed.values, mask=None if parsed.valid is None else ~parsed.valid)
            places = np.arange(len(keys)) if parsed.valid is None else np.flatnonzero(parsed.valid)
            if len(places) == 0:
                return
            self.key_type = "integer"
            integers = parsed.values[places]
            if not self._address_directly(integers, places):
                self._build(hash_integers(integers), places)
        else:
            texts = parsed.values.cast(pa.large_string())
            if parsed.codes is not None:
                texts = texts.take(pa.array(parsed.codes, mask=parsed.codes < 0))
            self._keys = texts
            places = np.flatnonzero(np.asarray(self._keys.is_valid()))
            if len(places) == 0:
                return
            self.key_type = "text"
            self._texts = texts
            if pc.count_distinct(self._texts).as_py() < len(places):
                _repeated()
            self._build(hash_texts(self._texts)[places], places)

    def _address_directly(self, integers: Int64s, places: Int64s) -> bool:
        lowest, highest = int(integers.min()), int(integers.max())
        span = highest - lowest + 1
        if span > _COMPACT * len(integers) + 1024:
            return False
        self._lowest = lowest
        self._direct = np.full(span, -1, _place_type(self._num_keys))
        self._direct[integers - lowest] = places
        if np.count_nonzero(self._direct >= 0) < len(integers):
            _repeated()
        return True

    def _build(self, hashes: npt.NDArray[np.uint64], places: Int64s) -> None:
        order = np.argsort(hashes)
        place_type = _place_type(self._num_keys)
        # One slot more than there are keys: the last buckets may be empty, and then begin there. Its place is -1,
        # absent, and slot -1 refers to it as well.
        self._num_slots = len(hashes)
        self._hashes = np.append(hashes[order], np.uint64(0))
        self._places = np.append(places[order], -1).astype(place_type)
        if self._texts is None and np.any(self._hashes[1:-1] == self._hashes[:-2]):
            _repeated()
        bits = max(1, (2 * len(hashes)).bit_length())
        self._shift = 64 - bits
        counts = np.bincount((self._hashes[:-1] >> np.uint64(self._shift)).astype(np.int64), minlength=2**bits)
        self._starts = np.zeros(2**bits + 1, place_type)
        np.cumsum(counts, out=self._starts[1:])

    @property
    def keys(self) -> Array:
        """The keys, in order: int64 or large_string."""
        return self._keys

    def __len__(self) -> int:
        return self._num_keys

    def positions(self, column: Column, *, where: str = "keys") -> Int64s:
        """Place of each value, -1 if it is null or not among the keys.

        Args:
            column: (n,), of the keys' type.
            where: names the column in errors.

        Returns:
            int64, (n,).

        Raises:
            EncodingError: integers were asked of text keys, or the reverse.
        """
        parsed = as_keys(column, where=where)
        if isinstance(parsed, NoKeys) or self.key_type is None:
            return np.full(len(column), -1, np.int64)
        if (self.key_type == "integer") != isinstance(parsed, IntKeys):
            cast = "int64" if self.key_type == "integer" else "text"
            wanted = "integers" if self.key_type == "integer" else "text"
            raise EncodingError(
                f"{where} must hold {wanted}, as when it was fitted, got a column of type {column.type}",
                hint=f"cast the column to {cast}",
            )
        if isinstance(parsed, IntKeys):
            found = self._find_integers(parsed.values)
            if parsed.valid is not None:
                found[~parsed.valid] = -1
            return found
        found = self._find_texts(parsed.values)
        return found if parsed.codes is None else np.append(found, -1)[parsed.codes]

    def _find_integers(self, values: Int64s) -> Int64s:
        if len(values) <= FEW:
            return np.array([self._place_of_integer(value) for value in values.tolist()], np.int64)
        found = np.empty(len(values), np.int64)
        for begin in range(0, len(values), _BLOCK):
            block = values[begin : begin + _BLOCK]
            if self._direct is not None:
                found[begin : begin + _BLOCK] = self._places_of_addresses(self._direct, block)
            else:
                found[begin : begin + _BLOCK] = self._places[self._slots_of_hashes(hash_integers(block))]
        return found

    def _places_of_addresses(self, direct: npt.NDArray[np.integer], integers: Int64s) -> npt.NDArray[np.integer]:
        # Unsigned, so that one comparison finds the values on either side, and no difference overflows.
        shifted = integers.view(np.uint64) - np.uint64(self._lowest % 2**64)
        if shifted.max() < np.uint64(len(direct)):  # mostly, all are among the keys
            return direct[shifted.view(np.int64)]
        inside = shifted < np.uint64(len(direct))
        return np.where(inside, direct[np.where(inside, shifted, np.uint64(0)).view(np.int64)], -1)

    def _find_texts(self, texts: Array) -> Int64s:
        if len(texts) <= FEW:
            return np.array([-1 if t is None else self._place_of_text(t) for t in texts.to_pylist()], np.int64)
        hashes = hash_texts(texts)
        slots = np.empty(len(texts), np.int64)
        for begin in range(0, len(texts), _BLOCK):
            slots[begin : begin + _BLOCK] = self._slots_of_hashes(hashes[begin : begin + _BLOCK])
        found = np.full(len(texts), -1, np.int64)
        rows = np.flatnonzero(slots >= 0)
        while len(rows):  # a second round only where two texts have the same hash
            places = self._places[slots[rows]]
            asked = texts if len(rows) == len(texts) else texts.take(pa.array(rows))
            equal = pc.equal(self._texts.take(pa.array(places)), asked.cast(pa.large_string()))
            is_same = pc.fill_null(equal, False).to_numpy(zero_copy_only=False)
            found[rows[is_same]] = places[is_same]
            rows = rows[~is_same]
            slots[rows] += 1
            rows = rows[self._hashes[slots[rows]] == hashes[rows]]
            rows = rows[slots[rows] < self._num_slots]
        return found

    def _slots_of_hashes(self, hashes: npt.NDArray[np.uint64]) -> Int64s:
        """First place of each hash in the sorted hashes, -1 if there is none."""
        buckets = (hashes >> np.uint64(self._shift)).view(np.int64)
        slots = self._starts.take(buckets).astype(np.int64, copy=False)
        is_same = self._hashes.take(slots) == hashes
        if is_same.all():
            return slots
        rows = np.flatnonzero(~is_same)
        left, ends, wanted = slots[rows] + 1, self._starts[buckets[rows] + 1], hashes[rows]
        slots[rows] = -1
        while True:
            searching = left < ends
            rows, left, ends, wanted = rows[searching], left[searching], ends[searching], wanted[searching]
            if len(rows) == 0:
                return slots
            is_same = self._hashes[left] == wanted
            slots[rows[is_same]] = left[is_same]
            searching = ~is_same
            rows, left, ends, wanted = rows[searching], left[searching] + 1, ends[searching], wanted[searching]

    def _place_of_integer(self, value: int) -> int:
        if self._direct is None:
            return self._place_of_hash(hash_integer(value))
        offset = value - self._lowest
        return int(self._direct[offset]) if 0 <= offset < len(self._direct) else -1

    def _place_of_hash(self, hashed: int) -> int:
        bucket = hashed >> self._shift
        for slot in range(int(self._starts[bucket]), int(self._starts[bucket + 1])):
            if int(self._hashes[slot]) == hashed:
                return int(self._places[slot])
        return -1

    def _place_of_text(self, text: str) -> int:
        hashed = hash_text(text)
        bucket = hashed >> self._shift
        for slot in range(int(self._starts[bucket]), int(self._starts[bucket + 1])):
            place = int(self._places[slot])
            if int(self._hashes[slot]) == hashed and self._texts[place].as_py() == text:
                return place
        return -1


def _place_type(num_keys: int) -> type[np.integer]:
    return np.int32 if num_keys < 2**31 - 1 else np.int64


def _repeated() -> None:
    raise EncodingError("keys must be unique, got repeated ones", hint="keep one row a key")
