"""What a read of the online store finds: which values are there, and which events come before a time.

Shapes: n entities, R requests, S events of all requests together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np

from feature_store.online.codec import Codec, Decoded, ranges, take_rows
from feature_store.online.derived import DerivedRead
from recsys.encoding.columns import offsets_of
from recsys.encoding.encoder import EncodedColumn, Ragged


class Entities(NamedTuple):
    """Encoded features of n users or items.

    Attributes:
        columns: n rows each, by feature; unknown values where nothing is stored.
        is_known: ``(n,)`` bool.
    """

    columns: dict[str, EncodedColumn]
    is_known: np.ndarray


class Events(NamedTuple):
    """Stored events of R users, oldest first.

    Attributes:
        offsets: ``(R + 1,)`` int64.
        times: ``(S,)`` int64, UTC microseconds.
        columns: S rows each: the history's attributes and event features.
    """

    offsets: np.ndarray
    times: np.ndarray
    columns: dict[str, EncodedColumn]


class Read(NamedTuple):
    """What one call of :meth:`OnlineStore.read` found.

    Attributes:
        users: of R keys.
        items: of N keys.
        histories: all stored events of R users, by history; not yet cut at a time.
        derived: what derived values are computed of; None if the schema has none.
    """

    users: Entities
    items: Entities
    histories: dict[str, Events]
    derived: DerivedRead | None = None


def cut(events: Events, before: np.ndarray, max_length: int) -> Events:
    """The newest events of each user strictly before a time.

    Args:
        events: of R users.
        before: ``(R,)`` int64, UTC microseconds.
        max_length: of each history.
    """
    if len(before) == 1:
        if len(events.times) <= max_length and (len(events.times) == 0 or events.times[-1] < before[0]):
            return events
        last = int(np.searchsorted(events.times, before[0]))
        only = slice(max(last - max_length, 0), last)
        columns = {f: _sliced(c, only) for f, c in events.columns.items()}
        return Events(np.array([0, only.stop - only.start]), events.times[only], columns)
    first, lengths = events.offsets[:-1], np.diff(events.offsets)
    is_past = events.times < np.repeat(before, lengths)
    past = np.diff(
        offsets_of(is_past.astype(np.int64))[events.offsets]
    )  # each user's events are sorted: the past ones come first
    if (past == lengths).all() and (lengths <= max_length).all():
        return events
    kept = np.minimum(past, max_length)
    rows = ranges(first + past - kept, kept)
    columns = {f: take_rows(c, rows) for f, c in events.columns.items()}
    return Events(offsets_of(kept), events.times[rows], columns)


def _sliced(column: EncodedColumn, rows: slice) -> EncodedColumn:
    if not isinstance(column, Ragged):
        return column[rows]
    offsets = column.offsets[rows.start : rows.stop + 1]
    return Ragged(column.values[offsets[0] : offsets[-1]], offsets - offsets[0])


def chosen(events: Events, is_chosen: np.ndarray) -> Events:
    """Some of the events; of ``(S,)`` bool those that are true."""
    rows = np.flatnonzero(is_chosen)
    offsets = offsets_of(is_chosen.astype(np.int64))[events.offsets]
    return Events(offsets, events.times[rows], {f: take_rows(c, rows) for f, c in events.columns.items()})


def live(codec: Codec, found: Sequence[bytes | None], now: int) -> tuple[Decoded, np.ndarray]:
    """The values that are there and have not expired, decoded, and which those are."""
    values = cast("Sequence[bytes]", found)
    try:
        # Joining bytes is how it is noticed that some are missing: looking for them costs as much again.
        decoded, is_known = codec.decode(values), np.ones(len(found), np.bool_)
    except TypeError:
        is_known = np.fromiter((value is not None for value in found), np.bool_, len(found))
        values = [value for value in found if value is not None]
        decoded = codec.decode(values)
    if decoded.first_expiry <= now:
        is_live = decoded.expires > now
        is_known[is_known] = is_live
        decoded = codec.decode([value for value, live in zip(values, is_live.tolist(), strict=True) if live])
    return decoded, is_known


def live_columns(
    codec: Codec, found: Sequence[bytes | None], now: int
) -> tuple[Mapping[str, EncodedColumn], np.ndarray]:
    """Columns of those values, and which they are."""
    decoded, is_known = live(codec, found, now)
    return decoded.columns, is_known
