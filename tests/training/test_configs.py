"""The experiments that come with the project are whole: each fits its schema, and builds the model that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recsys.models import build_model
from recsys.models.aw_moe import AWMoEConfig
from recsys.models.dare import TWINConfig
from training.distill import OfflineDistillationConfig, OnlineDistillationConfig
from training.experiment import load_experiment

FILES = sorted((Path(__file__).parents[2] / "configs" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_an_experiment_builds_its_model(path: Path) -> None:
    experiment, schema = load_experiment(path)
    assert experiment.name == path.stem
    sizes = dict.fromkeys(schema.table_encoders, 3)
    assert sum(p.numel() for p in build_model(experiment.model, schema, sizes).parameters()) > 0
    match experiment.distillation:
        case OnlineDistillationConfig() as config:
            build_model(config.teacher, schema, sizes)
        case OfflineDistillationConfig() as config:
            # The teacher is the run that another of these files leaves behind, of the same data.
            teacher, of_teacher = load_experiment(path.with_name(f"{Path(config.teacher).name}.yaml"))
            assert config.teacher == f"runs/{teacher.name}"
            assert (teacher.data, of_teacher) == (experiment.data, schema)


def test_no_two_experiments_are_the_same() -> None:
    seen: dict[str, str] = {}
    for path in FILES:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        del content["name"]
        same = seen.setdefault(yaml.safe_dump(content), path.name)
        assert same == path.name, f"{same} and {path.name} differ in their names alone"


def test_every_relative_of_a_model_that_is_compared_with_others_has_a_file() -> None:
    experiments = [load_experiment(path)[0] for path in FILES]
    twins = [e.model for e in experiments if isinstance(e.model, TWINConfig)]
    assert {m.search for m in twins} == {"attention", "category", "hash", "sampling"}
    assert {"shared", "by_role_and_side"} <= {m.tables for m in twins}
    assert any(m.projection for m in twins)
    moes = [e.model for e in experiments if isinstance(e.model, AWMoEConfig)]
    assert {m.gate for m in moes} == {"attention", "mean", "anchor", "none"}
    assert {m.pooling for m in moes} == {"attention", "mean"}
    assert {m.anchor for m in moes if m.gate == "attention"} == {"candidate", "query"}
    assert {(m.has_gate_unit, m.has_activation_unit) for m in moes} == {(True, True), (False, True), (True, False)}
    assert any(m.contrastive_weight > 0 for m in moes)
    assert {e.distillation.mode for e in experiments if e.distillation} == {"online", "offline"}
