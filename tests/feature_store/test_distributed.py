from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from feature_store.build import DataConfig, build_training_set
from feature_store.distributed import RayEvents, build_distributed, scan_file, sort_shard, spill_file
from recsys.errors import SourceError
from recsys.training_set import TrainingSet
from tests.feature_store import derived_views
from tests.feature_store.small_views import config, make_schema, make_views, schema_mapping


def folder_of_parts(folder: Path, view: pl.DataFrame, num_parts: int) -> None:
    folder.mkdir(parents=True)
    for part in range(num_parts):
        view[part::num_parts].write_parquet(folder / f"part-{part}.parquet")


def data_of(folder: Path, name: str) -> DataConfig:
    return config(folder).model_copy(update={"training_set": str(folder / name)})


def write_all(folder: Path) -> None:
    views = make_views(num_requests=200, num_events=3_000, num_users=80)
    broken = views["events"].head(5).with_columns(time=pl.lit(-1, pl.Int64))
    folder_of_parts(folder / "views" / "events.parquet", pl.concat([views["events"], broken]), 3)
    for name in ("impressions", "users", "items"):
        views[name].write_parquet(folder / "views" / f"{name}.parquet")


def test_tasks_in_turn_give_the_files_of_the_local_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray: the same tasks, one after the other."""
    tasks = []

    def in_turn(self: RayEvents, task: object, rows: list[dict[str, object]]) -> list[dict[str, object]]:
        tasks.append(task)
        return [task(row) for row in rows]  # type: ignore[operator]

    write_all(tmp_path)
    monkeypatch.setattr(RayEvents, "_map", in_turn)
    local = build_training_set(make_schema(), data_of(tmp_path, "local"))
    spread = build_training_set(make_schema(), data_of(tmp_path, "spread"), work=RayEvents(2))
    assert tasks == [scan_file, spill_file, sort_shard]
    assert_same_files(tmp_path)
    assert spread.time_spans == local.time_spans
    assert "events of type 'click'" in spread.time_spans
    assert spread.notes == local.notes
    assert spread.quarantined == local.quarantined == {"events": {"time is negative": 5}}


@pytest.mark.slow
def test_tasks_give_derived_values_and_refuse_the_wrong_unit_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RayEvents, "_map", lambda self, task, rows: [task(row) for row in rows])
    views, schema = derived_views.make(3), derived_views.schema()
    folder_of_parts(tmp_path / "views" / "events.parquet", views.pop("events"), 3)
    for name, view in views.items():
        view.write_parquet(tmp_path / "views" / f"{name}.parquet")
    build_training_set(schema, data_of(tmp_path, "local"))
    build_training_set(schema, data_of(tmp_path, "spread"), work=RayEvents(2))
    assert_same_files(tmp_path)
    finer = schema_mapping()["views"]
    finer["events"]["time_unit"] = "ns"
    with pytest.raises(SourceError, match="must hold times in ns"):
        build_training_set(make_schema(views=finer), data_of(tmp_path, "wrong"), work=RayEvents(2))


@pytest.mark.slow
@pytest.mark.dist
def test_two_workers_give_the_files_of_the_local_build(tmp_path: Path) -> None:
    write_all(tmp_path)
    build_training_set(make_schema(), data_of(tmp_path, "local"))
    build_distributed(make_schema(), data_of(tmp_path, "spread"), workers=2)
    assert_same_files(tmp_path)


def assert_same_files(folder: Path) -> None:
    local, spread = (TrainingSet.open(folder / name).manifest for name in ("local", "spread"))
    data_files = {n for n in local["files"] if not n.startswith("quarantine/")}
    assert data_files >= {"events/clicked.arrow", "train/requests.arrow", "users.arrow"}
    assert {n: local["files"][n]["sha256"] for n in local["files"]} == {
        n: spread["files"][n]["sha256"] for n in spread["files"]
    }
    assert local["rows"] == spread["rows"]
