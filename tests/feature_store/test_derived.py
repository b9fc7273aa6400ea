"""Derived values of whole builds, against loops over the rows of the views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from feature_store.build import build_training_set
from feature_store.derived import families
from feature_store.joined import Joined
from feature_store.leaks import check_leaks
from feature_store.quality import check_quality
from feature_store.time_spans import TimeColumn, check_unit
from feature_store.views import Views
from recsys.config import validate
from recsys.errors import ConfigError, IntegrityError, SchemaError, SourceError
from recsys.schema import Schema
from recsys.training_set import TrainingSet
from tests.feature_store.derived_views import DERIVED, NUMBERS, VERSIONS, expected, make, mapping, schema, stored
from tests.feature_store.small_views import (
    DAY,
    START,
    build,
    config,
    make_schema,
    make_views,
    same_sets,
    write_views,
)
from tests.feature_store.test_leaks import tamper


def with_text_keys(views: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """The same with names for users and items."""
    names = [pl.concat_str(pl.lit(f"{key}-"), key).alias(key) for key in ("user", "item")]
    return {view: f.with_columns(n for n in names if n.meta.output_name() in f.columns) for view, f in views.items()}


@pytest.mark.parametrize("case", ["numbers", "text keys", "no requests"])
def test_every_value_equals_its_loops(tmp_path: Path, case: str) -> None:
    views, shape = make(0), mapping()
    if case == "text keys":
        views = with_text_keys(make(1))
    elif case == "no requests":
        views["impressions"] = views["impressions"].with_columns(request=pl.int_range(pl.len()))
        shape["views"]["impressions"] = {"user": "user", "item": "item", "time": "time"}
    training_set = build(tmp_path, views, validate(Schema, shape, source="test"))
    truth = expected(views)
    report = check_leaks(config(tmp_path), num_rows=60)
    assert report.differences == ()
    for name in NUMBERS:
        wanted = {row: np.float32(0 if v[name] is None else v[name]).item() for row, v in truth.items()}
        assert stored(training_set, f"f_{name}") == wanted, name
        assert len(set(wanted.values())) > 2, f"{name} tells nothing apart"
    red, blue = training_set.encoder.encode("shade", pl.Series(["red", "blue"]).to_arrow())
    ids = {"red": red, "blue": blue, None: 1}
    assert stored(training_set, "shade") == {row: ids[v["shade"]] for row, v in truth.items()}
    buckets = {row: 2 + int(np.log2(1 + v["user_events"])) for row, v in truth.items()}
    assert stored(training_set, "activity") == {row: min(b, 9) for row, b in buckets.items()}


def test_an_expression_of_literals_keeps_the_order_of_rows(tmp_path: Path) -> None:
    """Of many row groups, which Polars would read in any order if it took the order not to matter."""
    views = make_views(num_events=20_000)
    write_views(tmp_path / "views", views)
    views["events"].write_parquet(tmp_path / "views" / "events.parquet", row_group_size=1000)
    opened = Views(make_schema(), tmp_path / "views", staging=tmp_path / "staging", max_quarantined_fraction=0.0)
    wanted = pl.Series("value", [3 if kind == "like" else 1 for kind in views["events"]["type"]], dtype=pl.Int32)
    for _ in range(40):
        assert opened.computed("events", "CASE WHEN type = 'like' THEN 3 ELSE 1 END", "test").equals(wanted)


def test_missing_values_are_missing_not_zero(tmp_path: Path) -> None:
    views = make(0)
    write_views(tmp_path / "views", views)
    opened = Views(schema(), tmp_path / "views", staging=tmp_path / "staging", max_quarantined_fraction=0.0)
    joined = Joined.join(opened, lambda _: None)
    truth = expected(views)
    rows = joined.source_row[joined.requests.row_start]
    assert [np.isnan(v) for v in joined.derived["since_click"]] == [truth[r]["since_click"] is None for r in rows]
    assert np.isnan(joined.derived["since_click"]).any()
    assert [np.isnan(v) for v in joined.derived["mixed"]] == [truth[r]["mixed"] is None for r in joined.source_row]
    assert [v < 0 for v in joined.derived["level"]] == [truth[r]["level"] is None for r in rows]


def test_the_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    views = make(4)
    first = build(tmp_path / "a", views, schema(histories=[]))
    rng = np.random.default_rng(1)
    mixed = {n: f if n == "impressions" else f[rng.permutation(len(f))] for n, f in views.items()}
    second = build(tmp_path / "b", mixed, schema(histories=[]))
    same_sets(first, second)
    carried = sorted((Path(first.folder) / "derived").rglob("*.*"))
    assert len(carried) > 3
    for file in carried:  # what appends go on from
        assert file.read_bytes() == (Path(second.folder) / file.relative_to(first.folder)).read_bytes(), file.name


def test_the_future_changes_nothing(tmp_path: Path) -> None:
    views = make(5)
    cut = START + 5 * DAY
    changed = dict(views)
    changed["events"] = views["events"].with_columns(
        pl.when(pl.col("time") >= cut).then(pl.col("item") * 0 + 101).otherwise(pl.col("item")).alias("item"),
        pl.when(pl.col("time") >= cut).then(pl.col("dwell") * 3).otherwise(pl.col("dwell")).alias("dwell"),
    )
    changed["impressions"] = views["impressions"].with_columns(
        pl.when(pl.col("time") >= cut).then(1 - pl.col("click")).otherwise(pl.col("click")).alias("click")
    )
    for name, column in (("levels", "level"), ("costs", "cost")):
        is_later = pl.col("since") >= cut
        changed[name] = views[name].with_columns(
            pl.when(is_later).then(pl.col(column) + 1).otherwise(pl.col(column)).alias(column)
        )
    found = []
    for place, frames in (("a", views), ("b", changed)):
        write_views(tmp_path / place, frames)
        opened = Views(schema(), tmp_path / place, staging=tmp_path / f"staging-{place}", max_quarantined_fraction=0.0)
        found.append(Joined.join(opened, lambda _: None))
    one, other = found
    requests = int(np.searchsorted(one.requests.time, cut, side="right"))
    rows = one.rows_of(slice(0, requests)).stop
    assert 0 < requests < one.requests.num_requests
    for derived in one.schema.derived:
        part = slice(requests if one.schema.derived_scope(derived) == "context" else rows)
        np.testing.assert_array_equal(
            one.derived[derived.name][part], other.derived[derived.name][part], err_msg=derived.name
        )
    later = {n for n in one.derived if not np.array_equal(one.derived[n], other.derived[n], equal_nan=True)}
    assert {"item_dwell", "item_clicked", "user_category"} <= later


def test_text_views_give_the_same_values(tmp_path: Path) -> None:
    views = make(6)
    typed = build(tmp_path / "a", views, schema())
    text = mapping()
    for view in ("impressions", "events", "users", "items"):
        text["views"][view] = text["views"][view] | {"path": f"{view}.csv"}
    text["views"]["versions"] = [v | {"path": v["path"].replace("parquet", "csv")} for v in VERSIONS]
    text["derived"] = [
        d | {"value": "CAST(dwell AS DOUBLE) / 3.0", "where": "CAST(dwell AS DOUBLE) > 20"}
        if d["name"] == "item_dwell"
        else d
        for d in DERIVED
    ]
    other = build(tmp_path / "b", views, validate(Schema, text, source="test"), suffix=".csv")
    for name in NUMBERS:
        assert stored(typed, f"f_{name}") == stored(other, f"f_{name}"), name


@pytest.mark.parametrize(
    ("field", "text", "advised"),
    [
        ("value", "spent / 3.0", "CAST(spent AS DOUBLE) / 3.0"),
        ("value", "spent", "CAST(spent AS DOUBLE)"),
        ("where", "type <> 'spent' AND \"spent\" > 20", "type <> 'spent' AND CAST(\"spent\" AS DOUBLE) > 20"),
    ],
)
def test_numbers_in_text_are_told_how_to_be_written(tmp_path: Path, field: str, text: str, advised: str) -> None:
    """The hint is the expression to write; written so, it builds."""
    views = make(6)
    views["events"] = views["events"].with_columns(spent=pl.int_range(pl.len()) / 4)
    shape = mapping()
    shape["views"]["events"] = shape["views"]["events"] | {"path": "events.csv"}
    write_views(tmp_path / "views", views)
    write_views(tmp_path / "views", views, suffix=".csv")

    def build_with(written: str) -> None:
        shape["derived"] = changed("item_dwell", **{field: written})
        build_training_set(validate(Schema, shape, source="test"), config(tmp_path))

    with pytest.raises(SourceError, match=rf"events\.csv: derived value 'item_dwell': {field} must") as error:
        build_with(text)
    assert error.value.hint == f"column 'spent' holds numbers as text, for such files have no types: write {advised}"
    build_with(advised)


def test_broken_versions_are_set_aside(tmp_path: Path) -> None:
    views = make(7)
    broken = {
        "item": [None, 101],
        "since": [START, -5],
        "told": [START, START],
        "cost": [1.0, 1.0],
        "colour": ["red"] * 2,
    }
    views["costs"] = pl.concat([views["costs"], pl.DataFrame(broken, schema=views["costs"].schema)])
    write_views(tmp_path / "views", views)
    summary = build_training_set(schema(), config(tmp_path))
    assert summary.quarantined["costs"] == {"item is null": 1, "since is negative": 1}
    views["costs"] = views["costs"][:-2]
    same = build(tmp_path / "clean", views, schema())
    assert stored(TrainingSet.open(tmp_path / "training_set"), "f_cost") == stored(same, "f_cost")


def changed(name: str, /, **changes: Any) -> list[dict[str, Any]]:
    return [d | changes if d["name"] == name else d for d in DERIVED]


@pytest.mark.parametrize(
    ("derived", "message"),
    [
        (changed("item_dwell", value="SUM(dwell)"), "derived value 'item_dwell': value must read one row only"),
        (changed("item_dwell", value="dwell - LAG(dwell) OVER (ORDER BY time)"), "must read one row only, got Over"),
        (changed("item_dwell", value="dwell >"), "derived value 'item_dwell': value must be an SQL expression"),
        (changed("item_dwell", where="1 = 1"), "derived value 'item_dwell': where must read a column"),
        (changed("item_dwell", value="dwel"), "column 'dwel' must exist \\(derived value 'item_dwell' reads it\\)"),
        (
            changed("item_dwell", where="dwell"),
            "derived value 'item_dwell': where must give true or false, got float64",
        ),
        (changed("item_dwell", value="type"), "derived value 'item_dwell': value must give a number, got str"),
        (
            changed("item_dwell", value="type + 1"),
            "derived value 'item_dwell': value must fit its columns \\(type: text",
        ),
        (changed("item_dwell", value="dwell / 0"), "derived value 'item_dwell': value must be finite"),
        (changed("user_known", created="createt"), "column 'createt' must exist"),
    ],
)
def test_expressions_that_cannot_be_are_refused(tmp_path: Path, derived: list[dict[str, Any]], message: str) -> None:
    with pytest.raises((SchemaError, SourceError), match=message):
        build(tmp_path, make(0), schema(derived=derived))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"derived": [*DERIVED, DERIVED[0]]}, "derived value 'user_clicks_1d' is declared twice"),
        ({"derived": changed("user_clicks_1d", by=["usr"])}, "got 'usr', did you mean 'user'"),
        ({"derived": changed("user_clicks_1d", by=["tags"])}, "by must name user, item or a categorical feature"),
        ({"derived": changed("user_clicks_1d", by=["user", "user"])}, "by names the same twice"),
        ({"derived": changed("user_clicks_1d", by=["item"])}, "must have scope 'candidate', got 'context'"),
        ({"derived": changed("mixed", numerator="item_rate")}, "'item_rate' must be a derived count, sum, mean or rec"),
        ({"derived": changed("cost", view="cost")}, "view 'cost' must be one of views.versions, did you mean 'costs'"),
        ({"derived": changed("item_shown", name="click")}, "has the name of a column of the impressions that is read"),
        ({"derived": [*DERIVED, DERIVED[0] | {"name": "unread"}]}, "'unread' is read by no feature"),
    ],
)
def test_declarations_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schema(**changes)


def test_numbers_are_no_vocabulary() -> None:
    features = mapping()["features"]
    features[-1] = {k: v for k, v in features[-1].items() if k != "encoder"}
    with pytest.raises(ConfigError, match="must be dense, or categorical with the encoder quantile or log"):
        schema(features=features)


def test_the_leak_detector_recomputes_derived_values(tmp_path: Path) -> None:
    views = make(8)
    # A request that contradicts itself: none of its impressions counts for anything.
    first = pl.col("request") == views["impressions"]["request"][0]
    is_other = first & (pl.int_range(pl.len()) == 0)
    views["impressions"] = views["impressions"].with_columns(
        pl.when(is_other).then(pl.lit("other")).otherwise(pl.col("device")).alias("device")
    )
    num_contradictory = views["impressions"].filter(first).height
    assert num_contradictory > 1
    build(tmp_path, views, schema())
    report = check_leaks(config(tmp_path), num_rows=10_000)
    assert report.differences == ()
    assert report.rows_recomputed == views["impressions"].height - num_contradictory


@pytest.mark.parametrize(
    ("table", "column"),
    [("requests", "f_since_click"), ("impressions", "f_cost")],
)
def test_a_derived_value_that_the_views_do_not_give_is_named(tmp_path: Path, table: str, column: str) -> None:
    training_set = build(tmp_path, make(9), schema())
    tamper(training_set, f"validation/{table}", column, lambda c: c + np.float32(0.5))
    report = check_leaks(config(tmp_path), num_rows=60)
    assert {d.place for d in report.differences} == {column}
    assert {d.split for d in report.differences} == {"validation"}


def test_a_set_of_another_schema_is_not_checked_as_this_one(tmp_path: Path) -> None:
    build(tmp_path, make(8), schema())
    other = schema(derived=changed("item_likes", prior=0.5))
    with pytest.raises(
        IntegrityError, match=r"must be of the experiment's schema, 'small', but it was built with anoth"
    ):
        check_leaks(config(tmp_path), schema=other)
    assert check_leaks(config(tmp_path), schema=schema(), num_rows=5).differences == ()


def test_drift_of_derived_values_is_checked(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make(0))
    report = check_quality(schema(), config(tmp_path))
    assert {f"f_{name}" for name in NUMBERS} | {"shade", "activity"} <= {d.name for d in report.drift}
    by_name = {d.name: d for d in report.drift}
    assert by_name["f_user_events"].psi > by_name["price"].noise > 0


def test_nan_is_missing_and_noted(tmp_path: Path) -> None:
    """NaN in a column, which would be greater than everything, counts as null does; so does what divides 0 by 0."""
    views = make(0)
    rows = pl.int_range(pl.len()) % 10
    events = views["events"].with_columns(
        pl.when(rows == 2).then(None).when(rows == 5).then(0.0).otherwise(pl.col("dwell")).alias("dwell")
    )
    is_nan = pl.int_range(pl.len()) % 10 == 2
    derived = [
        *changed("item_dwell", value="dwell / dwell", where="dwell >= 0 OR dwell < 0"),
        {"name": "long", "kind": "count", "by": ["user"], "where": "dwell > 100"},
    ]
    features = [*mapping()["features"], {"name": "long", "kind": "dense", "scope": "context"}]
    shape = schema(derived=derived, features=features, histories=[])
    found, notes = [], []
    for name, nothing in (("null", None), ("nan", float("nan"))):
        views["events"] = events.with_columns(
            pl.when(is_nan).then(pl.lit(nothing, pl.Float64)).otherwise(pl.col("dwell")).alias("dwell")
        )
        found.append(build(tmp_path / name, views, shape))
        notes.append(found[-1].manifest["summary"]["notes"])
        assert check_leaks(config(tmp_path / name), num_rows=60).differences == ()
    for feature in ("f_item_dwell", "long"):
        assert stored(found[0], feature) == stored(found[1], feature)
    divided = events.with_row_index("row").filter(pl.col("dwell") == 0)["row"]
    assert len(divided) > 10
    of_value = (
        f"{tmp_path}/{{}}/views/events.parquet: derived value 'item_dwell': value gives NaN in {len(divided)} rows, "
        f"first row {divided[0]}: they count for nothing"
    )
    of_column = (
        f"{tmp_path}/nan/views/events.parquet: column 'dwell' holds NaN in {events.select(is_nan.sum()).item()} rows: "
        "derived values take it as missing"
    )
    assert notes[0] == [of_value.format("null")]
    assert notes[1] == [of_column, of_value.format("nan")]


def test_each_problem_of_a_column_is_told_once(tmp_path: Path) -> None:
    """However many expressions of one value read it."""
    derived = changed("item_dwell", value="dwel / 3.0", where="dwel > 20")
    with pytest.raises(SourceError) as raised:
        build(tmp_path, make(0), schema(derived=derived))
    assert raised.value.message.endswith(
        "events.parquet: column 'dwel' must exist (derived value 'item_dwell' reads it)"
    )
    two = [*changed("user_known", created="createt")]
    two = [d | {"value": "dwel", "where": "dwel > 20"} if d["name"] == "item_dwell" else d for d in two]
    with pytest.raises(SourceError) as raised:
        build(tmp_path, make(0), schema(derived=two))
    assert raised.value.message.splitlines() == [
        f"{tmp_path}/views/events.parquet: 2 problems",
        "  column 'createt' must exist (derived value 'user_known' reads it)",
        "  column 'dwel' must exist (derived value 'item_dwell' reads it)",
    ]


def test_times_that_several_values_share_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = make(0)
    # One of a hundred was written in seconds: no error, but a note.
    created = pl.when(pl.int_range(pl.len()) % 100 == 3).then(pl.col("created") // 1_000_000).otherwise("created")
    views["events"] = views["events"].with_columns(created.alias("created"))
    checked: list[str] = []

    def check(times: Any, of: TimeColumn) -> list[str]:
        checked.append(f"{of.field}.{of.name}")
        return check_unit(times, of)

    monkeypatch.setattr("feature_store.views.check_unit", check)
    training_set = build(tmp_path, views, schema(histories=[]))
    assert len([by for _, by, created in families(training_set.schema) if created is not None]) == 2
    assert sorted(checked) == [
        "views.events.created",
        "views.versions: 'costs'.created",
        "views.versions: 'costs'.time",
        "views.versions: 'levels'.time",
    ]
    (note,) = training_set.manifest["summary"]["notes"]
    assert note.startswith("views.events.created: 3 of 286 times of column 'created' lie before 1990")
