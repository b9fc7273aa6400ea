from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from recsys.errors import ConfigError
from tests.synthetic import SCHEMA, SPLIT, schema
from training.experiment import load_experiment

EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "schema_file": "schemas/synthetic.yaml",
    "data": {"views": "views", "training_set": "set", "split": SPLIT},
    "model": {"kind": "din"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "synthetic.yaml").write_text(yaml.safe_dump(SCHEMA))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT))
    return path


def test_the_schema_is_found_beside_the_file_whatever_the_working_directory(
    path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    experiment, found = load_experiment(path, ["training.epochs=3"])
    assert found == schema()
    assert experiment.training.epochs == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=0", r"training\.epochs: must be greater than or equal to 1, got 0"),
        ("training.embedding_optimizer.kind=adamax", r"embedding_optimizer\.kind: 'adamax' is not known"),
        ("training.embedding_optimizer={kind: adagrad, weight_decay: 0.1}", r"weight_decay: is not a known key"),
        ("training.dense_optimizer={kind: adam, lr: '1e-3'}", r"write 1e-3 without quotes"),
        ("training.selection.metric=accuracy", r"selection\.metric: must be 'auc', 'gauc', 'logloss', 'ne' or 'ece'"),
        ("training.selection.task=clik", r"selection\.task must be a task of the schema, got 'clik'\s+Hint: .*'click'"),
        ("training.task_weights={lik: 0.5}", r"task_weights\.lik must be a task of the schema, got 'lik'"),
        ("training.task_weights={like: -0.5}", r"task_weights\.like must be at least 0, got -0\.5"),
        ("training.batchsize=5", r"training\.batchsize: is not a known key"),
    ],
)
def test_mistakes_are_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_experiment(path, [override])


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("training.seed=2", True),
        ("training.epochs=2", True),
        ("training.selection.patience=7", True),
        ("model.dropout=0.1", True),
        ("training.num_threads=3", False),
        ("training.checkpoint_every_s=7.0", False),
        ("training.prefetch_batches=1", False),
        ("tracking.enabled=false", False),
        ("data.training_set=elsewhere", False),
        ("name=other", False),
    ],
)
def test_the_fingerprint_covers_what_decides_the_result(path: Path, override: str, changes: bool) -> None:
    before, found = load_experiment(path)
    after, _ = load_experiment(path, [override])
    assert (before.run_fingerprint(found, "s") != after.run_fingerprint(found, "s")) == changes
    assert before.run_fingerprint(found, "s") != before.run_fingerprint(found, "t")
