"""Small seeded views with every kind of column, and a schema that reads all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys.config import validate
from recsys.schema import Schema

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
