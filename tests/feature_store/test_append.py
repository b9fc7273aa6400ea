from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from feature_store.append import append_to_training_set, prune_versions
from feature_store.build import DataConfig, build_training_set
from feature_store.leaks import check_leaks
from feature_store.workspace import exclusive, versions_of
from recsys.batch import Batch
from recsys.cli import app
from recsys.config import validate
from recsys.errors import SourceError
from recsys.schema import Schema
from recsys.training_set import SPLITS, TrainingSet, open_table, write_table
from tests.feature_store import derived_views
from tests.feature_store.small_views import DAY, START, impressions_of, make_schema, make_views, schema_mapping

ROOT = Path(__file__).parents[2]
LAST_DAYS = (8, 9)
"""Appended one by one to what was built of the days before."""


def write_days(folder: Path, views: dict[str, pl.DataFrame], days: range) -> None:
    """One file a day and log; users and items whole."""
    for log in ("impressions", "events"):
        (folder / f"{log}.parquet").mkdir(parents=True, exist_ok=True)
        rows = views[log]
        for day in days:
            chosen = rows.filter(((pl.col("time") - START) // DAY).clip(0, 9) == day)
            chosen.write_parquet(folder / f"{log}.parquet" / f"day-{day}.parquet")
    for entity in views.keys() - {"impressions", "events"}:
        views[entity].write_parquet(folder / f"{entity}.parquet")


def settings(folder: Path, name: str, **split: int) -> DataConfig:
    days = {"train_end": 6, "validation_end": 7, "test_end": 10} | split
    times = {key: START + day * DAY for key, day in days.items()}
    mapping = {"views": str(folder / "views"), "training_set": str(folder / name), "split": times}
    return validate(DataConfig, mapping, source="test")


def small(max_length: int = 50) -> Schema:
    return make_schema(histories=[{**h, "max_length": max_length} for h in schema_mapping()["histories"]])


def appended(folder: Path, views: dict[str, pl.DataFrame], schema: Schema) -> TrainingSet:
    """What days 0 to 7 give, with the last days appended."""
    write_days(folder / "views", views, range(8))
    build_training_set(schema, settings(folder, "set"))
    for day in LAST_DAYS:
        write_days(folder / "views", views, range(day, day + 1))
        append_to_training_set(schema, settings(folder, "set"))
    return TrainingSet.open(folder / "set", verify=True)


def by_source_row(training_set: TrainingSet, history: str, max_length: int) -> dict[int, Any]:
    """Keys, labels and what a batch reads of the history, of every impression."""
    found = impressions_of(training_set, history)
    names = ("split", "user", "item", "time", "labels")
    return {n: ([r[name] for name in names], r["history"][-max_length:]) for n, r in found.items()}


@pytest.mark.parametrize("max_length", [50, 3])
def test_an_append_equals_a_rebuild(tmp_path: Path, max_length: int) -> None:
    views, schema = make_views(num_requests=120, num_events=900), small(max_length)
    after = appended(tmp_path, views, schema)
    build_training_set(schema, settings(tmp_path, "rebuilt"))
    rebuilt = TrainingSet.open(tmp_path / "rebuilt")
    for history in ("clicked", "seen"):
        length = schema.history(history).max_length
        assert by_source_row(after, history, length) == by_source_row(rebuilt, history, length)
        if max_length >= 50 and history == "clicked":
            assert sum(len(h) for _, h in by_source_row(after, history, length).values()) > 100
    assert after.manifest["rows"] == rebuilt.manifest["rows"]
    spans = [s.manifest["summary"]["time_spans"] for s in (after, rebuilt)]
    assert spans[0] == spans[1]
    for name in SPLITS:  # nothing new in the training period: the same ids, and so the same batches
        batches = [Batch.from_training_set(s, name, np.arange(s.split(name).num_requests)) for s in (after, rebuilt)]
        if batches[0].num_rows:
            assert (batches[0].labels == batches[1].labels).all()
            for history in ("clicked", "seen"):
                mine, theirs = (b.histories[history] for b in batches)
                assert (mine.offsets == theirs.offsets).all()
                assert (mine.times == theirs.times).all()
                assert (mine.features["item_id"] == theirs.features["item_id"]).all()
            assert (batches[0].item["category"] == batches[1].item["category"]).all()


def test_older_versions_stay_readable_until_they_are_pruned(tmp_path: Path) -> None:
    views = make_views(num_requests=120, num_events=600)
    after = appended(tmp_path, views, small())
    versions = versions_of((tmp_path / "set").resolve())
    assert [p.name for p in versions] == ["000001", "000002"]
    rows = [sum(TrainingSet.open(p, verify=True).manifest["rows"].values()) for p in versions]
    assert rows[0] < rows[1] < sum(after.manifest["rows"].values())
    shared = [tmp_path / f / "train" / "impressions.arrow" for f in ("set", "set.versions/000001")]
    assert shared[0].samefile(shared[1]), "what stays as it is must take no room twice"
    assert [p.name for p in prune_versions(tmp_path / "set", keep=1)] == ["000001"]
    TrainingSet.open(versions[1], verify=True)
    prune_versions(tmp_path / "set", keep=0)
    assert versions_of((tmp_path / "set").resolve()) == []
    TrainingSet.open(tmp_path / "set", verify=True)


@pytest.mark.parametrize(("num_renames", "is_derived"), [(0, False), (1, False), (0, True), (1, True)])
def test_an_append_that_is_killed_leaves_the_set_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_renames: int, is_derived: bool
) -> None:
    views = derived_views.make(0) if is_derived else make_views()
    schema = derived_views.schema() if is_derived else small()
    write_days(tmp_path / "views", views, range(8))
    build_training_set(schema, settings(tmp_path, "set"))
    before = TrainingSet.open(tmp_path / "set").fingerprint
    write_days(tmp_path / "views", views, range(8, 10))
    done, rename = 0, Path.rename

    def killed(self: Path, target: Path) -> Path:
        nonlocal done
        if Path(target).parent == tmp_path / "set.versions" or Path(target) == tmp_path / "set":
            if done == num_renames:
                raise KeyboardInterrupt
            done += 1
        return rename(self, target)

    # A killed process clears nothing up.
    monkeypatch.setattr("feature_store.workspace.shutil.rmtree", lambda *_, **__: None)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            append_to_training_set(schema, settings(tmp_path, "set"))
    monkeypatch.undo()
    assert list(tmp_path.glob("set.tmp-*"))
    assert (tmp_path / "set").exists() == (num_renames == 0)
    with exclusive(tmp_path / "set"):
        assert TrainingSet.open(tmp_path / "set", verify=True).fingerprint == before
    assert not list(tmp_path.glob("set.tmp-*"))
    append_to_training_set(schema, settings(tmp_path, "set"))
    assert len(versions_of(tmp_path / "set")) == 1
    TrainingSet.open(tmp_path / "set", verify=True)
    assert check_leaks(settings(tmp_path, "set"), num_rows=60).differences == ()


def test_splits_move_forward_and_vocabularies_grow_behind_their_ids(tmp_path: Path) -> None:
    views, schema = make_views(num_requests=120, num_events=600), small()
    is_new = (pl.col("time") - START) // DAY >= 8
    views["impressions"] = views["impressions"].with_columns(
        device=pl.when(is_new).then(pl.lit("watch")).otherwise(pl.col("device")),
        item=pl.when(is_new & (pl.col("item") == 103)).then(pl.lit(999, pl.Int64)).otherwise(pl.col("item")),
    )
    write_days(tmp_path / "views", views, range(8))
    build_training_set(schema, settings(tmp_path, "set"))
    before = TrainingSet.open(tmp_path / "set")
    write_days(tmp_path / "views", views, range(8, 10))
    append_to_training_set(schema, settings(tmp_path, "set", train_end=9, validation_end=10, test_end=11))
    after = TrainingSet.open(tmp_path / "set", verify=True)
    assert after.encoder.table_sizes["device"] == before.encoder.table_sizes["device"] + 1
    devices = pa.array(["phone", "tablet", "tv"])
    old, new = (s.encoder.encode("device", devices) for s in (before, after))
    np.testing.assert_array_equal(old, new)
    assert after.encoder.encode("device", pa.array(["watch"])).tolist() == [before.encoder.table_sizes["device"]]
    items = pa.array([*range(100, 120), 999])
    old, new = (s.encoder.encode("item_id", items) for s in (before, after))
    assert isinstance(old, np.ndarray)
    assert isinstance(new, np.ndarray)
    np.testing.assert_array_equal(old[old > 1], new[old > 1])
    assert (old[-1], new[-1]) == (1, before.encoder.table_sizes["item_id"])
    assert before.users.keys is not None
    assert after.users.keys is not None
    assert after.users.keys.to_pylist()[: before.users.num_rows] == before.users.keys.to_pylist()
    times = {name: after.split(name).requests.array("@time") for name in SPLITS}
    assert times["train"].max() < START + 9 * DAY <= times["validation"].min()
    assert len(times["test"]) == 0
    assert (np.diff(times["train"]) >= 0).all()
    assert len(times["train"]) > before.split("train").num_requests


def test_late_events_count_from_now_on_and_late_impressions_are_set_aside(tmp_path: Path) -> None:
    views, schema = make_views(num_requests=120, num_events=600), small()
    write_days(tmp_path / "views", views, range(8))
    build_training_set(schema, settings(tmp_path, "set"))
    before = impressions_of(TrainingSet.open(tmp_path / "set"), "clicked")
    late = pl.DataFrame({"user": range(12), "item": 101, "time": START - 5, "type": "click", "dwell": -1.0})
    late.write_parquet(tmp_path / "views" / "events.parquet" / "late.parquet")
    day = views["impressions"].filter((pl.col("time").min().over("request") - START) // DAY == 8)
    stale = views["impressions"].head(1).with_columns(request=pl.lit(10**6, pl.Int64), time=pl.lit(START + 1, pl.Int64))
    pl.concat([day, stale]).write_parquet(tmp_path / "views" / "impressions.parquet" / "day-8.parquet")
    append_to_training_set(schema, settings(tmp_path, "set"))
    training_set = TrainingSet.open(tmp_path / "set", verify=True)
    after = impressions_of(training_set, "clicked")
    assert {n: after[n]["history"] for n in before} == {n: before[n]["history"] for n in before}
    new = [row for n, row in after.items() if n not in before]
    assert len(new) == day.height
    assert all(row["history"][0] == (101, START - 5) for row in new)
    assert training_set.manifest["quarantined"]["impressions"] == {"earlier than what was built before": 1}


def test_nothing_new_is_nothing_done_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    views, schema = make_views(), small()
    write_days(tmp_path / "views", views, range(10))
    build_training_set(schema, settings(tmp_path, "set"))
    assert append_to_training_set(schema, settings(tmp_path, "set")).skipped
    assert versions_of((tmp_path / "set").resolve()) == []
    views["impressions"].head(3).write_parquet(tmp_path / "views" / "impressions.parquet" / "more.parquet")
    with pytest.raises(SourceError, match=r"split\.train_end must not be earlier"):
        append_to_training_set(schema, settings(tmp_path, "set", train_end=5))
    views["events"].head(3).write_parquet(tmp_path / "views" / "events.parquet" / "day-0.parquet")
    with pytest.raises(SourceError, match=r"day-0\.parquet must be as when the set was built, but was changed"):
        append_to_training_set(schema, settings(tmp_path, "set"))
    (tmp_path / "views" / "events.parquet" / "day-0.parquet").unlink()
    with pytest.raises(SourceError, match=r"day-0\.parquet must be as when the set was built, but is gone"):
        append_to_training_set(schema, settings(tmp_path, "set"))


def test_the_command_tells_what_a_build_tells(tmp_path: Path) -> None:
    """Notes, and items that have lost their attributes."""
    views = make_views(num_requests=120, num_events=600)
    write_days(tmp_path / "views", views, range(8))
    data = settings(tmp_path, "set")
    build_training_set(small(), data)
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(small().model_dump(mode="json")))
    experiment = {"name": "small", "schema_file": "schema.yaml", "data": data.model_dump(mode="json")}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(experiment | {"model": {"kind": "din"}}))
    write_days(tmp_path / "views", views, range(8, 9))
    views["items"].head(0).write_parquet(tmp_path / "views" / "items.parquet")
    done = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["data", "append", str(tmp_path / "x.yaml")])
    assert done.exit_code == 0, done.stderr
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert facts["items without attributes"] == facts["items"] == "20"
    assert facts["note 1"] == f"{tmp_path}/views/items.parquet holds no rows"


