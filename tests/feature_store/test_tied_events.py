"""The order of tied events against plain sorting of rows; append, online store and leak check have the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store import tied_events
from feature_store.append import append_to_training_set
from feature_store.build import build_training_set
from feature_store.leaks import check_leaks
from feature_store.online.location import open_backend
from feature_store.online.materialize import materialize
from feature_store.online.pushing import Event
from feature_store.online.store import Limits, OnlineStore
from feature_store.snapshot import view_snapshot
from feature_store.tied_events import TieRule
from recsys.config import validate
from recsys.encoding import EncodedColumn, Encoder, EncoderFitter, Ragged
from recsys.errors import SourceError
from recsys.schema import Schema
from recsys.training_set import ITEM_ROW, SEQUENCE, TIME, TrainingSet
from tests.feature_store.online.test_materialize import assert_online_is_offline
from tests.feature_store.small_views import (
    build,
    config,
    impressions_of,
    make_views,
    schema_mapping,
    shuffled,
)
from tests.feature_store.test_append import settings as data_of
from tests.feature_store.test_append import write_days

SOURCES = ["web", "app", "Tv"]
"""The first is the most frequent, and so has the first id; no id is at its place in the order of values."""
EVENT_FEATURES: list[dict[str, Any]] = [
    {"name": "source", "kind": "categorical", "scope": "event"},
    {"name": "place", "kind": "categorical", "scope": "event", "encoder": {"kind": "hash", "num_buckets": 3}},
    {"name": "dwell", "kind": "dense", "scope": "event", "transform": {"kind": "keep"}},
    {"name": "where", "kind": "dense", "scope": "event", "dim": 2, "transform": {"kind": "keep"}},
    {"name": "words", "kind": "multi_categorical", "scope": "event", "table": "source"},
]


def schema_of(*, sequence: str | None = None, max_length: int = 50) -> Schema:
    """The small schema; the first history has features of every kind."""
    mapping = schema_mapping()
    mapping["views"]["events"]["sequence"] = sequence
    mapping["histories"][0] |= {"event_features": EVENT_FEATURES, "max_length": max_length}
    mapping["tables"] = {"source": {}}
    mapping["histories"][0]["event_features"][0]["table"] = "source"
    return validate(Schema, mapping, source="test")


def fitted() -> Encoder:
    fitter = EncoderFitter(schema_of())
    fitter.update("source", pa.array(["web"] * 3 + ["app"] * 2 + ["Tv"]))
    return fitter.finish()


def many_ties(num_events: int = 900, seed: int = 0) -> dict[str, pl.DataFrame]:
    """Small views whose events have few times, few items and few values."""
    views, rng = make_views(num_requests=120, num_events=num_events, seed=seed), np.random.default_rng(seed)
    events = views["events"].with_columns(item=pl.col("item") % 4 + 100)
    return views | {
        "events": events.with_columns(
            source=pl.Series(rng.choice(["web", "web", "app", "Tv"], num_events)),
            place=pl.Series(rng.integers(0, 9, num_events)),
            dwell=pl.Series(rng.choice([-1.5, 0.0, -0.0, 2.0], num_events)),
            where=pl.Series(rng.choice([-1.0, 1.0], (num_events, 2)), dtype=pl.Array(pl.Float64, 2)),
            words=pl.Series([rng.choice(SOURCES, rng.integers(0, 3)).tolist() for _ in range(num_events)]),
            number=pl.Series(rng.permutation(num_events)),
        )
    }


EVENT = st.tuples(
    st.integers(0, 3),  # time
    st.sampled_from([-(2**63), -7, 3]),  # sequence
    st.integers(0, 2),  # item row
    st.integers(1, 4),  # source: unknown, web, app, Tv
    st.integers(1, 4),
    st.sampled_from([-1.5, -0.0, 0.0, 2.0]),
    st.tuples(st.sampled_from([-1.0, 1.0]), st.sampled_from([0.0, 1.0])),
    st.lists(st.integers(1, 4), max_size=2),
)
ORDER_OF_IDS = {0: -2, 1: -1} | {2 + place: sorted(SOURCES).index(name) for place, name in enumerate(SOURCES)}


@settings(deadline=None)
@given(
    users=st.lists(st.lists(EVENT, max_size=12), max_size=6),
    is_numbered=st.booleans(),
    is_read_only=st.booleans(),
    sizes=st.sampled_from([(1 << 20, 1 << 20), (1, 1), (3, 2)]),
)
def test_tied_events_are_sorted_by_their_values(
    users: list[list[Any]], is_numbered: bool, is_read_only: bool, sizes: tuple[int, int]
) -> None:
    users = [sorted(events, key=lambda e: e[0]) for events in users]  # stable: tied events come as they are drawn
    rows = [event for events in users for event in events]
    offsets = np.append(0, np.cumsum([len(events) for events in users])).astype(np.int64)
    lengths = np.array([len(e[7]) for e in rows], dtype=np.int64)
    columns: dict[str, EncodedColumn] = {
        TIME: np.array([e[0] for e in rows], dtype=np.int64),
        ITEM_ROW: np.array([e[2] for e in rows], dtype=np.int64),
        "source": np.array([e[3] for e in rows], dtype=np.int64),
        "place": np.array([e[4] for e in rows], dtype=np.int64),
        "dwell": np.array([e[5] for e in rows], dtype=np.float32),
        "where": np.array([e[6] for e in rows], dtype=np.float32).reshape(-1, 2),
        "words": Ragged(
            np.array([i for e in rows for i in e[7]], dtype=np.int64),
            np.append(0, np.cumsum(lengths)).astype(np.int64),
        ),
        "@went_along": np.arange(len(rows)),
    }
    if is_numbered:
        columns[SEQUENCE] = np.array([e[1] for e in rows], dtype=np.int64)
    if is_read_only:
        for column in columns.values():
            if isinstance(column, np.ndarray):
                column.flags.writeable = False
    item_keys = [None, "z", "a"]
    rule = TieRule(fitted(), schema_of().histories[0], item_keys=pa.array(item_keys, pa.large_string()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tied_events, "_BLOCK", sizes[0])
        patch.setattr(tied_events, "_LONGEST_PIECE", sizes[1])
        settled = rule.settle(columns, offsets)

    def place(event: Any) -> tuple[Any, ...]:
        time, number, item, source, bucket, dwell, where, words = event
        return (
            time,
            number if is_numbered else 0,
            item_keys[item] or "",
            ORDER_OF_IDS[source],
            bucket,
            (dwell, math.copysign(1, dwell)),
            where,
            tuple(ORDER_OF_IDS[word] for word in words),
        )

    expected = [event for events in users for event in sorted(events, key=place)]
    found = settled["words"]
    assert isinstance(found, Ragged)
    for at, event in enumerate(expected):
        assert settled[TIME][at] == event[0]  # type: ignore[index]
        assert settled[ITEM_ROW][at] == event[2]  # type: ignore[index]
        assert settled["source"][at] == event[3]  # type: ignore[index]
        assert settled["place"][at] == event[4]  # type: ignore[index]
        assert place((0, 0, 0, 0, 0, float(settled["dwell"][at]), 0, ())) == place((0, 0, 0, 0, 0, event[5], 0, ()))  # type: ignore[index]
        assert tuple(settled["where"][at]) == event[6]  # type: ignore[index]
        assert found.values[found.offsets[at] : found.offsets[at + 1]].tolist() == event[7]
    if is_numbered:
        assert settled[SEQUENCE].tolist() == [event[1] for event in expected]  # type: ignore[union-attr]
    along = settled["@went_along"]
    assert [place(rows[row])[1:] for row in along.tolist()] == [place(event)[1:] for event in expected]  # type: ignore[union-attr]


def test_a_log_without_ties_stays_as_it_is() -> None:
    times = np.array([1, 2, 2, 3, 3])  # equal times of different users are no ties
    columns: dict[str, EncodedColumn] = {TIME: times, ITEM_ROW: np.array([5, 4, 3, 2, 1])}
    columns |= {name: np.zeros(5) for name in ("source", "place", "dwell", "where", "words")}
    rule = TieRule(fitted(), schema_of().histories[0])
    assert list(rule.moves(columns, np.array([0, 2, 2, 4, 5]))) == []
    settled = rule.settle(columns, np.array([0, 2, 2, 4, 5]))
    assert all(settled[name] is column for name, column in columns.items())


def read_by_batches(training_set: TrainingSet, max_length: int) -> dict[int, Any]:
    """Of every impression, what a batch reads of the first history: items, times and event features."""
    log, schema, found = training_set.events["clicked"], training_set.schema, {}
    for number, row in impressions_of(training_set, "clicked").items():
        start, end = row["slice"]
        at = np.arange(max(start, end - max_length), end)
        features = {}
        for feature in schema.history("clicked").event_features:
            column = log.columns[feature.name]
            taken = column.take(at) if isinstance(column, Ragged) else column[at]
            features[feature.name] = [part.tolist() for part in taken] if isinstance(taken, Ragged) else taken.tolist()
        found[number] = [row["history"][-max_length:], features]
    return found


@pytest.mark.parametrize("sequence", [None, "number"])
def test_an_append_puts_new_events_among_those_that_are_stored(tmp_path: Path, sequence: str | None) -> None:
    """Late files whose events are tied with stored ones, and items that come late but have the smallest keys."""
    schema, views = schema_of(sequence=sequence, max_length=3), many_ties()
    rng = np.random.default_rng(1)
    is_late = pl.Series(rng.random(views["events"].height) < 0.4)
    events = views["events"].with_columns(item=pl.when(is_late & (pl.col("item") == 102)).then(7).otherwise("item"))
    early = views | {"events": events.filter(~is_late)}
    write_days(tmp_path / "views", early, range(8))
    build_training_set(schema, data_of(tmp_path, "set"))
    for day in (8, 9):
        write_days(tmp_path / "views", early, range(day, day + 1))
        late = events.filter(is_late & (pl.Series(np.arange(len(events))) % 2 == day % 2))
        # Names that come before all others: no order of files helps.
        late.write_parquet(tmp_path / "views" / "events.parquet" / f"a-{day}.parquet")
        append_to_training_set(schema, data_of(tmp_path, "set"))
    after = TrainingSet.open(tmp_path / "set", verify=True)
    assert check_leaks(data_of(tmp_path, "set"), num_rows=10_000).differences == ()
    build_training_set(schema, data_of(tmp_path, "rebuilt"))
    rebuilt = TrainingSet.open(tmp_path / "rebuilt")
    assert after.items.keys is not None
    assert after.items.keys.to_pylist().index(7) > after.items.keys.to_pylist().index(103)
    newest = set(impressions_of(after, "clicked")) - set(
        impressions_of(TrainingSet.open(tmp_path / "set.versions" / "000002"), "clicked")
    )
    ours, theirs = (read_by_batches(s, 3) for s in (after, rebuilt))
    assert len(newest) > 10
    assert {n: ours[n] for n in newest} == {n: theirs[n] for n in newest}


def test_the_online_store_has_the_order_of_the_training_set(tmp_path: Path) -> None:
    """From the set, and from views whose rows are in another order: the same bytes."""
    schema, views = schema_of(max_length=3), many_ties()
    training_set = build(tmp_path, views, schema)
    rng = np.random.default_rng(2)
    for name, view in views.items():
        shuffled(view, rng).write_parquet(tmp_path / "views" / f"{name}.parquet")
    stored = []
    with view_snapshot(config(tmp_path), training_set.encoder) as snapshot:
        for name, source in (("set", training_set), ("views", snapshot)):
            backend = open_backend(f"lmdb:{tmp_path / 'stores' / name}", is_writable=True)
            store = OnlineStore(backend, training_set.encoder, limits=Limits(keep_events=1_000))
            materialize(store, source)
            assert assert_online_is_offline(training_set, store, 100, 0, steps=False) > 500
            stored.append(dict(backend.scan(b"h")))
            # A pushed event stands behind those of the log, whatever its values.
            before = store.history("clicked", pa.array([3])).times.tolist()
            store.push(Event(3, 0, before[-1], "click", {"dwell": -7.0}))
            after = store.history("clicked", pa.array([3]))
            assert after.times.tolist() == [*before, before[-1]]
            assert np.ravel(after.columns["dwell"]).tolist().index(-7.0) == len(before)
            backend.close()
    assert len(stored[0]) == 24
    assert stored[0] == stored[1]


@pytest.mark.parametrize("column", ["dwell", "source"])
def test_a_sequence_holds_integers(tmp_path: Path, column: str) -> None:
    with pytest.raises(SourceError, match=rf"column '{column}' \(views.events.sequence\) must hold integers"):
        build(tmp_path, many_ties(), schema_of(sequence=column))


def test_a_sequence_in_text_is_read_as_integers_and_others_are_set_aside(tmp_path: Path) -> None:
    views = make_views()
    number = pl.Series([str(n) for n in range(views["events"].height)]).scatter(0, "third").scatter(1, None)
    views["events"] = views["events"].with_columns(number=number)
    mapping = schema_mapping()
    mapping["views"]["events"]["sequence"] = "number"
    for name, view in mapping["views"].items():
        view["path"] = f"{name}.csv"
    training_set = build(tmp_path, views, validate(Schema, mapping, source="test"), suffix=".csv")
    assert training_set.manifest["quarantined"] == {"events": {"number is not a signed 64-bit integer": 1}}
    log, users = training_set.events["seen"], training_set.users
    sequence, times = log.array(SEQUENCE), log.array(TIME)
    assert np.count_nonzero(sequence == -(2**63)) == 1
    for start, end in zip(users.array("@start.seen"), users.array("@end.seen"), strict=True):
        pairs = list(zip(times[start:end].tolist(), sequence[start:end].tolist(), strict=True))
        assert pairs == sorted(pairs)
