"""The online store: encoded features of users and items, and users' newest events, by key.

:class:`OnlineStore` knows features; what holds the bytes is a :class:`KeyValues`, an embedded database or a server, and
knows nothing but keys and values. Everything about one request is read in one call of :meth:`KeyValues.get`: one
transaction, or one round trip.

Rules:

* a history holds the newest ``keep`` events of a user, oldest first; equal times in the order of the log, then of their
  arrival. Older ones are evicted;
* a read sees events strictly before its time, the newest ``max_length`` of them, and of those only what is kept:
  ``keep`` is at least ``max_length``, and what it has beyond is for requests that are older than the newest events;
* a value with a TTL is unknown once it has expired, whether or not it was swept away; every write sets its expiry anew;
* of derived values the store keeps what :mod:`feature_store.online.derived` says. Rows of a user are kept as far back
  as a window reaches, at most the newest ``keep_rows``;
* every value carries a digest of its encoder's fingerprint, and the store the fingerprint itself. Another encoder is
  refused when a store is opened and, should the values have been replaced since, at the read.

Shapes: n entities, R requests, S events of all requests together.
"""

from __future__ import annotations

import json
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa
from pydantic import Field

from feature_store.online.codec import NEVER, Codec, Decoded, concatenated, expiry_of, ranges, refused, take_rows
from feature_store.online.derived import (
    ITEM_VALUES,
    KNOWN,
    USER_VALUES,
    DerivedColumns,
    DerivedRead,
    Family,
    Kept,
    Layout,
    Rows,
    code_column,
    code_of,
    counts_column,
    derived_columns,
    units_column,
)
from recsys.config import Config
from recsys.encoding.columns import Array, IntKeys, NoKeys, as_keys, offsets_of
from recsys.encoding.encoder import EncodedColumn, Encoder, Ragged
from recsys.errors import ArtifactError, ConfigError, DataError, EncodingError, IntegrityError, nearest
from recsys.schema import Categorical, DayOfWeek, HourOfDay, Schema

FORMAT = "recsys.online"
FORMAT_VERSION = 1
MAX_TIME = 7_258_118_400_000_000
"""2200-01-01 in UTC microseconds; times lie before it, as in training."""

META = b"m"
"""Key of what the store says about itself."""
USER = b"u"
"""What the keys of users begin with."""
ITEM = b"i"
"""What the keys of items begin with."""
_LONGEST_KEY = 400
_NO_KEY = b"-"
"""Asked for in place of a null key; nothing is stored there."""

Key = int | str
Change = Callable[[list[bytes | None]], Sequence[bytes | None]]
"""From the values of keys to their new ones; None leaves a key as it is, no bytes remove it. May be called again."""


class KeyValues(Protocol):
    """Bytes by key. Safe to call from several threads, and from several processes at once."""

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, as of one moment; None where there is none.

        Raises:
            UnavailableError: the store does not answer.
        """

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        """Changes the values of some keys together: all or none, and nothing in between is lost.

        Raises:
            UnavailableError: the store does not answer, or cannot take the values.
        """

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values under a prefix, in any order; keys that change meanwhile may be given or not."""

    def close(self) -> None:
        """Lets go of files and connections."""


class Limits(Config):
    """What a store keeps. Decided when it is first written to; None means without limit."""

    keep_events: int | None = Field(
        None, ge=1, description="newest events of each history of a user; the history's max_length if not given"
    )
    keep_rows: int | None = Field(
        None, ge=1, description="newest rows of a user for derived values; all that their windows reach if not given"
    )
    user_ttl_s: float | None = Field(None, gt=0, description="users and their histories expire so long after a write")
    item_ttl_s: float | None = Field(None, gt=0, description="items expire so long after a write")


@dataclass(frozen=True)
class Event:
    """One event as it happens.

    Attributes:
        user: key.
        item: key.
        time: UTC microseconds.
        type: decides which histories it belongs to; None where the events view has no types.
        values: raw values by source column, of event features and of the item; these override what is stored of it.
    """

    user: Key
    item: Key
    time: int
    type: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


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


