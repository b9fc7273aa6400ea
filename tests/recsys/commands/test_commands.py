"""The commands on one small data set, in the order in which a user types them."""

from __future__ import annotations

import html
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from recsys.cli import app
from recsys.commands.demo_service import Service
from recsys.errors import UnavailableError
from recsys.training_set import TrainingSet
from tests.synthetic import SCHEMA, SPLIT, write_views
from tests.training_sets import arrive, write_days

Run = Callable[..., Any]


def invoke(*arguments: object) -> Any:
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    return runner.invoke(app, [str(a) for a in arguments])


def answer(*arguments: object) -> Any:
    """What a command prints with ``--json``."""
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: views with two broken rows, schema, experiment; and the sound rows by themselves, to score."""
    folder = tmp_path_factory.mktemp("commands")
    write_views(folder / "views", num_requests=200)
    impressions = pl.read_parquet(folder / "views" / "impressions.parquet")
    impressions[2:].write_parquet(folder / "sound.parquet")
    is_broken = pl.int_range(pl.len()) < 2
    broken = impressions.with_columns(pl.when(is_broken).then(None).otherwise(pl.col("user_id")).alias("user_id"))
    broken.write_parquet(folder / "views" / "impressions.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA), encoding="utf-8")
    experiment = {
        "name": "tiny",
        "schema_file": "schema.yaml",
        "data": {"views": str(folder / "views"), "training_set": str(folder / "training_set"), "split": SPLIT},
        "model": {"kind": "din", "embedding_dim": 4, "attention_hidden": [8], "hidden": [8]},
        "training": {"epochs": 2, "batch_size": 64},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def built(place: Path) -> dict[str, Any]:
    return dict(answer("build", place / "tiny.yaml"))


@pytest.fixture(scope="module")
def trained(place: Path, built: dict[str, Any]) -> dict[str, Any]:
    return dict(answer("train", place / "tiny.yaml", "--run", place / "runs" / "tiny"))


@pytest.fixture(scope="module")
def exported(place: Path, trained: dict[str, Any]) -> dict[str, Any]:
    arguments = ("export", place / "runs" / "tiny", "-o", place / "artifact", "--compile", "never")
    return dict(answer(*arguments, "--register", "tiny-ranker"))


def test_build_counts_its_rows(place: Path, built: dict[str, Any]) -> None:
    impressions = pq.read_metadata(place / "views" / "impressions.parquet").num_rows
    broken = sum(built["quarantined"]["impressions"].values())
    assert broken >= 2
    assert sum(built["rows"].values()) + built["outside_split"] + broken == impressions
    assert not built["skipped"]
    assert (place / "training_set" / "manifest.json").is_file()


def test_an_equal_build_is_kept_and_force_builds_again(place: Path, built: dict[str, Any]) -> None:
    manifest = place / "training_set" / "manifest.json"
    first = manifest.stat().st_ino
    assert answer("build", place / "tiny.yaml")["skipped"]
    assert manifest.stat().st_ino == first
    assert not answer("build", place / "tiny.yaml", "--force")["skipped"]
    assert manifest.stat().st_ino != first


def test_build_shows_what_it_did(place: Path, built: dict[str, Any]) -> None:
    shown = invoke("build", place / "tiny.yaml").stdout
    assert "(up to date)" in shown
    assert f"{built['rows']['train']:,}" in shown


@pytest.mark.parametrize("command", ["build", "train"])
def test_a_wrong_setting_is_named(place: Path, command: str) -> None:
    done = invoke(command, place / "tiny.yaml", "--set", "model.embedding_dimm=8", "--set", "data.views=7")
    assert done.exit_code == 2
    assert "embedding_dimm: is not a known key" in done.stderr
    assert "did you mean 'embedding_dim'?" in done.stderr
    assert "data.views" in done.stderr


def test_train_leaves_a_report_and_an_mlflow_run(built: dict[str, Any], trained: dict[str, Any]) -> None:
    assert trained["epochs"] == 2
    report = Path(trained["report"]).read_text(encoding="utf-8")
    assert report.startswith("<!doctype html>")
    for reason, rows in built["quarantined"]["impressions"].items():
        assert f'impressions: {html.escape(reason)}</th><td class="number">{rows:,}</td>' in report
    assert trained["mlflow"]["tracking_uri"].startswith("sqlite:///")
    assert len(trained["mlflow"]["run_id"]) == 32


def test_a_finished_run_is_not_trained_again(place: Path, trained: dict[str, Any]) -> None:
    done = invoke("train", place / "tiny.yaml", "--run", place / "runs" / "tiny", "--json")
    assert "nothing to train" in done.stderr
    assert json.loads(done.stdout)["best_checkpoint"] == trained["best_checkpoint"]


def test_a_run_folder_of_other_settings_is_refused(place: Path, trained: dict[str, Any]) -> None:
    run = place / "runs" / "tiny"
    done = invoke("train", place / "tiny.yaml", "--run", run, "--set", "training.seed=9")
    assert done.exit_code == 2
    assert "training.seed" in done.stderr


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_repeats_the_figures_of_training(place: Path, trained: dict[str, Any], split: str) -> None:
    tasks = answer("evaluate", place / "runs" / "tiny", "--split", split)["tasks"]
    assert set(tasks) == set(trained[split]) == {"click", "like"}
    for task, expected in trained[split].items():
        # Training looks up fused tables, evaluation plain ones: sums in another order, so near-ties may change places.
        assert tasks[task]["logloss"] == pytest.approx(expected["logloss"], abs=1e-6)
        assert tasks[task]["auc"] == pytest.approx(expected["auc"], abs=1e-3)
        assert tasks[task]["num_rows"] == expected["num_rows"]


def test_evaluate_shows_a_table(place: Path, trained: dict[str, Any]) -> None:
    expected = answer("evaluate", place / "runs" / "tiny")["tasks"]
    shown = [line.split() for line in invoke("evaluate", place / "runs" / "tiny").stdout.splitlines()]
    for task, metrics in expected.items():
        row = [f"{metrics[name]:.4f}" for name in ("auc", "gauc", "logloss", "ne", "ece")]
        assert [task, *row, str(metrics["num_rows"])] in shown


def test_evaluate_compares_with_popularity_and_with_another_run(place: Path, trained: dict[str, Any]) -> None:
    run = place / "runs" / "tiny"
    found = answer("evaluate", run, "--base", "popularity")
    for task, metrics in found["tasks"].items():
        for name in ("auc", "gauc"):
            ours, base = metrics[name], found["base_tasks"][task][name]
            expected = ((ours - 0.5) / (base - 0.5) - 1) * 100
            assert found["rela_impr"][task][name] == pytest.approx(expected)
        assert found["base_tasks"][task]["num_rows"] == metrics["num_rows"]
    itself = answer("evaluate", run, "--base", run)
    assert itself["rela_impr"]["click"] == {"auc": 0.0, "gauc": 0.0}
    shown = invoke("evaluate", run, "--base", "popularity").stdout
    assert "RelaImpr over popularity" in shown
    assert str(found["tasks"]["click"]["gauc_users"]) in shown


def test_sweep_writes_a_table_and_trains_nothing_twice(place: Path, trained: dict[str, Any]) -> None:
    other = yaml.safe_load((place / "tiny.yaml").read_text(encoding="utf-8")) | {"name": "mean"}
    other["model"] = other["model"] | {"pooling": "mean"}
    (place / "mean.yaml").write_text(yaml.safe_dump(other), encoding="utf-8")
    arguments = ("sweep", place / "tiny.yaml", place / "mean.yaml", "--folder", place / "sweep", "--seeds", "1,2")
    quick = ("--set", "training.epochs=1", "--set", "tracking.enabled=false")
    found = answer(*arguments, *quick, "--base", "mean")
    assert set(found["arms"]) == {"tiny", "mean"}
    for name, arm in found["arms"].items():
        values = [run["test"]["click"]["auc"] for run in arm["seeds"].values()]
        assert len(set(values)) == 2, "seeds must differ"
        assert arm["test"]["click"]["auc"]["mean"] == pytest.approx(sum(values) / 2)
        assert arm["test"]["click"]["auc"]["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        summary = json.loads((place / "sweep" / name / "seed-2" / "summary.json").read_text(encoding="utf-8"))
        assert summary["test"]["click"]["auc"] == arm["seeds"]["2"]["test"]["click"]["auc"]
    ours, base = (found["arms"][name]["test"]["click"]["auc"]["mean"] for name in ("tiny", "mean"))
    expected = ((ours - 0.5) / (base - 0.5) - 1) * 100
    assert found["arms"]["tiny"]["rela_impr"]["click"]["auc"] == pytest.approx(expected)
    table = (place / "sweep" / "sweep.md").read_text(encoding="utf-8")
    assert f"{ours:.4f} ± " in table
    checkpoints = sorted((place / "sweep").rglob("checkpoints/*"))
    times = {path: path.stat().st_mtime_ns for path in checkpoints}
    assert answer(*arguments, *quick, "--base", "mean") == found
    assert {path: path.stat().st_mtime_ns for path in sorted((place / "sweep").rglob("checkpoints/*"))} == times


def test_sweep_refuses_what_cannot_stand_in_one_table(place: Path, trained: dict[str, Any]) -> None:
    folder = ("--folder", place / "refused")
    twice = invoke("sweep", place / "tiny.yaml", place / "tiny.yaml", *folder)
    assert twice.exit_code == 2
    assert "experiments must be at least one and all different" in twice.stderr
    seeds = invoke("sweep", place / "tiny.yaml", *folder, "--seeds", "1,one")
    assert seeds.exit_code == 2
    assert "--seeds must be whole numbers" in seeds.stderr
    base = invoke("sweep", place / "tiny.yaml", *folder, "--base", "tony")
    assert base.exit_code == 2
    assert "base must be one of the experiments" in base.stderr
    assert not (place / "refused").exists()


def test_evaluate_of_no_run_says_so(tmp_path: Path) -> None:
    done = invoke("evaluate", tmp_path)
    assert done.exit_code == 2
    assert "train a model first" in done.stderr


def test_export_checks_what_it_wrote(place: Path, exported: dict[str, Any]) -> None:
    assert exported["engine"] == "portable"
    assert exported["max_error"] < 1e-5
    assert exported["registered"]["name"] == "tiny-ranker"
    assert exported["registered"]["alias"] == "champion"
    assert (place / "artifact" / "features" / "users.arrow").is_file()


def test_score_adds_a_probability_a_task(place: Path, exported: dict[str, Any]) -> None:
    source, target = place / "sound.parquet", place / "scored.parquet"
    summary = answer("score", place / "artifact", "-i", source, "-o", target)
    scored = pq.read_table(target)
    assert summary["rows"] == scored.num_rows == pq.read_metadata(source).num_rows
    assert summary["columns"] == ["score_click", "score_like"]
    values = scored.column("score_click").to_numpy()
    assert ((values > 0) & (values < 1)).all()
    assert len(np.unique(values)) > 10


def test_a_registered_version_scores_like_its_artifact(place: Path, exported: dict[str, Any]) -> None:
    source = place / "sound.parquet"
    answer("score", place / "artifact", "-i", source, "-o", place / "a.parquet")
    uri = exported["registered"]["tracking_uri"]
    model = "models:/tiny-ranker@champion"
    answer("score", model, "-i", source, "-o", place / "b.parquet", "--tracking-uri", uri)
    assert pq.read_table(place / "a.parquet").equals(pq.read_table(place / "b.parquet"))


def test_score_of_an_unknown_model_names_it(place: Path, exported: dict[str, Any]) -> None:
    source = place / "sound.parquet"
    uri = exported["registered"]["tracking_uri"]
    done = invoke("score", "models:/nobody@champion", "-i", source, "-o", place / "c.parquet", "--tracking-uri", uri)
    assert done.exit_code == 2
    assert "nobody" in done.stderr
    assert not (place / "c.parquet").exists()


def test_serve_ranks_and_stops(place: Path, exported: dict[str, Any]) -> None:
    items = pq.read_table(place / "views" / "items.parquet").column("item_id").to_pylist()[:5]
    with Service(place / "artifact", place / "service.log") as service:
        reply = service.rank({"user_id": 1003, "candidates": items})
        with pytest.raises(UnavailableError, match="candidates must name at least one"):
            service.rank({"user_id": 1003, "candidates": []})
    scores = [entry["score"] for entry in reply["ranked"]]
    assert sorted(entry["item"] for entry in reply["ranked"]) == sorted(items)
    assert scores == sorted(scores, reverse=True)
    assert not reply["unknown_user"]
    with pytest.raises(UnavailableError, match="does not answer"):
        service.rank({"user_id": 1003, "candidates": items})


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="status 2") as caught, Service(tmp_path / "none", tmp_path / "log"):
        pass
    assert caught.value.hint is not None
    assert "none" in caught.value.hint


def test_simulate_writes_what_it_says(tmp_path: Path) -> None:
    summary = answer("simulate", "--impressions", 12_000, "--seed", 3, "-o", tmp_path / "views", "--set", "num_days=5")
    assert summary["config"]["num_days"] == 5
    for view in ("impressions", "truth"):
        assert pq.read_metadata(tmp_path / "views" / f"{view}.parquet").num_rows == 12_000
    assert summary["num_rows"]["impressions"] == 12_000


def test_simulate_names_an_unknown_setting(tmp_path: Path) -> None:
    done = invoke("simulate", "-o", tmp_path / "views", "--set", "clik_rate=0.1")
    assert done.exit_code == 2
    assert "did you mean 'click_rate'?" in done.stderr


def test_data_lists_what_it_can_read() -> None:
    listing = answer("data", "list")
    assert {"kuairand_pure", "movielens_1m"} <= set(listing)
    assert all(entry["raw_files"] and entry["licence"] for entry in listing.values())
    shown = invoke("data", "list").stdout
    assert all(name in shown for name in listing)


def test_check_leaks_passes_an_honest_set_and_ends_with_its_own_status_on_a_leak(
    place: Path, built: dict[str, Any], tmp_path: Path
) -> None:
    report = answer("data", "check-leaks", place / "tiny.yaml", "--rows", 60)
    assert report["is_clean"]
    assert (report["rows_recomputed"], report["differences"], report["late"]) == (60, [], [])
    assert {f["task"] for f in report["features"]} == {"click", "like"}
    shown = invoke("data", "check-leaks", place / "tiny.yaml", "--rows", 3)
    assert shown.exit_code == 0
    assert "no leak found" in shown.stdout
    low = invoke("data", "check-leaks", place / "tiny.yaml", "--rows", 3, "--max-auc", 2)
    assert low.exit_code == 2
    views = tmp_path / "views"
    shutil.copytree(place / "views", views)
    impressions = pl.read_parquet(views / "impressions.parquet")
    impressions.with_columns(pl.col("is_click").alias("position")).write_parquet(views / "impressions.parquet")
    schema = yaml.safe_load((place / "schema.yaml").read_text())
    schema["features"].append({"name": "position", "scope": "candidate", "kind": "categorical"})
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    experiment = yaml.safe_load((place / "tiny.yaml").read_text())
    experiment["data"] |= {"views": str(views), "training_set": str(tmp_path / "training_set")}
    (tmp_path / "leaking.yaml").write_text(yaml.safe_dump(experiment))
    answer("build", tmp_path / "leaking.yaml")
    done = invoke("data", "check-leaks", tmp_path / "leaking.yaml")
    assert done.exit_code == 3
    assert "tells too much: position about click" in done.stdout


def test_data_draws_negatives_as_told(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    lines = [f"{n % 3},{n % 7},{n % 2},pv,{1511600000 + 9000 * n}" for n in range(60)]
    (tmp_path / "raw" / "UserBehavior.csv").write_text("\n".join(lines))
    told = ("--negatives", "uniform", "--per-positive", 3, "--seed", 9)
    for views, command in (("a", ("data", "taobao_userbehavior")), ("b", ("data", "convert", "taobao_userbehavior"))):
        summary = answer(*command, "--raw", tmp_path / "raw", "-o", tmp_path / views, *told)
        assert summary["sampling"]["negatives"] == "uniform"
        assert (summary["sampling"]["per_positive"], summary["sampling"]["seed"]) == (3, 9)
    refused = invoke("data", "frappe", "--raw", tmp_path / "raw", "--negatives", "uniform")
    assert refused.exit_code == 2
    assert "need a data set without impressions" in refused.stderr
    unknown = invoke("data", "taobao_userbehavior", "--raw", tmp_path / "raw", "--negatives", "popular")
    assert unknown.exit_code == 2
    assert "popularity" in unknown.stderr


def test_data_names_what_is_missing(tmp_path: Path) -> None:
    unknown = invoke("data", "movielens")
    assert unknown.exit_code == 2
    assert "movielens_1m" in unknown.stderr
    no_folder = invoke("data", "movielens_1m")
    assert no_folder.exit_code == 2
    assert "--raw" in no_folder.stderr
    assert "ratings.dat" in no_folder.stderr


def test_data_converts(tmp_path: Path, dataset: Callable[[str], Path]) -> None:
    raw = dataset("movielens_1m")
    summary = answer("data", "movielens_1m", "--raw", raw, "-o", tmp_path / "views")
    assert summary["rows_written"]["users"] == 6040
    assert pq.read_metadata(tmp_path / "views" / "users.parquet").num_rows == 6040


@pytest.mark.slow
@pytest.mark.dist
def test_a_set_is_built_by_workers_and_grows_day_by_day(place: Path, tmp_path: Path) -> None:
    views = write_days(tmp_path)
    arrive(tmp_path, range(8))
    shutil.copy(place / "schema.yaml", tmp_path)
    experiment = yaml.safe_load((place / "tiny.yaml").read_text())
    experiment["data"] |= {"views": str(views), "training_set": str(tmp_path / "set")}
    experiment["training"]["epochs"] = 1
    config = tmp_path / "grows.yaml"
    config.write_text(yaml.safe_dump(experiment))
    nothing = invoke("data", "append", config)
    assert nothing.exit_code == 2
    assert "must hold a training set, got no manifest.json" in nothing.stderr
    built = answer("build", config, "--workers", 2)
    local = answer("build", config, "--set", f"data.training_set={tmp_path / 'local'}")
    assert {**built, "seconds": 0, "training_set": ""} == {**local, "seconds": 0, "training_set": ""}
    sums = [
        {n: f["sha256"] for n, f in TrainingSet.open(tmp_path / s).manifest["files"].items()} for s in ("set", "local")
    ]
    assert sums[0] == sums[1]
    assert answer("data", "append", config)["skipped"]
    for day in (8, 9):
        arrive(tmp_path, range(day, day + 1))
        shown = invoke("data", "append", config)
        assert shown.exit_code == 0, shown.stderr
        assert "appended in" in shown.stdout
    rebuilt = answer("build", config, "--set", f"data.training_set={tmp_path / 'rebuilt'}")
    grown = answer("build", config)
    assert grown["skipped"], "an appended set is up to date"
    for counted in ("rows", "requests", "users", "items", "time_spans", "quarantined", "unused_events"):
        assert grown[counted] == rebuilt[counted]
    assert answer("data", "check-leaks", config)["is_clean"]
    report = answer("train", config, "--run", tmp_path / "run")
    assert report
    assert answer("export", tmp_path / "run", "-o", tmp_path / "artifact", "--compile", "never")
    pruned = answer("data", "prune", config, "--keep", 1)
    assert [Path(p).name for p in pruned["pruned"]] == ["000001"]
    assert [Path(p).name for p in pruned["kept"]] == ["000002"]
    assert "nothing" in invoke("data", "prune", config, "--keep", 1).stdout
    TrainingSet.open(tmp_path / "set", verify=True)


@pytest.mark.slow
def test_demo_runs_all_stages_and_again_from_what_is_there(tmp_path: Path) -> None:
    arguments = ("demo", "-o", tmp_path / "a #1: 'demo', [x]", "--impressions", 12_000, "--epochs", 1)
    first = answer(*arguments)
    scorers = first["scorers"]
    assert scorers["floor"]["auc"] < scorers["ceiling"]["auc"]
    assert scorers["model"]["auc"] < scorers["ceiling"]["auc"]
    assert len({scorers[s]["num_rows"] for s in scorers}) == 1
    assert first["score_difference"] < 1e-6
    probabilities = [c["probability"] for c in first["top_candidates"]]
    assert probabilities == sorted(probabilities, reverse=True)
    report = Path(first["report"]).read_text(encoding="utf-8")
    assert "true probabilities" in report
    assert f"{scorers['ceiling']['auc']:.4f}" in report
    assert Path(first["artifact"], "manifest.json").is_file()
    assert pq.read_metadata(first["scores"]).num_rows == scorers["model"]["num_rows"]

    again = invoke(*arguments)
    assert again.exit_code == 0
    assert again.stderr.count("there already") == 4
    assert "LIGHTSUAN, taught by SUAN" in again.stdout
    names = [m["name"] for m in first["models"]]
    assert names == ["DIN", "SUAN (the teacher)", "LIGHTSUAN, taught by SUAN"]
    assert first["models"][0]["metrics"]["auc"] == scorers["model"]["auc"]
    assert len({m["metrics"]["num_rows"] for m in first["models"]} | {scorers["model"]["num_rows"]}) == 1
    assert len({m["metrics"]["auc"] for m in first["models"]}) == 3
    assert first["models"][2]["network_parameters"] < first["models"][1]["network_parameters"]
    assert f"{scorers['model']['auc']:.4f}" in again.stdout
    assert "item popularity (floor)" in again.stdout


@pytest.mark.parametrize("target", ["/proc/x", "/proc/x/y", "FILE/x"])
@pytest.mark.parametrize("command", ["simulate", "demo", "build", "data", "check", "inspect"])
def test_a_place_that_cannot_be_written_is_told_before_any_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, target: str
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("work began")

    # By its name, the package would give the function of the same name.
    monkeypatch.setattr(importlib.import_module("feature_store.datasets.simulator.simulate"), "build_world", work)
    monkeypatch.setattr("feature_store.build._build", work)
    monkeypatch.setattr("feature_store.quality.check_quality", work)
    monkeypatch.setattr("feature_store.propose.propose", work)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "raw").mkdir()
    target = str(tmp_path / target)
    arguments: dict[str, tuple[object, ...]] = {
        "simulate": ("simulate", "--output", target),
        "demo": ("demo", "--output", target),
        "build": ("build", place / "tiny.yaml", "--set", f"data.training_set={target}"),
        "data": ("data", "kuairand_pure", "--raw", tmp_path / "raw", "--output", target),
        "check": ("data", "check", place / "tiny.yaml", "--html", target),
        "inspect": ("data", "inspect", place / "sound.parquet", "--schema", target),
    }
    done = invoke(*arguments[command])
    assert done.exit_code == 2, done.output
    assert f"must be a place that can be written to, got {target}" in done.stderr
    assert command != "check" or "--html must be" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_wants_a_folder(tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("")
    done = invoke("demo", "-o", tmp_path / "FILE")
    assert done.exit_code == 2
    assert f"--output must be a folder, got the file {tmp_path / 'FILE'}" in done.stderr


def test_the_demo_replaces_nothing_that_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "mine" / "run").mkdir(parents=True)
    (tmp_path / "mine" / "run" / "config.json").write_text("{}")
    done = invoke("demo", "-o", tmp_path / "mine")
    assert done.exit_code == 2
    assert f"an earlier demo, got {tmp_path / 'mine'}, which holds other files" in done.stderr
    assert (tmp_path / "mine" / "run" / "config.json").read_text() == "{}"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["run"]


def test_the_demo_simulates_again_where_a_file_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recsys.commands import demo_stages

    calls = []
    original = demo_stages.simulate
    monkeypatch.setattr(demo_stages, "simulate", lambda *a, **k: calls.append(1) or original(*a, **k))
    root = tmp_path / "demo"
    demo_stages._claim(root)
    for lost in (None, None, "events.parquet"):
        if lost:
            (root / "views" / lost).unlink()
        demo_stages._claim(root)
        demo_stages._simulate(root, 2_000)
    assert len(calls) == 2, "the second time everything is there; the third a file is missing"
    assert (root / "views" / "events.parquet").is_file()


def test_build_tells_what_it_found(place: Path) -> None:
    done = invoke("build", place / "tiny.yaml")
    assert done.exit_code == 0, done.stderr
    summary = answer("build", place / "tiny.yaml")
    shown = {line.split("  ")[0]: line.rpartition("  ")[2] for line in done.stdout.splitlines()}
    assert shown["users without attributes"] == f"{summary['users_without_attributes']:,}"
    assert shown["items without attributes"] == f"{summary['items_without_attributes']:,}"
    assert shown["events in no history"] == f"{summary['unused_events']:,}"
    assert summary["time_spans"]["impressions"][0].startswith("20")
    for log, (first, last) in summary["time_spans"].items():
        assert shown[f"time of {log}"] == f"{first} to {last}"
    assert [v for k, v in shown.items() if k.startswith("note ")] == summary["notes"]


@pytest.mark.parametrize("wrong", [999, 10**9 + 1])
def test_simulate_says_the_sizes_that_it_takes(tmp_path: Path, wrong: int) -> None:
    from feature_store.datasets.simulator import SimulatorConfig
    from recsys.commands.simulate import MAX_IMPRESSIONS, MIN_IMPRESSIONS

    bounds = SimulatorConfig.model_json_schema()["properties"]["num_impressions"]
    assert (bounds["minimum"], bounds["maximum"]) == (MIN_IMPRESSIONS, MAX_IMPRESSIONS)
    assert "1000<=x<=1000000000" in invoke("simulate", "--help").stdout
    done = invoke("simulate", "--output", tmp_path / "out", "--impressions", wrong)
    assert done.exit_code == 2
    assert "Invalid value for '--impressions'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_train_refuses_a_training_set_that_was_changed(place: Path, tmp_path: Path) -> None:
    """One bit of one label: nothing but the checksum knows."""
    copy = tmp_path / "set"
    arguments = ("train", place / "tiny.yaml", "--set", f"data.training_set={copy}", "--set", "training.epochs=1")
    invoke("build", place / "tiny.yaml")
    shutil.copytree(place / "training_set", copy)
    table = copy / "train" / "impressions.arrow"
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    done = invoke(*arguments, "--run", tmp_path / "run")
    assert done.exit_code == 2
    assert f"{table} was changed after it was written" in done.stderr
    assert not (tmp_path / "run").exists()


def test_missing_files_are_named_by_the_whole_path(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("build", place / "tiny.yaml", "--set", "data.views=nowhere", "--set", "data.training_set=set")
    assert done.exit_code == 2
    assert f"{tmp_path}/nowhere/impressions.parquet does not exist" in done.stderr
    assert f"'nowhere' is relative to the working folder, {tmp_path}" in done.stderr
    done = invoke("build", place / "tiny.yaml", "--set", "schema_file=../schem.yaml")
    assert done.exit_code == 2
    assert f"{place.parent}/schem.yaml does not exist" in done.stderr
    assert "relative to this one" in done.stderr
