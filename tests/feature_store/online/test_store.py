"""The store against one made of dictionaries and lists, over random sequences of writes and reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_store.online.codec import take_rows
from feature_store.online.key_values import KeyValues
from feature_store.online.pushing import Event
from feature_store.online.reading import cut
from feature_store.online.store import Limits, OnlineStore
from recsys.encoding import Ragged
from recsys.errors import ArtifactError, ConfigError, DataError, EncodingError
from recsys.training_set import TrainingSet
from tests.feature_store.online.test_codec import make_encoder

Fresh = Callable[[], KeyValues]

TTL_S = 1000.0
KEEP = 9


def rows_of(columns: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """Encoded columns as plain values, row by row."""

    def value(column: Any, row: int) -> Any:
        if isinstance(column, Ragged):
            return column.values[column.offsets[row] : column.offsets[row + 1]].tolist()
        return np.atleast_1d(column[row]).tolist()

    return [{name: value(column, row) for name, column in columns.items()} for row in range(n)]


class Reference:
    """What the rules of the store say, with dictionaries."""

    def __init__(self, training_set: TrainingSet) -> None:
        self.encoder = training_set.encoder
        self.schema = training_set.schema
        self.now = 0
        self.entities: dict[tuple[str, int], tuple[int, dict[str, Any]]] = {}
        self.events: dict[tuple[str, int], tuple[int, list[tuple[int, dict[str, Any]]]]] = {}

    def expiry(self) -> int:
        return self.now + round(TTL_S * 1e6)

    def entity(self, scope: str, key: int) -> dict[str, Any] | None:
        expires, row = self.entities.get((scope, key), (0, None))
        return row if expires > self.now else None

    def unknown(self, scope: Any) -> dict[str, Any]:
        features = self.schema.features_of(scope)
        return rows_of({f.name: self.encoder.unknown_column(f.name, 1) for f in features}, 1)[0]

    def push(self, event: Event) -> None:
        item = self.entity("item", event.item)  # type: ignore[arg-type]
        if item is None:
            item = self.unknown("item")
            item["item_id"] = self.encoder.encode("item_id", pa.array([event.item])).tolist()  # type: ignore[union-attr]
        for history in self.schema.histories:
            if history.event_types is not None and event.type not in history.event_types:
                continue
            row = {name: item[name] for name in history.attributes}
            for feature in history.event_features:
                raw = pa.array([event.values.get("dwell")], pa.int64())
                row[feature.name] = self.encoder.encode(feature.name, raw).tolist()  # type: ignore[union-attr]
            kept = [*self.history(history.name, event.user), (event.time, row)]  # type: ignore[arg-type]
            kept.sort(key=lambda e: e[0])
            self.events[history.name, event.user] = (self.expiry(), kept[-KEEP:])  # type: ignore[index]

    def history(self, name: str, user: int) -> list[tuple[int, dict[str, Any]]]:
        expires, events = self.events.get((name, user), (0, []))
        return list(events) if expires > self.now else []


operations = st.lists(
    st.one_of(
        st.tuples(st.just("user"), st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True)),
        st.tuples(st.just("item"), st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True)),
        st.tuples(
            st.just("push"),
            st.tuples(
                st.integers(1, 4),
                st.integers(1, 8),
                st.integers(0, 12),
                st.sampled_from(["click", "view"]),
                st.one_of(st.none(), st.integers(0, 500)),
            ),
        ),
        st.tuples(st.just("tick"), st.integers(1, 700)),
        st.tuples(st.just("sweep"), st.none()),
        st.tuples(st.just("read"), st.integers(0, 14)),
    ),
    max_size=25,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=operations)
def test_against_dictionaries(training_set: TrainingSet, fresh: Fresh, steps: list[tuple[str, Any]]) -> None:
    reference = Reference(training_set)
    reference.now = time.time_ns() // 1000  # Redis removes what has expired by its own clock
    limits = Limits(keep_events=KEEP, user_ttl_s=TTL_S, item_ttl_s=TTL_S)
    store = OnlineStore(fresh(), training_set.encoder, limits=limits, now=lambda: reference.now)
    tables = {"user": training_set.users, "item": training_set.items}
    for step, given_ in [*steps, ("read", 14), ("read", 5)]:
        if step in tables:
            rows = np.array(given_)
            names = [f.name for f in training_set.schema.features_of(step)]  # type: ignore[arg-type]
            columns = {name: take_rows(tables[step].columns[name], rows) for name in names}
            (store.put_users if step == "user" else store.put_items)(pa.array(given_), columns)
            for key, row in zip(given_, rows_of(columns, len(rows)), strict=True):
                reference.entities[step, key] = (reference.expiry(), row)
        elif step == "push":
            user, item, when, kind, dwell = given_
            event = Event(user, item, when, kind, {} if dwell is None else {"dwell": dwell})
            store.push(event)
            reference.push(event)
        elif step == "tick":
            reference.now += given_ * 1_000_000
        elif step == "sweep":
            store.sweep()
        else:
            check(store, reference, given_)
    store.close()


def check(store: OnlineStore, reference: Reference, before: int) -> None:
    users, items = [1, 2, None, 3, 4, 5, 2], [8, 1, 2, 3, None, 4, 5, 6, 7, 1]
    found = store.read(pa.array(users), pa.array(items))
    for scope, keys, entities in (("user", users, found.users), ("item", items, found.items)):
        expected = [None if key is None else reference.entity(scope, key) for key in keys]
        assert entities.is_known.tolist() == [row is not None for row in expected]
        unknown = reference.unknown(scope)
        assert rows_of(entities.columns, len(keys)) == [row or unknown for row in expected]
    for history in store.schema.histories:
        events = cut(found.histories[history.name], np.full(len(users), before), history.max_length)
        got = list(zip(events.times.tolist(), rows_of(events.columns, len(events.times)), strict=True))
        for place, user in enumerate(users):
            past = [] if user is None else [e for e in reference.history(history.name, user) if e[0] < before]
            assert got[events.offsets[place] : events.offsets[place + 1]] == past[-history.max_length :]
            stored = store.history(history.name, pa.array([user], pa.int64()))
            alone = cut(stored, np.array([before]), history.max_length)
            assert alone.times.tolist() == [when for when, _ in past[-history.max_length :]]


def test_pushes_at_the_same_time_are_all_kept(training_set: TrainingSet, fresh: Fresh) -> None:
    store = OnlineStore(fresh(), training_set.encoder, limits=Limits(keep_events=100))
    store.push(Event(7, 1, 0, "click"))

    def push(first: int) -> None:
        for when in range(first, first + 12):
            store.push(Event(7, 1, when, "click"))

    threads = [threading.Thread(target=push, args=(first,)) for first in (1, 13, 25, 37)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("clicked", "seen"):
        assert store.history(name, pa.array([7])).times.tolist() == list(range(49))


def test_a_store_of_another_encoder_is_refused(training_set: TrainingSet, fresh: Fresh) -> None:
    backend = fresh()
    OnlineStore(backend, training_set.encoder, limits=Limits())
    with pytest.raises(ArtifactError, match="must be encoded by the model's encoder, got another one's"):
        OnlineStore(backend, make_encoder())
    with pytest.raises(ArtifactError, match="must be encoded by the model's encoder, got another one's"):
        OnlineStore(backend, make_encoder(), limits=Limits())


def test_values_replaced_by_another_encoder_are_refused_at_the_read(training_set: TrainingSet, fresh: Fresh) -> None:
    backend = fresh()
    store = OnlineStore(backend, training_set.encoder, limits=Limits())
    columns = {
        f.name: take_rows(training_set.items.columns[f.name], np.array([1])) for f in store.schema.features_of("item")
    }
    store.put_items(pa.array([1]), columns)
    ((key, value),) = backend.scan(b"i")
    backend.update([key], lambda _: [value[:8] + bytes(8) + value[16:]])
    with pytest.raises(ArtifactError, match="items of the online store"):
        store.items(pa.array([1]))


def test_an_empty_store_is_an_error_that_says_what_to_do(training_set: TrainingSet, fresh: Fresh) -> None:
    with pytest.raises(ArtifactError, match="recsys materialize"):
        OnlineStore(fresh(), training_set.encoder)


def test_limits_are_those_of_the_first_write(training_set: TrainingSet, fresh: Fresh) -> None:
    backend = fresh()
    OnlineStore(backend, training_set.encoder, limits=Limits(keep_events=20, user_ttl_s=5.0))
    assert OnlineStore(backend, training_set.encoder).limits == Limits(keep_events=20, user_ttl_s=5.0)
    assert OnlineStore(backend, training_set.encoder, limits=Limits()).keep("clicked") == 20
    with pytest.raises(ConfigError, match="those that the store was made with"):
        OnlineStore(backend, training_set.encoder, limits=Limits(keep_events=30))
    with pytest.raises(ConfigError, match="at least the longest max_length of a history, 8, got 7"):
        OnlineStore(fresh(), training_set.encoder, limits=Limits(keep_events=7))


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (Event(1, 2, -1, "click"), "time must lie between 1970 and 2200"),
        (Event(-1, 2, 10**15, "click"), "the user's key must be at least 0, got -1"),
        (Event(1, -2, 10**15, "click"), "the item's key must be at least 0, got -2"),
        (Event(1, 2, 5), "type must be given"),
        (Event(1, 2, 5, "click", {"dwel": 3}), "'dwel' must be a column that a history reads"),
        (Event("one", 2, 5, "click"), "user_id must hold integers"),
        (Event(1, 2, 5, "click", {"dwell": [3]}), "dwell"),
        (Event(2**63, 2, 5, "click"), "the user's key must be a signed 64-bit integer"),
        (Event(1, 2**70, 5, "click"), "the item's key must be a signed 64-bit integer"),
        (Event(1, 2, 5, "click", {"dwell": 2**64}), "'dwell' must be a signed 64-bit integer"),
        (Event(1, 2, 5, "click", {"dwell": float("inf")}), "'dwell' must be finite"),
        (Event(1, 2, 5, "cl\ud800ick"), "type must be Unicode text"),
        (Event(1, 2, 5, "click", {"category": ["a", "\udfff"]}), "'category' must be Unicode text"),
    ],
)
def test_an_event_that_cannot_be_taken(training_set: TrainingSet, fresh: Fresh, event: Event, words: str) -> None:
    store = OnlineStore(fresh(), training_set.encoder, limits=Limits())
    store.push(Event(1, 2, 5, "click"))
    with pytest.raises(DataError, match=words):
        store.push(event)
    assert len(store.history("clicked", pa.array([1])).times) == 1
    assert store.push(Event(1, 2, 5, "view")) == (["seen"], [])


def test_keys_of_another_type_are_an_error_and_not_unknown(training_set: TrainingSet, fresh: Fresh) -> None:
    store = OnlineStore(fresh(), training_set.encoder, limits=Limits())
    store.push(Event(1, 2, 5, "click"))
    with pytest.raises(EncodingError, match="user_id must hold integers"):
        store.read(pa.array(["1"]), pa.array([2]))
    found = store.read(pa.nulls(2), pa.array([2]))
    assert found.users.is_known.tolist() == [False, False]


def test_text_keys_of_any_length(training_set: TrainingSet, fresh: Fresh) -> None:
    store = OnlineStore(fresh(), training_set.encoder, limits=Limits())
    users = ["", "a", "ä" * 199, "ä" * 201, "ä" * 5000, "ä" * 5000 + "b", "n1234567"]
    names = [f.name for f in store.schema.features_of("user")]
    rows = np.arange(1, len(users) + 1)
    store.put_users(pa.array(users), {n: take_rows(training_set.users.columns[n], rows) for n in names})
    found = store.users(pa.array([*users, None, "ä" * 5001]))
    assert found.is_known.tolist() == [True] * len(users) + [False, False]
    assert found.columns["age"][: len(users)].tolist() == training_set.users.array("age")[rows].tolist()


def test_equal_times_stay_in_the_order_of_arrival(training_set: TrainingSet, fresh: Fresh) -> None:
    store = OnlineStore(fresh(), training_set.encoder, limits=Limits())
    for when, dwell in ((5, 1), (5, 30), (9, 2), (5, 250), (2, 3)):
        store.push(Event(7, 1, when, "click", {"dwell": dwell}))
    found = store.history("clicked", pa.array([7]))
    assert found.times.tolist() == [2, 5, 5, 5, 9]
    expected = store.encoder.encode("dwell", pa.array([3, 1, 30, 250, 2]))
    np.testing.assert_array_equal(found.columns["dwell"], expected)
