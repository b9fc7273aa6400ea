"""Small seeded views with every kind of column, and a schema that reads all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from feature_store.build import DataConfig, build_training_set
from recsys.config import validate
from recsys.encoding import Ragged
from recsys.schema import Schema
from recsys.training_set import SPLITS, Table, TrainingSet

START = 1_600_000_000_000_000
DAY = 86_400_000_000
SPLIT: dict[str, Any] = {"train_end": START + 6 * DAY, "validation_end": START + 8 * DAY, "test_end": START + 10 * DAY}


def schema_mapping(**changes: Any) -> dict[str, Any]:
    """A schema over :func:`make_views`, as YAML would give it."""
    mapping: dict[str, Any] = {
        "name": "small",
        "views": {
            "impressions": {"user": "user", "item": "item", "time": "time", "request": "request"},
            "events": {"user": "user", "item": "item", "time": "time", "type": "type"},
            "users": {"path": "users.parquet", "key": "user"},
            "items": {"path": "items.parquet", "key": "item"},
        },
        "features": [
            {"name": "user_id", "kind": "categorical", "scope": "user", "column": "user"},
            {"name": "age", "kind": "dense", "scope": "user"},
            {"name": "item_id", "kind": "categorical", "scope": "item", "column": "item"},
            {"name": "category", "kind": "categorical", "scope": "item"},
            {"name": "tags", "kind": "multi_categorical", "scope": "item", "separator": "|"},
            {"name": "device", "kind": "categorical", "scope": "context"},
            {
                "name": "hour",
                "kind": "categorical",
                "scope": "context",
                "column": "time",
                "encoder": {"kind": "hour_of_day"},
            },
            {
                "name": "position",
                "kind": "categorical",
                "scope": "candidate",
                "encoder": {"kind": "hash", "num_buckets": 50},
            },
            {"name": "price", "kind": "dense", "scope": "candidate", "transform": {"kind": "keep"}},
        ],
        "histories": [
            {
                "name": "clicked",
                "event_types": ["click"],
                "attributes": ["item_id", "category", "tags"],
                "event_features": [
                    {"name": "dwell", "kind": "dense", "scope": "event", "transform": {"kind": "keep"}},
                ],
            },
            {"name": "seen", "attributes": ["item_id"], "max_length": 20},
        ],
        "tasks": [{"name": "click", "label": "click"}, {"name": "long", "label": "watched", "at_least": 10.0}],
    }
    mapping.update(changes)
    return mapping


def make_schema(**changes: Any) -> Schema:
    """:func:`schema_mapping`, validated."""
    return validate(Schema, schema_mapping(**changes), source="test")


def make_views(
    *, num_requests: int = 60, num_events: int = 300, num_users: int = 12, num_items: int = 20, seed: int = 0
) -> dict[str, pl.DataFrame]:
    """Views whose impressions carry their own number in ``price``; requests have one to four rows."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, num_requests)
    time = START + rng.integers(0, 10 * DAY, num_requests)
    n = int(counts.sum())
    impressions = pl.DataFrame(
        {
            "request": np.repeat(rng.permutation(num_requests), counts),
            "user": np.repeat(rng.integers(0, num_users, num_requests), counts),
            "item": rng.integers(100, 100 + num_items, n),
            "time": np.repeat(time, counts) + rng.integers(0, 5, n),
            "device": np.repeat(rng.choice(["phone", "tablet", "tv"], num_requests), counts),
            "position": np.arange(n) % 4,
            "price": np.arange(n, dtype=np.float64),
            "click": rng.integers(0, 2, n),
            "watched": rng.integers(0, 20, n),
        }
    )
    events = pl.DataFrame(
        {
            "user": rng.integers(0, num_users, num_events),
            "item": rng.integers(100, 100 + num_items, num_events),
            "time": START + rng.integers(0, 10 * DAY, num_events) // (DAY // 4) * (DAY // 4),
            "type": rng.choice(["click", "like", "share"], num_events),
            "dwell": np.arange(num_events, dtype=np.float64),
        }
    )
    users = pl.DataFrame(
        {"user": rng.permutation(num_users), "age": rng.integers(15, 80, num_users).astype(np.float64)}
    )
    items = pl.DataFrame(
        {
            "item": 100 + rng.permutation(num_items),
            "category": rng.choice(["drama", "comedy", "news"], num_items),
            "tags": ["|".join(map(str, rng.choice(9, rng.integers(0, 4)))) or None for _ in range(num_items)],
        }
    )
    return {"impressions": impressions, "events": events, "users": users, "items": items}


