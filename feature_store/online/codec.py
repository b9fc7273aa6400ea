"""Encoded features as bytes: one value an entity, one value a user's history; little-endian, padded to 8 bytes.

::

    header, 24 bytes    magic u1 · version u1 · kind u1 · 0 u1 · number of records u4 · digest u8 · expires i8
    records             one for an entity, one an event for a history, oldest first; fixed size
    ids of bags         bag feature after bag feature; how many ids a record has of each is in the record; those of an
                        entity are padded to 32 bytes, so that most entities' values are of one size

A record holds the time (of events), numbers as float32, ids in as few bytes as their table needs, and the length of
each bag. The *digest* stands for the encoder's fingerprint and the layout of the record: bytes that another encoder, or
another list of features, gave rise to are refused and never read as ids of this one. *expires* is in UTC microseconds;
what does not expire holds the greatest int64.

Many values are decoded together: their bytes are joined, and each column is one view, where they are of one size, or
one gather.

Shapes: V values, S records of all values together.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from recsys.config import fingerprint
from recsys.encoding.columns import Ragged, offsets_of
from recsys.encoding.encoder import EncodedColumn, Encoder
from recsys.errors import ArtifactError, IntegrityError
from recsys.schema import Dense, Feature, MultiCategorical

FORMAT_VERSION = 2
NEVER = 2**63 - 1
"""The expiry of what does not expire: no time is after it."""

_MAGIC = 0xC7
_HEADER = np.dtype(
    [("magic", "u1"), ("version", "u1"), ("kind", "u1"), ("zero", "u1"), ("records", "<u4"), ("digest", "<u8"),
     ("expires", "<i8")]
)  # fmt: skip
_HEADER_WORDS = _HEADER.itemsize // 8
_HEAD = struct.Struct("<QQq")
"""The same as three words."""
_KINDS = {"user": 1, "item": 2, "history": 3, "values": 4, "rows": 5}
_TIMED = ("history", "rows")
_TIME = "@time"
_START_MASK = 2**32 - 1
_BLOCK_WORDS = 4
_WIDEST = 64
"""Ids of an entity up to which its bags are masked out of a table rather than gathered."""
_FIRST = np.arange(_WIDEST) < np.arange(_WIDEST + 1)[:, None]
"""Row ``n`` is true in its first ``n`` places."""
_NO_WORDS = np.empty(0, np.uint64)
_NO_TIMES = np.empty(0, np.int64)


class Decoded(NamedTuple):
    """The records of V values.

    Attributes:
        offsets: ``(V + 1,)`` int64: records of value ``v`` are ``offsets[v]`` up to ``offsets[v + 1]``.
        times: ``(S,)`` int64, UTC microseconds; empty unless the values are histories.
        columns: encoded columns of S rows, by feature.
        expires: ``(V,)`` int64: when each value expires, UTC microseconds.
        first_expiry: when the first of them does; :data:`NEVER` without values.
    """

    offsets: np.ndarray
    times: np.ndarray
    columns: dict[str, EncodedColumn]
    expires: np.ndarray
    first_expiry: int


@dataclass(frozen=True)
class _Field:
    """Where a feature lies in a record: under its name, or, of a bag, the length under its name."""

    name: str
    type: np.dtype[Any]
    dim: int | None  # of dense features
    is_bag: bool
    read_as: np.dtype[Any]


class Codec:
    """Reads and writes the values of one kind. Safe to call from several threads.

    Args:
        encoder: whose ids and numbers the values hold.
        kind: ``"user"``, ``"item"``, ``"history"``, ``"values"`` or ``"rows"``.
        features: in the order in which they are stored.
        name: what the values are, for messages.
        numbers: what is stored beside features as it is: types, ``"<f8"``, ``"<i8"`` or ``"<u1"``, by name.
        meaning: what else the values depend on; another one makes them unreadable.

    Attributes:
        features: names, in order.
        numbers: names of what is stored beside them.
        digest: first 8 bytes of a sha256 over the encoder's fingerprint and the layout.
    """

    def __init__(
        self,
        encoder: Encoder,
        kind: str,
        features: Sequence[str],
        *,
        name: str,
        numbers: Mapping[str, str] | None = None,
        meaning: Any = None,
    ) -> None:
        self.name = name
        self.features = tuple(features)
        self.numbers = tuple(numbers or ())
        self._encoder = encoder
        self._kind = _KINDS[kind]
        self._start = _MAGIC | FORMAT_VERSION << 8 | self._kind << 16
        self._has_times = kind in _TIMED
        self._fields = [_field(encoder, encoder.schema.feature(f)) for f in features]
        self._fields += [_Field(n, np.dtype(t), None, False, np.dtype(t)) for n, t in (numbers or {}).items()]
        self._bags = [f.name for f in self._fields if f.is_bag]
        large = any(encoder.table_sizes[_table(encoder, bag)] > 2**32 for bag in self._bags)
        self._id_type = np.dtype("<i8" if large else "<u4")
        self._record = self._record_type()
        self._words = self._record.itemsize // 8
        # Of one record each, values are padded to have one size.
        self._block = 1 if self._has_times else _BLOCK_WORDS
        self._ids_of_block = 8 * self._block // self._id_type.itemsize
        self._least_blocks = int(bool(self._bags) and not self._has_times)
        self._tables: dict[int, np.dtype[Any]] = {}
        layout = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "record": [[n, self._record.fields[n][0].str, self._record.fields[n][1]] for n in self._record.names or ()]
            if self._record.fields
            else [],
            "bags": dict.fromkeys(self._bags, self._id_type.str),
            "encoder": encoder.fingerprint,
        }
        if meaning is not None:
            layout["meaning"] = meaning
        self.digest = int.from_bytes(hashlib.sha256(fingerprint(layout).encode()).digest()[:8], "little")

    def _record_type(self) -> np.dtype[Any]:
        """Widest fields first, so that each is aligned; the whole a multiple of 8 bytes."""
        fields: list[tuple[str, str, tuple[int, ...]]] = [(_TIME, "<i8", ())] if self._has_times else []
        by_width = sorted(self._fields, key=lambda f: -f.type.itemsize)
        fields += [(f.name, f.type.str, (f.dim,) if f.dim is not None and f.dim > 1 else ()) for f in by_width]
        plain = np.dtype(fields)
        padding = -plain.itemsize % 8 if plain.itemsize else 8
        return np.dtype([*fields, ("@padding", "u1", (padding,))]) if padding else plain

    def bytes_of(self, number: str) -> slice:
        """Where a value of one record holds what is stored beside features."""
        assert self._record.fields is not None
        kind, place, *_ = self._record.fields[number]
        return slice(_HEADER.itemsize + place, _HEADER.itemsize + place + kind.itemsize)

    def encode(
        self,
        columns: Mapping[str, EncodedColumn],
        offsets: np.ndarray,
        times: np.ndarray | None = None,
        *,
        expires: int = NEVER,
    ) -> list[bytes]:
        """V values.

        Args:
            columns: S rows each, by feature.
            offsets: ``(V + 1,)`` int64 from 0 to S, the records of each value.
            times: ``(S,)`` int64, of histories.
            expires: UTC microseconds.
        """
        bags = {name: _bag(columns[name]) for name in self._bags}
        num_records, counts = int(offsets[-1]), np.diff(offsets)
        records = np.zeros(num_records, self._record)
        if times is not None:
            records[_TIME] = times
        for field in self._fields:
            column = columns[field.name]
            if isinstance(column, Ragged):
                records[field.name] = np.diff(column.offsets)
            elif field.dim == 1:
                records[field.name] = column.reshape(num_records)
            else:
                records[field.name] = column
        width = self._id_type.itemsize
        ids_of = {name: np.diff(bag.offsets[offsets]) for name, bag in bags.items()}  # ids of each value, by bag
        num_ids = sum(ids_of.values(), np.zeros(len(counts), np.int64))
        words = _HEADER_WORDS + counts * self._words + self._id_words(num_ids)
        starts = offsets_of(words)
        buffer = np.zeros(int(starts[-1]), np.uint64)
        headers = np.zeros(len(counts), _HEADER)
        headers["magic"], headers["version"], headers["kind"] = _MAGIC, FORMAT_VERSION, self._kind
        headers["records"], headers["digest"], headers["expires"] = counts, self.digest, expires
        buffer[starts[:-1, None] + np.arange(_HEADER_WORDS)] = headers.view(np.uint64).reshape(-1, _HEADER_WORDS)
        buffer[ranges(starts[:-1] + _HEADER_WORDS, counts * self._words)] = records.view(np.uint64)
        place = (starts[:-1] + _HEADER_WORDS + counts * self._words) * (8 // width)
        ids = buffer.view(self._id_type)
        for name, bag in bags.items():
            ids[ranges(place, ids_of[name])] = bag.values[bag.offsets[0] : bag.offsets[-1]]
            place = place + ids_of[name]
        content, ends = buffer.tobytes(), (starts * 8).tolist()
        return [content[start:end] for start, end in pairwise(ends)]

    def _id_words(self, num_ids: np.ndarray) -> np.ndarray:
        """Words that so many ids of a value take."""
        blocks = np.maximum(-(-num_ids // self._ids_of_block), self._least_blocks)
        words: np.ndarray = blocks * self._block
        return words

    def decode(self, values: Sequence[bytes]) -> Decoded:
        """The records of V values.

        Raises:
            ArtifactError: a value was encoded by another encoder, or of other features.
            IntegrityError: a value is not one of this format, or was cut short.
        """
        if not values:
            return self._decoded(np.zeros(1, np.int64), np.empty(0, np.uint64), np.zeros(0, np.int64), _NO_WORDS)
        content = values[0] if len(values) == 1 else b"".join(values)
        if len(content) % 8 or len(values[0]) < _HEADER.itemsize:
            raise _broken(self.name)
        found = None
        if len(content) == len(values[0]) * len(values):
            found = self._decoded_one(content) if len(values) == 1 else self._decoded_alike(content, len(values))
        return found or self._decoded_each(values, np.frombuffer(content, np.uint64))

    def _decoded_one(self, content: bytes) -> Decoded | None:
        """One value; None if it is not sound."""
        start, digest, expires = _HEAD.unpack_from(content)
        count = start >> 32
        place = _HEADER.itemsize + count * self._record.itemsize
        if start & _START_MASK != self._start or digest != self.digest or len(content) < place:
            return None
        records = np.frombuffer(content, self._record, count, _HEADER.itemsize)
        ids = np.frombuffer(content, self._id_type, offset=place)
        columns: dict[str, EncodedColumn] = {}
        num_ids = 0
        for field in self._fields:
            stored = records[field.name]
            if field.is_bag:
                offsets = offsets_of(stored)
                end = num_ids + int(offsets[-1])
                columns[field.name] = Ragged(ids[num_ids:end].astype(np.int64), offsets)
                num_ids = end
            else:
                columns[field.name] = stored.astype(field.read_as)
        blocks = max(-(-num_ids // self._ids_of_block), self._least_blocks)
        if blocks * self._block * 8 != len(content) - place:
            return None
        times = records[_TIME].astype(np.int64) if self._has_times else _NO_TIMES
        return Decoded(np.array([0, count]), times, columns, np.array([expires]), expires)

    def _decoded_alike(self, content: bytes, num_values: int) -> Decoded | None:
        """Values of one record and one size: a table. None if they are not, or not sound."""
        size = len(content) // num_values
        capacity = (size - _HEADER.itemsize - self._record.itemsize) // self._id_type.itemsize
        if self._has_times or not 0 <= capacity <= _WIDEST or size % 8 or bool(capacity) != bool(self._bags):
            return None
        table = np.frombuffer(content, self._table(size, capacity))
        # Were the sizes not equal, another word would lie where the digest is expected.
        start, digest, first_expiry = _HEAD.unpack_from(content)
        if start != (self._start | 1 << 32) or digest != self.digest:
            return None
        heads = np.frombuffer(content, np.uint64).reshape(num_values, size // 8)[:, :_HEADER_WORDS]
        if heads.tobytes() != content[: _HEADER.itemsize] * num_values:  # as those that expire at different times
            if (table["@start"] != start).any() or (table["@digest"] != digest).any():
                return None
            first_expiry = int(table["@expires"].min())
        columns: dict[str, EncodedColumn] = {}
        for field in self._fields:
            if not field.is_bag:
                columns[field.name] = table[field.name].astype(field.read_as)
        lengths = [table[bag].astype(np.int64) for bag in self._bags]
        num_ids = sum(lengths[1:], lengths[0]) if lengths else np.zeros(1, np.int64)
        most = int(num_ids.max())
        is_least = capacity == self._least_blocks * self._ids_of_block
        if most > capacity or not (is_least or int(num_ids.min()) > capacity - self._ids_of_block):
            return None
        for bag, (ids, offsets) in zip(self._bags, self._bags_of(table, lengths, capacity), strict=True):
            columns[bag] = Ragged(ids, offsets)
        return Decoded(np.arange(num_values + 1), _NO_TIMES, columns, table["@expires"], first_expiry)

    @staticmethod
    def _bags_of(
        table: np.ndarray, lengths: Sequence[np.ndarray], capacity: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and offsets of each bag of a table.

        Args:
            table: of V values.
            lengths: ``(V,)`` int64 of each bag; the ids of a value's bags lie one after the other.
            capacity: ids that a value has room for.
        """
        if not lengths:
            return
        stored = np.ascontiguousarray(table["@ids"])
        if len(lengths) == 1:
            # No id of a bag is 0, the row of padding: what is not 0 is an id.
            ids = stored[stored != 0]
            offsets = offsets_of(lengths[0])
            if len(ids) == offsets[-1]:
                yield ids.astype(np.int64), offsets
                return
        place: np.ndarray | None = None
        for length in lengths:
            end = length if place is None else place + length
            is_own = _FIRST[end, :capacity]
            if place is not None:
                is_own &= ~_FIRST[place, :capacity]
            yield stored[is_own].astype(np.int64), offsets_of(length)
            place = end

    def _table(self, size: int, capacity: int) -> np.dtype[Any]:
        """One row a value: the words of its header, its record, its ids."""
        if size not in self._tables:
            places: dict[str, tuple[np.dtype[Any], int]] = {}
            for name, (kind, place, *_) in (self._record.fields or {}).items():
                places[name] = kind, _HEADER.itemsize + place
            places |= {"@start": (np.dtype("<u8"), 0), "@digest": (np.dtype("<u8"), 8)}
            places |= {"@expires": (np.dtype("<i8"), 16)}
            if capacity:
                ids = np.dtype((self._id_type, (capacity,)))
                places["@ids"] = ids, _HEADER.itemsize + self._record.itemsize
            names = list(places)
            self._tables[size] = np.dtype(
                {
                    "names": names,
                    "formats": [places[n][0] for n in names],
                    "offsets": [places[n][1] for n in names],
                    "itemsize": size,
                }
            )
        return self._tables[size]

    def _decoded_each(self, values: Sequence[bytes], buffer: np.ndarray) -> Decoded:
        """Values of any sizes."""
        sizes = np.fromiter(map(len, values), np.int64, len(values))
        if (sizes & 7).any() or int(sizes.min()) < _HEADER.itemsize:
            raise _broken(self.name)
        starts = offsets_of(sizes >> 3)
        first = starts[:-1]
        headers = np.stack([buffer[first], buffer[first + 1], buffer[first + 2]], axis=1)
        if ((headers[:, 0] & np.uint64(_START_MASK)) != self._start).any() or (headers[:, 1] != self.digest).any():
            self._refuse(headers)
        counts = (headers[:, 0] >> np.uint64(32)).astype(np.int64)
        # Records, then ids of bags, as the records say: at least the records must be there.
        if (_HEADER_WORDS + counts * self._words > sizes >> 3).any():
            raise _broken(self.name)
        if (counts == counts[0]).all():
            at = (first + _HEADER_WORDS)[:, None] + np.arange(int(counts[0]) * self._words)
            words = buffer[at].reshape(-1)
        else:
            words = buffer[ranges(first + _HEADER_WORDS, counts * self._words)]
        return self._decoded(starts, buffer, counts, words, expires=headers[:, 2].view(np.int64))

    def _decoded(
        self,
        starts: np.ndarray,
        buffer: np.ndarray,
        counts: np.ndarray,
        words: np.ndarray,
        *,
        expires: np.ndarray | None = None,
    ) -> Decoded:
        """Columns of records.

        Args:
            starts: ``(V + 1,)`` int64: where each value begins, in words.
            buffer: all words of all values.
            counts: ``(V,)`` int64, records of each value.
            words: of all records.
            expires: ``(V,)`` int64.
        """
        records = words.view(self._record)
        offsets = offsets_of(counts)
        columns: dict[str, EncodedColumn] = {}
        ids = buffer.view(self._id_type)
        per_word = 8 // self._id_type.itemsize
        place = (starts[:-1] + (_HEADER_WORDS + counts * self._words)) * per_word
        for field in self._fields:
            stored = records[field.name]
            if field.is_bag:
                bag_offsets = offsets_of(stored)
                ends = bag_offsets[offsets]
                num_ids = ends[1:] - ends[:-1]
                if len(counts) and int((place + num_ids).max()) > len(ids):
                    raise _broken(self.name)
                columns[field.name] = Ragged(ids[ranges(place, num_ids)].astype(np.int64), bag_offsets)
                place = place + num_ids
            else:
                columns[field.name] = stored.astype(field.read_as)
        id_words = self._id_words(place - (starts[:-1] + (_HEADER_WORDS + counts * self._words)) * per_word)
        if (starts[:-1] + (_HEADER_WORDS + counts * self._words) + id_words != starts[1:]).any():
            raise _broken(self.name)
        times = records[_TIME].astype(np.int64) if self._has_times else _NO_TIMES
        if expires is None:
            return Decoded(offsets, times, columns, _NO_TIMES, NEVER)
        return Decoded(offsets, times, columns, expires, int(expires.min()))

    def _refuse(self, headers: np.ndarray) -> None:
        """Raises what is wrong with headers ``(V, 3)`` of words."""
        head = np.ascontiguousarray(headers).reshape(-1).view(_HEADER)
        if (head["magic"] != _MAGIC).any() or (head["kind"] != self._kind).any():
            raise _broken(self.name)
        if (head["version"] != FORMAT_VERSION).any():
            raise IntegrityError(
                f"{self.name} of the online store must be of format {FORMAT_VERSION}, got another",
                hint="materialize again with this version",
            )
        raise refused(self.name)


