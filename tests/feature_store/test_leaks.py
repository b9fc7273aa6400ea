from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from feature_store.leaks import check_leaks
from feature_store.single_feature import single_feature_aucs, standard_error
from recsys.errors import IntegrityError
from recsys.files import sha256_of, write_json
from recsys.training_set import (
    ITEM_ROW,
    SOURCE_ROW,
    TIME,
    TrainingSet,
    end_column,
    label_column,
    open_table,
    write_table,
)
from tests.feature_store.small_views import build, config, make_schema, make_views, write_views


@pytest.fixture
def built(tmp_path: Path) -> TrainingSet:
    return build(tmp_path, make_views(num_requests=120, num_events=600))


def tamper(training_set: TrainingSet, name: str, column: str, change: Any) -> None:
    """Replaces a column of a table, and its checksum, as a build with a defect would have written it."""
    path = training_set.folder / f"{name}.arrow"
    table = open_table(path)
    columns = {n: (change(np.array(c)) if n == column else c) for n, c in table.columns.items()}
    write_table(path, columns, keys=table.keys)
    entry = training_set.manifest["files"][f"{name}.arrow"]
    entry |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(training_set.folder / "manifest.json", training_set.manifest)


def test_an_honest_build_is_clean(built: TrainingSet, tmp_path: Path) -> None:
    report = check_leaks(config(tmp_path), num_rows=10_000)
    assert report.rows_recomputed == sum(built.manifest["rows"].values())
    assert report.differences == ()
    assert report.late == ()
    assert report.is_clean
    # Every feature, each of its histories' three numbers, on both tasks.
    names = {f.feature for f in report.features}
    histories = {f"{h}.{x}" for h in ("clicked", "seen") for x in ("length", "recency", "candidate")}
    assert names == {f.name for f in built.schema.features} | histories


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_dirty_views_are_recomputed_as_the_build_reads_them(tmp_path: Path, suffix: str) -> None:
    views = make_views(num_requests=150, num_events=400, seed=3)
    is_broken = pl.int_range(pl.len()) % 37 == 5
    views["impressions"] = views["impressions"].with_columns(
        pl.when(is_broken).then(None).otherwise(pl.col("user")).alias("user"),
        pl.when(pl.int_range(pl.len()) % 41 == 3).then(pl.lit("other")).otherwise(pl.col("device")).alias("device"),
    )
    views["events"] = views["events"].with_columns(
        pl.when(pl.int_range(pl.len()) % 50 == 7).then(None).otherwise(pl.col("time")).alias("time")
    )
    views["items"] = pl.concat([views["items"], views["items"][:1].with_columns(pl.lit("twice").alias("category"))])
    views["users"] = views["users"][2:]
    write_views(tmp_path / "views", views, suffix=suffix)
    changed = {"max_quarantined_fraction": 0.5}
    mapping = make_schema().model_dump(mode="json", exclude_none=True)
    for view in ("impressions", "events", "users", "items"):
        mapping["views"][view]["path"] = f"{view}{suffix}"
    from feature_store.build import build_training_set
    from recsys.config import validate
    from recsys.schema import Schema

    summary = build_training_set(validate(Schema, mapping, source="test"), config(tmp_path, **changed))
    assert summary.num_quarantined > 3
    report = check_leaks(config(tmp_path, **changed), num_rows=10_000)
    assert (report.differences, report.late) == ((), ())
    assert report.rows_recomputed == summary.num_rows


def test_a_history_that_reaches_one_event_too_far_is_named(built: TrainingSet, tmp_path: Path) -> None:
    split = built.split("validation")
    log, requests = built.events["seen"], split.requests
    end = np.array(requests.array(end_column("seen")))
    # A request with a later event of the same user: the next event of the log is its own.
    stop = built.users.array(end_column("seen"))[requests.array("@user_row")]
    chosen = int(np.flatnonzero(end < stop)[0])
    tamper(built, "validation/requests", end_column("seen"), lambda c: c + (np.arange(len(c)) == chosen))
    assert log.array(TIME)[end[chosen]] >= requests.array(TIME)[chosen]
    rows = split.impressions.array(SOURCE_ROW)[split.row_offsets[chosen] : split.row_offsets[chosen + 1]]
    report = check_leaks(config(tmp_path), num_rows=10_000)
    assert [(late.split, late.history, late.num_requests, late.source_rows) for late in report.late] == [
        ("validation", "seen", 1, (int(rows[0]),))
    ]
    assert {(d.source_row, d.place) for d in report.differences} == {(int(row), "history seen") for row in rows}
    assert not report.is_clean


@pytest.mark.parametrize(
    ("table", "column", "place"),
    [
        ("users", "age", "age"),
        ("items", "category", "category"),
        ("train/requests", "device", "device"),
        ("train/requests", TIME, "request time"),
        ("train/impressions", "price", "price"),
        ("train/impressions", ITEM_ROW, "item"),
        ("train/impressions", label_column("click"), "label of click"),
        ("events/clicked", "dwell", "history clicked: dwell of event"),
        ("events/clicked", TIME, "history clicked: time of event"),
    ],
)
def test_every_kind_of_stored_value_is_compared(
    built: TrainingSet, tmp_path: Path, table: str, column: str, place: str
) -> None:
    def change(values: np.ndarray) -> np.ndarray:
        if column == label_column("click"):
            return (1 - values).astype(np.float32)
        if column == ITEM_ROW:
            return values % 20 + 1
        if column == TIME:
            return values - 1
        return (values + 1).astype(values.dtype)

    tamper(built, table, column, change)
    report = check_leaks(config(tmp_path), num_rows=10_000)
    assert any(d.place.startswith(place) for d in report.differences)
    assert not report.is_clean


