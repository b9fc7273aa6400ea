"""One event as it happens: what it adds to histories, and to derived values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from feature_store.online.derived import KNOWN, Family, Rows, code_column, counts_column, units_column
from feature_store.online.keys import Key
from recsys.derived import Windowed
from recsys.encoding.encoder import EncodedColumn, Encoder
from recsys.errors import DataError, EncodingError, nearest
from recsys.schema import Categorical, DayOfWeek, HourOfDay, Schema
from recsys.times import EARLIEST, MAX_TIME

if TYPE_CHECKING:
    from feature_store.online.store import OnlineStore


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


class Pushed(NamedTuple):
    """Where a pushed event went.

    Attributes:
        histories: names of the histories that hold it.
        derived: names of the derived values of its user that count it; those of items, and of impressions, follow
            when the store is materialised.
    """

    histories: list[str]
    derived: list[str]


def check_event(schema: Schema, event: Event) -> None:
    """Refuses what a build would set aside.

    Raises:
        DataError: its time, a key or another value cannot be.
    """
    if not 0 <= event.time < MAX_TIME:
        raise DataError("time must lie between 1970 and 2200, in UTC microseconds, got another")
    keys = (("user", event.user), ("item", event.item))
    given = {**{f"the {what}'s key": key for what, key in keys}, "type": event.type}
    given |= {repr(column): value for column, value in event.values.items()}
    for name, value in given.items():
        problem = _problem_of(value)
        if problem is not None:
            raise DataError(f"{name} {problem}")
    for what, key in keys:
        if isinstance(key, int) and key < 0 and schema.views.negative_keys == "quarantine":
            raise DataError(
                f"the {what}'s key must be at least 0, got {key}: a build sets such rows aside",
                hint="negative keys mostly stand for nobody; views.negative_keys: keep takes them",
            )


def _problem_of(value: Any) -> str | None:
    """What is wrong with a value whatever it is read for; None if nothing is."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "must be a signed 64-bit integer, got a larger number"
    if isinstance(value, float) and math.isinf(value):
        return "must be finite, got infinity"
    if isinstance(value, str) and not _is_unicode(value):
        return "must be Unicode text, got half of a surrogate pair"
    if isinstance(value, (list, tuple)):
        return next((problem for problem in map(_problem_of, value) if problem is not None), None)
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def histories_of(schema: Schema, event: Event) -> list[str]:
    """Names of the histories that an event belongs to.

    Raises:
        DataError: it has no type, and a history takes only some.
    """
    typed = [h for h in schema.histories if h.event_types is not None]
    if typed and event.type is None:
        assert schema.views.events is not None
        raise DataError(
            f"type must be given, history {typed[0].name!r} takes only some",
            hint=f"it is the column {schema.views.events.type!r} of the events view",
        )
    return [h.name for h in schema.histories if h.event_types is None or event.type in h.event_types]


def named_types(schema: Schema) -> set[str]:
    """The event types that histories and derived values name; others may be in the log, and may be pushed."""
    readers = [*schema.histories, *(d for d in schema.derived if isinstance(d, Windowed) and d.source == "events")]
    return {name for reader in readers for name in reader.event_types or ()}


def event_columns(store: OnlineStore, event: Event, histories: Sequence[str]) -> dict[str, EncodedColumn]:
    """Encoded attributes and event features of one event, one row each."""
    schema = store.schema
    specs = {f: schema.feature(f) for h in histories for f in store.features_of(h)}
    known = {schema.feature(f).source_column for h in schema.histories for f in store.features_of(h.name)}
    known |= store.derived_columns()
    for column in event.values:
        if column not in known:
            raise DataError(f"{column!r} must be a column that a history reads", hint=nearest(column, known))
    item = store.items(pa.array([event.item]))
    views = schema.views
    assert views.events is not None
    key_column = views.items.key if views.items else views.impressions.item
    columns: dict[str, EncodedColumn] = {}
    for name, feature in specs.items():
        column = feature.source_column
        if column in event.values:
            columns[name] = _encoded(store.encoder, name, event.values[column])
        elif feature.scope == "event" and column == views.events.time and _reads_instant(schema, name):
            columns[name] = store.encoder.encode(name, pa.array([event.time]))
        elif feature.scope == "event" and column in (views.events.user, views.events.item, views.events.type):
            own = {views.events.user: event.user, views.events.item: event.item, views.events.type: event.type}
            columns[name] = _encoded(store.encoder, name, own[column])
        elif feature.scope == "event":
            columns[name] = store.encoder.unknown_column(name, 1)
        elif column == key_column and not item.is_known[0]:
            columns[name] = _encoded(store.encoder, name, event.item)
        else:
            columns[name] = item.columns[name]
    return columns


def row_of(store: OnlineStore, family: Family, event: Event) -> Rows | None:
    """What an event adds to derived values, after the mark of a user without rows; None if it counts for none."""
    from feature_store.online.pushed import counted_event

    counted = [counted_event(spec, store.schema, event, store.meta) for spec in family.specs]
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
        if not 0 <= known < MAX_TIME or known < EARLIEST <= event.time:
            raise DataError(
                f"{family.created!r} must be in UTC microseconds between 1970 and 2200, got another unit, or none",
                hint="seconds times 1,000,000 are microseconds",
            )
        columns[KNOWN][1] = known
    if family.codes:
        for name, code in store.item_codes(event.item, family.codes).items():
            columns[code_column(name)][:] = -1, code
    return Rows(np.array([0, 2]), np.array([0, event.time]), columns)


def _reads_instant(schema: Schema, feature: str) -> bool:
    spec = schema.feature(feature)
    if not isinstance(spec, Categorical):
        return False
    return isinstance(schema.table_encoders[spec.table_name], (HourOfDay, DayOfWeek))


def _encoded(encoder: Encoder, feature: str, value: Any) -> EncodedColumn:
    try:
        return encoder.encode(feature, pa.array([value]))
    except pa.ArrowException as err:
        raise EncodingError(f"feature {feature!r} must be given a value that fits it, got another type") from err
