from __future__ import annotations

import io
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import training.console
import training.trainer
from recsys.errors import ConfigError, DataError, IntegrityError, RecsysError, TrainingError
from recsys.metrics import auc
from recsys.training_set import TrainingSet, label_column
from tests.synthetic import SPLIT, schema
from tests.training.conftest import MakeExperiment
from tests.training_sets import build_synthetic
from training.baselines import item_popularity
from training.checkpoint import CheckpointStore, checkpoint_name
from training.console import TrainingDisplay
from training.data import BatchLoader, LoadedBatch
from training.evaluate import evaluate, plain, predict
from training.experiment import Criterion, ExperimentConfig, check_tasks
from training.run import RunFolder, TrainedRun
from training.trainer import Trainer, TrainResult, _check_criterion, train


def checkpoint_tensors(run_dir: Path, name: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read without any of our code."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(run_dir / "checkpoints" / name),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    flat: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{path}/{key}")
        else:
            flat[path] = node

    walk(state, "")
    return flat


def same_checkpoints(one: Path, other: Path) -> None:
    latest = CheckpointStore(one / "checkpoints").latest
    assert latest is not None
    assert CheckpointStore(other / "checkpoints").latest == latest
    first, second = checkpoint_tensors(one, latest), checkpoint_tensors(other, latest)
    assert first.keys() == second.keys()
    of_tables, of_network = ([n for n in first if f"/{part}." in n] for part in ("tables", "dense"))
    assert any("momentum_1" in n or "exp_avg" in n for n in of_tables), "the tables' state is there"
    assert any("exp_avg" in n for n in of_network), "dense optimizer state is there"
    assert any("random" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def result_of(run: TrainResult) -> dict[str, Any]:
    timings = {"train_s", "train_rows_per_s", "finished_at"}
    return {k: v for k, v in run.summary().items() if k not in timings}


class Crash(BaseException):
    pass


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes training crash before the given step; the clock of checkpoints always says it is time."""
    original = Trainer._step

    def crash_at(step: int) -> None:
        def crashing(self: Trainer, loaded: Any) -> None:
            if self._progress.step == step:
                raise Crash
            original(self, loaded)

        monkeypatch.setattr(Trainer, "_step", crashing)

    return crash_at


def test_the_planted_signal_is_found(training_set: TrainingSet, make_experiment: MakeExperiment, run_dir: Path) -> None:
    """A user clicks what is like the own history. Popularity cannot see that; the truth gets .8 against .15."""
    result = train(make_experiment(epochs=15), schema(), run_dir, progress=False)
    labels = training_set.split("test").impressions.array(label_column("click"))
    floor = auc(labels, item_popularity(training_set, "test", "click"))
    assert result.test is not None
    assert result.test["click"]["auc"] > floor + 0.1
    assert result.best_epoch > 1


@pytest.mark.parametrize("crash_step", [3, 11, 17, 25])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    make_experiment: MakeExperiment,
    run_dir: Path,
    crash_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    crash_step: int,
) -> None:
    """One epoch has about 20 steps; crashes are before the first checkpoint, between two, and in the second epoch."""
    experiment = make_experiment(epochs=2, log_every_steps=4, checkpoint_every_s=1e-9, model={"dropout": 0.3})
    whole, broken = run_dir / "whole", run_dir / "broken"
    expected = train(experiment, schema(), whole, progress=False)
    assert 15 < expected.steps / 2 < 25
    crash_at(crash_step)
    with pytest.raises(Crash):
        train(experiment, schema(), broken, progress=False)
    monkeypatch.undo()
    found = train(experiment, schema(), broken, progress=False)
    assert result_of(found) == result_of(expected)
    same_checkpoints(whole, broken)
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {
            "embedding_optimizer": {"kind": "adam", "lr": 0.01},
            "embedding_l2": 0.05,
            "dense_l2": 0.01,
            "gradient_clip_norm": 0.3,
            "lr_schedule": {"kind": "plateau", "warmup_steps": 5},
        },
        pytest.param(
            {
                "embedding_optimizer": {"kind": "lazy_adam", "lr": 0.01},
                "gradient_clip_norm": 0.3,
                "mini_batch_aware_l2": 0.5,
                "lr_schedule": {"kind": "exponential", "rate": 0.5, "every_steps": 10},
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "mini_batch_aware_l2": 0.5,
                "lr_schedule": {"kind": "cosine", "warmup_steps": 5},
                "task_balancing": {"kind": "gradnorm", "shared": ["mlp.first"]},
            },
            marks=pytest.mark.slow,
        ),
        {"task_balancing": {"kind": "uncertainty"}, "dense_optimizer": {"kind": "adam", "weight_decay": 0.1}},
    ],
    ids=["adam", "lazy_adam", "gradnorm", "uncertainty"],
)
def test_a_run_of_any_recipe_resumes_with_the_same_bits(
    make_experiment: MakeExperiment,
    run_dir: Path,
    crash_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    experiment = make_experiment(epochs=2, log_every_steps=4, checkpoint_every_s=1e-9, **settings)
    whole, broken = run_dir / "whole", run_dir / "broken"
    expected = train(experiment, schema(), whole, progress=False)
    crash_at(25)
    with pytest.raises(Crash):
        train(experiment, schema(), broken, progress=False)
    monkeypatch.undo()
    assert result_of(train(experiment, schema(), broken, progress=False)) == result_of(expected)
    same_checkpoints(whole, broken)
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_the_schedule_reaches_tables_and_network_and_is_shown(make_experiment: MakeExperiment, run_dir: Path) -> None:
    """With a rate of 1e-30 nothing moves after the first steps, whatever kind of optimizer the tables have."""
    for kind in ("adagrad", "adam"):
        experiment = make_experiment(
            epochs=2,
            log_every_steps=10,
            embedding_optimizer={"kind": kind, "lr": 0.25},
            lr_schedule={"kind": "exponential", "rate": 1e-30, "every_steps": 15, "staircase": True},
        )
        result = train(experiment, schema(), run_dir / kind, progress=False)
        lines = [json.loads(line) for line in (run_dir / kind / "metrics.jsonl").read_text().splitlines()]
        rates = [line["lr"] for line in lines]
        assert rates[0] == {"tables": 0.25, "network": 1e-3}
        assert rates[-1]["tables"] == pytest.approx(0.25 * 1e-30 ** (result.steps // 15))
        first, second = (
            checkpoint_tensors(run_dir / kind, checkpoint_name(step)) for step in (result.steps // 2, result.steps)
        )
        weights = [name for name in first if name.startswith("/model") and "running" not in name]
        assert any("embedding_bags" in name for name in weights)
        for name in weights:
            assert torch.equal(first[name], second[name]), name


def test_a_plateau_lowers_the_rates_of_the_next_epoch(make_experiment: MakeExperiment, run_dir: Path) -> None:
    experiment = make_experiment(
        epochs=6,
        embedding_optimizer={"kind": "adam", "lr": 0.1},
        lr_schedule={"kind": "plateau", "rate": 0.5},
        selection={"patience": 10},
    )
    train(experiment, schema(), run_dir, progress=False)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    expected = 0.1
    for epoch in epochs:
        expected *= 1.0 if epoch["is_best"] else 0.5
        assert epoch["lr"]["tables"] == pytest.approx(expected)
    assert not all(epoch["is_best"] for epoch in epochs)


def test_two_runs_of_one_experiment_are_equal_and_another_seed_differs(
    make_experiment: MakeExperiment, run_dir: Path
) -> None:
    first = train(make_experiment(epochs=1), schema(), run_dir / "a", progress=False)
    second = train(make_experiment(epochs=1), schema(), run_dir / "b", progress=False)
    other = train(make_experiment(epochs=1, seed=2), schema(), run_dir / "c", progress=False)
    assert result_of(first) == result_of(second)
    same_checkpoints(run_dir / "a", run_dir / "b")
    assert other.validation != first.validation


def test_training_leaves_the_random_state_and_threads_of_the_process_alone(
    make_experiment: MakeExperiment, run_dir: Path
) -> None:
    torch.manual_seed(123)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(make_experiment(epochs=1, num_threads=1), schema(), run_dir, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_folder_holds_the_result(training_set: TrainingSet, make_experiment: MakeExperiment, run_dir: Path) -> None:
    experiment = make_experiment()
    result = train(experiment, schema(), run_dir, progress=False)
    run = TrainedRun.load(run_dir)
    assert run.experiment == experiment
    assert run.schema == schema()
    assert run.training_set().fingerprint == training_set.fingerprint
    assert run.fingerprint == result.fingerprint == experiment.run_fingerprint(schema(), training_set.fingerprint)
    # The model that is loaded is the one that the metrics are of; its look-up is torch's, which rounds otherwise.
    for split, expected in (("validation", result.validation), ("test", result.test)):
        assert expected is not None
        for task, metrics in plain(evaluate(predict(run.model, training_set, split))).items():
            assert metrics == pytest.approx(expected[task], rel=1e-6)
    epochs = [line for line in run.folder.lines() if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert epochs[result.best_epoch - 1]["validation"] == result.validation
    assert result.test is not None
    assert f"{result.test['click']['auc']:.4f}" in run.folder.report.read_text()


def test_a_finished_run_is_not_trained_again(
    make_experiment: MakeExperiment, run_dir: Path, crash_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = make_experiment(epochs=1)
    first = train(experiment, schema(), run_dir, progress=False)
    crash_at(0)
    second = train(experiment, schema(), run_dir)
    assert (first.was_finished, second.was_finished) == (False, True)
    assert result_of(second) == result_of(first)
    assert "holds this run, finished" in capsys.readouterr().err


def test_resume_false_starts_again(make_experiment: MakeExperiment, run_dir: Path) -> None:
    experiment = make_experiment(epochs=1)
    first = train(experiment, schema(), run_dir, progress=False)
    (run_dir / "report.html").write_text("old")
    second = train(experiment, schema(), run_dir, resume=False, progress=False)
    assert not second.was_finished
    assert result_of(second) == result_of(first)
    assert (run_dir / "report.html").read_text() != "old"


def test_a_folder_of_another_run_is_refused_naming_what_differs(
    make_experiment: MakeExperiment, run_dir: Path, crash_at: Callable[[int], None]
) -> None:
    crash_at(0)
    with pytest.raises(Crash):
        train(make_experiment(), schema(), run_dir, progress=False)
    for resume in (True, False):
        with pytest.raises(ConfigError, match=r"model\.dropout, training\.seed differ"):
            train(make_experiment(seed=9, model={"dropout": 0.5}), schema(), run_dir, resume=resume, progress=False)


def test_settings_that_decide_nothing_may_change_on_the_way(
    make_experiment: MakeExperiment, run_dir: Path, crash_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_at(12)
    with pytest.raises(Crash):
        train(make_experiment(checkpoint_every_s=1e-9), schema(), run_dir / "b", progress=False)
    monkeypatch.undo()
    train(make_experiment(prefetch_batches=0, evaluation_batch_size=50), schema(), run_dir / "b", progress=False)
    train(make_experiment(), schema(), run_dir / "a", progress=False)
    same_checkpoints(run_dir / "a", run_dir / "b")


def test_one_process_trains_into_a_folder_at_a_time(make_experiment: MakeExperiment, run_dir: Path) -> None:
    with RunFolder(run_dir).locked(), pytest.raises(ConfigError, match="another process trains into it"):
        train(make_experiment(), schema(), run_dir, progress=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_a_checkpoint_and_training_goes_on_from_it(
    make_experiment: MakeExperiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    original = Trainer._step

    def signalled(self: Trainer, loaded: Any) -> None:
        original(self, loaded)
        if self._progress.step == 7:
            os.kill(os.getpid(), number)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
        with pytest.raises(expected):
            train(make_experiment(), schema(), run_dir / "b", progress=False)
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert CheckpointStore(run_dir / "b" / "checkpoints").latest == "step-000000000010"
    train(make_experiment(), schema(), run_dir / "b", progress=False)
    train(make_experiment(), schema(), run_dir / "a", progress=False)
    same_checkpoints(run_dir / "a", run_dir / "b")


def test_a_signal_stops_the_scoring_of_an_epoch_and_its_steps_are_kept(
    make_experiment: MakeExperiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, scored = [0], [0]

    def counted(self: Trainer, loaded: Any, original: Any = Trainer._step) -> None:
        steps[0] += 1
        original(self, loaded)

    def signalled(self: BatchLoader, original: Any = BatchLoader.__iter__) -> Iterator[LoadedBatch]:
        for loaded in original(self):
            if self.split == "validation":
                scored[0] += 1
                if scored[0] == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            yield loaded

    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "__iter__", signalled)
        with pytest.raises(SystemExit):
            train(make_experiment(evaluation_batch_size=8), schema(), run_dir / "b", progress=False)
    assert scored[0] == 2, "the rest of the split is not scored"
    train(make_experiment(), schema(), run_dir / "a", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", counted)
        train(make_experiment(), schema(), run_dir / "b", progress=False)
    assert steps[0] == int(str(CheckpointStore(run_dir / "b" / "checkpoints").latest)[5:]) / 2, (
        "two epochs, one is kept"
    )
    same_checkpoints(run_dir / "a", run_dir / "b")


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_checkpoint_sound(
    make_experiment: MakeExperiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._step

    def exploding(self: Trainer, loaded: Any) -> None:
        if self._progress.step == 12:
            with torch.no_grad():
                next(iter(self._dense.values())).fill_(torch.nan)
        original(self, loaded)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", exploding)
        with pytest.raises(TrainingError, match=r"got nan at step 13 \(epoch 1, batch 13\)") as caught:
            train(make_experiment(checkpoint_every_s=1e-9), schema(), run_dir, progress=False)
    assert "training.dense_optimizer.lr (0.001)" in str(caught.value)
    assert "step-000000000010 is sound" in str(caught.value)
    assert np.isfinite(train(make_experiment(), schema(), run_dir, progress=False).validation["click"]["logloss"])


def test_the_best_epoch_on_validation_is_kept_and_patience_ends_training(
    make_experiment: MakeExperiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs 1 to 4 get .5, .7, .6, .65: the second is best, and after two worse ones training ends."""
    planned = iter([0.5, 0.7, 0.6, 0.65])
    original = training.trainer.evaluate

    def scripted(predictions: Any) -> Any:
        metrics = original(predictions)
        value = next(planned, None)
        if value is not None:
            object.__setattr__(metrics["like"], "gauc", value)
        return metrics

    monkeypatch.setattr(training.trainer, "evaluate", scripted)
    selection = {"metric": "gauc", "task": "like", "patience": 2}
    result = train(make_experiment(epochs=9, selection=selection), schema(), run_dir, progress=False)
    assert (result.epochs, result.best_epoch, result.stopped_early) == (4, 2, True)
    assert result.selected_by == "like.gauc"
    assert result.best_checkpoint == f"step-{result.steps // 2:012d}"
    assert result.validation["like"]["gauc"] == 0.7


def test_the_mean_over_tasks_chooses_the_checkpoint(
    make_experiment: MakeExperiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best epoch of neither task, but of their mean."""
    planned = iter([(0.9, 0.1), (0.7, 0.7), (0.1, 0.9)])
    original = training.trainer.evaluate

    def scripted(predictions: Any) -> Any:
        metrics = original(predictions)
        for name, value in zip(("click", "like"), next(planned, ()), strict=False):
            object.__setattr__(metrics[name], "auc", value)
        return metrics

    monkeypatch.setattr(training.trainer, "evaluate", scripted)
    selection = {"metric": "auc", "mean_over_tasks": True, "patience": None}
    result = train(make_experiment(epochs=3, selection=selection), schema(), run_dir, progress=False)
    assert (result.best_epoch, result.selected_by) == (2, "mean auc of click, like")
    with pytest.raises(ConfigError, match=r"selection: .*task must be null where mean_over_tasks is true, got 'like'"):
        make_experiment(selection={"mean_over_tasks": True, "task": "like"})


def test_lower_is_better_for_losses(
    make_experiment: MakeExperiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = iter([0.5, 0.4, 0.6])
    original = training.trainer.evaluate

    def scripted(predictions: Any) -> Any:
        metrics = original(predictions)
        object.__setattr__(metrics["click"], "logloss", next(planned, 0.0))
        return metrics

    monkeypatch.setattr(training.trainer, "evaluate", scripted)
    experiment = make_experiment(epochs=3, selection={"metric": "logloss", "patience": None})
    assert train(experiment, schema(), run_dir, progress=False).best_epoch == 2


def altered_experiment(experiment: ExperimentConfig, folder: Path) -> ExperimentConfig:
    data = experiment.data.model_copy(update={"training_set": str(folder)})
    return experiment.model_copy(update={"data": data})


def test_the_test_split_chooses_nothing(make_experiment: MakeExperiment, run_dir: Path, tmp_path: Path) -> None:
    """With other labels in the test period, everything but the test metrics is the same."""
    import polars as pl

    from feature_store.build import build_training_set

    built = build_synthetic(tmp_path / "altered", num_requests=600)
    views = tmp_path / "altered" / "views"
    frame = pl.read_parquet(views / "impressions.parquet")
    is_test = pl.col("time") >= SPLIT["validation_end"]
    flipped = frame.with_columns(
        pl.when(is_test).then(1 - pl.col("is_click")).otherwise(pl.col("is_click")).alias("is_click")
    )
    flipped.write_parquet(views / "impressions.parquet")
    experiment = altered_experiment(make_experiment(), built.folder)
    experiment = experiment.model_copy(update={"data": experiment.data.model_copy(update={"views": str(views)})})
    build_training_set(schema(), experiment.data)
    expected = train(make_experiment(), schema(), run_dir / "a", progress=False)
    found = train(experiment, schema(), run_dir / "b", progress=False)
    same_checkpoints(run_dir / "a", run_dir / "b")
    assert found.best_checkpoint == expected.best_checkpoint
    assert found.validation == expected.validation
    assert expected.test is not None
    assert found.test is not None
    assert found.test["click"]["auc"] == pytest.approx(1 - expected.test["click"]["auc"], abs=1e-12)


def test_accumulated_losses_are_means_over_rows(make_experiment: MakeExperiment, run_dir: Path) -> None:
    """With learning rates next to zero, the epoch's training loss is the loss of the initial model over the split."""
    experiment = make_experiment(
        epochs=1,
        embedding_optimizer={"kind": "sgd", "lr": 1e-30},
        dense_optimizer={"kind": "sgd", "lr": 1e-30},
        model={"activation": "prelu", "attention_activation": "prelu"},
    )
    train(experiment, schema(), run_dir, progress=False)
    run = TrainedRun.load(run_dir)
    metrics = evaluate(predict(run.model, run.training_set(), "train"))
    (line,) = [line for line in run.folder.lines() if line["kind"] == "epoch"]
    assert line["train_loss"] == pytest.approx(metrics["click"].logloss + metrics["like"].logloss, rel=1e-5)


def test_gradient_clipping_bounds_the_dense_step(make_experiment: MakeExperiment, run_dir: Path) -> None:
    """One step of plain SGD with learning rate 1 moves the dense parameters by exactly the clipped gradient."""
    moved = {}
    for clip in (1e-3, None):
        experiment = make_experiment(
            epochs=1, batch_size=100_000, dense_optimizer={"kind": "sgd", "lr": 1.0}, gradient_clip_norm=clip
        )
        folder = run_dir / str(clip)
        torch.manual_seed(experiment.training.seed)
        from recsys.models import build_model

        with torch.random.fork_rng([]):
            torch.manual_seed(experiment.training.seed)
            sizes = TrainingSet.open(experiment.data.training_set).encoder.table_sizes
            start = dict(build_model(experiment.model, schema(), sizes).network.named_parameters())
        train(experiment, schema(), folder, progress=False)
        end = dict(TrainedRun.load(folder).model.network.named_parameters())
        moved[clip] = torch.sqrt(sum(((end[n] - start[n]) ** 2).sum() for n in start)).item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert moved[None] > 1e-2


def test_a_metric_that_turns_out_undefined_is_an_error_that_says_what_to_do(
    make_experiment: MakeExperiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training.trainer.predict

    def unlabelled(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        found.labels[:, 0] = 0.0
        return found

    monkeypatch.setattr(training.trainer, "predict", unlabelled)
    with pytest.raises(DataError, match=r"validation click\.auc must be defined(?s:.*)Hint: .*move data\.split"):
        train(make_experiment(), schema(), run_dir, progress=False)


def test_a_training_set_of_another_schema_is_refused(make_experiment: MakeExperiment, run_dir: Path) -> None:
    other = schema().model_copy(update={"name": "other"})
    with pytest.raises(IntegrityError, match="must be built with the schema"):
        train(make_experiment(), other, run_dir, progress=False)


def test_an_unfinished_run_cannot_be_loaded(
    make_experiment: MakeExperiment, run_dir: Path, crash_at: Callable[[int], None]
) -> None:
    with pytest.raises(IntegrityError, match=r"must be a run folder, got no config\.json"):
        TrainedRun.load(run_dir)
    crash_at(3)
    with pytest.raises(Crash):
        train(make_experiment(), schema(), run_dir, progress=False)
    with pytest.raises(IntegrityError, match="must have finished"):
        TrainedRun.load(run_dir)


def test_workers_must_be_a_positive_number(make_experiment: MakeExperiment, run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="workers must be at least 1, got 0"):
        train(make_experiment(), schema(), run_dir, workers=0)


def test_progress_goes_to_stderr_in_plain_lines_and_no_library_says_anything(
    make_experiment: MakeExperiment,
    run_dir: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        train(make_experiment(epochs=1), schema(), run_dir)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["epoch 1"]
    assert "auc" in shown.err
    assert [r for r in caplog.records if r.levelno >= logging.INFO and r.name.startswith(("torch", "fbgemm"))] == []


def test_a_terminal_shows_rows_speed_and_loss() -> None:
    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    with TrainingDisplay(console=console) as display:
        display.start("epoch 1 of 2", 1000)
        display.advance(400, "loss 0.4321")
        assert display._progress is not None
        display._progress.refresh()
        (task,) = display._progress.tasks
        assert (task.completed, task.total) == (400, 1000)
        display.say("epoch 1: done")
    text = console.export_text()
    assert "epoch 1 of 2" in text
    assert "rows/s" in text
    assert "loss 0.4321" in text
    assert "epoch 1: done" in text


def test_elsewhere_lines_tell_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 105.0, 111.0, 112.0])
    monkeypatch.setattr(training.console.time, "monotonic", lambda: next(clock))
    console = Console(file=io.StringIO(), width=200)
    with TrainingDisplay(console=console) as display:
        display.start("epoch 1 of 2", 2000, done=100)  # at 100 s
        display.advance(300)  # at 104 s: too soon for a line
        display.advance(0, "loss 0.4321")
        display.advance(250)  # at 111 s
        display.advance(10)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "epoch 1 of 2: 650 of 2,000 rows (32%), 50 rows/s  loss 0.4321\n"


def test_training_outside_the_main_thread_works(make_experiment: MakeExperiment, run_dir: Path) -> None:
    """Signals belong to the main thread; a launcher may train in another."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(train(make_experiment(epochs=1), schema(), run_dir, progress=False))
        except RecsysError as err:
            found.append(err)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], TrainResult)
    assert json.loads((run_dir / "summary.json").read_text())["epochs"] == 1


def test_a_cosine_ends_with_the_part_of_the_data_that_is_learnt_from(
    make_experiment: MakeExperiment, run_dir: Path
) -> None:
    experiment = make_experiment(epochs=2, data_fraction=0.3, lr_schedule={"kind": "cosine", "final": 0.1})
    train(experiment, schema(), run_dir, progress=False)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"]["network"] for line in lines if line["kind"] == "epoch"]
    assert rates[0] == pytest.approx(0.001 * 0.55, rel=0.1), "halfway after the first of two epochs"
    assert rates[1] == pytest.approx(0.001 * 0.1, rel=0.1)


@pytest.mark.parametrize(
    ("metric", "labels", "message"),
    [
        ("auc", [nan, nan], "0 labels, 0 of them positive"),
        ("auc", [1.0, 1.0], "2 labels, 2 of them positive"),
        ("gauc", [0.0, 0.0, nan], "2 labels, 0 of them positive"),
        ("logloss", [nan], "0 labels, 0 of them positive"),
        ("logloss", [0.0, nan], None),
        ("auc", [0.0, 1.0, nan], None),
    ],
)
def test_what_chooses_the_checkpoint_is_checked_before_anything_is_learnt(
    metric: Any, labels: list[float], message: str | None
) -> None:
    columns = {label_column("click"): np.array([0.0, 1.0]), label_column("like"): np.array(labels)}
    impressions = SimpleNamespace(array=columns.__getitem__)
    training_set: Any = SimpleNamespace(split=lambda _: SimpleNamespace(impressions=impressions))
    criterion = Criterion(metric, ("click", "like"))
    if message is None:
        _check_criterion(criterion, training_set)
        return
    with pytest.raises(DataError, match=f"of task 'like' the validation split has {message}") as caught:
        _check_criterion(criterion, training_set)
    assert "training.selection.task" in str(caught.value)


def test_weights_of_nothing_but_0_are_refused(make_experiment: MakeExperiment) -> None:
    experiment = make_experiment(task_weights={"click": 0.0, "like": 0.0})
    with pytest.raises(ConfigError, match=r"training.task_weights must be more than 0 for one task at least"):
        check_tasks(experiment, schema(), source="test")
    check_tasks(make_experiment(task_weights={"click": 0.0}), schema(), source="test")