def planted(seed: int) -> dict[str, pl.DataFrame]:
    """Two thousand impressions whose position is 3 exactly for clicks, as a logger does that fills it in later."""
    views = make_views(num_requests=800, num_events=2000, num_users=40, seed=seed)
    leaking = pl.when(pl.col("click") == 1).then(3).otherwise(pl.col("position") % 3)
    views["impressions"] = views["impressions"].with_columns(leaking.alias("position"))
    return views


def test_a_feature_that_knows_the_answer_is_named_with_rows(tmp_path: Path) -> None:
    build(tmp_path, planted(1))
    report = check_leaks(config(tmp_path), num_rows=50)
    (found,) = report.implausible
    assert (found.feature, found.task, found.auc) == ("position", "click", 1.0)
    clicks = pl.read_parquet(tmp_path / "views" / "impressions.parquet")["click"]
    assert len(found.source_rows) == 10
    assert clicks.gather(list(found.source_rows)).to_list() == [1] * 10
    assert report.differences == ()


def test_an_event_of_the_click_itself_that_is_logged_too_early_is_found(tmp_path: Path) -> None:
    views = make_views(num_requests=800, num_events=300, num_users=40, num_items=3000, seed=2)
    clicks = views["impressions"].filter(pl.col("click") == 1)
    starts = views["impressions"].group_by("request").agg(pl.col("time").min().alias("start"))
    caused = clicks.join(starts, on="request").select(
        "user", "item", (pl.col("start") - 1).alias("time"), pl.lit("click").alias("type"), pl.lit(0.5).alias("dwell")
    )
    views["events"] = pl.concat([views["events"], caused])
    build(tmp_path, views)
    report = check_leaks(config(tmp_path), num_rows=50)
    assert {(f.feature, f.task) for f in report.implausible} == {
        ("clicked.candidate", "click"),
        ("seen.candidate", "click"),
    }


def test_a_number_with_a_bump_in_the_middle_is_found(tmp_path: Path) -> None:
    views = make_views(num_requests=800, seed=4)
    bump = pl.when(pl.col("click") == 1).then(0.0).otherwise(pl.col("position") - 1.5)
    views["impressions"] = views["impressions"].with_columns(bump.alias("price"))
    build(tmp_path, views)
    assert [f.feature for f in check_leaks(config(tmp_path)).implausible] == ["price"]


def test_aucs_are_those_of_the_formula(built: TrainingSet) -> None:
    found = {(f.feature, f.task): f for f in single_feature_aucs(built, max_auc=0.95)}
    train, later = built.split("train"), built.split("validation")
    ids, labels = train.impressions.array("position"), train.impressions.array(label_column("click"))
    base = labels.mean()
    share = {i: (labels[ids == i].sum() + 10 * base) / ((ids == i).sum() + 10) for i in set(ids.tolist())}
    scores = [share.get(i, base) for i in later.impressions.array("position").tolist()]
    judged = later.impressions.array(label_column("click"))
    pairs = [
        (a > b) + (a == b) / 2
        for a, x in zip(scores, judged, strict=True)
        for b, y in zip(scores, judged, strict=True)
        if x == 1 and y == 0
    ]
    result = found["position", "click"]
    assert result.auc == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    positives = int(judged.sum())
    assert result.lower == pytest.approx(
        result.auc - 3 * standard_error(result.auc, positives, len(judged) - positives)
    )
    assert result.num_rows == len(judged)


def test_with_too_few_of_a_class_nothing_is_claimed(tmp_path: Path) -> None:
    views = planted(5)
    few = pl.when(pl.int_range(pl.len()) < 60).then(pl.col("click")).otherwise(0)
    views["impressions"] = views["impressions"].with_columns(few.alias("click"))
    build(tmp_path, views)
    report = check_leaks(config(tmp_path), num_rows=30)
    assert all(math.isnan(f.auc) and not f.is_implausible for f in report.features if f.task == "click")


def test_views_that_changed_since_are_refused(built: TrainingSet, tmp_path: Path) -> None:
    path = tmp_path / "views" / "users.parquet"
    pl.read_parquet(path).with_columns(pl.col("age") + 1).write_parquet(path)
    with pytest.raises(IntegrityError, match="have changed since"):
        check_leaks(config(tmp_path))


def test_a_sample_is_spread_over_the_splits_and_repeats_with_its_seed(built: TrainingSet, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        tamper(built, f"{split}/impressions", "price", lambda c: c + 1)
    first, again, other = (check_leaks(config(tmp_path), num_rows=30, seed=seed) for seed in (1, 1, 2))
    assert first.rows_recomputed == 30
    assert [d.place for d in first.differences] == ["price"] * 30
    assert {split: sum(d.split == split for d in first.differences) for split in ("train", "validation", "test")} == {
        "train": 10,
        "validation": 10,
        "test": 10,
    }
    assert first.differences == again.differences != other.differences
