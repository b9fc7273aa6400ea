"""Raw requests and stored features in, one :class:`~recsys.batch.Batch` out.

The only place where serving turns values into ids, and it does so with the encoder that the model was trained with.
JSON requests and data frames meet here as :class:`RawBatch`: columns of raw values.

For every feature, the first of these that there is:

1. a raw value that came with the request;
2. the key of the user or item itself, where the feature reads the key, or the request's time, where it reads that;
3. what the feature source knows;
4. the unknown value.

Derived values (:mod:`recsys.derived`) are the exception: the unknown value in their place would be another than the
model was trained on. A request that does not bring them, and whose feature source does not give them, is refused.

Shapes: R requests, N candidates, S events of all requests together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from recsys.batch import Bags, Batch, Column, HistoryBatch, concatenated_ranges
from recsys.encoding.columns import Array
from recsys.encoding.encoder import EncodedColumn, Encoder, Ragged
from recsys.errors import EncodingError, RequestError
from recsys.schema import Feature, History, Schema, Scope
from serving.features import Derived, Events, FeatureSource, take_rows
from serving.request import InlineHistory, Key, RankRequest, raise_problems


class Given(NamedTuple):
    """Raw values of a column that came with requests.

    Attributes:
        values: ``(m,)``.
        rows: ``(m,)`` int64, the rows that they belong to; None for all rows.
        where: names the column in messages.
    """

    values: Array
    rows: np.ndarray | None
    where: str


@dataclass(frozen=True)
class GivenHistory:
    """Events that came with requests.

    Attributes:
        requests: ``(Q,)`` int64, the requests that brought their history, ascending.
        offsets: ``(Q + 1,)`` int64.
        items: ``(S,)`` keys, oldest first.
        times: ``(S,)`` int64 UTC microseconds; None where the events have none.
        columns: raw values by column.
    """

    requests: np.ndarray
    offsets: np.ndarray
    items: Array
    times: np.ndarray | None
    columns: Mapping[str, Given] = field(default_factory=dict)


@dataclass(frozen=True)
class RawBatch:
    """Requests as columns of raw values.

    Attributes:
        request_of_row: ``(N,)`` int64, non-decreasing.
        time: ``(R,)`` int64, UTC microseconds.
        row_time: ``(N,)`` int64, where a row's own time is not its request's.
        users: ``(R,)`` keys, null for unknown users.
        items: ``(N,)`` keys.
        user: raw values by column, of R rows.
        context: raw values by column, of R rows.
        row: raw values by column, of N rows: of items and of candidates.
        histories: by name; requests that bring none have the stored one.
    """

    request_of_row: np.ndarray
    time: np.ndarray
    users: Array
    items: Array
    row_time: np.ndarray | None = None
    user: Mapping[str, Given] = field(default_factory=dict)
    context: Mapping[str, Given] = field(default_factory=dict)
    row: Mapping[str, Given] = field(default_factory=dict)
    histories: Mapping[str, GivenHistory] = field(default_factory=dict)


@dataclass(frozen=True)
class Assembled:
    """A batch, and what was not known of it.

    Attributes:
        batch: of R requests and N candidates.
        is_known_user: ``(R,)`` bool.
        is_known_item: ``(N,)`` bool.
        num_ignored_events: events that came with requests and are not before them.
    """

    batch: Batch
    is_known_user: np.ndarray
    is_known_item: np.ndarray
    num_ignored_events: int


class Assembler:
    """Builds batches. Safe to call from several threads.

    Args:
        encoder: the artifact's.
        features: what is known without being told.
    """

    def __init__(self, encoder: Encoder, features: FeatureSource) -> None:
        self.schema: Schema = encoder.schema
        self.features = features
        self._encoder = encoder
        views = self.schema.views
        self._user_key = views.users.key if views.users else views.impressions.user
        self._item_key = views.items.key if views.items else views.impressions.item
        self._event_time = views.events.time if views.events else None
        self._event_item = views.events.item if views.events else self._item_key
        self._by_scope: dict[Scope, tuple[Feature, ...]] = {
            scope: self.schema.features_of(scope) for scope in ("user", "item", "context", "candidate")
        }
        self._derived = [f for f in self.schema.features if self.schema.derived_of(f) is not None]
        self._attributes = {h.name: [self.schema.feature(a) for a in h.attributes] for h in self.schema.histories}

    def batch(self, requests: Sequence[RankRequest]) -> Assembled:
        """One batch of checked requests.

        Raises:
            RequestError: values cannot be encoded; every such column is named.
        """
        return self.assemble(raw_batch(requests))

    def assemble(self, raw: RawBatch) -> Assembled:
        """One batch of raw columns.

        Raises:
            RequestError: values cannot be encoded; every such column is named.
        """
        problems: list[str] = []
        num_requests, num_rows = len(raw.time), len(raw.request_of_row)
        try:
            stored = self.features.at(raw.users, raw.items)
            user, is_known_user = self._entities(stored, "user", raw.users, raw.user, num_requests, problems)
            item, is_known_item = self._entities(stored, "item", raw.items, raw.row, num_rows, problems)
            derived = self._derived_values(stored, raw)
        except EncodingError as err:  # keys of the wrong type: nothing else can be said of these rows
            raise RequestError(err.message) from err
        shown = self.schema.views.impressions
        known_R = {shown.time: raw.time, shown.user: raw.users}
        row_time = raw.time[raw.request_of_row] if raw.row_time is None else raw.row_time
        known_N = {shown.time: row_time, shown.item: raw.items}
        context = {
            f.name: self._column(f, raw.context, known_R, derived.columns.get(f.name), num_requests, problems, derived)
            for f in self._by_scope["context"]
        }
        candidate = {
            f.name: self._column(f, raw.row, known_N, derived.columns.get(f.name), num_rows, problems, derived)
            for f in self._by_scope["candidate"]
        }
        histories, num_ignored = {}, 0
        for history in self.schema.histories:
            events, ignored = self._history(stored, history, raw, problems)
            num_ignored += ignored
            histories[history.name] = HistoryBatch(
                torch.from_numpy(events.offsets),
                torch.from_numpy(events.times),
                {name: _to_tensor(column) for name, column in events.columns.items()},
            )
        raise_problems(problems)
        batch = Batch(
            request_of_row=torch.from_numpy(raw.request_of_row),
            time=torch.from_numpy(raw.time),
            user={name: _to_tensor(c) for name, c in user.items()},
            context={name: _to_tensor(c) for name, c in context.items()},
            item={name: _to_tensor(c) for name, c in item.items()},
            candidate={name: _to_tensor(c) for name, c in candidate.items()},
            histories=histories,
        )
        return Assembled(batch, is_known_user, is_known_item, num_ignored)

    def _derived_values(self, stored: FeatureSource, raw: RawBatch) -> Derived:
        """What the feature source gives, if the requests do not bring all of it."""
        for feature in self._derived:
            came = (raw.context if feature.scope == "context" else raw.row).get(feature.source_column)
            if came is None or came.rows is not None:
                return stored.derived(raw.users, raw.items, raw.time, raw.request_of_row)
        return Derived({}, {})

    def _entities(
        self,
        stored: FeatureSource,
        scope: Scope,
        keys: Array,
        given: Mapping[str, Given],
        n: int,
        problems: list[str],
    ) -> tuple[dict[str, EncodedColumn], np.ndarray]:
        features = self._by_scope[scope]
        return self._entity_columns(stored, scope, features, keys, given, n, problems)

    def _entity_columns(
        self,
        source: FeatureSource,
        scope: Scope,
        features: Sequence[Feature],
        keys: Array,
        given: Mapping[str, Given],
        n: int,
        problems: list[str],
    ) -> tuple[dict[str, EncodedColumn], np.ndarray]:
        """Features of users or items: stored, or unknown but for the key, under what came with the requests."""
        ask = source.users if scope == "user" else source.items
        key_column = self._user_key if scope == "user" else self._item_key
        stored, is_known = ask(keys, [f.name for f in features])
        columns: dict[str, EncodedColumn] = {}
        for feature in features:
            base = stored[feature.name]
            if feature.source_column == key_column and not is_known.all():
                new = np.flatnonzero(~is_known)
                base = overlay(base, new, self._encoder.encode(feature.name, keys.take(pa.array(new))))
            columns[feature.name] = self._column(feature, given, {}, base, n, problems)
        return columns, is_known

    def _column(
        self,
        feature: Feature,
        given: Mapping[str, Given],
        known: Mapping[str, Any],
        base: EncodedColumn | None,
        n: int,
        problems: list[str],
        derived: Derived | None = None,
    ) -> EncodedColumn:
        """One encoded column of n rows.

        Args:
            given: raw values that came with the requests.
            known: raw values that are known of every request or row, such as its time.
            base: what the column holds where neither says anything.
            derived: what the source says of derived values.
        """
        column = feature.source_column
        came = given.get(column)
        if base is None and feature in self._derived and (came is None or came.rows is not None):
            reason = (derived.refused if derived is not None else {}).get(feature.name)
            problems.append(
                f"{'context' if feature.scope == 'context' else 'candidates'}.{column} must be given: feature "
                f"{feature.name!r} reads a derived value, which "
                + ("no feature source gives" if reason is None else f"the feature source cannot give: it {reason}")
            )
            return self._encoder.unknown_column(feature.name, n)
        if came is None or came.rows is not None:
            if base is None:
                fact = known.get(column)
                base = (
                    self._encoder.unknown_column(feature.name, n)
                    if fact is None
                    else self._encoder.encode(feature.name, pa.array(fact) if isinstance(fact, np.ndarray) else fact)
                )
            if came is None:
                return base
        try:
            encoded = self._encoder.encode(feature.name, came.values)
        except EncodingError as err:
            problems.append(f"{came.where}: {err.message}")
            return base if base is not None else self._encoder.unknown_column(feature.name, n)
        if came.rows is None:
            return encoded
        assert base is not None
        return overlay(base, came.rows, encoded)

    def _history(
        self, source: FeatureSource, history: History, raw: RawBatch, problems: list[str]
    ) -> tuple[Events, int]:
        """The events of R requests, and how many of those that came with them were not before them."""
        events, num_ignored = self._any_age(source, history, raw, problems)
        return (events if history.max_age_us is None else recent(events, raw.time - history.max_age_us)), num_ignored

    def _any_age(
        self, source: FeatureSource, history: History, raw: RawBatch, problems: list[str]
    ) -> tuple[Events, int]:
        came = raw.histories.get(history.name)
        if came is None:
            return source.history(history.name, raw.users, raw.time, history.max_length), 0
        brought, num_ignored = self._given_events(source, history, came, raw.time, problems)
        if len(came.requests) == len(raw.time):
            return brought, num_ignored
        others = np.setdiff1d(np.arange(len(raw.time)), came.requests, assume_unique=True)
        stored = source.history(history.name, raw.users.take(pa.array(others)), raw.time[others], history.max_length)
        return _interleaved([(came.requests, brought), (others, stored)], len(raw.time)), num_ignored

    def _given_events(
        self, source: FeatureSource, history: History, came: GivenHistory, time: np.ndarray, problems: list[str]
    ) -> tuple[Events, int]:
        """Encodes events that came with requests: those strictly before, in order of time, the newest so many."""
        lengths = np.diff(came.offsets)
        request = np.repeat(np.arange(len(lengths)), lengths)
        before = time[came.requests][request]
        # Events without times are as old as can be told apart from the request.
        times = before - 1 if came.times is None else came.times
        is_past = times < before
        order = np.lexsort((times, request))  # stable: equal times keep their order
        order = order[is_past[order]]
        kept = np.bincount(request[order], minlength=len(lengths)).astype(np.int64)
        length = np.minimum(kept, history.max_length)
        ends = np.cumsum(kept)
        order = order[concatenated_ranges(ends - length, length)]
        attributes = self._attributes[history.name]
        try:
            columns, _ = self._entity_columns(
                source, "item", attributes, came.items, came.columns, len(came.items), problems
            )
        except EncodingError as err:  # of the keys: other columns are among the problems
            # A feature source calls all item keys by one name, that of the candidates.
            _, _, rule = err.message.partition(" must ")
            raise RequestError(f"histories.{history.name}.{self._event_item} must {rule}") from err
        known = {} if self._event_time is None else {self._event_time: times}
        for feature in history.event_features:
            columns[feature.name] = self._column(feature, came.columns, known, None, len(came.items), problems)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(length, out=offsets[1:])
        chosen = {name: take_rows(column, order) for name, column in columns.items()}
        return Events(offsets, times[order], chosen), int(np.count_nonzero(~is_past))


def recent(events: Events, oldest: np.ndarray) -> Events:
    """The events of each request from a time on.

    Args:
        events: of R requests.
        oldest: ``(R,)`` int64, UTC microseconds.
    """
    lengths = np.diff(events.offsets)
    is_recent = events.times >= np.repeat(oldest, lengths)
    if is_recent.all():
        return events
    kept = np.flatnonzero(is_recent)
    offsets = np.append(0, np.cumsum(is_recent))[events.offsets]
    return Events(offsets, events.times[kept], {name: take_rows(c, kept) for name, c in events.columns.items()})


def overlay(base: EncodedColumn, rows: np.ndarray, values: EncodedColumn) -> EncodedColumn:
    """The column with some rows replaced.

    Args:
        base: n rows.
        rows: ``(m,)`` int64, each row at most once.
        values: m rows.
    """
    if isinstance(base, Ragged):
        assert isinstance(values, Ragged)
        source = np.arange(len(base.offsets) - 1)
        source[rows] = len(source) + np.arange(len(rows))
        return _joined([base, values]).take(source)
    result = base.copy()
    assert isinstance(values, np.ndarray)
    result[rows] = values.reshape(len(rows), *base.shape[1:])
    return result


def _joined(columns: Sequence[EncodedColumn]) -> EncodedColumn:
    """One column of all rows of several."""
    if isinstance(columns[0], Ragged):
        bags = [c for c in columns if isinstance(c, Ragged)]
        lengths = np.concatenate([np.diff(b.offsets) for b in bags])
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Ragged(np.concatenate([b.values[b.offsets[0] : b.offsets[-1]] for b in bags]), offsets)
    plain = [c.reshape(len(c), -1) if c.dtype == np.float32 else c for c in columns if isinstance(c, np.ndarray)]
    return np.concatenate(plain)


def _interleaved(parts: Sequence[tuple[np.ndarray, Events]], num_requests: int) -> Events:
    """Events of all requests, from parts that each have those of some."""
    start, length = np.zeros(num_requests, np.int64), np.zeros(num_requests, np.int64)
    shift = 0
    for requests, events in parts:
        start[requests] = events.offsets[:-1] + shift
        length[requests] = np.diff(events.offsets)
        shift += int(events.offsets[-1])
    order = concatenated_ranges(start, length)
    offsets = np.zeros(num_requests + 1, np.int64)
    np.cumsum(length, out=offsets[1:])
    names = parts[0][1].columns
    columns = {name: take_rows(_joined([events.columns[name] for _, events in parts]), order) for name in names}
    return Events(offsets, np.concatenate([events.times for _, events in parts])[order], columns)


def _to_tensor(column: EncodedColumn) -> Column:
    if isinstance(column, Ragged):
        return Bags(torch.from_numpy(column.values), torch.from_numpy(column.offsets))
    return torch.from_numpy(column[:, None] if column.dtype == np.float32 and column.ndim == 1 else column)


# Checked requests as columns


def raw_batch(requests: Sequence[RankRequest]) -> RawBatch:
    """Several requests as columns of raw values.

    Raises:
        RequestError: values of one column are of types that do not mix; every such column is named.
    """
    problems: list[str] = []
    counts = [len(r.candidates) for r in requests]
    first = np.cumsum([0, *counts])
    keys: list[Key] = (
        list(requests[0].candidates) if len(requests) == 1 else [k for r in requests for k in r.candidates]
    )
    row_values: list[tuple[int, Mapping[str, Any]]] = [
        (int(begin) + place, values)
        for begin, request in zip(first.tolist(), requests, strict=False)
        if request.candidate_values is not None
        for place, values in enumerate(request.candidate_values)
        if values
    ]
    result = RawBatch(
        request_of_row=np.repeat(np.arange(len(requests), dtype=np.int64), counts),
        time=np.array([r.time for r in requests], np.int64),
        users=_array([r.user_id for r in requests], "user_id", problems),
        items=_array(keys, "candidates", problems),
        user=_given(((i, r.user) for i, r in enumerate(requests)), len(requests), "user", problems),
        context=_given(((i, r.context) for i, r in enumerate(requests)), len(requests), "context", problems),
        row=_given(row_values, len(keys), "candidates", problems),
        histories=_given_histories(requests, problems),
    )
    raise_problems(problems)
    return result


def _given_histories(requests: Sequence[RankRequest], problems: list[str]) -> dict[str, GivenHistory]:
    result = {}
    for name in dict.fromkeys(n for r in requests for n in r.histories):
        brought = [(i, r.histories[name]) for i, r in enumerate(requests) if name in r.histories]
        events: list[InlineHistory] = [h for _, h in brought]
        where = f"histories.{name}"
        has_times = [h.times is not None or not h.items for h in events]
        times: np.ndarray | None = None
        if all(has_times):
            times = np.array([t for h in events for t in h.times or ()], np.int64)
        elif any(h.times is not None for h in events):
            # Some requests give times and some do not: those that do not are as old as can be told apart from the
            # request.
            pairs = [(requests[i].time, h) for i, h in brought]
            times = np.array([t for at, h in pairs for t in h.times or [at - 1] * len(h.items)], np.int64)
        items = [k for h in events for k in h.items]
        values = [(i, v) for i, v in enumerate(v for h in events for v in h.values) if v]
        result[name] = GivenHistory(
            requests=np.array([i for i, _ in brought], np.int64),
            offsets=np.cumsum([0, *(len(h.items) for h in events)]).astype(np.int64),
            items=_array(items, where, problems) if items else pa.nulls(0),
            times=times,
            columns=_given(values, len(items), where, problems),
        )
    return result


def _given(rows: Iterable[tuple[int, Mapping[str, Any]]], n: int, where: str, problems: list[str]) -> dict[str, Given]:
    """Raw values by column, from those of each row."""
    found: dict[str, tuple[list[int], list[Any]]] = {}
    for row, values in rows:
        for name, value in values.items():
            places, column = found.setdefault(name, ([], []))
            places.append(row)
            column.append(value)
    return {
        name: Given(
            _array(column, f"{where}.{name}", problems),
            None if len(column) == n else np.array(places, np.int64),
            f"{where}.{name}",
        )
        for name, (places, column) in found.items()
    }


def _array(values: list[Any], where: str, problems: list[str]) -> Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        problems.append(f"{where} must have values of one type, got several, or integers beyond 64 bits")
        return pa.nulls(len(values))
