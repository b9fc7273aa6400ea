"""Recomputes rows of a training set from the views by plain loops, and compares.

Nothing of the build is used but the reading of single columns and the encoder: no index of keys, no sorted log, no
binary search. For each sampled impression, all valid rows of the views are looked through for its request, its user,
its item and its events; what is found is encoded and compared with what is stored, number by number.

Of a set that was appended to, each row is compared with what the logs held when it was written, and the history of an
appended row with the newest events that a batch reads (:mod:`feature_store.append`). Attributes and their versions are
taken as they are now: where they were changed since for the past, the rows of before differ.

That no event is at or after its request is checked on every request, not on a sample.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from feature_store.appended import Appends
from feature_store.build import DataConfig
from feature_store.recompute_derived import DerivedTruth
from feature_store.sources import to_arrow
from feature_store.views import Views
from recsys.encoding import EncodedColumn, Ragged
from recsys.schema import FIRST_ID, Dense, Feature, History
from recsys.training_set import (
    ITEM_ROW,
    SOURCE_ROW,
    SPLITS,
    TIME,
    USER_ROW,
    Split,
    Table,
    TrainingSet,
    end_column,
    label_column,
    start_column,
)

_MAX_LATE = 100
"""Late requests named for each history and split; all are counted."""


@dataclass(frozen=True)
class Difference:
    """A stored value that is not what the views say.

    Attributes:
        split: of the training set.
        row: of the split's impressions.
        source_row: of the impressions view.
        place: the feature, or which other column.
        stored: what the training set holds: encoded values, lengths or times, never raw values.
        expected: the same, recomputed.
    """

    split: str
    row: int
    source_row: int
    place: str
    stored: str
    expected: str


@dataclass(frozen=True)
class LateEvents:
    """Requests whose history reaches their own time or beyond.

    Attributes:
        split: of the training set.
        history: by name.
        num_requests: how many.
        source_rows: rows of the impressions view, the first of each such request; at most a hundred.
    """

    split: str
    history: str
    num_requests: int
    source_rows: tuple[int, ...]


def late_events(training_set: TrainingSet) -> list[LateEvents]:
    """Looks at the last event of every request's history."""
    found = []
    for split in _splits(training_set):
        requests, source_row = split.requests, split.impressions.array(SOURCE_ROW)
        for name, log in training_set.events.items():
            start, end = requests.array(start_column(name)), requests.array(end_column(name))
            has_events = np.flatnonzero(end > start)
            is_late = log.array(TIME)[end[has_events] - 1] >= requests.array(TIME)[has_events]
            late = has_events[is_late]
            if len(late):
                rows = source_row[split.row_offsets[late[:_MAX_LATE]]]
                found.append(LateEvents(split.name, name, len(late), tuple(rows.tolist())))
    return found