def write_views(folder: Path, views: dict[str, pl.DataFrame], *, suffix: str = ".parquet") -> Path:
    """Writes each view as one file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in views.items():
        path = folder / f"{name}{suffix}"
        if suffix == ".csv":
            frame.write_csv(path)
        else:
            frame.write_parquet(path)
    return folder


def config(folder: Path, **changes: Any) -> DataConfig:
    """Settings of a build of ``folder/views`` into ``folder/training_set``."""
    mapping = {"views": str(folder / "views"), "training_set": str(folder / "training_set"), "split": SPLIT, **changes}
    return validate(DataConfig, mapping, source="test")


def build(
    folder: Path,
    views: dict[str, pl.DataFrame],
    schema: Schema | None = None,
    *,
    suffix: str = ".parquet",
    **changes: Any,
) -> TrainingSet:
    """Writes the views, builds, and opens the result."""
    write_views(folder / "views", views, suffix=suffix)
    build_training_set(schema or make_schema(), config(folder, **changes))
    return TrainingSet.open(folder / "training_set", verify=True)


def impressions_of(training_set: TrainingSet, history: str) -> dict[int, dict[str, Any]]:
    """Every impression by source row: raw keys, time, labels, and the whole history as (item key, time) pairs."""
    users, items = training_set.users, training_set.items
    assert users.keys is not None
    assert items.keys is not None
    user_keys, item_keys = users.keys.to_pylist(), items.keys.to_pylist()
    log = training_set.events[history]
    found: dict[int, dict[str, Any]] = {}
    for name in SPLITS:
        split = training_set.split(name)
        for request in range(split.num_requests):
            columns = split.requests.columns
            start, end = (int(split.requests.array(f"@{edge}.{history}")[request]) for edge in ("start", "end"))
            for row in range(split.row_offsets[request], split.row_offsets[request + 1]):
                source_row = int(split.impressions.array("@source_row")[row])
                assert source_row not in found
                found[source_row] = {
                    "split": name,
                    "user": user_keys[split.requests.array("@user_row")[request]],
                    "item": item_keys[split.impressions.array("@item_row")[row]],
                    "time": int(split.requests.array("@time")[request]),
                    "request": request,
                    "labels": {
                        c: float(split.impressions.array(c)[row])
                        for c in split.impressions.columns
                        if c.startswith("@label")
                    },
                    "context": {n: c[request] for n, c in columns.items() if isinstance(c, np.ndarray) and n[0] != "@"},
                    "slice": (start, end),
                    "history": [
                        (item_keys[log.array("@item_row")[e]], int(log.array("@time")[e])) for e in range(start, end)
                    ],
                }
    return found


def same_columns(left: Table, right: Table, *, but: tuple[str, ...] = ()) -> None:
    """Asserts that two tables are equal, column by column."""
    assert list(left.columns) == list(right.columns)
    assert left.keys == right.keys or (left.keys is not None and left.keys.equals(right.keys))
    for name in left.columns:
        if name in but:
            continue
        a, b = left.columns[name], right.columns[name]
        if isinstance(a, Ragged):
            assert isinstance(b, Ragged)
            np.testing.assert_array_equal(a.values, b.values, err_msg=name)
            np.testing.assert_array_equal(a.offsets, b.offsets, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def same_sets(left: TrainingSet, right: TrainingSet, *, but: tuple[str, ...] = ()) -> None:
    """Asserts that two training sets hold the same in the same order."""
    assert left.encoder.fingerprint == right.encoder.fingerprint
    same_columns(left.users, right.users)
    same_columns(left.items, right.items)
    for name, log in left.events.items():
        same_columns(log, right.events[name])
    for name in SPLITS:
        same_columns(left.split(name).requests, right.split(name).requests)
        same_columns(left.split(name).impressions, right.split(name).impressions, but=but)


def shuffled(frame: pl.DataFrame, rng: np.random.Generator, *, keeping: Sequence[str] = ()) -> pl.DataFrame:
    """The rows in random order; those that are equal in the columns ``keeping`` keep theirs."""
    numbered = frame.with_row_index("@n")
    mixed = numbered[rng.permutation(len(frame))]
    if keeping:
        mixed = numbered[mixed.select(place=pl.col("@n").sort().over(keeping))["place"].to_numpy()]
    return mixed.drop("@n")
