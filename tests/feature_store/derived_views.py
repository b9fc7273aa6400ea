"""Small views with ties, late and repeated events and versions, and what every derived value of them must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from recsys.config import validate
from recsys.schema import Schema
from recsys.training_set import SOURCE_ROW, SPLITS, TrainingSet
from tests.feature_store.small_views import DAY, START, make_views, schema_mapping
from tests.references import derived as reference

DERIVED: list[dict[str, Any]] = [
    {"name": "user_clicks_1d", "kind": "count", "by": ["user"], "event_types": ["click"], "window": "1d"},
    {"name": "user_events", "kind": "count", "by": ["user"]},
    {"name": "user_known", "kind": "count", "by": ["user"], "window": "2d", "created": "created"},
    {
        "name": "item_dwell",
        "kind": "sum",
        "by": ["item"],
        "value": "dwell / 3.0",
        "where": "dwell > 20",
        "window": "3d",
    },
    {"name": "item_likes", "kind": "mean", "by": ["item"], "value": "type = 'like'", "prior": 0.25, "prior_count": 4.0},
    {"name": "user_category", "kind": "count", "by": ["user", "category"], "created": "created", "known_after": "1h"},
    {"name": "since_click", "kind": "recency", "by": ["user"], "event_types": ["click", "like"], "window": "2d"},
    {"name": "item_shown", "kind": "count", "by": ["item"], "source": "impressions", "window": "5d"},
    {
        "name": "item_clicked",
        "kind": "count",
        "by": ["item"],
        "source": "impressions",
        "where": "click = 1",
        "window": "5d",
        "known_after": "30m",
    },
    {"name": "item_rate", "kind": "ratio", "numerator": "item_clicked", "denominator": "item_shown"}
    | {"add_to_numerator": 1.0, "add_to_denominator": 5.0},
    {"name": "mixed", "kind": "ratio", "numerator": "user_category", "denominator": "user_events"},
    {"name": "level", "kind": "as_of", "view": "levels", "max_age": "2d"},
    {"name": "cost", "kind": "as_of", "view": "costs"},
    {"name": "shade", "kind": "as_of", "view": "costs", "column": "colour"},
]
VERSIONS: list[dict[str, Any]] = [
    {"name": "levels", "path": "levels.parquet", "of": "user", "key": "user", "time": "since"},
    {"name": "costs", "path": "costs.parquet", "of": "item", "key": "item", "time": "since", "created": "told"},
]
CONTEXT = ("user_clicks_1d", "user_events", "user_known", "since_click", "level")
NUMBERS = [d["name"] for d in DERIVED if d["name"] != "shade"]


def mapping(**changes: Any) -> dict[str, Any]:
    """The small schema with every kind of derived value, read as it is."""
    found = schema_mapping()
    found["views"] = found["views"] | {"versions": VERSIONS}
    scopes = {name: "context" if name in CONTEXT else "candidate" for name in NUMBERS}
    found["features"] = [
        *found["features"],
        *(
            {"name": f"f_{n}", "column": n, "kind": "dense", "scope": s, "transform": {"kind": "keep"}}
            for n, s in scopes.items()
        ),
        {"name": "shade", "kind": "categorical", "scope": "candidate"},
        {
            "name": "activity",
            "column": "user_events",
            "kind": "categorical",
            "scope": "context",
            "encoder": {"kind": "log", "num_buckets": 8},
        },
    ]
    return found | {"derived": DERIVED} | changes


def schema(**changes: Any) -> Schema:
    return validate(Schema, mapping(**changes), source="test")


def make(seed: int, **changes: Any) -> dict[str, pl.DataFrame]:
    """Small views with ties, late and repeated events, and versions."""
    views = make_views(num_requests=50, num_events=250, num_users=8, num_items=12, seed=seed, **changes)
    rng = np.random.default_rng(seed + 100)
    hour = DAY // 24
    impressions = views["impressions"]
    # Everything at whole hours, so that times tie with events, with versions and with the edges of windows.
    views["impressions"] = impressions.with_columns(pl.col("time") // hour * hour)
    n = len(views["events"])
    late = rng.choice([0, 0, hour, 30 * hour], n)
    events = views["events"].with_columns(
        (pl.col("time") + late).alias("created"),
        pl.when(pl.int_range(pl.len()) % 11 == 3).then(None).otherwise(pl.col("dwell")).alias("dwell"),
    )
    views["events"] = pl.concat([events, events[::7]])
    views["items"] = views["items"].with_columns(
        pl.when(pl.int_range(pl.len()) == 2).then(None).otherwise(pl.col("category")).alias("category")
    )
    levels = pl.DataFrame({"user": rng.integers(0, 10, 60), "since": START + rng.integers(0, 240, 60) * hour})
    views["levels"] = levels.with_columns(pl.Series("level", rng.integers(0, 9, 60)))
    costs = pl.DataFrame({"item": 100 + rng.integers(0, 14, 120), "since": START + rng.integers(0, 40, 120) * 6 * hour})
    views["costs"] = costs.with_columns(
        (pl.col("since") + rng.choice([0, 0, -hour, 20 * hour], 120)).alias("told"),
        pl.Series("cost", [[0.5, 1.25, 2.0, None][i] for i in rng.integers(0, 4, 120)]),
        pl.Series("colour", rng.choice(["red", "blue"], 120)),
    )
    return views


def expected(views: dict[str, pl.DataFrame], *, first: int = 0) -> dict[int, dict[str, Any]]:
    """Every derived value of every impression from the ``first`` on, by loops."""
    impressions, events = views["impressions"].to_dicts(), views["events"].to_dicts()
    category = {row["item"]: row["category"] for row in views["items"].to_dicts()}
    earliest: dict[int, int] = {}
    for row in impressions:
        earliest[row["request"]] = min(earliest.get(row["request"], row["time"]), row["time"])
    hour = DAY // 24
    found = {}
    for number, row in enumerate(impressions[first:], start=first):
        time = earliest[row["request"]]
        user, item = row["user"], row["item"]

        def of(rows: list[dict[str, Any]], *, created: bool = False, **wanted: Any) -> list[dict[str, Any]]:
            kept = [r for r in rows if all(r[name] == value for name, value in wanted.items())]
            return kept if created else [{n: v for n, v in r.items() if n != "created"} for r in kept]

        clicks = [r for r in of(events, user=user) if r["type"] == "click"]
        liked = [r for r in of(events, user=user) if r["type"] in ("click", "like")]
        dwelt = [
            r | {"x": r["dwell"] / 3.0} for r in of(events, item=item) if r["dwell"] is not None and r["dwell"] > 20
        ]
        likes = [r | {"x": float(r["type"] == "like")} for r in of(events, item=item)]
        mine = category.get(item)
        alike = [r for r in of(events, created=True, user=user) if category.get(r["item"]) == mine]
        shown = of(impressions, item=item)
        clicked = [r for r in shown if r["click"] == 1]
        values: dict[str, Any] = {
            "user_clicks_1d": reference.count(clicks, time, window=DAY),
            "user_events": reference.count(of(events, user=user), time),
            "user_known": reference.count(of(events, created=True, user=user), time, window=2 * DAY),
            "item_dwell": reference.total(dwelt, time, window=3 * DAY, known_after=0, decimals=6),
            "item_likes": reference.mean(
                likes, time, window=None, known_after=0, decimals=6, prior=0.25, prior_count=4.0
            ),
            "user_category": None if mine is None else reference.count(alike, time, known_after=hour),
            "since_click": reference.recency(liked, time, window=2 * DAY),
            "item_shown": reference.count(shown, time, window=5 * DAY),
            "item_clicked": reference.count(clicked, time, window=5 * DAY, known_after=hour // 2),
        }
        values["item_rate"] = reference.ratio(values["item_clicked"], values["item_shown"], 1.0, 5.0)
        values["mixed"] = reference.ratio(values["user_category"], values["user_events"], 0.0, 0.0)
        levels = [{"time": r["since"], "x": r["level"]} for r in of(views["levels"].to_dicts(), user=user)]
        level = reference.as_of(levels, time, max_age=2 * DAY)
        values["level"] = None if level is None else level["x"]
        # Columns in the order of their names: the colour decides, then the cost.
        costs = [
            {"time": r["since"], "created": r["told"], "x": (r["colour"], -1.0 if r["cost"] is None else r["cost"])}
            for r in of(views["costs"].to_dicts(), item=item)
        ]
        cost = reference.as_of(costs, time, max_age=None)
        values["shade"] = None if cost is None else cost["x"][0]
        values["cost"] = None if cost is None or cost["x"][1] < 0 else cost["x"][1]
        found[number] = values
    return found


def stored(training_set: TrainingSet, name: str) -> dict[int, float]:
    """An encoded feature of every impression, by the row of the view."""
    scope = training_set.schema.feature(name).scope
    found: dict[int, float] = {}
    for part in map(training_set.split, SPLITS):
        table = part.requests if scope == "context" else part.impressions
        request = np.repeat(np.arange(part.num_requests), np.diff(part.row_offsets))
        values = table.array(name)[request] if scope == "context" else table.array(name)
        found.update(zip(part.impressions.array(SOURCE_ROW).tolist(), values.tolist(), strict=True))
    return found