def recompute_rows(
    training_set: TrainingSet, data: DataConfig, *, num_rows: int, seed: int
) -> tuple[int, list[Difference]]:
    """Recomputes a sample of each split.

    Args:
        training_set: what was built.
        data: what it was built from.
        num_rows: impressions over all splits, in equal parts; a smaller split is taken as a whole.
        seed: of the sample.

    Returns:
        How many impressions were recomputed, and all differences in them.

    Raises:
        SourceError: the views cannot be read.
    """
    rng = np.random.default_rng(seed)
    splits = _splits(training_set)
    chosen = []
    for split in splits:
        size = min(split.num_rows, -(-num_rows // len(splits)))
        chosen.append((split, np.sort(rng.choice(split.num_rows, size, replace=False))))
    with tempfile.TemporaryDirectory(prefix="recsys-leaks-") as staging:
        views = Views(
            training_set.schema,
            data.views_root,
            staging=Path(staging),
            max_quarantined_fraction=data.max_quarantined_fraction,
            last=Appends.of(training_set).files,
        )
        truth = _Truth(training_set, views, chosen)
        differences = [d for split, rows in chosen for d in truth.compare(split, rows)]
    return sum(len(rows) for _, rows in chosen), differences


def _splits(training_set: TrainingSet) -> list[Split]:
    splits = [training_set.split(name) for name in SPLITS]
    return [split for split in splits if split.num_rows]


class _Truth:
    """What the views say about the sampled impressions."""

    def __init__(self, training_set: TrainingSet, views: Views, chosen: list[tuple[Split, np.ndarray]]) -> None:
        self.training_set, self.views, self.schema = training_set, views, training_set.schema
        self._valid: dict[str, np.ndarray] = {}
        sources = np.concatenate([split.impressions.array(SOURCE_ROW)[rows] for split, rows in chosen])
        self._place = {int(row): place for place, row in enumerate(sources)}
        self._sources = sources
        self._appends = Appends.of(training_set)
        self._generations = self._appends.generations("impressions", sources).tolist()
        self._users = views.keys("impressions", "user").gather(sources).to_list()
        self._items = views.keys("impressions", "item").gather(sources).to_list()
        self._own_time = views.time("impressions")[sources].tolist()
        self._request_time = self._find_request_times()
        self._labels = {task.name: views.labels(task, sources) for task in self.schema.tasks}
        self._derived = DerivedTruth(
            views,
            self._valid_rows,
            self._users,
            self._items,
            self._request_time,
            self._appends,
            self._generations,
        )
        self._encoded = {f.name: self._encode(f) for f in self.schema.features}
        self._events = self._find_events()
        self._event_values = self._encode_events()
        self._vocabularies = {f.name: self._vocabulary(f) for f in self.schema.features_of("event")}

    def _valid_rows(self, view: str) -> np.ndarray:
        """Rows of a view that are not set aside; looked for once, or they would be counted again each time."""
        if view not in self._valid:
            self._valid[view] = self.views.valid_rows(view)
        return self._valid[view]

    def _find_request_times(self) -> list[int]:
        """The earliest valid impression of each sampled request."""
        keys = self.views.request_keys()
        if keys is None:
            return list(self._own_time)
        wanted = list(zip(self._generations, keys.gather(self._sources).to_list(), strict=True))
        valid = self._valid_rows("impressions")
        generations = self._appends.generations("impressions", valid).tolist()
        keys_of_valid, times = keys.gather(valid).to_list(), self.views.time("impressions")[valid].tolist()
        earliest: dict[tuple[int, Any], int] = dict.fromkeys(wanted, 2**63 - 1)
        for generation, key, time in zip(generations, keys_of_valid, times, strict=True):
            if (generation, key) in earliest and time >= self._appends.begin(generation):
                earliest[generation, key] = min(earliest[generation, key], time)
        return [earliest[request] for request in wanted]

    def _first_rows(self, view: str, scope: str, wanted: list[Any]) -> list[int | None]:
        """The first valid row of each entity in its view, None without one."""
        if view not in self.views.sources:
            return [None] * len(wanted)
        valid = self._valid_rows(view)
        first: dict[Any, int | None] = dict.fromkeys(wanted)
        for row, key in zip(valid.tolist(), self.views.keys(view, scope).gather(valid).to_list(), strict=True):
            if key in first and first[key] is None:
                first[key] = row
        return [first[key] for key in wanted]

    def _encode(self, feature: Feature) -> EncodedColumn:
        """The encoded value of a feature for every sampled impression."""
        return self.training_set.encoder.encode(feature.name, self._raw(feature))

    def _raw(self, feature: Feature) -> pa.Array[Any]:
        views, derived = self.views, self.schema.derived_of(feature)
        if derived is not None:
            return self._derived.raw(feature, derived)
        if feature.scope in ("user", "item"):
            scope, view = feature.scope, f"{feature.scope}s"
            keys = self._users if scope == "user" else self._items
            key_column = views.key_column(view if view in views.sources else "impressions", scope)
            if feature.source_column == key_column:
                return to_arrow(pl.Series(keys, dtype=views.keys("impressions", scope).dtype))
            rows = self._first_rows(view, scope, keys)
            return to_arrow(views.values(feature).gather(pl.Series(rows, dtype=pl.Int64)))
        if views.reads_time(feature):
            return pa.array(self._request_time if feature.scope == "context" else self._own_time, pa.int64())
        return to_arrow(views.values(feature).gather(self._sources))

    def _find_events(self) -> dict[Any, list[dict[str, Any]]]:
        """The valid events of the sampled users."""
        events: dict[Any, list[dict[str, Any]]] = {user: [] for user in self._users}
        if "events" not in self.views.sources:
            return events
        valid = self._valid_rows("events")
        users = self.views.keys("events", "user").gather(valid)
        rows = valid[users.is_in(pl.Series(list(events), dtype=users.dtype).implode()).to_numpy()]
        types, sequence = self.views.event_types(), self.views.sequence(rows)
        columns = {
            "row": rows.tolist(),
            "user": self.views.keys("events", "user").gather(rows).to_list(),
            "item": self.views.keys("events", "item").gather(rows).to_list(),
            "time": self.views.time("events")[rows].tolist(),
            "type": [None] * len(rows) if types is None else types.gather(rows).to_list(),
            "sequence": [0] * len(rows) if sequence is None else sequence.tolist(),
        }
        generations = self._appends.generations("events", rows).tolist()
        for place, values in enumerate(zip(*columns.values(), strict=True)):
            event = dict(zip(columns, values, strict=True)) | {"place": place, "generation": generations[place]}
            events[event["user"]].append(event)
        return events

    def _encode_events(self) -> dict[str, EncodedColumn]:
        """The encoded value of every event feature, by the ``place`` of the event."""
        ordered = sorted((e for events in self._events.values() for e in events), key=lambda e: e["place"])
        rows = np.array([e["row"] for e in ordered], dtype=np.int64)
        values = {}
        for feature in self.schema.features_of("event"):
            raw: pa.Array[Any]
            if self.views.reads_time(feature):
                raw = pa.array([e["time"] for e in ordered], pa.int64())
            else:
                raw = to_arrow(self.views.values(feature).gather(rows))
            values[feature.name] = self.training_set.encoder.encode(feature.name, raw)
        return values

    def _history(self, history: History, user: Any, time: int, generation: int) -> list[dict[str, Any]]:
        types = history.event_types
        oldest = -math.inf if history.max_age_us is None else time - history.max_age_us
        of_type = [e for e in self._events[user] if types is None or e["type"] in types]
        known = [e for e in of_type if self._appends.knew_event(generation, e["row"])]
        before = [e for e in known if oldest <= e["time"] < time]
        ordered: list[dict[str, Any]] = []
        for _, same in groupby(sorted(before, key=itemgetter("time")), key=itemgetter("time")):
            tied = list(same)
            ordered += tied if len(tied) == 1 else sorted(tied, key=lambda e: self._place_among_tied(history, e))
        return ordered

    def _vocabulary(self, feature: Feature) -> list[Any] | None:
        """The value of each id of a feature; None where the ids are in the order of the values, or by hash."""
        values = self.training_set.encoder.vocabulary(feature.name)
        return None if values is None else [None] * FIRST_ID + values.to_pylist()

    def _place_among_tied(self, history: History, event: Mapping[str, Any]) -> tuple[Any, ...]:
        """What orders a history's events of one time: sequence, key of the item, each event feature as stored."""
        features: list[tuple[Any, ...]] = []
        for feature in history.event_features:
            value = self._encoded_event(feature, event)
            words = self._vocabularies[feature.name]
            if isinstance(feature, Dense):
                features += [(number, math.copysign(1.0, number)) for number in value.tolist()]
            else:
                features.append(tuple((i, 0) if words is None or i < FIRST_ID else (FIRST_ID, words[i]) for i in value))
        return (event["sequence"], event["item"], *features)

    def _encoded_event(self, feature: Feature, event: Mapping[str, Any]) -> np.ndarray:
        """An event's value as it was encoded when it came."""
        value = _value(self._event_values[feature.name], event["place"])
        return self._appends.as_encoded(feature, value, event["generation"])

    def compare(self, split: Split, rows: np.ndarray) -> Iterator[Difference]:
        """Differences in some impressions of a split."""
        request_of_row = np.searchsorted(split.row_offsets, rows, side="right") - 1
        for row, request in zip(rows.tolist(), request_of_row.tolist(), strict=True):
            source_row = int(split.impressions.array(SOURCE_ROW)[row])
            for place, stored, expected in self._compare_row(split, row, request, self._place[source_row]):
                yield Difference(split.name, row, source_row, place, stored, expected)

    def _compare_row(self, split: Split, row: int, request: int, at: int) -> Iterator[tuple[str, str, str]]:
        impressions, requests = split.impressions, split.requests
        users, items = self.training_set.users, self.training_set.items
        user_row, item_row = int(requests.array(USER_ROW)[request]), int(impressions.array(ITEM_ROW)[row])
        for place, table, table_row, key in (
            ("user", users, user_row, self._users[at]),
            ("item", items, item_row, self._items[at]),
        ):
            assert table.keys is not None
            if table.keys[table_row].as_py() != key:
                yield place, f"row {table_row} of {place}s", "the row of another key"
        time, stored_time = self._request_time[at], int(requests.array(TIME)[request])
        if stored_time != time:
            yield "request time", str(stored_time), str(time)
        if (found := self._split_of(time)) != split.name:
            yield "split", split.name, found
        for task, labels in self._labels.items():
            stored = impressions.array(label_column(task))[row]
            if not np.array_equal(stored, labels[at], equal_nan=True):
                yield f"label of {task}", str(stored), str(labels[at])
        places: Mapping[str, tuple[Table, int]] = {
            "user": (users, user_row),
            "item": (items, item_row),
            "context": (requests, request),
            "candidate": (impressions, row),
        }
        for feature in self.schema.features:
            table, table_row = places[feature.scope]
            stored_value = _value(table.columns[feature.name], table_row)
            expected_value = _value(self._encoded[feature.name], at)
            if feature.scope in ("context", "candidate"):  # users and items are encoded anew at each append
                expected_value = self._appends.as_encoded(feature, expected_value, self._generations[at])
            if not np.array_equal(stored_value, expected_value, equal_nan=True):
                yield feature.name, _shown(stored_value), _shown(expected_value)
        generation = self._generations[at]
        for history in self.schema.histories:
            expected = self._history(history, self._users[at], time, generation)
            yield from self._compare_history(history, requests, request, expected, is_appended=generation > 0)

    def _compare_history(
        self, history: History, requests: Table, request: int, expected: list[dict[str, Any]], *, is_appended: bool
    ) -> Iterator[tuple[str, str, str]]:
        log, keys = self.training_set.events[history.name], self.training_set.items.keys
        assert keys is not None
        start = int(requests.array(start_column(history.name))[request])
        end = int(requests.array(end_column(history.name))[request])
        name = f"history {history.name}"
        num_needed = min(len(expected), history.max_length) if is_appended else len(expected)
        if not num_needed <= end - start <= len(expected):
            yield name, f"{end - start} events", f"{len(expected)} events"
            return
        if is_appended:
            start, expected = end - num_needed, expected[len(expected) - num_needed :]
        for offset, event in enumerate(expected):
            if int(log.array(TIME)[start + offset]) != event["time"]:
                yield f"{name}: time of event {offset}", str(log.array(TIME)[start + offset]), str(event["time"])
                return
            if keys[int(log.array(ITEM_ROW)[start + offset])].as_py() != event["item"]:
                yield f"{name}: item of event {offset}", "another item", "the item of the view"
                return
            for feature in history.event_features:
                stored = _value(log.columns[feature.name], start + offset)
                value = self._encoded_event(feature, event)
                if not np.array_equal(stored, value, equal_nan=True):
                    yield f"{name}: {feature.name} of event {offset}", _shown(stored), _shown(value)
                    return

    def _split_of(self, time: int) -> str:
        edges = self.training_set.manifest["split"]
        start = edges["train_start"]
        if start is not None and time < start:
            return "none"
        for name, end in zip(SPLITS, ("train_end", "validation_end", "test_end"), strict=True):
            if time < edges[end]:
                return name
        return "none"


def _value(column: EncodedColumn, row: int) -> np.ndarray:
    """One row of an encoded column as a vector."""
    if isinstance(column, Ragged):
        return column.values[column.offsets[row] : column.offsets[row + 1]]
    return np.atleast_1d(column[row])


def _shown(value: np.ndarray) -> str:
    shown = ", ".join(f"{v:g}" if isinstance(v, np.floating) else str(v) for v in value[:8])
    return f"[{shown}{', ...' if len(value) > 8 else ''}]"