def refused(name: str, more: str = "") -> ArtifactError:
    """Values of another encoder; ``more`` goes on after the message."""
    return ArtifactError(
        f"{name} of the online store must be encoded by the model's encoder, got another one's{more}",
        hint="materialize from the training set that the model was trained on, into a store of its own",
    )


def _broken(name: str) -> IntegrityError:
    return IntegrityError(
        f"{name} of the online store must be as they were written, got other bytes", hint="materialize again"
    )


def expiry_of(value: bytes) -> int:
    """When one encoded value expires, UTC microseconds; :data:`NEVER` for what is not an encoded value."""
    if len(value) < _HEADER.itemsize or value[0] != _MAGIC:
        return NEVER
    return int.from_bytes(value[16:24], "little", signed=True)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Positions of consecutive ranges, one after the other.

    Example:
        >>> ranges(np.array([5, 2]), np.array([2, 3]))
        array([5, 6, 2, 3, 4])
    """
    if len(lengths) == 1:
        only: np.ndarray = np.arange(starts[0], starts[0] + lengths[0])
        return only
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    places: np.ndarray = np.arange(total) + np.repeat(starts - ends + lengths, lengths)
    return places


def take_rows(column: EncodedColumn, rows: np.ndarray) -> EncodedColumn:
    """Some rows of an encoded column."""
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


def concatenated(columns: Sequence[EncodedColumn]) -> EncodedColumn:
    """All rows of several encoded columns of one feature."""
    if isinstance(columns[0], Ragged):
        bags = [_bag(c) for c in columns]
        lengths = np.concatenate([np.diff(b.offsets) for b in bags])
        return Ragged(np.concatenate([b.values[b.offsets[0] : b.offsets[-1]] for b in bags]), offsets_of(lengths))
    plain = [c for c in columns if isinstance(c, np.ndarray)]
    return np.concatenate([c.reshape(len(c)) if c.ndim == 2 and c.shape[1] == 1 else c for c in plain])


def _bag(column: EncodedColumn) -> Ragged:
    assert isinstance(column, Ragged)
    return column


def _table(encoder: Encoder, feature: str) -> str:
    spec = encoder.schema.feature(feature)
    assert not isinstance(spec, Dense)
    return spec.table_name


def _field(encoder: Encoder, feature: Feature) -> _Field:
    if isinstance(feature, Dense):
        return _Field(feature.name, np.dtype("<f4"), feature.dim, False, np.dtype(np.float32))
    if isinstance(feature, MultiCategorical):
        return _Field(feature.name, np.dtype("<u4"), None, True, np.dtype(np.int64))
    size = encoder.table_sizes[feature.table_name]
    width = next((w for w in (1, 2, 4) if size <= 2 ** (8 * w)), 8)
    return _Field(feature.name, np.dtype(f"<u{width}" if width < 8 else "<i8"), None, False, np.dtype(np.int64))
