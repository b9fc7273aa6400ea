"""From a training set to the store: the same values, whatever the way there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_store.online.codec import take_rows
from feature_store.online.key_values import KeyValues
from feature_store.online.lmdb_store import LMDB
from feature_store.online.materialize import PROGRESS, Materializer, materialize
from feature_store.online.pushing import Event
from feature_store.online.reading import cut
from feature_store.online.store import Limits, OnlineStore
from feature_store.snapshot import ViewSnapshot
from recsys.encoding import EncodedColumn, Encoder, Ragged
from recsys.errors import ArtifactError, ConfigError
from recsys.training_set import ITEM_ROW, SPLITS, TIME, USER_ROW, TrainingSet, end_column, start_column
from tests.feature_store.online.equal import assert_equal_columns
from tests.training_sets import build_synthetic

Fresh = Callable[[], KeyValues]
MIDDLE = 1_700_000_000_000_000 + 4 * 86_400_000_000


def open_store(backend: KeyValues, training_set: TrainingSet, **limits: Any) -> OnlineStore:
    return OnlineStore(backend, training_set.encoder, limits=Limits(**limits))


def content(backend: KeyValues) -> dict[bytes, bytes]:
    """All values, but not what the store says about itself."""
    return {key: value for prefix in (b"u", b"i", b"h") for key, value in backend.scan(prefix)}


def assert_online_is_offline(
    training_set: TrainingSet,
    store: OnlineStore,
    num_pairs: int,
    seed: int,
    *,
    steps: bool = True,
    views: ViewSnapshot | None = None,
) -> int:
    """Random requests of the training set, in order of time: what is fetched is what their training rows hold.

    Args:
        steps: materialise up to each request's time before it is fetched; else everything is there already.
        views: what to materialise from, derived values too; the training set if not given.

    Returns:
        Events compared.
    """
    requests = [
        (split, position, when)
        for split in SPLITS
        for position, when in enumerate(training_set.split(split).requests.array(TIME).tolist())
    ]
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(requests), min(num_pairs, len(requests)), replace=False)
    materializer = Materializer(store, views or training_set, derived=None if views is None else views.derived)
    num_events = 0
    for split_name, position, when in sorted((requests[c] for c in chosen.tolist()), key=lambda r: r[2]):
        if steps:
            materializer.run(when)
        split = training_set.split(split_name)
        user = split.requests.array(USER_ROW)[position : position + 1]
        rows = slice(*split.row_offsets[position : position + 2].tolist())
        items = split.impressions.array(ITEM_ROW)[rows]
        assert training_set.users.keys is not None
        assert training_set.items.keys is not None
        found = store.read(training_set.users.keys.take(user), training_set.items.keys.take(items))
        assert found.users.is_known.all()
        assert found.items.is_known.all()
        schema = training_set.schema
        for got, table, at, scope in (
            (found.users, training_set.users, user, "user"),
            (found.items, training_set.items, items, "item"),
        ):
            names = [f.name for f in schema.features_of(scope)]  # type: ignore[arg-type]
            assert_equal_columns(got.columns, {n: take_rows(table.columns[n], at) for n in names})
        for history in schema.histories:
            start = int(split.requests.array(start_column(history.name))[position])
            end = int(split.requests.array(end_column(history.name))[position])
            events = np.arange(max(start, end - history.max_length), end)
            log = training_set.events[history.name]
            expected = {
                a: take_rows(training_set.items.columns[a], log.array(ITEM_ROW)[events]) for a in history.attributes
            }
            expected |= {f.name: take_rows(log.columns[f.name], events) for f in history.event_features}
            fetched = cut(found.histories[history.name], np.array([when]), history.max_length)
            np.testing.assert_array_equal(fetched.times, log.array(TIME)[events])
            assert fetched.offsets.tolist() == [0, len(events)]
            assert_equal_columns(fetched.columns, expected)
            num_events += len(events)
        if views is not None:
            derived = store.derived_of(found, np.array([when]), np.zeros(len(items), np.int64))
            assert derived.refused == {}
            of_request = {f.name for f in schema.features_of("context")}
            assert_equal_columns(
                {name: plain(column) for name, column in derived.columns.items()},
                {
                    name: take_rows(split.requests.columns[name], np.array([position]))
                    if name in of_request
                    else take_rows(split.impressions.columns[name], np.arange(rows.start, rows.stop))
                    for name in store.layout.features
                },
            )
    return num_events


def plain(column: EncodedColumn) -> EncodedColumn:
    """A column as training sets store it."""
    return column if isinstance(column, Ragged) or column.dtype != np.float32 else column.reshape(len(column))


@pytest.mark.parametrize("seed", [0, 1])
def test_online_is_offline(tmp_path: Path, fresh: Fresh, seed: int) -> None:
    training_set = build_synthetic(tmp_path, num_requests=150, seed=seed)
    assert assert_online_is_offline(training_set, open_store(fresh(), training_set), 150, seed) > 500


def test_online_is_offline_for_requests_of_the_past(training_set: TrainingSet, fresh: Fresh) -> None:
    store = open_store(fresh(), training_set, keep_events=10_000)
    materialize(store, training_set)
    assert_online_is_offline(training_set, store, 150, 0, steps=False)


def test_often_is_the_same_as_once(training_set: TrainingSet, fresh: Fresh) -> None:
    once, often = open_store(fresh(), training_set), open_store(fresh(), training_set)
    materialize(once, training_set)
    for day in (0, 3, 3, 5):
        summary = materialize(often, training_set, MIDDLE + day * 86_400_000_000, chunk=7)
    assert summary.written["items"] == 0
    assert 0 < summary.visited["clicked"] <= 30
    assert materialize(often, training_set).written["clicked"] > 0
    assert content(often.backend) == content(once.backend)
    again = materialize(often, training_set)
    assert set(again.written.values()) == {0}
    assert set(again.visited.values()) == {0}


def test_the_log_replaces_pushes_before_its_end_and_keeps_later_ones(training_set: TrainingSet, fresh: Fresh) -> None:
    pushed, plain = open_store(fresh(), training_set, keep_events=50), open_store(fresh(), training_set, keep_events=50)
    materialize(pushed, training_set, MIDDLE)
    logged = pushed.history("seen", pa.array([1000])).times
    for when in (MIDDLE - 5, MIDDLE + 5, MIDDLE + 9):
        pushed.push(Event(1000, 2**53 + 1, when, "view"))
    assert pushed.history("seen", pa.array([1000])).times.tolist() == [
        *logged.tolist(), MIDDLE - 5, MIDDLE + 5, MIDDLE + 9
    ]  # fmt: skip
    end = int(training_set.events["seen"].array(TIME).max()) + 1
    materialize(pushed, training_set, MIDDLE + 7)
    user_start = training_set.users.array(start_column("seen"))[1]
    user_end = training_set.users.array(end_column("seen"))[1]
    times = training_set.events["seen"].array(TIME)[user_start:user_end]
    if ((times >= MIDDLE) & (times < MIDDLE + 7)).any():
        assert pushed.history("seen", pa.array([1000])).times.tolist() == [*times[times < MIDDLE + 7], MIDDLE + 9]
    materialize(pushed, training_set, end)
    materialize(plain, training_set, end)
    assert content(pushed.backend) == content(plain.backend)


def test_pushing_the_log_is_the_same_as_materialising_it(training_set: TrainingSet, fresh: Fresh) -> None:
    import polars as pl

    pushed, plain = open_store(fresh(), training_set), open_store(fresh(), training_set)
    materialize(pushed, training_set, MIDDLE)
    events = pl.read_parquet(training_set.folder.parent / "views" / "events.parquet")
    for row in events.filter(pl.col("time") >= MIDDLE).sample(fraction=1.0, shuffle=True, seed=1).to_dicts():
        kind = row["type"]
        done = pushed.push(Event(row["user_id"], row["item_id"], row["time"], kind, {"dwell": row["dwell"]}))
        assert done.histories == (["clicked", "seen"] if kind == "click" else ["seen"])
    materialize(plain, training_set)
    assert content(pushed.backend) == content(plain.backend)


def test_going_back_is_refused(training_set: TrainingSet, fresh: Fresh) -> None:
    store = open_store(fresh(), training_set)
    materialize(store, training_set, MIDDLE)
    with pytest.raises(ConfigError, match="until must not be before"):
        materialize(store, training_set, MIDDLE - 1)


def test_another_training_set_is_refused(tmp_path: Path, training_set: TrainingSet, fresh: Fresh) -> None:
    other = build_synthetic(tmp_path, num_requests=60, seed=99)
    with pytest.raises(ArtifactError, match="must have the store's encoder"):
        materialize(open_store(fresh(), training_set), other)


def test_expired_values_are_renewed_and_swept(training_set: TrainingSet, fresh: Fresh) -> None:
    import time

    now = [time.time_ns() // 1000]
    store = OnlineStore(
        fresh(), training_set.encoder, limits=Limits(user_ttl_s=60.0, item_ttl_s=900.0), now=lambda: now[0]
    )
    materialize(store, training_set)
    now[0] += 61_000_000
    found = store.read(pa.array([1000]), pa.array([2**53 + 1]))
    assert (found.users.is_known.tolist(), found.items.is_known.tolist()) == ([False], [True])
    assert len(found.histories["clicked"].times) == 0
    summary = materialize(store, training_set)
    assert summary.swept == 90  # 30 users and their two histories
    assert summary.written == {"items": 40, "users": 30, "clicked": 30, "seen": 30}
    assert_online_is_offline(training_set, OnlineStore(store.backend, training_set.encoder, now=lambda: now[0]), 0, 0)
    assert store.users(pa.array([1000])).is_known.tolist() == [True]


def test_an_interrupted_run_goes_on(training_set: TrainingSet, fresh: Fresh) -> None:
    store, plain = open_store(fresh(), training_set), open_store(fresh(), training_set)

    def stop(kind: str, done: int, _total: int) -> None:
        if kind == "clicked" and done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialize(store, training_set, progress=stop, chunk=5)
    seen: list[tuple[str, int]] = []
    summary = materialize(store, training_set, progress=lambda kind, done, _: seen.append((kind, done)), chunk=5)
    assert summary.resumed
    assert seen[0] == ("clicked", 10)
    materialize(plain, training_set)
    assert content(store.backend) == content(plain.backend)
    assert store.backend.get([PROGRESS]) == [None]


KILLED = """
import sys
from feature_store.online.lmdb_store import LMDB
from feature_store.online.materialize import materialize
from feature_store.online.store import Limits, OnlineStore
from recsys.training_set import TrainingSet
training_set = TrainingSet.open(sys.argv[1])
store = OnlineStore(LMDB(sys.argv[2]), training_set.encoder, limits=Limits())
def told(kind, done, total):
    print(kind, done, flush=True)
