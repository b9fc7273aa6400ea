from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from feature_store.build import build_training_set
from recsys.errors import QuarantineError
from recsys.training_set import SPLITS, TrainingSet
from tests.feature_store.small_views import (
    START,
    build,
    config,
    impressions_of,
    make_schema,
    make_views,
    same_sets,
    schema_mapping,
    write_views,
)

Mapping = dict[str, Any]
FIRST, SECOND = 4, 9
"""The rows that the cases break."""


def broken(frame: pl.DataFrame, column: str, value: Any) -> pl.DataFrame:
    rows = pl.int_range(pl.len()).is_in([FIRST, SECOND])
    return frame.with_columns(pl.when(rows).then(pl.lit(value)).otherwise(pl.col(column)).alias(column))


@pytest.mark.parametrize(
    ("view", "column", "value", "reason"),
    [
        ("impressions", "user", None, "user is null"),
        ("impressions", "item", None, "item is null"),
        ("impressions", "time", None, "time is null"),
        ("impressions", "time", -1, "time is negative"),
        ("impressions", "time", 7_258_118_400_000_000, "time is not before 2200"),
        ("impressions", "request", None, "request is null"),
        ("impressions", "click", 2, "click is neither 0 nor 1"),
        ("events", "user", None, "user is null"),
        ("events", "item", None, "item is null"),
        ("events", "time", None, "time is null"),
        ("events", "time", START * 1000, "time is not before 2200"),
        ("users", "user", None, "user is null"),
        ("items", "item", None, "item is null"),
    ],
)
def test_broken_rows_are_set_aside_counted_and_kept(
    tmp_path: Path, view: str, column: str, value: Any, reason: str
) -> None:
    views = make_views()
    whole = {**views, view: views[view].filter(~pl.int_range(pl.len()).is_in([FIRST, SECOND]))}
    views[view] = broken(views[view], column, value)
    limit = 0.5
    training_set = build(tmp_path / "broken", views, max_quarantined_fraction=limit)
    assert training_set.manifest["quarantined"] == {view: {reason: 2}}
    file = pl.read_parquet(tmp_path / "broken" / "training_set" / "quarantine" / f"{view}.parquet")
    assert file["@source_row"].to_list() == [FIRST, SECOND]
    assert file["@reason"].to_list() == [reason, reason]
    assert file[column].to_list() == [value, value]
    other = next(c for c in views[view].columns if c != column)
    assert file[other].to_list() == views[view][other].gather([FIRST, SECOND]).to_list()
    same_sets(build(tmp_path / "whole", whole), training_set, but=("@source_row",))


def test_a_row_with_every_label_missing_is_broken_one_with_some_is_not(tmp_path: Path) -> None:
    views = make_views()
    views["impressions"] = broken(views["impressions"], "click", None)
    views["impressions"][FIRST, "watched"] = None
    training_set = build(tmp_path, views)
    assert training_set.manifest["quarantined"] == {"impressions": {"every label is missing": 1}}
    labels = impressions_of(training_set, "clicked")[SECOND]["labels"]
    assert labels["@label.click"] != labels["@label.click"]  # NaN
    assert labels["@label.long"] in (0.0, 1.0)


def test_repeated_entities_keep_the_first_row(tmp_path: Path) -> None:
    views = make_views()
    again = views["users"][3:5].with_columns(age=pl.lit(1000.0))
    expected = build(tmp_path / "once", views)
    views["users"] = pl.concat([views["users"], again])
    training_set = build(tmp_path / "twice", views, max_quarantined_fraction=0.2)
    assert training_set.manifest["quarantined"] == {"users": {"user repeats that of an earlier row": 2}}
    same_sets(expected, training_set)
    file = pl.read_parquet(tmp_path / "twice" / "training_set" / "quarantine" / "users.parquet")
    assert file["@source_row"].to_list() == [12, 13]
    assert file["age"].to_list() == [1000.0, 1000.0]


def request_of_several_rows(views: dict[str, pl.DataFrame]) -> tuple[int, list[int]]:
    frame = views["impressions"].with_row_index("@n")
    request, rows = frame.group_by("request", maintain_order=True).agg("@n").filter(pl.col("@n").list.len() > 2).row(0)
    return request, rows


