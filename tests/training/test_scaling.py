"""Scaling studies: which trials there are, what they cost, what is read from them, and that they go on."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from feature_store.build import DataConfig, build_training_set
from recsys.batch import Batch
from recsys.config import validate
from recsys.errors import ConfigError, TrainingError
from recsys.models import build_model
from recsys.models.aw_moe import AWMoEConfig
from recsys.models.suan import SUANConfig
from recsys.schema import Schema
from recsys.training_set import TrainingSet
from tests.synthetic import SCHEMA, SPLIT, write_views
from tests.training.conftest import MakeExperiment
from training.data import BatchLoader, ShuffleConfig, ordered_requests, sampled
from training.distill import OnlineDistillationConfig
from training.experiment import Criterion
from training.scaling import (
    FRACTION,
    LENGTH,
    Axis,
    Outcome,
    Study,
    as_read,
    cost_of,
    curves_of,
    recommend,
    run_study,
    trials_of,
)
from training.scaling_report import doubts, needs, render_study, study_sizes

AUC, LOGLOSS = Criterion("auc", ("click",)), Criterion("logloss", ("click",))
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
    cost = cost_of(make_experiment(), training_set)
    more = cost_of(make_experiment(model={"hidden": [64]}), training_set)
    assert more.parameters > cost.parameters
    assert more.flops_per_row > cost.flops_per_row
    assert 1 <= cost.trained_flops_per_row / cost.flops_per_row < 1.1, "Dice's statistics of the batch"
    assert cost_of(make_experiment(history_length=1), training_set).flops_per_row < cost.flops_per_row


def test_a_teacher_that_is_trained_along_is_part_of_what_training_costs(
    training_set: TrainingSet, make_experiment: MakeExperiment
) -> None:
    student, teacher = make_experiment(), make_experiment(model={"hidden": [64]})
    taught = student.model_copy(update={"distillation": OnlineDistillationConfig(teacher=teacher.model)})
    alone, large, both = (cost_of(experiment, training_set) for experiment in (student, teacher, taught))
    assert both.trained_flops_per_row == alone.trained_flops_per_row + large.trained_flops_per_row
    assert (both.parameters, both.flops_per_row) == (alone.parameters, alone.flops_per_row), "the student is scored"


def test_what_a_loss_of_the_models_own_computes_is_part_of_what_training_costs(
    training_set: TrainingSet, make_experiment: MakeExperiment
) -> None:
    plain = make_experiment().model_copy(update={"model": AWMoEConfig(embedding_dim=4)})
    contrastive = plain.model.model_copy(update={"contrastive_weight": 0.1, "mask_probability": 0.1})
    alone, more = (cost_of(plain.model_copy(update={"model": m}), training_set) for m in (plain.model, contrastive))
    assert more.flops_per_row == alone.flops_per_row, "scoring does not know of it"
    assert more.trained_flops_per_row > alone.trained_flops_per_row


def test_a_target_that_no_size_can_reach_is_refused(config: Path, tmp_path: Path) -> None:
    axes = [Axis.parse(f"{FRACTION}=0.1,0.3")]
    with pytest.raises(ConfigError, match=r"target must be at most 1, the best that click.auc can be, got 74"):
        run_study(config, axes, tmp_path / "study", target=74.0)
    selected = ["training.selection.metric=logloss"]
    with pytest.raises(ConfigError, match=r"target must be at least 0, .* click.logloss can be, got -0.1"):
        run_study(config, axes, tmp_path / "study", target=-0.1, overrides=selected)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([f"{LENGTH}=1,9"], "training.history_length must be at most 8, the max_length of the longest history, got 9"),
        ([f"{FRACTION}=0.0000001,0.1"], "training.data_fraction must leave a training request, but 1e-07 of"),
        (["model.hidden=[8],[4]", "model.hidden=[16],[4]"], "model.hidden must be varied once, got two axes"),
    ],
)
def test_sizes_that_make_no_study_are_refused_before_training(
    axes: list[str], message: str, config: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_study(config, [Axis.parse(axis) for axis in axes], tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_the_metric_is_no_axis() -> None:
    with pytest.raises(ConfigError, match=r"an axis must not be training.selection.metric: all sizes are compared by"):
        Axis.parse("training.selection.metric=auc,logloss")


def test_a_trial_that_fails_is_named_with_its_cause(config: Path, tmp_path: Path) -> None:
    axes = [Axis.parse("training.dense_optimizer.lr=0.001,1.0e+30")]
    with pytest.raises(TrainingError, match=r"the trial .*lr=1.0e_30-seed1 failed: the loss must be finite") as caught:
        run_study(config, axes, tmp_path / "study")
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("leave that size out: the finished trials are kept")


def test_the_attention_of_a_long_history_is_counted(tmp_path: Path, make_experiment: MakeExperiment) -> None:
    """As many operations as the unfused form of attention has: scores and weighted sums of 200 x 200 pairs."""
    spec = {**SCHEMA, "histories": [{"name": "seen", "max_length": 200, "attributes": ["item_id"]}]}
    write_views(tmp_path / "views", num_users=10, num_events=5000, num_requests=60)
    data = {"views": str(tmp_path / "views"), "training_set": str(tmp_path / "set"), "split": SPLIT}
    build_training_set(validate(Schema, spec, source="long"), validate(DataConfig, data, source="long"))
    long = TrainingSet.open(tmp_path / "set")
    config = SUANConfig(embedding_dim=8, num_layers=2, hidden=(8,))
    experiment = make_experiment().model_copy(update={"model": config})

    model, part = build_model(config, long.schema, long.encoder.table_sizes).eval(), long.split("validation")
    with torch.no_grad():
        embedded = model.lookup(Batch.from_training_set(long, "validation", slice(None)))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as unfused:
            model.network(embedded)
        with FlopCounterMode(display=False) as without:
            model.network(embedded)
    events, tokens, length = part.num_requests, 4, embedded.histories["seen"].times.shape[1]
    assert length == 200
    # Two layers, 8 wide, multiplied and added: of events with events, and with the profile's tokens.
    attention = 2 * 2 * 2 * 8 * events * length * (length + tokens)
    counted = cost_of(experiment, long).flops_per_row * part.num_rows
    assert round(counted) == unfused.get_total_flops() == without.get_total_flops() + attention
    assert attention > 0.5 * counted


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
    curves = curves_of([Axis("model.a", ("1", "2")), Axis("model.b", ("1", "2"))], [*of_model, *worse], AUC)
    assert [c.axis for c in curves] == ["model.a", "model.b", "training_flops"]
    assert curves[0].law is not None
    assert round(curves[0].law.exponent.value, 4) == 0.4
    assert curves[2].y == curves[0].y, "what a cheaper size beats is not on the frontier"
    few = curves_of([Axis("model.a", ("1", "2"))], of_model[:3], AUC)
    assert few[0].law is None
    assert "at least 4 different x" in str(few[0].note)


def test_the_cheapest_size_for_a_target() -> None:
    costs = [1e3, 1e4, 1e5, 1e6]
    found = outcomes("model.a", [0.60, 0.70, 0.74, 0.745], costs)
    curves = curves_of([Axis("model.a", ("1", "2"))], found, AUC)
    assert recommend(0.7, found, curves, AUC).settings == {"model.a": "10000.0"}
    none = recommend(0.76, found, curves, AUC)
    assert none.settings is None


def test_where_lower_is_better_everything_is_mirrored() -> None:
    costs = [1e3, 1e4, 1e5, 1e6, 1e7]
    of_model = outcomes("model.a", [0.25 + 3 * c**-0.4 for c in costs], costs)
    worse = outcomes("model.b", [0.5] * 5, [10 * c for c in costs])
    curves = curves_of([Axis("model.a", ("1", "2")), Axis("model.b", ("1", "2"))], [*of_model, *worse], LOGLOSS)
    law = curves[0].law
    assert law is not None
    assert (round(law.limit.value, 4), round(law.exponent.value, 4), law.is_falling) == (0.25, 0.4, True)
    assert curves[2].y == curves[0].y, "what a cheaper size beats is not on the frontier"
    assert recommend(0.3, of_model, curves, LOGLOSS).settings == {"model.a": "100000.0"}
    none = recommend(0.251, of_model, curves, LOGLOSS)
    assert none.settings is None
    assert round(none.needed["model.a"] / (3 / 0.001) ** 2.5, 2) == 1.0
    assert recommend(0.24, of_model, curves, LOGLOSS).needed == {}


def study_of(found: list[Outcome], target: float) -> Study:
    axes = [Axis(key, ("1", "2")) for key in dict.fromkeys(key for o in found for key in o.settings)]
    curves = curves_of(axes, found, AUC)
    return Study("tiny", "click.auc", True, tuple(found), tuple(curves), recommend(target, found, curves, AUC))


def test_the_report_says_whether_what_is_needed_was_tried() -> None:
    costs = [1e3, 1e4, 1e5, 1e6, 1e7]
    values = [0.75 - 3 * c**-0.4 for c in costs]
    found = study_of(outcomes("model.a", values, costs), 0.7499)
    assert needs(found)["model.a"] == "1.56e+11 parameters outside tables, beyond the 1e+03 to 1e+07 tried"
    assert "beyond the 1e+03 to 1e+07 tried" in render_study(found)
    # The largest size is a little below the curve: what it takes is as large, or smaller.
    within = study_of(outcomes("model.a", [*values[:4], values[4] - 0.0006], costs), 0.7446)
    assert "parameters outside tables, within the 1e+03 to 1e+07 tried" in needs(within)["model.a"]
    assert "beyond" not in render_study(within)


def test_a_law_that_is_not_identified_is_called_so() -> None:
    rows = [1e4, 3e4, 1e5, 3e5, 1e6]
    found = study_of(outcomes("model.a", [0.5504, 0.615, 0.662, 0.719, 0.7579], rows), 0.76)
    assert found.recommendation is not None
    assert found.recommendation.needed == {}
    assert doubts(found)["model.a"].startswith("not identified: A ends at its bound 1")
    page = render_study(found)
    assert "not identified: A ends at its bound 1" in page
    assert "No size reaches a click.auc of 0.7600.<" in page
    few = study_of(outcomes("model.a", [0.55, 0.6, 0.65], rows[:3]), 0.76)
    assert "at least 4 different x, got 3" in doubts(few)["model.a"]


def test_sizes_are_named_by_the_last_part_of_a_setting_where_that_will_do() -> None:
    found = study_of([*outcomes("model.num_layers", [0.6], [1e3]), *outcomes("training.lr", [0.7], [1e4])], 0.5)
    assert [row[0] for row in study_sizes(found)] == ["num_layers = 1000.0", "lr = 10000.0"]
    alike = study_of([*outcomes("model.lr", [0.6], [1e3]), *outcomes("training.lr", [0.7], [1e4])], 0.5)
    assert [row[0] for row in study_sizes(alike)] == ["model.lr = 1000.0", "training.lr = 10000.0"]


def test_a_study_runs_goes_on_and_is_written(config: Path, tmp_path: Path) -> None:
    axes = [Axis.parse(f"{FRACTION}=0.1,0.3,0.6"), Axis.parse(f"{LENGTH}=1,6")]
    seen: list[tuple[int, int]] = []
    study = run_study(config, axes, tmp_path / "study", target=0.1, advance=lambda *at: seen.append(at))
    assert seen[-1] == (6, 6)
    assert len(study.outcomes) == 6
    rows = [o.rows for o in study.outcomes if FRACTION in o.settings]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]
    lengths = [o for o in study.outcomes if LENGTH in o.settings]
    assert [o.history_length for o in lengths] == [1, 6]
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


def test_a_history_as_long_as_the_schemas_is_the_experiment_itself(
    training_set: TrainingSet, make_experiment: MakeExperiment
) -> None:
    one = validate(Schema, {**SCHEMA, "histories": [h for h in SCHEMA["histories"] if h["max_length"] == 8]}, source="")
    experiment = make_experiment()
    assert as_read(make_experiment(history_length=8), one) == experiment
    shorter = make_experiment(history_length=5)
    assert as_read(shorter, one) == shorter
    both = make_experiment(history_length=8)
    assert as_read(both, training_set.schema) == make_experiment(), "no history is read further back than its bound"
    batch = Batch.from_training_set(training_set, "train", slice(None), max_length=8)
    assert int(batch.histories["seen"].lengths.max()) == 5
    assert int(batch.histories["clicked"].lengths.max()) == 8


def test_an_axis_that_cannot_be_fitted_is_told_before_training(config: Path, tmp_path: Path) -> None:
    told: list[str] = []

    def stop(done: int, _: int) -> None:
        raise KeyboardInterrupt

    axes = ["model.hidden=[4],[16],[32]", "training.batch_size=32,64,128,256", f"{FRACTION}=0.1,0.3,1.0"]
    axes += [f"{LENGTH}=1,2,4"]
    with pytest.raises(KeyboardInterrupt):
        run_study(config, [Axis.parse(a) for a in axes], tmp_path / "study", advance=stop, warn=told.append)
    assert [words.partition(", and")[0] for words in told] == [
        "training.batch_size: its sizes have 1 different parameters outside tables",
        f"{FRACTION}: its sizes have 3 different training rows",
    ]


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
