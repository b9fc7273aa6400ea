"""Encoded features as bytes: one value an entity, one value a user's history; little-endian, padded to 8 bytes.

::

    header, 24 bytes    magic u1 · version u1 · kind u1 · 0 u1 · number of records u4 · digest u8 · expires i8
    records             one for an entity, one an event for a history, oldest first; fixed size
    ids of bags         bag feature after bag feature; how many ids a record has of each is in the record

A record holds the time (of events), numbers as float32, ids in as few bytes as their table needs, and the length of
each bag. The *digest* stands for the encoder's fingerprint and the layout of the record: bytes that another encoder, or
another list of features, gave rise to are refused and never read as ids of this one. *expires* is in UTC microseconds;
what does not expire holds the greatest int64.

Many values are decoded together: their bytes are joined, and each column is one view or one gather.

Shapes: V values, S records of all values together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from recsys.config import fingerprint
from recsys.encoding.columns import Ragged, offsets_of
from recsys.encoding.encoder import EncodedColumn, Encoder
from recsys.errors import ArtifactError, IntegrityError
from recsys.schema import Dense, Feature, MultiCategorical

FORMAT_VERSION = 1
NEVER = 2**63 - 1
"""The expiry of what does not expire: no time is after it."""

_MAGIC = 0xC7
_HEADER = np.dtype(
    [("magic", "u1"), ("version", "u1"), ("kind", "u1"), ("zero", "u1"), ("records", "<u4"), ("digest", "<u8"),
     ("expires", "<i8")]
)  # fmt: skip
_HEADER_WORDS = _HEADER.itemsize // 8
_KINDS = {"user": 1, "item": 2, "history": 3, "values": 4, "rows": 5}
_TIMED = ("history", "rows")
_TIME = "@time"
_START_MASK = 2**32 - 1
_NO_WORDS = np.empty(0, np.uint64)
_NO_TIMES = np.empty(0, np.int64)


class Decoded(NamedTuple):
    """The records of V values.

    Attributes:
        offsets: ``(V + 1,)`` int64: records of value ``v`` are ``offsets[v]`` up to ``offsets[v + 1]``.
        times: ``(S,)`` int64, UTC microseconds; empty unless the values are histories.
        columns: encoded columns of S rows, by feature.
        expires: ``(V,)`` int64: when each value expires, UTC microseconds.
    """

    offsets: np.ndarray
    times: np.ndarray
    columns: dict[str, EncodedColumn]
    expires: np.ndarray


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
        words = _HEADER_WORDS + counts * self._words + (num_ids * width + 7) // 8
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
        buffer = np.frombuffer(content, np.uint64)
        return self._decoded_alike(values, buffer) or self._decoded_each(values, buffer)

    def _decoded_alike(self, values: Sequence[bytes], buffer: np.ndarray) -> Decoded | None:
        """Values of one size with as many records each: a table of words. None if they are not, or not sound."""
        size = len(values[0]) >> 3
        if len(buffer) != len(values) * size:
            return None
        table = buffer.reshape(len(values), size)
        start, digest = table[0, :2].tolist()
        count = start >> 32
        is_sound = start & _START_MASK == self._start and digest == self.digest
        if not is_sound or size < _HEADER_WORDS + count * self._words:
            return None
        # Were the sizes not equal, another word would lie where the digest is expected.
        if len(values) > 1 and not (table[:, :2] == table[0, :2]).all():
            return None
        words = np.ascontiguousarray(table[:, _HEADER_WORDS : _HEADER_WORDS + count * self._words])
        starts = np.arange(0, len(buffer) + 1, size)
        counts = np.full(len(values), count)
        return self._decoded(starts, buffer, counts, words.reshape(-1), expires=table[:, 2].view(np.int64))

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
        if ((place + (per_word - 1)) // per_word != starts[1:]).any():
            raise _broken(self.name)
        times = records[_TIME].astype(np.int64) if self._has_times else _NO_TIMES
        return Decoded(offsets, times, columns, np.empty(0, np.int64) if expires is None else expires)

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


def refused(name: str) -> ArtifactError:
    """Values of another encoder."""
    return ArtifactError(
        f"{name} of the online store must be encoded by the model's encoder, got another one's",
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