@pytest.mark.parametrize(
    ("column", "other"),
    [("user", lambda value: (value + 1) % 12), ("device", lambda value: "fridge"), ("device", lambda v: None)],
)
def test_requests_that_contradict_themselves(tmp_path: Path, column: str, other: Callable[[Any], Any]) -> None:
    views = make_views()
    _, rows = request_of_several_rows(views)
    expected = {**views, "impressions": views["impressions"].filter(~pl.int_range(pl.len()).is_in(rows))}
    frame = views["impressions"].clone()
    frame[rows[1], column] = other(frame[rows[1], column])
    training_set = build(tmp_path / "a", {**views, "impressions": frame})
    reason = f"{column} differs within the request"
    assert training_set.manifest["quarantined"] == {"impressions": {reason: len(rows)}}
    file = pl.read_parquet(tmp_path / "a" / "training_set" / "quarantine" / "impressions.parquet")
    assert file["@source_row"].to_list() == rows
    same_sets(build(tmp_path / "b", expected), training_set, but=("@source_row",))


def test_one_broken_row_does_not_take_its_request_with_it(tmp_path: Path) -> None:
    views = make_views()
    _, rows = request_of_several_rows(views)
    views["impressions"][rows[0], "item"] = None
    found = impressions_of(build(tmp_path, views), "clicked")
    assert rows[0] not in found
    assert len({found[r]["request"] for r in rows[1:]}) == 1


@pytest.mark.parametrize(
    ("view", "column", "text", "reason"),
    [
        ("impressions", "time", "yesterday", "time is not a time"),
        ("impressions", "time", "12.5", "time is not a time"),
        ("impressions", "click", "maybe", "click is not a number"),
        ("impressions", "click", "0.5", "click is neither 0 nor 1"),
        ("impressions", "price", "cheap", "price is not a number"),
        ("events", "dwell", "1,5", "dwell is not a number"),
        ("users", "age", "old", "age is not a number"),
        ("items", "item", "99999999999999999999", "item is not a signed 64-bit integer"),
        ("events", "item", "", "item is null"),
    ],
)
def test_unparsable_values_of_a_csv(tmp_path: Path, view: str, column: str, text: str, reason: str) -> None:
    mapping = schema_mapping()["views"]
    for name, entry in mapping.items():
        entry["path"] = f"{name}.csv"
    views = make_views()
    whole = {**views, view: views[view].filter(~pl.int_range(pl.len()).is_in([FIRST, SECOND]))}
    views[view] = broken(views[view].with_columns(pl.col(column).cast(pl.String)), column, text)
    training_set = build(tmp_path / "a", views, make_schema(views=mapping), suffix=".csv", max_quarantined_fraction=0.2)
    assert training_set.manifest["quarantined"] == {view: {reason: 2}}
    file = pl.read_parquet(tmp_path / "a" / "training_set" / "quarantine" / f"{view}.parquet")
    assert file[column].to_list() == [text or None] * 2
    expected = build(tmp_path / "b", whole, make_schema(views=mapping), suffix=".csv")
    same_sets(expected, training_set, but=("@source_row",))


def test_too_many_broken_rows_fail_the_build(tmp_path: Path) -> None:
    views = make_views()
    n = len(views["events"])
    frame = views["events"].with_columns(
        pl.when(pl.int_range(n) < 40).then(None).otherwise(pl.col("item")).alias("item")
    )
    views["events"] = frame
    write_views(tmp_path / "views", views)
    with pytest.raises(QuarantineError) as error:
        build_training_set(make_schema(), config(tmp_path))
    message = str(error.value)
    assert "events.parquet" in message
    assert "at most 10.0% of the rows may be broken, got 40 of 300" in message
    assert "item is null: 40 rows, first row 0" in message
    assert "max_quarantined_fraction" in message
    assert not (tmp_path / "training_set").exists()
    build_training_set(make_schema(), config(tmp_path, max_quarantined_fraction=40 / 300))
    assert TrainingSet.open(tmp_path / "training_set").manifest["quarantined"] == {"events": {"item is null": 40}}


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    views = make_views(num_requests=200)
    views["impressions"] = broken(views["impressions"], "user", None)
    views["impressions"][20, "time"] = -3
    training_set = build(tmp_path, views)
    summary = training_set.manifest["summary"]
    kept = sum(training_set.split(name).num_rows for name in SPLITS)
    set_aside = sum(summary["quarantined"]["impressions"].values())
    assert set_aside == 3
    assert kept + set_aside + summary["outside_split"] == len(views["impressions"])


def test_nothing_broken_writes_no_folder(tmp_path: Path) -> None:
    build(tmp_path, make_views())
    assert not (tmp_path / "training_set" / "quarantine").exists()
