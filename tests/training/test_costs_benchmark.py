"""The benchmark of what experiments cost."""

from pathlib import Path

import pytest

from benchmarks import costs
from recsys.config import validate
from recsys.schema import Schema
from tests.synthetic import SCHEMA, SPLIT
from tests.training_sets import build_synthetic
from training.experiment import ExperimentConfig
from training.sweep import Arm

pytestmark = pytest.mark.slow


def arm(folder: Path, name: str, **values: object) -> Arm:
    document = {
        "name": name,
        "schema_file": "unused.yaml",
        "data": {"views": str(folder / "views"), "training_set": str(folder / "training_set"), "split": SPLIT},
        "training": {"batch_size": 32, "num_threads": 1},
    } | values
    return Arm(validate(ExperimentConfig, document, source=name), validate(Schema, SCHEMA, source="schema"))


def test_it_counts_the_student_and_times_its_training_with_the_teacher(tmp_path: Path) -> None:
    build_synthetic(tmp_path, num_requests=120)
    small, large = {"kind": "din", "embedding_dim": 4}, {"kind": "suan", "embedding_dim": 16, "num_layers": 4}
    arms = [
        arm(tmp_path, "alone", model=small),
        arm(tmp_path, "taught", model=small, distillation={"mode": "online", "teacher": large}),
    ]
    found = costs.run(arms, batches=2, requests=30, repeats=3)
    alone, taught = found["models"]["alone"], found["models"]["taught"]
    for kind in ("network_parameters", "table_parameters"):
        assert alone[kind] == taught[kind] > 0
    assert taught["step_ms"] > alone["step_ms"] > 0, "the teacher's step is a part of it"
    assert min(alone["scoring_ms"], taught["scoring_ms"]) > 0
    assert found["candidates"] >= 30
    assert found["events"] > 5
    lines = costs.markdown(found).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| alone", "| taught"]