materialize(store, training_set, progress=told, chunk=1)
"""


def test_a_killed_run_leaves_a_sound_store_and_goes_on(tmp_path: Path, training_set: TrainingSet) -> None:
    plain = open_store(LMDB(tmp_path / "plain"), training_set)
    materialize(plain, training_set)
    folder = tmp_path / "killed"
    root = Path(__file__).resolve().parents[3]
    for num_lines in (23, 55):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(training_set.folder), str(folder)],
            stdout=subprocess.PIPE,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)},
            text=True,
        )
        assert process.stdout is not None
        with process.stdout:
            for _ in range(num_lines):
                assert process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # What is there is right already, and can be read.
        store = OnlineStore(LMDB(folder), Encoder.load(training_set.folder / "encoder"))
        assert content(store.backend).items() <= content(plain.backend).items()
        store.close()
    store = OnlineStore(LMDB(folder), training_set.encoder)
    summary = materialize(store, training_set)
    assert summary.resumed
    assert sum(summary.visited.values()) < 130 - 55
    assert content(store.backend) == content(plain.backend)
    store.close()
    plain.close()


ROOT = Path(__file__).resolve().parents[3]


def build_kuairand(source: Path, folder: Path, **more: list[Any]) -> TrainingSet:
    """KuaiRand-Pure as its configuration says, with more features, and with derived values."""
    from feature_store.build import DataConfig, build_training_set
    from feature_store.datasets import DATASETS
    from recsys.config import load_yaml, validate
    from recsys.schema import Schema

    DATASETS["kuairand_pure"].load(source, folder / "views")
    path = ROOT / "configs" / "schema" / "kuairand_pure.yaml"
    shape = load_yaml(path)
    schema = validate(
        Schema, shape | {name: [*shape.get(name, []), *added] for name, added in more.items()}, source="test"
    )
    split = {
        "train_end": "2022-04-30T00:00:00+08:00",
        "validation_end": "2022-05-01T00:00:00+08:00",
        "test_end": "2022-05-09T00:00:00+08:00",
    }
    folders = {"views": str(folder / "views"), "training_set": str(folder / "set"), "split": split}
    build_training_set(schema, validate(DataConfig, folders, source="test"))
    return TrainingSet.open(folder / "set")


@pytest.mark.slow
def test_online_is_offline_on_kuairand(dataset: Callable[[str], Path], tmp_path: Path, fresh: Fresh) -> None:
    """10,000 random requests, each fetched after materialising up to its time."""
    training_set = build_kuairand(dataset("kuairand_pure"), tmp_path)
    num_events = assert_online_is_offline(training_set, open_store(fresh(), training_set), 10_000, 0)
    assert num_events > 100_000


WATCHED = ["watch", "click"]
KUAIRAND_DERIVED: list[tuple[str, dict[str, Any]]] = [
    # The user's own rows: windows that end, none, a smoothed rate of impressions whose labels come later.
    ("context", {"name": "user_watched_3d", "kind": "count", "by": ["user"], "event_types": WATCHED, "window": "3d"}),
    ("context", {"name": "since_like", "kind": "recency", "by": ["user"], "event_types": ["like"], "window": "2w"}),
    ("context", {"name": "user_rate", "kind": "mean", "source": "impressions", "by": ["user"], "value": "is_click"}
     | {"window": "7d", "known_after": "10m", "prior": 0.3, "prior_count": 5.0}),
    # The user and what the item is.
    ("candidate", {"name": "author_watched", "kind": "count", "by": ["user", "author_id"], "event_types": WATCHED}),
    ("candidate", {"name": "since_author", "kind": "recency", "by": ["user", "author_id"]}),
    ("candidate", {"name": "music_watched_3d", "kind": "sum", "by": ["user", "music_type"], "window": "3d"}
     | {"value": "CASE WHEN type = 'long_watch' THEN 1.5 ELSE 0.1 END"}),
    ("candidate", {"name": "watched_before", "kind": "count", "by": ["item", "user"]}),
    ("candidate", {"name": "author_share", "kind": "ratio", "numerator": "author_watched"}
     | {"denominator": "user_watched_3d", "add_to_denominator": 5.0}),
    # The item's, as of the time of materialising.
    ("candidate", {"name": "item_watched_1d", "kind": "count", "by": ["item"], "event_types": WATCHED, "window": "1d"}),
    ("candidate", {"name": "item_likes", "kind": "count", "by": ["item"], "where": "type = 'like'"}),
    ("candidate", {"name": "item_rate", "kind": "mean", "source": "impressions", "by": ["item"], "value": "is_click"}
     | {"window": "7d", "known_after": "10m", "prior": 0.3, "prior_count": 20.0}),
    ("candidate", {"name": "author_rate", "kind": "mean", "source": "impressions", "by": ["author_id"]}
     | {"value": "long_view", "known_after": "10m", "prior": 0.2, "prior_count": 20.0}),
    ("candidate", {"name": "item_ratio", "kind": "ratio", "numerator": "item_likes", "denominator": "item_watched_1d"}
     | {"add_to_denominator": 10.0}),
]  # fmt: skip


@pytest.mark.slow
def test_derived_values_online_are_offline_on_kuairand(
    dataset: Callable[[str], Path], tmp_path: Path, fresh: Fresh
) -> None:
    """10,000 random requests, each fetched after materialising up to its time, derived values and all."""
    from feature_store.snapshot import training_set_views

    features = [
        {"name": spec["name"], "kind": "dense", "scope": scope, "transform": {"kind": "keep"}}
        for scope, spec in KUAIRAND_DERIVED
    ]
    logarithm = {"kind": "log", "base": 2.0, "num_buckets": 20}
    features.append(
        {"name": "how_often", "column": "item_likes", "kind": "categorical", "scope": "candidate"}
        | {"encoder": logarithm}
    )
    training_set = build_kuairand(
        dataset("kuairand_pure"), tmp_path, features=features, derived=[spec for _, spec in KUAIRAND_DERIVED]
    )
    with training_set_views(training_set) as views:
        num_events = assert_online_is_offline(training_set, open_store(fresh(), training_set), 10_000, 0, views=views)
    assert num_events > 100_000
