"""Scaling studies: which trials there are, what they cost, what is read from them, and that they go on."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from recsys.errors import ConfigError
from recsys.training_set import TrainingSet
from tests.training.conftest import MakeExperiment
from training.data import BatchLoader, ShuffleConfig, ordered_requests, sampled
from training.scaling import FRACTION, LENGTH, Axis, Outcome, cost_of, curves_of, recommend, run_study, trials_of

BASE = Outcome({}, 1, 0.7, 1000, 50, 10_000, 2000.0, 6e7, 1.0)


@pytest.fixture
def config(training_set: TrainingSet, make_experiment: MakeExperiment, tmp_path: Path) -> Path:
    """The small experiment as a file."""
    experiment = make_experiment().model_dump(mode="json")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(training_set.schema.model_dump(mode="json")))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    return tmp_path / "tiny.yaml"


def test_an_axis_is_read() -> None:
    assert Axis.parse("model.hidden=[32],[64,32]") == Axis("model.hidden", ("[32]", "[64,32]"))
    assert Axis.parse("training.data_fraction=0.1, 1") == Axis(FRACTION, ("0.1", "1"))


@pytest.mark.parametrize(
    "text", ["model.hidden", "model.hidden=", "a=1", "a=1,1", "a=1,,2", "=1,2", "training.seed=1,2"]
)
def test_what_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="an axis must"):
        Axis.parse(text)


def test_the_trials_of_a_study() -> None:
    axes = [Axis("model.a", ("1", "2")), Axis(FRACTION, ("0.1", "1"))]
    alone = trials_of(axes, (5, 6), Path("out"), grid=False)
    assert [t.settings for t in alone[::2]] == [
        {},
        {"model.a": "1"},
        {"model.a": "2"},
        {FRACTION: "0.1"},
        {FRACTION: "1"},
    ]
    assert [t.seed for t in alone[:2]] == [5, 6]
    assert len({t.folder for t in alone}) == 10
    everything = trials_of(axes, (5,), Path("out"), grid=True)
    assert [t.settings for t in everything] == [{"model.a": a, FRACTION: f} for a in "12" for f in ("0.1", "1")]
    assert "training.epochs=1" in alone[0].overrides
    alike = trials_of([Axis("model.lr", ("1", "2")), Axis("training.lr", ("1", "2"))], (5,), Path("out"), grid=False)
    assert len({t.folder for t in alike}) == 5, "settings of one last name have folders of their own"


def test_a_larger_part_of_the_data_holds_a_smaller_one() -> None:
    parts = [
        np.concatenate(list(sampled(ordered_requests(20_000, piece=777), fraction, seed=3)))
        for fraction in (0.01, 0.1, 0.5, 1.0)
    ]
    for fraction, part in zip((0.01, 0.1, 0.5, 1.0), parts, strict=True):
        assert abs(len(part) - 20_000 * fraction) <= 5 * (20_000 * fraction) ** 0.5
    for smaller, larger in pairwise(parts):
        assert np.isin(smaller, larger).all()
    other = np.concatenate(list(sampled(ordered_requests(20_000), 0.1, seed=4)))
    assert 100 < len(np.intersect1d(other, parts[1])) < 300  # a tenth of a tenth by chance


def test_a_part_of_the_data_is_the_same_in_every_epoch(training_set: TrainingSet) -> None:
    def requests(epoch: int) -> set[int]:
        loader = BatchLoader(training_set, "train", 64, ShuffleConfig(), seed=1, epoch=epoch, fraction=0.3)
        plan = list(loader.plan())
        offsets = training_set.split("train").row_offsets
        assert sum(int((offsets[p + 1] - offsets[p]).sum()) for p in plan) == loader.num_rows
        return {int(r) for part in plan for r in part}

    assert requests(0) == requests(1)
    assert 0 < len(requests(0)) < training_set.split("train").num_requests / 2


def test_what_a_size_costs(training_set: TrainingSet, make_experiment: MakeExperiment) -> None:
    parameters, flops = cost_of(make_experiment(), training_set)
    more_parameters, more_flops = cost_of(make_experiment(model={"hidden": [64]}), training_set)
    assert more_parameters > parameters
    assert more_flops > flops
    _, short = cost_of(make_experiment(history_length=1), training_set)
    assert short < flops


def outcomes(key: str, values: list[float], costs: list[float]) -> list[Outcome]:
    return [
        replace(
            BASE, settings={key: str(c)}, metric=v, parameters=int(c), rows=int(c), training_flops=c, flops_per_row=c
        )
        for v, c in zip(values, costs, strict=True)
    ]


def test_curves_and_the_frontier() -> None:
    costs = [1e3, 1e4, 1e5, 1e6, 1e7]
    of_model = outcomes("model.a", [0.75 - 3 * c**-0.4 for c in costs], costs)
    worse = outcomes("model.b", [0.5] * 5, costs)
    curves = curves_of([Axis("model.a", ("1", "2")), Axis("model.b", ("1", "2"))], [*of_model, *worse])
    assert [c.axis for c in curves] == ["model.a", "model.b", "training_flops"]
    assert curves[0].law is not None
    assert round(curves[0].law.exponent.value, 4) == 0.4
    assert curves[2].y == curves[0].y, "what a cheaper size beats is not on the frontier"
    few = curves_of([Axis("model.a", ("1", "2"))], of_model[:3])
    assert few[0].law is None
    assert "at least 4 different x" in str(few[0].note)


def test_the_cheapest_size_for_a_target() -> None:
    costs = [1e3, 1e4, 1e5, 1e6]
    found = outcomes("model.a", [0.60, 0.70, 0.74, 0.745], costs)
    curves = curves_of([Axis("model.a", ("1", "2"))], found)
    assert recommend(0.7, found, curves).settings == {"model.a": "10000.0"}
    none = recommend(0.76, found, curves)
    assert none.settings is None


def test_a_study_runs_goes_on_and_is_written(config: Path, tmp_path: Path) -> None:
    axes = [Axis.parse(f"{FRACTION}=0.1,0.3,0.6"), Axis.parse(f"{LENGTH}=1,8")]
    seen: list[tuple[int, int]] = []
    study = run_study(config, axes, tmp_path / "study", target=0.1, advance=lambda *at: seen.append(at))
    assert seen[-1] == (6, 6)
    assert len(study.outcomes) == 6
    rows = [o.rows for o in study.outcomes if FRACTION in o.settings]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]
    lengths = [o for o in study.outcomes if LENGTH in o.settings]
    assert [o.history_length for o in lengths] == [1, 8]
    assert lengths[0].flops_per_row < lengths[1].flops_per_row
    assert study.recommendation is not None
    assert study.recommendation.settings is not None
    written = json.loads((tmp_path / "study" / "study.json").read_text())
    assert len(written["outcomes"]) == 6
    page = (tmp_path / "study" / "study.html").read_text()
    assert page.count("<svg") == 3
    assert "NaN" not in page
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "study" / "runs").glob("*/summary.json")}
    again = run_study(config, axes, tmp_path / "study", target=0.1)
    assert again == study
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items()), "finished trials are kept"


def test_a_value_of_the_experiment_itself_is_trained_once(config: Path, tmp_path: Path) -> None:
    study = run_study(config, [Axis.parse(f"{FRACTION}=0.1,1.0")], tmp_path / "study")
    assert [o.settings for o in study.outcomes] == [{}, {FRACTION: "0.1"}]
    assert len(study.curves[0].x) == 2


def test_a_value_that_does_not_fit_is_told_before_any_training(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embedding_dim"):
        run_study(config, [Axis.parse("model.embedding_dim=4,5")], tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.dist
def test_under_ray_tune_the_outcomes_are_the_same(config: Path, tmp_path: Path) -> None:
    axes = [Axis.parse("model.hidden=[4],[8]")]
    one = run_study(config, axes, tmp_path / "one")
    two = run_study(config, axes, tmp_path / "two", workers=2)
    assert [o.settings for o in two.outcomes] == [o.settings for o in one.outcomes]
    assert [o.metric for o in two.outcomes] == [o.metric for o in one.outcomes]