def test_new_files_may_lack_a_type_but_not_have_the_wrong_unit(tmp_path: Path) -> None:
    views, schema = make_views(num_requests=120, num_events=600), small()
    write_days(tmp_path / "views", views, range(8))
    build_training_set(schema, settings(tmp_path, "set"))
    num_clicks = TrainingSet.open(tmp_path / "set").events["clicked"].num_rows
    write_days(tmp_path / "views", views, range(8, 9))
    day = tmp_path / "views" / "events.parquet" / "day-8.parquet"
    likes = pl.read_parquet(day).with_columns(type=pl.lit("like"))
    likes.with_columns(pl.col("time") // 1000).write_parquet(day)
    with pytest.raises(SourceError, match=r"must hold times in us, its declared unit.*in ms they would be 2020-09-"):
        append_to_training_set(schema, settings(tmp_path, "set"))
    assert TrainingSet.open(tmp_path / "set").events["clicked"].num_rows == num_clicks
    likes.write_parquet(day)
    summary = append_to_training_set(schema, settings(tmp_path, "set"))
    assert [note.split(" (")[0] for note in summary.notes] == ["history 'clicked': there is no event of type 'click'"]
    assert TrainingSet.open(tmp_path / "set").events["seen"].num_rows > num_clicks


@pytest.mark.parametrize("max_age_hours", [None, 60.0])
def test_the_leak_detector_knows_what_was_there_at_each_append(tmp_path: Path, max_age_hours: float | None) -> None:
    histories = [{**h, "max_length": 3, "max_age_hours": max_age_hours} for h in schema_mapping()["histories"]]
    features = [*schema_mapping()["features"], {"name": "colour", "kind": "categorical", "scope": "candidate"}]
    histories[0]["event_features"] = [
        *histories[0]["event_features"],
        {"name": "source", "kind": "categorical", "scope": "event"},
    ]
    schema = make_schema(histories=histories, features=features)
    views = make_views(num_requests=120, num_events=900)
    day = (pl.col("time") - START) // DAY
    for log, column in (("impressions", "colour"), ("events", "source")):  # a new value a day, and one that is old
        views[log] = views[log].with_columns(
            pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit("old")).otherwise(day.cast(pl.String)).alias(column)
        )
    write_days(tmp_path / "views", views, range(8))
    build_training_set(schema, settings(tmp_path, "set"))
    # Names that come before all others, and events that come late: rows built before know nothing of them.
    views["events"].filter(day == 2).write_parquet(tmp_path / "views" / "events.parquet" / "a-late.parquet")
    split = {"train_end": 9, "validation_end": 10, "test_end": 11}
    for number in LAST_DAYS:
        write_days(tmp_path / "views", views, range(number, number + 1))
        for log in ("impressions", "events"):
            folder = tmp_path / "views" / f"{log}.parquet"
            (folder / f"day-{number}.parquet").rename(folder / f"at-{number}.parquet")
        append_to_training_set(schema, settings(tmp_path, "set", **split))
    training_set = TrainingSet.open(tmp_path / "set", verify=True)
    assert [a["files"]["events"] for a in training_set.manifest["appends"]] == [
        ["events.parquet/a-late.parquet", "events.parquet/at-8.parquet"],
        ["events.parquet/at-9.parquet"],
    ]
    sizes = [a["table_sizes"] for a in training_set.manifest["appends"]] + [training_set.encoder.table_sizes]
    assert sizes[0]["colour"] < sizes[1]["colour"] <= sizes[2]["colour"]
    report = check_leaks(settings(tmp_path, "set", **split), num_rows=10_000)
    assert report.rows_recomputed == sum(training_set.manifest["rows"].values()) == views["impressions"].height
    assert (report.differences, report.late) == ((), ())
    # What an append must not have known is found: its last event is one of another moment.
    requests = training_set.folder / "parts" / "00001" / "requests.arrow"
    table = open_table(requests)
    end = table.array("@end.seen")
    changed = {**table.columns, "@end.seen": end - (end > table.array("@start.seen") + 3)}
    requests.unlink()
    write_table(requests, changed)
    found = check_leaks(settings(tmp_path, "set", **split), num_rows=10_000).differences
    assert found
    assert {d.place.split(":")[0] for d in found} == {"history seen"}
    assert {d.split for d in found} == {"train"}