class Pushed(NamedTuple):
    """Where a pushed event went.

    Attributes:
        histories: names of the histories that hold it.
        derived: names of the derived values of its user that count it; those of items, and of impressions, follow
            when the store is materialised.
    """

    histories: list[str]
    derived: list[str]


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


class OnlineStore:
    """Encoded features by key. Safe to call from several threads.

    Args:
        backend: what holds the bytes.
        encoder: of the model. A store that another encoder wrote is refused.
        limits: of a store that is new, or None for one that must exist. A store that exists keeps its own.
        now: the clock, UTC microseconds.

    Raises:
        ArtifactError: the store holds values of another encoder, or nothing.
        ConfigError: a limit contradicts the schema, or those of a store that exists.
        IntegrityError: the store is of another format.
        UnavailableError: it does not answer.
    """

    def __init__(
        self,
        backend: KeyValues,
        encoder: Encoder,
        *,
        limits: Limits | None = None,
        now: Callable[[], int] = lambda: clock.time_ns() // 1000,
    ) -> None:
        self.backend = backend
        self.encoder = encoder
        self.schema: Schema = encoder.schema
        self._now = now
        self._users = Codec(encoder, "user", [f.name for f in self.schema.features_of("user")], name="users")
        self._items = Codec(encoder, "item", [f.name for f in self.schema.features_of("item")], name="items")
        self._histories = {
            h.name: Codec(
                encoder,
                "history",
                [*h.attributes, *(f.name for f in h.event_features)],
                name=f"events of {h.name!r}",
            )
            for h in self.schema.histories
        }
        # A digit, so that no history's name can begin like another's.
        self._places = {h.name: b"h%d:" % place for place, h in enumerate(self.schema.histories)}
        self.layout = Layout(encoder)
        self._row_places = [b"r%d:" % place for place in range(len(self.layout.families))]
        self._meta = self._open(limits)
        self.limits = Limits(**self._meta["limits"])

    def _open(self, limits: Limits | None) -> dict[str, Any]:
        (found,) = self.backend.get([META])
        if found is None:
            if limits is None:
                raise _empty()
            self._check(limits)
            fresh = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "schema_name": self.schema.name,
                "encoder_fingerprint": self.encoder.fingerprint,
                "limits": limits.model_dump(mode="json"),
                "key_types": {"user_id": None, "item_id": None},
                "materialized": None,
                "derived": None,
            }
            self.backend.update([META], lambda old: [_json_bytes(fresh) if old[0] is None else None])
            (found,) = self.backend.get([META])
        meta = _read_meta(found)
        if meta["encoder_fingerprint"] != self.encoder.fingerprint:
            raise refused("values")
        if limits is not None and limits != Limits() and limits != Limits(**meta["limits"]):
            raise ConfigError(
                f"limits must be those that the store was made with, {meta['limits']}, "
                f"got {limits.model_dump(mode='json')}",
                hint="leave them out, or materialize into a new store",
            )
        return meta

    def _check(self, limits: Limits) -> None:
        longest = max((h.max_length for h in self.schema.histories), default=1)
        if limits.keep_events is not None and limits.keep_events < longest:
            raise ConfigError(
                f"keep_events must be at least the longest max_length of a history, {longest}, "
                f"got {limits.keep_events}",
                hint="the model reads as many events: leave keep_events out",
            )

    def keep(self, history: str) -> int:
        """How many events of a history a user keeps."""
        return self.limits.keep_events or self.schema.history(history).max_length

    # Reading

    def read(self, users: Array, items: Array, histories: Sequence[str] | None = None) -> Read:
        """Everything about some users and items, in one go.

        Args:
            users: ``(R,)`` keys; null is an unknown user.
            items: ``(N,)`` keys; null is an unknown item.
            histories: names; all if not given.

        Raises:
            ArtifactError: a value was encoded by another encoder.
            EncodingError: keys are text where the store's are integers, or the reverse.
            UnavailableError: the store does not answer.
        """
        names = list(self._histories) if histories is None else list(histories)
        asked = self.request_keys(users, items, names)
        found = self.backend.get(asked)
        num_users, num_items, now = len(users), len(items), self._now()
        events = {
            name: self._events(name, found[num_users * (1 + place) : num_users * (2 + place)], now)
            for place, name in enumerate(names)
        }
        first = num_users * (1 + len(names))
        derived = None
        if not self.layout.is_empty:
            item_keys = [key[len(ITEM_VALUES) :] for key in asked[first + num_items : first + 2 * num_items]]
            derived = self._derived(found[first + num_items :], item_keys, num_users, now)
        found_users = self._entities(self._users, found[:num_users], now)
        del found[first + num_items :], found[:first]
        return Read(found_users, self._entities(self._items, found, now), events, derived)

    def request_keys(self, users: Array, items: Array, histories: Sequence[str] | None = None) -> list[bytes]:
        """Keys of all that :meth:`read` reads: users, their histories one by one, items, then derived values."""
        user_keys = self._checked_keys(users, "user_id")
        asked = _prefixed(USER, user_keys)
        for name in self._histories if histories is None else histories:
            asked += _prefixed(self._places[name], user_keys)
        asked += self._item_keys(items)
        if self.layout.is_empty:
            return asked
        asked += self._checked_keys(items, "item_id", ITEM_VALUES)
        for place in (USER_VALUES, *self._row_places):
            asked += _prefixed(place, user_keys)
        return asked

    def derived(self, users: Array, items: Array, time: np.ndarray, request_of_row: np.ndarray) -> DerivedColumns:
        """Derived values of R requests and N candidates; see :meth:`derived_of`."""
        return self.derived_of(self.read(users, items, ()), time, request_of_row)

    def derived_of(self, read: Read, time: np.ndarray, request_of_row: np.ndarray) -> DerivedColumns:
        """Derived values of what was read.

        Args:
            read: of R users and N items.
            time: ``(R,)`` int64, UTC microseconds.
            request_of_row: ``(N,)`` int64.
        """
        if read.derived is None:
            return DerivedColumns({}, {})
        if self._meta.get("derived") is None:
            self._meta = self.meta()  # perhaps materialised since this store was opened
        if self._meta.get("derived") is None:
            reason = "was not materialised: the store was filled from a training set alone"
            return DerivedColumns({}, dict.fromkeys(self.layout.features, reason))
        return derived_columns(self.encoder, self.layout, read.derived, time, request_of_row)

    def _derived(
        self, found: Sequence[bytes | None], item_keys: Sequence[bytes], num_users: int, now: int
    ) -> DerivedRead:
        """Values of items, of users, rows of users family by family."""
        items, users, rows = self.layout.codecs
        starts = range(len(item_keys), len(found), num_users or 1)
        parts = [found[: len(item_keys)], *(found[first : first + num_users] for first in starts)]
        return DerivedRead(
            Kept(*_columns(items, parts[0], now)),
            Kept(*_columns(users, parts[1] if num_users else [], now)),
            [self._rows(place, parts[2 + place] if num_users else [], now) for place in range(len(rows))],
            item_keys,
        )

    def _rows(self, place: int, found: Sequence[bytes | None], now: int) -> Rows:
        decoded, is_known = _live(self.layout.codecs[2][place], found, now)
        lengths = np.zeros(len(found), np.int64)
        lengths[is_known] = np.diff(decoded.offsets)
        return Rows(offsets_of(lengths), decoded.times, decoded.columns)

    def users(self, keys: Array) -> Entities:
        """Features of ``(n,)`` users."""
        return self._entities(self._users, self.backend.get(self._user_keys(keys)), self._now())

    def items(self, keys: Array) -> Entities:
        """Features of ``(n,)`` items."""
        return self._entities(self._items, self.backend.get(self._item_keys(keys)), self._now())

    def history(self, name: str, users: Array) -> Events:
        """All stored events of ``(R,)`` users."""
        keys = self._checked_keys(users, "user_id", self._places[name])
        return self._events(name, self.backend.get(keys), self._now())

    def _entities(self, codec: Codec, found: Sequence[bytes | None], now: int) -> Entities:
        decoded, is_known = _live(codec, found, now)
        columns = decoded.columns
        if len(decoded.expires) == len(found):
            return Entities(columns, is_known)
        return Entities({f: self._spread(f, columns[f], is_known) for f in codec.features}, is_known)

    def _spread(self, feature: str, known: EncodedColumn, is_known: np.ndarray) -> EncodedColumn:
        """A column of all entities from that of the known ones."""
        column = self.encoder.unknown_column(feature, len(is_known))
        if isinstance(known, Ragged):
            lengths = np.zeros(len(is_known), np.int64)
            lengths[is_known] = np.diff(known.offsets)
            return Ragged(known.values, offsets_of(lengths))
        assert isinstance(column, np.ndarray)
        column = column.reshape(len(is_known), *known.shape[1:])
        column[is_known] = known
        return column

    def _events(self, name: str, found: Sequence[bytes | None], now: int) -> Events:
        codec = self._histories[name]
        decoded, is_known = _live(codec, found, now)
        offsets = decoded.offsets
        if len(decoded.expires) < len(found):
            lengths = np.zeros(len(found), np.int64)
            lengths[is_known] = np.diff(offsets)
            offsets = offsets_of(lengths)
        return Events(offsets, decoded.times, decoded.columns)

    # Writing

    def put_users(self, keys: Array, columns: Mapping[str, EncodedColumn]) -> None:
        """Stores encoded features of ``(n,)`` users; their histories stay.

        Raises:
            EncodingError: a key is missing, or of another type than those of the store.
            UnavailableError: the store does not answer.
        """
        names = self.claim("user_id", keys, USER)
        values = self.encoded_users(columns, len(names))
        self.backend.update(names, lambda _: values)

    def put_items(self, keys: Array, columns: Mapping[str, EncodedColumn]) -> None:
        """Stores encoded features of ``(n,)`` items.

        Raises:
            EncodingError: a key is missing, or of another type than those of the store.
            UnavailableError: the store does not answer.
        """
        names = self.claim("item_id", keys, ITEM)
        values = self.encoded_items(columns, len(names))
        self.backend.update(names, lambda _: values)

    def encoded_users(self, columns: Mapping[str, EncodedColumn], n: int) -> list[bytes]:
        """The values of ``n`` users."""
        return self._users.encode(columns, np.arange(n + 1), expires=self._expiry(self.limits.user_ttl_s))

    def encoded_items(self, columns: Mapping[str, EncodedColumn], n: int) -> list[bytes]:
        """The values of ``n`` items."""
        return self._items.encode(columns, np.arange(n + 1), expires=self._expiry(self.limits.item_ttl_s))

    def encoded_values(self, of: str, columns: Mapping[str, EncodedColumn], n: int) -> list[bytes]:
        """What is kept of the derived values of ``n`` items, or of ``n`` users."""
        items, users, _ = self.layout.codecs
        if of == "item":
            return items.encode(columns, np.arange(n + 1), expires=self._expiry(self.limits.item_ttl_s))
        return users.encode(columns, np.arange(n + 1), expires=self._expiry(self.limits.user_ttl_s))

    def merged(self, name: str, stored: Sequence[bytes | None], events: Events, *, since: int | None) -> list[bytes]:
        """The values of V users' histories after more events.

        Args:
            name: of the history.
            stored: V values as they are.
            events: of V users, each user's in order.
            since: of what is stored, events before this time are replaced by ``events``; None keeps them all.
        """
        old = self._events(name, stored, self._now())
        if since is not None and len(old.times):
            old = _chosen(old, old.times >= since)
        if len(old.times):
            users = [np.repeat(np.arange(len(stored)), np.diff(e.offsets)) for e in (old, events)]
            user, times = np.concatenate(users), np.concatenate([old.times, events.times])
            # Equal times: the log before what arrived later; of pushes, in the order of arrival.
            came = np.concatenate(
                [np.full(len(old.times), int(since is not None)), np.full(len(events.times), int(since is None))]
            )
            order = np.lexsort((came, times, user))
            columns = {f: take_rows(concatenated([old.columns[f], c]), order) for f, c in events.columns.items()}
            lengths = np.diff(old.offsets) + np.diff(events.offsets)
            events = Events(offsets_of(lengths), times[order], columns)
        lengths = np.diff(events.offsets)
        kept = np.minimum(lengths, self.keep(name))
        if (kept < lengths).any():
            rows = ranges(events.offsets[1:] - kept, kept)
            columns = {f: take_rows(c, rows) for f, c in events.columns.items()}
            events = Events(offsets_of(kept), events.times[rows], columns)
        expires = self._expiry(self.limits.user_ttl_s)
        return self._histories[name].encode(events.columns, events.offsets, events.times, expires=expires)

    def push(self, event: Event) -> Pushed:
        """Adds one event to the histories and to the derived values that it belongs to; the next read sees it.

        An event that comes late is put in its place. Each push is one event: two equal ones are both kept, as in the
        log. Materialising a log that reaches past the event's time replaces it by what the log says.

        Returns:
            Which these are; none of either if nothing has changed.

        Raises:
            DataError: time, type or a column is not one that the schema can take.
            EncodingError: a value cannot be encoded.
            UnavailableError: the store does not answer; whether the event was added is not known.
        """
        names = self._histories_of(event)
        places = [n for n, family in enumerate(self.layout.families) if family.source == "events"]
        pushed = [(n, self._row_of(self.layout.families[n], event)) for n in places]
        pushed = [(n, row) for n, row in pushed if row is not None]
        if not names and not pushed:
            return Pushed([], [])
        (user,) = self.claim("user_id", pa.array([event.user]))
        rows = self._event_columns(event, names) if names else {}
        added = {
            name: Events(np.array([0, 1]), np.array([event.time]), {f: rows[f] for f in self._histories[name].features})
            for name in names
        }

        def change(stored: list[bytes | None]) -> list[bytes | None]:
            histories = zip(names, stored[: len(names)], strict=True)
            changed: list[bytes | None] = [
                self.merged(name, [old], added[name], since=None)[0] for name, old in histories
            ]
            for (place, row), old in zip(pushed, stored[len(names) :], strict=True):
                assert row is not None
                changed.append(self.merged_rows(place, [old], row, until=None)[0])
            return changed

        keys = [self._places[name] + user for name in names] + [self._row_places[n] + user for n, _ in pushed]
        self.backend.update(keys, change)
        return Pushed(names, [name for place, row in pushed for name in self._counted(place, row)])

    def _counted(self, place: int, row: Rows | None) -> list[str]:
        """Names of the values that an event counts for."""
        assert row is not None
        specs = self.layout.families[place].specs
        return [spec.name for spec in specs if row.columns[counts_column(spec.name)][-1]]  # type: ignore[index]

    def merged_rows(self, place: int, stored: Sequence[bytes | None], rows: Rows, *, until: int | None) -> list[bytes]:
        """The values of V users' rows after more of them.

        Args:
            place: of the family.
            stored: V values as they are.
            rows: of V users, each beginning with the record that says since when all are there.
            until: of what is stored, rows before this time are replaced; None keeps them all.
        """
        codec = self.layout.codecs[2][place]
        old = self._rows(place, stored, self._now())
        first = old.offsets[:-1][np.diff(old.offsets) > 0]
        is_mark = np.zeros(len(old.times), np.bool_)
        is_mark[first] = True
        is_kept = ~is_mark if until is None else ~is_mark & (old.times >= until)
        old_user = np.repeat(np.arange(len(stored)), np.diff(old.offsets))
        user = np.repeat(np.arange(len(stored)), np.diff(rows.offsets))
        since = rows.times[rows.offsets[:-1]].copy()
        # A mark at or after ``until`` says that newer rows were evicted: it holds for what replaces older ones, too.
        is_held = is_mark if until is None else is_mark & (old.times >= until)
        since[old_user[is_held]] = old.times[is_held]
        users, times = np.concatenate([old_user[is_kept], user]), np.concatenate([old.times[is_kept], rows.times])
        columns = {n: np.concatenate([c[is_kept], rows.columns[n]]) for n, c in old.columns.items()}
        is_new_mark = np.zeros(len(times), np.bool_)
        is_new_mark[len(times) - len(rows.times) + rows.offsets[:-1]] = True
        times[is_new_mark] = since
        order = np.lexsort((times, ~is_new_mark, users))
        # Late ones from before that time would not be alone: others of then are gone.
        order = order[times[order] >= since[users[order]]]
        users, times = users[order], times[order]
        offsets = np.searchsorted(users, np.arange(len(stored) + 1))
        kept = np.minimum(np.diff(offsets), 1 + (self.limits.keep_rows or 2**62))
        is_cut = kept < np.diff(offsets)
        if is_cut.any():
            # The mark moves to just after the newest row that goes.
            place_of = ranges(offsets[1:] - kept + 1, kept - 1)
            marks = offsets[:-1]
            times[marks[is_cut]] = times[(offsets[1:] - kept)[is_cut]] + 1
            chosen = np.sort(np.concatenate([marks, place_of]))
            chosen = chosen[(times >= times[marks][users])[chosen]]
            order, users, times = order[chosen], users[chosen], times[chosen]
            offsets = np.searchsorted(users, np.arange(len(stored) + 1))
        expires = self._expiry(self.limits.user_ttl_s)
        return codec.encode({n: c[order] for n, c in columns.items()}, offsets, times, expires=expires)

    def _row_of(self, family: Family, event: Event) -> Rows | None:
        """What an event adds to derived values, after the mark of a user without rows; None if it counts for none."""
        from feature_store.online.pushed import counted_event

        counted = [counted_event(spec, self.schema, event, self.meta) for spec in family.specs]
        if not any(is_counted for is_counted, _ in counted):
            return None
        columns = {name: np.zeros(2, np.dtype(kind)) for name, kind in family.numbers.items()}
        for spec, (is_counted, units) in zip(family.specs, counted, strict=True):
            columns[counts_column(spec.name)][1] = is_counted
            if units is not None:
                columns[units_column(spec.name)][1] = units
        if family.created is not None:
            known = event.values.get(family.created)
            if isinstance(known, bool) or not isinstance(known, int):
                raise DataError(
                    f"{family.created!r} must be given in UTC microseconds: derived values count an event from then on"
                )
            columns[KNOWN][1] = known
        if family.codes:
            (key,) = self._checked_keys(pa.array([event.item]), "item_id")
            (found,) = self.backend.get([ITEM_VALUES + key])
            stored, is_known = _columns(self.layout.codecs[0], [found], self._now())
            for name in family.codes:
                own = code_of(key) if name == "item" else -1
                code = stored[code_column(name)]
                assert isinstance(code, np.ndarray)
                columns[code_column(name)][:] = -1, code[0] if is_known[0] else own
        return Rows(np.array([0, 2]), np.array([0, event.time]), columns)

    def _histories_of(self, event: Event) -> list[str]:
        if not 0 <= event.time < MAX_TIME:
            raise DataError("time must lie between 1970 and 2200, in UTC microseconds, got another")
        typed = [h for h in self.schema.histories if h.event_types is not None]
        if typed and event.type is None:
            assert self.schema.views.events is not None
            raise DataError(
                f"type must be given, history {typed[0].name!r} takes only some",
                hint=f"it is the column {self.schema.views.events.type!r} of the events view",
            )
        return [h.name for h in self.schema.histories if h.event_types is None or event.type in h.event_types]

    def _event_columns(self, event: Event, histories: Sequence[str]) -> dict[str, EncodedColumn]:
        """Encoded attributes and event features of one event, one row each."""
        specs = {f: self.schema.feature(f) for h in histories for f in self._histories[h].features}
        known = {s.source_column for h in self._histories.values() for s in map(self.schema.feature, h.features)}
        known |= self._derived_columns()
        for column in event.values:
            if column not in known:
                raise DataError(f"{column!r} must be a column that a history reads", hint=nearest(column, known))
        item = self.items(pa.array([event.item]))
        views = self.schema.views
        assert views.events is not None
        key_column = views.items.key if views.items else views.impressions.item
        columns: dict[str, EncodedColumn] = {}
        for name, feature in specs.items():
            column = feature.source_column
            if column in event.values:
                columns[name] = self._encoded(name, event.values[column])
            elif feature.scope == "event" and column == views.events.time and self._reads_instant(name):
                columns[name] = self.encoder.encode(name, pa.array([event.time]))
            elif feature.scope == "event" and column in (views.events.user, views.events.item, views.events.type):
                own = {views.events.user: event.user, views.events.item: event.item, views.events.type: event.type}
                columns[name] = self._encoded(name, own[column])
            elif feature.scope == "event":
                columns[name] = self.encoder.unknown_column(name, 1)
            elif column == key_column and not item.is_known[0]:
                columns[name] = self._encoded(name, event.item)
            else:
                columns[name] = item.columns[name]
        return columns

    def _derived_columns(self) -> set[str]:
        """Columns of the events that derived values read."""
        read = set((self._meta.get("derived") or {}).get("columns", {}))
        return read | {f.created for f in self.layout.families if f.created is not None}

    def _reads_instant(self, feature: str) -> bool:
        spec = self.schema.feature(feature)
        if not isinstance(spec, Categorical):
            return False
        return isinstance(self.schema.table_encoders[spec.table_name], (HourOfDay, DayOfWeek))

    def _encoded(self, feature: str, value: Any) -> EncodedColumn:
        try:
            return self.encoder.encode(feature, pa.array([value]))
        except pa.ArrowException as err:
            raise EncodingError(f"feature {feature!r} must be given a value that fits it, got another type") from err

    def _expiry(self, ttl_s: float | None) -> int:
        return NEVER if ttl_s is None else self._now() + round(ttl_s * 1e6)

    def sweep(self) -> int:
        """Removes what has expired; returns how many values that was. Reads do not depend on it."""
        now = self._now()
        prefixes = (USER, b"h", ITEM, b"v", b"r")
        gone = [k for prefix in prefixes for k, v in self.backend.scan(prefix) if expiry_of(v) <= now]
        for start in range(0, len(gone), 1024):
            # Asked again: a write since the scan has set a new expiry.
            self.backend.update(
                gone[start : start + 1024],
                lambda old: [b"" if value is not None and expiry_of(value) <= now else None for value in old],
            )
        return len(gone)

    # Keys

    def rows_prefix(self, place: int) -> bytes:
        """What the keys of a family of rows begin with."""
        return self._row_places[place]

    def history_prefix(self, history: str) -> bytes:
        """What the keys of a history begin with."""
        return self._places[history]

    def _user_keys(self, keys: Array) -> list[bytes]:
        return self._checked_keys(keys, "user_id", USER)

    def _item_keys(self, keys: Array) -> list[bytes]:
        return self._checked_keys(keys, "item_id", ITEM)

    def _checked_keys(self, keys: Array, which: str, prefix: bytes = b"") -> list[bytes]:
        names, kind = stored_keys(keys, which, prefix)
        expected = self._meta["key_types"][which]
        if kind is not None and kind != expected:
            if expected is None:  # perhaps written since this store was opened
                expected = self._meta["key_types"][which] = self.meta()["key_types"][which]
            if expected is not None and kind != expected:
                raise EncodingError(f"{which} must hold {_WORDS[expected]}, as when they were stored")
        return names

    def claim(self, which: str, keys: Array, prefix: bytes = b"") -> list[bytes]:
        """Stored form of ``(n,)`` keys that are to be written; the first write decides their type.

        Args:
            which: ``"user_id"`` or ``"item_id"``.
            prefix: of the stored form: what is stored under it.

        Raises:
            EncodingError: a key is missing, or of another type than those before.
        """
        names, kind = stored_keys(keys, which, prefix)
        if keys.null_count:
            raise EncodingError(f"{which} must be given, got a missing one")
        if kind is not None and self._meta["key_types"][which] is None:
            self.change_meta(lambda meta: meta["key_types"].update({which: meta["key_types"][which] or kind}))
        if kind is not None and self._meta["key_types"][which] != kind:
            raise EncodingError(f"{which} must hold {_WORDS[self._meta['key_types'][which]]}, as when they were stored")
        return names

    # What the store says about itself

    def meta(self) -> dict[str, Any]:
        """What the store says about itself, read anew."""
        return _read_meta(self.backend.get([META])[0])

    def change_meta(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Changes what the store says about itself."""

        def write(old: list[bytes | None]) -> list[bytes | None]:
            meta = _read_meta(old[0])
            change(meta)
            self._meta = meta
            return [_json_bytes(meta)]

        self.backend.update([META], write)

    def close(self) -> None:
        """Lets go of files and connections."""
        self.backend.close()


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


def _chosen(events: Events, is_chosen: np.ndarray) -> Events:
    rows = np.flatnonzero(is_chosen)
    offsets = offsets_of(is_chosen.astype(np.int64))[events.offsets]
    return Events(offsets, events.times[rows], {f: take_rows(c, rows) for f, c in events.columns.items()})


def _live(codec: Codec, found: Sequence[bytes | None], now: int) -> tuple[Decoded, np.ndarray]:
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


def _columns(codec: Codec, found: Sequence[bytes | None], now: int) -> tuple[Mapping[str, EncodedColumn], np.ndarray]:
    decoded, is_known = _live(codec, found, now)
    return decoded.columns, is_known


_WORDS = {"integer": "integers", "text": "text"}


def stored_keys(keys: Array, which: str, prefix: bytes) -> tuple[list[bytes], str | None]:
    """Stored form of keys, and their type: 8 bytes for an integer; for text, its bytes or their hash."""
    parsed = as_keys(keys, where=which)
    if isinstance(parsed, NoKeys):
        return [_NO_KEY] * parsed.length, None
    if isinstance(parsed, IntKeys):
        # After a letter that no text begins with.
        head = prefix + b"n"
        if len(parsed.values) == 1 and parsed.valid is None:
            return [head + int(parsed.values[0]).to_bytes(8, "big", signed=True)], "integer"
        stored = np.empty(len(parsed.values), [("head", f"V{len(head)}"), ("key", ">i8")])
        stored["head"] = np.void(head)
        stored["key"] = parsed.values
        names: list[bytes] = stored.view(f"V{len(head) + 8}").tolist()
        if parsed.valid is not None:
            names = [n if v else _NO_KEY for n, v in zip(names, parsed.valid.tolist(), strict=True)]
        return names, "integer" if parsed.valid is None or parsed.valid.any() else None
    texts = (
        parsed.values
        if parsed.codes is None
        else parsed.values.take(pa.array(parsed.codes, mask=np.asarray(parsed.codes) < 0))
    )
    names = [_NO_KEY if text is None else prefix + _stored_text(text) for text in texts.to_pylist()]
    return names, "text" if texts.null_count < len(texts) else None


def _stored_text(text: str) -> bytes:
    content = text.encode()
    if len(content) <= _LONGEST_KEY:
        return b"t" + content
    return b"#" + blake2b(content, digest_size=32).digest()


def _prefixed(prefix: bytes, keys: Sequence[bytes]) -> list[bytes]:
    return [prefix + key for key in keys]


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _empty() -> ArtifactError:
    return ArtifactError("the online store must hold features, got an empty one", hint="fill it: `recsys materialize`")


def _read_meta(found: bytes | None) -> dict[str, Any]:
    if found is None:
        raise _empty()
    try:
        meta: dict[str, Any] = json.loads(found)
        version = meta["format_version"] if meta["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError) as err:
        raise IntegrityError("the online store must be one that `recsys materialize` made, got other content") from err
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"the online store must be of format {FORMAT_VERSION}, got {version}",
            hint="materialize into a new store with this version",
        )
    return meta
