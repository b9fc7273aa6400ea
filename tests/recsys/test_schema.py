"""The schema: what it derives, and every rule that it holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from recsys.config import fingerprint, validate
from recsys.errors import ConfigError, SchemaError
from recsys.schema import (
    Categorical,
    Dense,
    Hash,
    HourOfDay,
    LogBuckets,
    MultiCategorical,
    Schema,
    Standardise,
    Vocabulary,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "schema"


def valid() -> dict[str, Any]:
    """A schema that uses everything once."""
    return {
        "name": "shop",
        "views": {
            "impressions": {"user": "user_id", "item": "item_id", "time": "shown_at", "request": "request_id"},
            "events": {"user": "user_id", "item": "item_id", "time": "at", "type": "what"},
            "users": {"path": "users.parquet", "key": "user_id"},
            "items": {"path": "items.parquet", "key": "item_id"},
        },
        "tables": {"item": {"encoder": {"kind": "hash", "num_buckets": 100}}},
        "features": [
            {"name": "basket", "kind": "multi_categorical", "scope": "user", "table": "item"},
            {"name": "likes", "kind": "multi_categorical", "scope": "user", "table": "category"},
            {"name": "item_id", "kind": "categorical", "scope": "item", "table": "item"},
            {
                "name": "category",
                "kind": "categorical",
                "scope": "item",
                "encoder": {"kind": "vocabulary", "min_count": 2},
            },
            {"name": "price", "kind": "dense", "scope": "item", "column": "price_eur", "dim": 2},
            {
                "name": "hour",
                "kind": "categorical",
                "scope": "context",
                "column": "shown_at",
                "encoder": {"kind": "hour_of_day"},
            },
            {"name": "place", "kind": "categorical", "scope": "candidate"},
        ],
        "histories": [
            {
                "name": "bought",
                "event_types": ["buy"],
                "attributes": ["item_id", "category"],
                "event_features": [
                    {"name": "amount", "kind": "categorical", "scope": "event", "encoder": {"kind": "log"}}
                ],
            }
        ],
        "tasks": [{"name": "click", "label": "clicked"}, {"name": "long", "label": "seconds", "at_least": 30}],
    }


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """The valid schema with one thing replaced; ``...`` appends to a list."""
    schema = valid()
    node: Any = schema
    for part in path[:-1]:
        node = node[part]
    if path[-1] is ...:
        node.append(to)
    else:
        node[path[-1]] = to
    return schema


def problems_of(mapping: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(Schema, mapping, source="s.yaml")
    return caught.value.message.split("\n  ")[1:]


def test_what_a_schema_derives() -> None:
    schema = validate(Schema, valid(), source="s.yaml")
    assert [f.name for f in schema.all_features] == [
        "basket", "likes", "item_id", "category", "price", "hour", "place", "amount"
    ]  # fmt: skip
    assert [f.name for f in schema.features_of("user")] == ["basket", "likes"]
    assert [f.name for f in schema.features_of("event")] == ["amount"]
    assert isinstance(schema.feature("likes"), MultiCategorical)
    price = schema.feature("price")
    assert isinstance(price, Dense)
    assert (price.source_column, price.transform) == ("price_eur", Standardise())
    place = schema.feature("place")
    assert isinstance(place, Categorical)
    assert (place.source_column, place.table_name) == ("place", "place")
    assert schema.history("bought").max_length == 50


def test_tables_are_in_order_of_first_use_with_the_encoder_of_their_owner() -> None:
    schema = validate(Schema, valid(), source="s.yaml")
    assert list(schema.table_encoders.items()) == [
        ("item", Hash(num_buckets=100)),
        ("category", Vocabulary(min_count=2)),  # first used by likes, owned by category, declared after it
        ("hour", HourOfDay()),
        ("place", Vocabulary()),
        ("amount", LogBuckets()),
    ]


def test_a_table_may_have_the_name_of_its_feature() -> None:
    schema = validate(
        Schema, changed("tables", "place", to={"encoder": {"kind": "hash", "num_buckets": 5}}), source="s"
    )
    assert schema.table_encoders["place"] == Hash(num_buckets=5)


def test_unknown_names_bring_the_nearest() -> None:
    schema = validate(Schema, valid(), source="s.yaml")
    with pytest.raises(SchemaError, match=r"feature 'catgory' must be declared[\s\S]*did you mean 'category'"):
        schema.feature("catgory")
    with pytest.raises(SchemaError, match=r"history 'bougth' must be declared[\s\S]*did you mean 'bought'"):
        schema.history("bougth")


def without(*path: str) -> dict[str, Any]:
    schema = valid()
    node: Any = schema
    for part in path[:-1]:
        node = node[part]
    del node[path[-1]]
    return schema


EVENT_FEATURE = {"name": "dwell", "kind": "dense", "scope": "event"}
HISTORY = {"name": "seen", "attributes": ["item_id"]}


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        (
            changed("features", ..., to={"name": "price", "kind": "dense", "scope": "item"}),
            "feature 'price' is declared twice",
        ),
        (
            changed("features", ..., to=EVENT_FEATURE),
            "feature 'dwell' has scope 'event': declare it under a history's event_features",
        ),
        (
            changed("features", ..., to={"name": "x", "kind": "categorical", "scope": "item", "table": "itm"}),
            "feature 'x': table 'itm' is not known, did you mean 'item'?",
        ),
        (
            changed("features", 2, "encoder", to={"kind": "vocabulary"}),
            "feature 'item_id' gives both table and encoder: the encoder belongs to the table",
        ),
        (changed("tables", "category", to={}), "feature 'category' gives an encoder, and so does its table"),
        (changed("tables", "colour", to={}), "table 'colour' is used by no feature"),
        (changed("tables", "price", to={}), "table 'price' is used by no feature"),
        (changed("histories", ..., to=HISTORY | {"name": "bought"}), "history 'bought': the name is taken"),
        (changed("histories", ..., to=HISTORY | {"name": "price"}), "history 'price': the name is taken"),
        (changed("histories", ..., to=HISTORY | {"name": "amount"}), "history 'amount': the name is taken"),
        (
            changed("histories", ..., to=HISTORY | {"event_features": [EVENT_FEATURE | {"name": "price"}]}),
            "history 'seen': event feature 'price': the name is taken",
        ),
        (
            changed("histories", ..., to=HISTORY | {"event_features": [EVENT_FEATURE | {"name": "amount"}]}),
            "history 'seen': event feature 'amount': the name is taken",
        ),
        (
            changed("histories", ..., to=HISTORY | {"event_features": [EVENT_FEATURE | {"name": "seen"}]}),
            "history 'seen': event feature 'seen': the name is taken",
        ),
        (
            changed("histories", ..., to=HISTORY | {"event_features": [EVENT_FEATURE | {"scope": "item"}]}),
            "history 'seen': event feature 'dwell' must have scope 'event', got 'item'",
        ),
        (
            changed("histories", 0, "attributes", to=["category", "category"]),
            "history 'bought' repeats an attribute",
        ),
        (
            changed("histories", 0, "attributes", to=["categry"]),
            "history 'bought': attribute 'categry' is not a feature, did you mean 'category'?",
        ),
        (
            changed("histories", 0, "attributes", to=["place"]),
            "history 'bought': attribute 'place' must be an item feature, got scope 'candidate'",
        ),
        (
            changed("histories", 0, "attributes", to=["amount"]),
            "history 'bought': attribute 'amount' is not a feature, known names: 'category', 'item_id', 'price'",
        ),
        (without("views", "events"), "history 'bought' needs views.events"),
        (
            without("views", "events", "type"),
            "history 'bought' filters on event types and needs views.events.type",
        ),
        (changed("tasks", ..., to={"name": "click", "label": "x"}), "two tasks have the same name"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_each_rule(mapping: dict[str, Any], problem: str) -> None:
    assert problems_of(mapping) == [problem]


def test_entity_features_need_their_view() -> None:
    assert problems_of(without("views", "users")) == [
        "user feature 'basket' needs views.users",
        "user feature 'likes' needs views.users",
    ]
    # item_id is in the impressions view anyway
    assert problems_of(without("views", "items")) == [
        "item feature 'category' needs views.items",
        "item feature 'price' needs views.items",
    ]


def test_all_broken_rules_are_told_at_once() -> None:
    mapping = changed("tables", "colour", to={})
    mapping["histories"][0]["attributes"] = ["place", "nothing"]
    mapping["tasks"].append({"name": "click", "label": "x"})
    del mapping["views"]["users"]
    assert len(problems_of(mapping)) == 6


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        (changed("features", to=[]), "features: must have at least 1 item, got 0"),
        (changed("tasks", to=[]), "tasks: must have at least 1 item, got 0"),
        (changed("histories", 0, "attributes", to=[]), "histories.0.attributes: must have at least 1 item, got 0"),
        (changed("histories", 0, "event_types", to=[]), "histories.0.event_types: must have at least 1 item, got 0"),
        (
            changed("histories", 0, "max_length", to=0),
            "histories.0.max_length: must be greater than or equal to 1, got 0",
        ),
        (changed("name", to="a b"), "name: must match pattern '^[A-Za-z_][A-Za-z0-9_]*$', got \"a b\""),
        (changed("name", to="a\n"), "name: must match pattern '^[A-Za-z_][A-Za-z0-9_]*$', got \"a\\n\""),
        (changed("features", 4, "dim", to=0), "features.4.dim: must be greater than or equal to 1, got 0"),
        (
            changed("features", 4, "transform", to={"kind": "standardise", "clip": 0}),
            "features.4.transform.clip: must be greater than 0, got 0",
        ),
        (
            changed("tables", "item", "encoder", to={"kind": "hash", "num_buckets": 0}),
            "tables.item.encoder.num_buckets: must be greater than or equal to 1, got 0",
        ),
        (
            changed("features", 5, "encoder", to={"kind": "log", "base": 1}),
            "features.5.encoder.base: must be greater than 1, got 1",
        ),
        (changed("features", 0, "scope", to="usr"), None),
        (changed("features", 0, "separator", to=""), None),
        (changed("features", 2, "separator", to="|"), "features.2.separator: is not a known key"),
        (changed("views", "impressions", "time_unit", to="h"), None),
        (without("views", "impressions"), "views.impressions: must be given"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_fields_are_bounded(mapping: dict[str, Any], problem: str | None) -> None:
    lines = problems_of(mapping)
    assert len(lines) == 1
    assert problem is None or lines == [problem]


def test_the_fingerprint_follows_the_content() -> None:
    schema = validate(Schema, valid(), source="a")
    reordered = {key: copy.deepcopy(value) for key, value in reversed(valid().items())}
    assert fingerprint(validate(Schema, reordered, source="b")) == fingerprint(schema)
    assert fingerprint(validate(Schema, schema.model_dump(mode="json"), source="c")) == fingerprint(schema)
    for other in (
        changed("features", 3, "encoder", "min_count", to=3),
        changed("tasks", 1, "at_least", to=31),
        changed("histories", 0, "max_length", to=51),
    ):
        assert fingerprint(validate(Schema, other, source="d")) != fingerprint(schema)


def test_a_schema_is_loaded_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "name: tiny\nviews: {impressions: {user: u, item: i, time: t}}\n"
        "features:\n- {name: i, kind: categorical, scope: item}\ntasks:\n- {name: click, label: c}\n"
    )
    assert Schema.load(tmp_path / "s.yaml").feature("i").scope == "item"
    with pytest.raises(ConfigError, match=r"does not exist[\s\S]*did you mean 's\.yaml'"):
        Schema.load(tmp_path / "ss.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_schemas_that_come_with_the_platform_are_valid(path: Path) -> None:
    schema = Schema.load(path)
    assert validate(Schema, schema.model_dump(mode="json"), source="again") == schema