FOREVER = """
import itertools
import sys
from pathlib import Path
import polars as pl
from feature_store.append import append_to_training_set
from tests.feature_store.small_views import DAY
from tests.feature_store.test_append import SHAPES, settings
schema = SHAPES[sys.argv[3]][0]()
folder = Path(sys.argv[1])
for number in itertools.count(int(sys.argv[2])):
    for log in ("events", "impressions"):
        rows = pl.read_parquet(folder / f"{log}.parquet")
        rows = rows.with_columns(pl.col("^(time|created)$") + 10 * number * DAY)
        if log == "impressions":
            rows = rows.with_columns(pl.col("request") + number * 10_000)
        place = folder / "views" / f"{log}.parquet"
        rows.write_parquet(place / f".{number}")
        (place / f".{number}").rename(place / f"more-{number:06d}.parquet")
    append_to_training_set(schema, settings(folder, "set", test_end=20_000))
    print(number, flush=True)
"""
SHAPES: dict[str, tuple[Callable[[], Schema], Callable[[], dict[str, pl.DataFrame]]]] = {
    "plain": (small, lambda: make_views(num_requests=300, num_events=2_000)),
    "derived values": (derived_views.schema, lambda: derived_views.make(0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_appends_that_are_killed_at_random_moments_leave_whole_sets(tmp_path: Path, shape: str) -> None:
    """Whatever is there after a SIGKILL is the set before an append or after it, and so are the older versions."""
    schema, views, data = SHAPES[shape][0](), SHAPES[shape][1](), settings(tmp_path, "set", test_end=20_000)
    write_days(tmp_path / "views", views, range(10))
    for log in ("impressions", "events"):
        rows = views[log].with_columns(pl.col("^(time|created)$") + 10 * DAY)
        rows.write_parquet(tmp_path / f"{log}.parquet")
    build_training_set(schema, data)
    num_rows = views["impressions"].height
    rng, left_behind, was_interrupted = random.Random(0), 0, 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    appends = 0
    for _ in range(8):
        files = len(list((tmp_path / "views" / "impressions.parquet").glob("more-*")))
        process = subprocess.Popen(
            [sys.executable, "-c", FOREVER, str(tmp_path), str(files), shape],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == f"{files}\n"
        time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        left_behind += len(list(tmp_path.glob("set.tmp-*")))
        with exclusive(tmp_path / "set"):  # what the next command does first
            assert not list(tmp_path.glob("set.tmp-*"))
        training_set = TrainingSet.open(tmp_path / "set", verify=True)
        manifest = training_set.manifest
        done = (sum(manifest["rows"].values()) - num_rows) // num_rows
        assert sum(manifest["rows"].values()) == (1 + done) * num_rows, "an append is whole or not there"
        last_said = int(said[-1]) if said else files
        assert done in (last_said + 1, last_said + 2)
        assert len(training_set.split("test").impressions.array("@item_row")) == manifest["rows"]["test"]
        versions = versions_of(tmp_path / "set")
        assert [sum(TrainingSet.open(v, verify=True).manifest["rows"].values()) for v in versions[-2:]] == sorted(
            {sum(TrainingSet.open(v).manifest["rows"].values()) for v in versions[-2:]}
        )
        if len(list((tmp_path / "views" / "impressions.parquet").glob("more-*"))) > done:
            was_interrupted += 1
            append_to_training_set(schema, data)
        appends = len(TrainingSet.open(tmp_path / "set").manifest["appends"])
    assert left_behind > 0, "no kill fell into an append: the test has shown nothing"
    assert was_interrupted > 0
    assert len(versions_of(tmp_path / "set")) == appends
    assert check_leaks(data, num_rows=200).differences == ()
