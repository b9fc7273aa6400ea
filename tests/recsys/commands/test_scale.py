"""``recsys scale`` as a user types it: what it tells before training, and what it prints at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from recsys.cli import app
from recsys.commands import terminal
from tests.synthetic import SCHEMA, SPLIT
from tests.training_sets import build_synthetic


def scale(config: Path, *arguments: object) -> Any:
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    return runner.invoke(app, ["scale", str(config), *map(str, arguments)])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of a second, with its training set."""
    folder = tmp_path_factory.mktemp("scale")
    training_set = build_synthetic(folder, num_requests=200)
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA), encoding="utf-8")
    experiment = {
        "name": "tiny",
        "schema_file": "schema.yaml",
        "data": {"views": str(folder / "views"), "training_set": str(training_set.folder), "split": SPLIT},
        "model": {"kind": "dnn", "embedding_dim": 4, "hidden": [8]},
        "training": {"batch_size": 128, "num_threads": 1},
        "tracking": {"enabled": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return folder / "tiny.yaml"


def test_an_axis_of_few_sizes_is_told_before_and_not_fitted(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--vary", "training.data_fraction=0.3,1.0", "-o", tmp_path / "study", "--target", "0.999")
    done = scale(config, *arguments)
    assert done.exit_code == 0, done.stderr
    warning = "training.data_fraction: its sizes have 2 different training rows, and a power law takes 4"
    assert warning in done.stderr
    assert done.stderr.index(warning) < done.stderr.index("2 of 2 trials")
    assert "not fitted: a power law must be fitted to at least 4 different x, got 2" in done.stdout
    assert "none of these sizes" in done.stdout

    narrow = Console(width=80, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(terminal, "results", lambda: narrow)
    again = scale(config, *arguments).stdout
    [row] = [line for line in again.splitlines() if "data_fraction = 0.3" in line]
    assert len(row.rstrip()) <= 80


@pytest.mark.dist
def test_trials_run_side_by_side(config: Path, tmp_path: Path) -> None:
    arguments = ("--vary", "model.hidden=[8],[4]", "-o", tmp_path / "study", "--workers", "2")
    done = scale(config, *arguments)
    assert done.exit_code == 0, done.stderr
    assert "2 of 2 trials" in done.stderr
    assert len(json.loads((tmp_path / "study" / "study.json").read_text())["outcomes"]) == 2
