"""The online store: encoded features of users and items, and users' newest events, by key.

:class:`OnlineStore` knows features; what holds the bytes is a :class:`KeyValues`, an embedded database or a server, and
knows nothing but keys and values. Everything about one request is read in one call of :meth:`KeyValues.get`: one
transaction, or one round trip.

Rules:

* a history holds the newest ``keep`` events of a user, oldest first; equal times in the order of the log, which is one
  of their values (:mod:`feature_store.tied_events`), and behind them what was pushed, in the order of arrival. Older
  ones are evicted;
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from feature_store.online.codec import NEVER, Codec, expiry_of, refused
from feature_store.online.derived import (
    ITEM_VALUES,
    USER_VALUES,
    DerivedColumns,
    DerivedRead,
    Kept,
    Layout,
    Rows,
    code_column,
    code_of,
    counts_column,
    derived_columns,
)
from feature_store.online.key_values import KeyValues
from feature_store.online.keys import ITEM, META, USER, WORDS, Key, prefixed, stored_keys
from feature_store.online.merging import merged_events, merged_rows
from feature_store.online.pushing import Event, Pushed, check_event, event_columns, histories_of, row_of
from feature_store.online.reading import Entities, Events, Read, live, live_columns
from recsys.config import Config
from recsys.encoding.columns import Array, offsets_of
from recsys.encoding.encoder import EncodedColumn, Encoder, Ragged
from recsys.errors import ArtifactError, ConfigError, EncodingError, IntegrityError
from recsys.schema import Schema

FORMAT = "recsys.online"
FORMAT_VERSION = 1


_MOST = 1_000_000_000
_LONGEST_S = 3_155_760_000.0
"""A hundred years; leave the limit out for longer ones."""


class Limits(Config):
    """What a store keeps. Decided when it is first written to; None means without limit."""

    keep_events: int | None = Field(
        None,
        ge=1,
        le=_MOST,
        description="newest events of each history of a user; the history's max_length if not given",
    )
    keep_rows: int | None = Field(
        None,
        ge=1,
        le=_MOST,
        description="newest rows of a user for derived values; all that their windows reach if not given",
    )
    user_ttl_s: float | None = Field(
        None, gt=0, le=_LONGEST_S, description="users and their histories expire so long after a write"
    )
    item_ttl_s: float | None = Field(None, gt=0, le=_LONGEST_S, description="items expire so long after a write")


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
            raise refused(
                "values", f": it is {meta['encoder_fingerprint'][:12]}, the model's {self.encoder.fingerprint[:12]}"
            )
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
        asked = prefixed(USER, user_keys)
        for name in self._histories if histories is None else histories:
            asked += prefixed(self._places[name], user_keys)
        asked += self._item_keys(items)
        if self.layout.is_empty:
            return asked
        asked += self._checked_keys(items, "item_id", ITEM_VALUES)
        for place in (USER_VALUES, *self._row_places):
            asked += prefixed(place, user_keys)
        return asked

    def expiries(self, users: Array, items: Array) -> list[int | None]:
        """When each value of :meth:`request_keys` expires, or did, UTC microseconds; None where there is none."""
        found = self.backend.get(self.request_keys(users, items))
        return [None if value is None else expiry_of(value) for value in found]

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
            Kept(*live_columns(items, parts[0], now)),
            Kept(*live_columns(users, parts[1] if num_users else [], now)),
            [self._rows(place, parts[2 + place] if num_users else [], now) for place in range(len(rows))],
            item_keys,
        )

    def _rows(self, place: int, found: Sequence[bytes | None], now: int) -> Rows:
        decoded, is_known = live(self.layout.codecs[2][place], found, now)
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
        decoded, is_known = live(codec, found, now)
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
        decoded, is_known = live(codec, found, now)
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
        kept = merged_events(old, events, since=since, keep=self.keep(name))
        expires = self._expiry(self.limits.user_ttl_s)
        return self._histories[name].encode(kept.columns, kept.offsets, kept.times, expires=expires)

    def push(self, event: Event) -> Pushed:
        """Adds one event to the histories and to the derived values that it belongs to; the next read sees it.

        An event that comes late is put in its place; of equal times, behind those that are there. Each push is one
        event: two equal ones are both kept, as in the log. Materialising a log that reaches past the event's time
        replaces it by what the log says.

        Returns:
            Which these are; none of either if nothing has changed.

        Raises:
            DataError: time, type or a column is not one that the schema can take.
            EncodingError: a value cannot be encoded.
            UnavailableError: the store does not answer; whether the event was added is not known.
        """
        check_event(self.schema, event)
        names = histories_of(self.schema, event)
        places = [n for n, family in enumerate(self.layout.families) if family.source == "events"]
        pushed = [(n, row_of(self, self.layout.families[n], event)) for n in places]
        pushed = [(n, row) for n, row in pushed if row is not None]
        if not names and not pushed:
            return Pushed([], [])
        (user,) = self.claim("user_id", pa.array([event.user]))
        rows = event_columns(self, event, names) if names else {}
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
        return [spec.name for spec in specs if row.columns[counts_column(spec.name)][-1]]

    def merged_rows(self, place: int, stored: Sequence[bytes | None], rows: Rows, *, until: int | None) -> list[bytes]:
        """The values of V users' rows after more of them.

        Args:
            place: of the family.
            stored: V values as they are.
            rows: of V users, each beginning with the record that says since when all are there.
            until: of what is stored, rows before this time are replaced; None keeps them all.
        """
        old = self._rows(place, stored, self._now())
        kept = merged_rows(old, rows, until=until, keep=self.limits.keep_rows)
        expires = self._expiry(self.limits.user_ttl_s)
        return self.layout.codecs[2][place].encode(kept.columns, kept.offsets, kept.times, expires=expires)

    def item_codes(self, item: Key, names: Sequence[str]) -> dict[str, int]:
        """The codes by which rows of an item are grouped, as the store has them; -1 for an attribute that is missing.

        Args:
            item: key.
            names: ``"item"``, or attributes.
        """
        (key,) = self._checked_keys(pa.array([item]), "item_id")
        stored, is_known = live_columns(self.layout.codecs[0], self.backend.get([ITEM_VALUES + key]), self._now())
        if not is_known[0]:
            return {name: code_of(key) if name == "item" else -1 for name in names}
        return {name: int(stored[code_column(name)][0]) for name in names}

    def features_of(self, history: str) -> tuple[str, ...]:
        """Attributes and event features of a history, as they are stored."""
        return self._histories[history].features

    def derived_columns(self) -> set[str]:
        """Columns of the events that derived values read."""
        read = set((self._meta.get("derived") or {}).get("columns", {}))
        return read | {f.created for f in self.layout.families if f.created is not None}

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
                raise EncodingError(f"{which} must hold {WORDS[expected]}, as when they were stored")
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
            raise EncodingError(f"{which} must hold {WORDS[self._meta['key_types'][which]]}, as when they were stored")
        return names

    # What the store says about itself

    def meta(self) -> dict[str, Any]:
        """What the store says about itself, read anew."""
        return stored_meta(self.backend)

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


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _empty() -> ArtifactError:
    return ArtifactError("the online store must hold features, got an empty one", hint="fill it: `recsys materialize`")


def stored_meta(backend: KeyValues) -> dict[str, Any]:
    """What a store says about itself: whose encoder it has, its limits, up to when it is materialised.

    Raises:
        ArtifactError: it holds nothing.
        IntegrityError: it is of another format.
        UnavailableError: it does not answer.
    """
    return _read_meta(backend.get([META])[0])


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
