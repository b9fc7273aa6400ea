"""A small schema with every kind of feature, and random batches and training sets for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from recsys.batch import Bags, Batch, Column, HistoryBatch
from recsys.config import validate
from recsys.schema import Categorical, Dense, MultiCategorical, Schema

SCHEMA: dict[str, Any] = {
    "name": "synthetic",
    "views": {
        "impressions": {"user": "user_id", "item": "item_id", "time": "time", "request": "request_id"},
        "events": {"user": "user_id", "item": "item_id", "time": "time", "type": "type"},
        "users": {"path": "users.parquet", "key": "user_id"},
        "items": {"path": "items.parquet", "key": "item_id"},
    },
    "tables": {"item": {"encoder": {"kind": "vocabulary"}}},
    "features": [
        {"name": "user_id", "kind": "categorical", "scope": "user"},
        {"name": "age", "kind": "dense", "scope": "user"},
        {"name": "interests", "kind": "multi_categorical", "scope": "user", "table": "category"},
        {
            "name": "hour",
            "kind": "categorical",
            "scope": "context",
            "column": "time",
            "encoder": {"kind": "hour_of_day"},
        },
        {"name": "item_id", "kind": "categorical", "scope": "item", "table": "item"},
        {"name": "category", "kind": "categorical", "scope": "item"},
        {"name": "tags", "kind": "multi_categorical", "scope": "item", "separator": ","},
        {"name": "price", "kind": "dense", "scope": "item", "transform": {"kind": "standardise", "log1p": True}},
        {"name": "source", "kind": "categorical", "scope": "candidate"},
    ],
    "histories": [
        {
            "name": "clicked",
            "event_types": ["click"],
            "max_length": 8,
            "attributes": ["item_id", "category", "tags"],
            "event_features": [{"name": "dwell", "kind": "categorical", "scope": "event", "encoder": {"kind": "log"}}],
        },
        {"name": "seen", "max_length": 5, "attributes": ["item_id"]},
    ],
    "tasks": [{"name": "click", "label": "is_click"}, {"name": "like", "label": "is_like"}],
}

TABLE_SIZES = {"user_id": 40, "category": 9, "hour": 26, "item": 60, "tags": 12, "source": 5, "dwell": 34}


def schema() -> Schema:
    """The synthetic schema."""
    return validate(Schema, SCHEMA, source="synthetic")


def random_batch(num_requests: int = 4, max_rows: int = 5, *, seed: int = 0, empty_history: bool = False) -> Batch:
    """A batch of requests with 1 to ``max_rows`` candidates and histories of random length (0 included)."""
    generator = np.random.default_rng(seed)
    spec = schema()
    counts = generator.integers(1, max_rows + 1, num_requests)
    num_rows = int(counts.sum())

    def column(name: str, size: int) -> Column:
        feature = spec.feature(name)
        if isinstance(feature, Dense):
            return torch.from_numpy(generator.normal(size=(size, feature.dim)).astype(np.float32))
        assert isinstance(feature, Categorical)
        rows = TABLE_SIZES[feature.table_name]
        if isinstance(feature, MultiCategorical):
            offsets = np.concatenate([[0], np.cumsum(generator.integers(0, 4, size))])
            return Bags(torch.from_numpy(generator.integers(1, rows, offsets[-1])), torch.from_numpy(offsets))
        return torch.from_numpy(generator.integers(1, rows, size))

    histories = {}
    for history in spec.histories:
        lengths = generator.integers(0, 1 if empty_history else history.max_length + 1, num_requests)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        names = [*history.attributes, *(f.name for f in history.event_features)]
        histories[history.name] = HistoryBatch(
            torch.from_numpy(offsets),
            torch.from_numpy(generator.integers(0, 10**15, offsets[-1])),
            {name: column(name, int(offsets[-1])) for name in names},
        )
    return Batch(
        request_of_row=torch.from_numpy(np.repeat(np.arange(num_requests), counts)),
        time=torch.from_numpy(generator.integers(0, 10**15, num_requests)),
        user={f.name: column(f.name, num_requests) for f in spec.features_of("user")},
        context={f.name: column(f.name, num_requests) for f in spec.features_of("context")},
        item={f.name: column(f.name, num_rows) for f in spec.features_of("item")},
        candidate={f.name: column(f.name, num_rows) for f in spec.features_of("candidate")},
        histories=histories,
        labels=torch.from_numpy(generator.integers(0, 2, (num_rows, len(spec.tasks))).astype(np.float32)),
        user_row=torch.from_numpy(generator.integers(1, 30, num_requests)),
        source_row=torch.arange(num_rows),
    )


def write_views(
    folder: Path,
    *,
    num_users: int = 30,
    num_items: int = 40,
    num_requests: int = 200,
    num_events: int = 900,
    seed: int = 0,
) -> None:
    """Views for the schema, with a planted answer: a user clicks the category of most of the own past clicks."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    day = 86_400_000_000
    start = 1_700_000_000_000_000
    category = generator.integers(0, 5, num_items)
    favourite = generator.integers(0, 5, num_users)
    pl.DataFrame(
        {
            "user_id": np.arange(num_users) + 1000,
            "age": generator.normal(35, 10, num_users),
            "interests": [[f"c{c}"] if c else [] for c in favourite],
        }
    ).write_parquet(folder / "users.parquet")
    pl.DataFrame(
        {
            "item_id": np.arange(num_items) + 2**53 + 1,
            "category": [f"c{c}" for c in category],
            "tags": [
                ",".join(f"t{t}" for t in generator.integers(0, 8, generator.integers(0, 4))) for _ in range(num_items)
            ],
            "price": generator.lognormal(2, 1, num_items),
        }
    ).write_parquet(folder / "items.parquet")
    event_user = generator.integers(0, num_users, num_events)
    by_category = [np.flatnonzero(category == c) for c in range(5)]
    liked = np.array([generator.choice(by_category[favourite[u]]) for u in event_user])
    event_item = np.where(generator.random(num_events) < 0.8, liked, generator.integers(0, num_items, num_events))
    pl.DataFrame(
        {
            "user_id": event_user + 1000,
            "item_id": event_item + 2**53 + 1,
            "time": start + generator.integers(0, 10 * day, num_events),
            "type": np.where(generator.random(num_events) < 0.7, "click", "view"),
            "dwell": generator.integers(0, 300, num_events),
        }
    ).write_parquet(folder / "events.parquet")
    counts = generator.integers(1, 6, num_requests)
    request = np.repeat(np.arange(num_requests), counts)
    user = np.repeat(generator.integers(0, num_users, num_requests), counts)
    time = np.repeat(np.sort(start + generator.integers(day, 10 * day, num_requests)), counts)
    item = generator.integers(0, num_items, len(request))
    probability = np.where(category[item] == favourite[user], 0.8, 0.15)
    pl.DataFrame(
        {
            "request_id": request,
            "user_id": user + 1000,
            "item_id": item + 2**53 + 1,
            "time": time,
            "source": [f"s{s}" for s in generator.integers(0, 3, len(request))],
            "is_click": (generator.random(len(request)) < probability).astype(np.int64),
            "is_like": (generator.random(len(request)) < probability / 2).astype(np.int64),
        }
    ).write_parquet(folder / "impressions.parquet")


SPLIT = {
    "train_end": 1_700_000_000_000_000 + 7 * 86_400_000_000,
    "validation_end": 1_700_000_000_000_000 + 8 * 86_400_000_000,
    "test_end": 1_700_000_000_000_000 + 11 * 86_400_000_000,
}
