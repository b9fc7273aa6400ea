"""What an online store holds of a user and of items, in words: as a request at a time would see it, for people to read.

Everything is decoded by the store's own encoder. What serving reads goes through the same functions
(:meth:`OnlineStore.read`, :func:`~feature_store.online.reading.cut`), so what is shown is what a request gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.online.codec import NEVER, take_rows
from feature_store.online.derived import derived_numbers
from feature_store.online.keys import Key
from feature_store.online.reading import Entities, Events, Read, chosen, cut
from feature_store.online.store import OnlineStore
from recsys.derived import AsOf, Derived, Ratio
from recsys.encoding.encoder import EncodedColumn, Ragged
from recsys.errors import ConfigError
from recsys.schema import Schema


@dataclass
class FetchedEntity:
    """What the store holds of a user, or of an item.

    Attributes:
        key: as it was asked for.
        is_known: whether its features are stored and have not expired; if not, a request gets unknown values.
        expires: when its features do, or did, UTC microseconds; None for never, and where none are stored.
        features: what its features stand for; see :meth:`recsys.encoding.Encoder.decode`. Empty if it is not known.
        encoded: what a model gets, of features and of derived values.
        derived: values by feature, numbers before they are encoded; None where missing.
        refused: features whose derived value a request would have to bring, and why.
    """

    key: Key
    is_known: bool
    expires: int | None
    features: dict[str, Any]
    encoded: dict[str, Any]
    derived: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class FetchedHistory:
    """A user's events of one history.

    Attributes:
        num_stored: events that the store keeps.
        expires: when they do, or did, UTC microseconds; None for never, and where none are stored.
        times: of the events that a request at the time would see, oldest first, UTC microseconds.
        events: their attributes and event features.
    """

    num_stored: int
    expires: int | None
    times: list[int]
    events: list[dict[str, Any]]


@dataclass
class FetchedUser(FetchedEntity):
    """What the store holds of a user.

    Attributes:
        histories: by name.
        num_rows: rows that derived values are computed of, by the log that they are of.
        rows_expire: when these do, or did, UTC microseconds; of those that never do None.
    """

    histories: dict[str, FetchedHistory] = field(default_factory=dict)
    num_rows: dict[str, int] = field(default_factory=dict)
    rows_expire: dict[str, int | None] = field(default_factory=dict)

    @property
    def is_stored(self) -> bool:
        """Whether there is anything of the user, such as pushed events of one without features."""
        return self.is_known or any(h.num_stored for h in self.histories.values()) or any(self.num_rows.values())


@dataclass
class Fetched:
    """What one call of :func:`fetch` found.

    Attributes:
        at: the time of the request, UTC microseconds.
        user: None if none was asked for.
        items: in the order in which they were asked for.
    """

    at: int
    user: FetchedUser | None
    items: list[FetchedEntity]


def parsed_key(store: OnlineStore, which: str, text: str) -> Key:
    """A key given as text, of the type that the store's keys have.

    Args:
        store: whose keys they are; one that holds none yet takes any.
        which: ``"user_id"`` or ``"item_id"``.
        text: the key.

    Raises:
        ConfigError: the store's keys are integers, and this is none.
    """
    if store.meta()["key_types"][which] == "text":
        return text
    try:
        key = int(text)
    except ValueError as err:
        if store.meta()["key_types"][which] is None:
            return text
        raise ConfigError(f"{which} must be an integer, as the store's keys are, got {text!r}") from err
    if not -(2**63) <= key < 2**63:
        raise ConfigError(f"{which} must be a signed 64-bit integer, got {text}")
    return key


def fetch(store: OnlineStore, user: Key | None, items: Sequence[Key], at: int) -> Fetched:
    """What a request of a user with some candidates at a time gets from the store.

    Args:
        store: where to look.
        user: key; None to look at items alone. Values of user and item together are left out then.
        items: keys.
        at: UTC microseconds.

    Raises:
        ArtifactError: a value was encoded by another encoder.
        UnavailableError: the store does not answer.
    """
    asked_user: list[Any] = [user]
    asked_items: list[Any] = [*items]
    users_R, items_N = pa.array(asked_user), pa.array(asked_items)
    read = store.read(users_R, items_N)
    expiries = [_shown_expiry(e) for e in store.expiries(users_R, items_N)]
    num_histories = len(store.schema.histories)
    item_expiries = expiries[1 + num_histories : 1 + num_histories + len(items)]
    found_items = [
        FetchedEntity(key, bool(read.items.is_known[row]), item_expiries[row], *_values(store, read.items, row))
        for row, key in enumerate(items)
    ]
    found_user = None if user is None else _user(store, user, read, at, expiries)
    if not store.layout.is_empty:
        _add_derived(store, read, at, found_user, found_items)
    return Fetched(at, found_user, found_items)


def _user(store: OnlineStore, user: Key, read: Read, at: int, expiries: Sequence[int | None]) -> FetchedUser:
    found = FetchedUser(user, bool(read.users.is_known[0]), expiries[0], *_values(store, read.users, 0))
    for place, history in enumerate(store.schema.histories):
        stored = read.histories[history.name]
        seen = cut(stored, np.array([at]), history.max_length)
        if history.max_age_us is not None:
            seen = chosen(seen, seen.times >= at - history.max_age_us)
        found.histories[history.name] = FetchedHistory(
            len(stored.times), expiries[1 + place], seen.times.tolist(), _events(store, seen)
        )
    if read.derived is not None:
        families = store.layout.families
        for family, rows, expires in zip(families, read.derived.rows, expiries[-len(families) :], strict=False):
            found.num_rows[family.name] = max(len(rows.times) - 1, 0)  # the first record is no row
            found.rows_expire[family.name] = expires
    return found


def _events(store: OnlineStore, events: Events) -> list[dict[str, Any]]:
    words = {name: store.encoder.decode(name, column) for name, column in events.columns.items()}
    return [{name: values[row] for name, values in words.items()} for row in range(len(events.times))]


def _add_derived(
    store: OnlineStore, read: Read, at: int, user: FetchedUser | None, items: Sequence[FetchedEntity]
) -> None:
    """Puts derived values to the user, or to each item, that they are of."""
    assert read.derived is not None
    time, request_of_row = np.array([at]), np.zeros(len(items), np.int64)
    columns, refused = store.derived_of(read, time, request_of_row)
    numbers = derived_numbers(store.layout, read.derived, time, request_of_row) if columns else {}
    for name, feature in store.layout.features.items():
        spec = store.schema.derived_of(feature)
        assert spec is not None
        if user is None and is_of_user(store.schema, spec):
            continue
        if feature.scope == "context":
            whose: Sequence[FetchedEntity] = [] if user is None else [user]
        else:
            whose = items
        for row, entity in enumerate(whose):
            if name in refused:
                entity.refused[name] = refused[name]
                continue
            if name in numbers:
                number = float(numbers[name][row])
                entity.derived[name] = None if np.isnan(number) else number
            else:
                entity.derived[name] = store.encoder.decode(name, take_rows(columns[name], np.array([row])))[0]
            entity.encoded |= _encoded({name: columns[name]}, row)


def is_of_user(schema: Schema, spec: Derived) -> bool:
    """Whether a derived value depends on the user."""
    if isinstance(spec, Ratio):
        parts = [d for d in schema.derived if d.name in (spec.numerator, spec.denominator)]
        return any(is_of_user(schema, part) for part in parts)
    if isinstance(spec, AsOf):
        return schema.derived_scope(spec) == "context"
    return any(name == "user" or (name != "item" and schema.feature(name).scope == "user") for name in spec.by)


def _values(store: OnlineStore, entities: Entities, row: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What features stand for, and what they are encoded to; nothing of who is not stored."""
    if not entities.is_known[row]:
        return {}, {}
    rows, columns = np.array([row]), entities.columns
    words = {name: store.encoder.decode(name, take_rows(column, rows))[0] for name, column in columns.items()}
    return words, _encoded(columns, row)


def _encoded(columns: Mapping[str, EncodedColumn], row: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, column in columns.items():
        one = take_rows(column, np.array([row]))
        if isinstance(one, Ragged):
            found[name] = one.values.tolist()
        else:
            values = one.reshape(-1).tolist()
            found[name] = values[0] if len(values) == 1 else values
    return found


def _shown_expiry(expires: int | None) -> int | None:
    return None if expires == NEVER else expires
