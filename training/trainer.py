"""The trainer: epochs of steps, an evaluation after each, checkpoints that an interrupted run goes on from.

A run that was killed and resumed ends with the same bits as one that was not: model, optimizers (the fused ones too),
random state, place in the epoch and early-stopping state are all in the checkpoint, and the metrics file is cut back to
it.

The validation split chooses the checkpoint. The test split is scored once, at the end, with that checkpoint, and never
chooses anything.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor
from torchrec.optim.keyed import KeyedOptimizer

from recsys.errors import CheckpointError, ConfigError, DataError, IntegrityError, TrainingError
from recsys.files import append_line, write_json
from recsys.metrics import Metrics
from recsys.schema import Schema
from recsys.training_set import TrainingSet, label_column
from training import schedule
from training.balancing import build_balance
from training.checkpoint import CheckpointStore, checkpoint_name
from training.console import TrainingDisplay, quiet_libraries
from training.data import BatchLoader, LoadedBatch
from training.distill import (
    OfflineDistillationConfig,
    OnlineDistillationConfig,
    build_training_model,
    check_teacher,
    is_gone,
    learners,
    prepare,
    scoring_teacher,
)
from training.evaluate import Predictions, evaluate, plain, predict
from training.experiment import Criterion, ExperimentConfig, check_history_length, check_tasks
from training.memory import keep_freed_memory
from training.objective import Objective
from training.optim import clip_gradients, dense_optimizer, rows_of_tables
from training.regularisation import MiniBatchAwareDecay, add_l2, count_impressions, without_biases
from training.report import ScoreRow
from training.run import RunFolder, flatten
from training.run_report import write_run_report
from training.schedule import LearningRates
from training.stopping import StopRequest, stop_signals
from training.strategy import SingleProcess, Strategy
from training.tracking import Tracker

_log = logging.getLogger(__name__)

_COUNTING_ROWS = 16_384
"""Rows that are looked through at a time where ids are counted."""

_LOOK_EVERY_STEPS = 10
"""Steps between looks at losses, clock and signals: a look waits for the device and is agreed on by all ranks."""


@dataclass
class Progress:
    """Where a run is; saved with every checkpoint.

    Attributes:
        epoch: epochs finished and evaluated.
        batch: global batches of the current epoch done.
        step: optimizer steps done.
        epoch_rows, epoch_loss: rows of the current epoch, and the sum of their losses.
        window_rows, window_loss: the same since the last line of training loss.
        best: name of the checkpoint that is best on the validation split.
        best_epoch, best_value: of it.
        worse_epochs: epochs since.
        is_done: training has ended; what is left is the test split.
        train_s: seconds in training steps, over all attempts.
        metrics_bytes: length of the metrics file.
        plateau, stalled_epochs: state of a learning-rate schedule that waits for a better epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    epoch_rows: int = 0
    epoch_loss: float = 0.0
    window_rows: int = 0
    window_loss: float = 0.0
    best: str | None = None
    best_epoch: int | None = None
    best_value: float | None = None
    worse_epochs: int = 0
    is_done: bool = False
    train_s: float = 0.0
    total_rows: int = 0
    metrics_bytes: int = 0
    plateau: float = 1.0
    stalled_epochs: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What a run resulted in; ``summary.json`` holds the same.

    Attributes:
        run_dir: the run folder.
        fingerprint: of everything that decided the result.
        epochs: epochs trained.
        steps: optimizer steps taken.
        stopped_early: the validation metric had stopped getting better.
        best_epoch: 1 for the first.
        best_checkpoint: its name.
        selected_by: the validation metric, ``task.metric`` or the mean over several tasks.
        validation: metrics by task of the best epoch; None where undefined.
        test: metrics by task with the best checkpoint; None if the split is empty.
        teacher: metrics by split and task of the teacher that was trained along, with the same checkpoint; None where
            there is none.
        train_rows_per_s: over training steps, without evaluation.
        train_s: seconds in training steps.
        was_finished: the run had finished before this call.
    """

    run_dir: Path
    fingerprint: str
    epochs: int
    steps: int
    stopped_early: bool
    best_epoch: int
    best_checkpoint: str
    selected_by: str
    validation: dict[str, dict[str, Any]]
    test: dict[str, dict[str, Any]] | None
    train_rows_per_s: float
    train_s: float
    teacher: dict[str, dict[str, dict[str, Any]]] | None = None
    was_finished: bool = False

    @classmethod
    def from_summary(cls, run_dir: Path, summary: Mapping[str, Any], *, was_finished: bool = True) -> Self:
        """The result of a run that has finished.

        Raises:
            IntegrityError: the summary lacks a part.
        """
        known = {k: v for k, v in summary.items() if k in cls.__dataclass_fields__}
        try:
            return cls(**known, run_dir=run_dir, was_finished=was_finished)
        except TypeError as err:
            raise IntegrityError(
                f"{run_dir / 'summary.json'} must say how the run ended, but lacks a part of it",
                hint=f"delete {run_dir} and train again",
            ) from err

    def summary(self) -> dict[str, Any]:
        """As plain JSON."""
        values = asdict(self)
        del values["run_dir"], values["was_finished"]
        return values | {"finished_at": datetime.now(UTC).isoformat(timespec="seconds")}


def train(
    experiment: ExperimentConfig,
    schema: Schema,
    run_dir: str | Path,
    *,
    resume: bool = True,
    workers: int = 1,
    progress: bool = True,
    verify: bool = True,
) -> TrainResult:
    """Trains a model, or goes on with a run that was interrupted.

    Args:
        experiment: what to train, on what, how.
        schema: the experiment's.
        run_dir: the run folder; made if need be.
        resume: False starts an interrupted or finished run again from nothing.
        workers: processes; more than one needs Ray.
        progress: show progress on stderr.
        verify: compare the training set's files with their checksums, if they were not since they were last touched
            (:meth:`~recsys.training_set.TrainingSet.verify_once`).

    Returns:
        The result; at once if the folder holds this very run, finished.

    Raises:
        ConfigError: the folder holds another run, another process trains into it, a setting is for one worker only, or
            the model's teacher is no finished run, or one that has seen the validation or test period.
        IntegrityError: the training set is absent, damaged, or of another schema.
        CheckpointError: the checkpoint to resume from is damaged, or a new one cannot be written.
        DataError: a split is empty, or the validation split has one class only.
        TrainingError: the loss is no longer finite.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    if workers > 1 and experiment.training.task_balancing.kind == "gradnorm":
        # Gradients taken one task at a time leave DistributedDataParallel's own reduction wrong.
        raise ConfigError(
            f"training.task_balancing.kind must be 'none' or 'uncertainty' with {workers} workers, got 'gradnorm'",
            hint="train with one worker",
        )
    check_tasks(experiment, schema, source="experiment")
    check_history_length(experiment, schema, source="experiment")
    folder = RunFolder(Path(run_dir))
    training_set = open_training_set(experiment, schema)
    check_fraction(experiment, training_set)
    if verify:
        training_set.verify_once()
    with TrainingDisplay(enabled=progress) as display, folder.locked():
        check_teacher(experiment, training_set)
        summary = folder.begin(experiment, schema, training_set, resume=resume)
        if summary is not None:
            display.say(f"{folder.path} holds this run, finished {summary['finished_at']}: nothing to train")
            taught = experiment.distillation
            if isinstance(taught, OfflineDistillationConfig) and is_gone(taught.teacher):
                display.say(f"there is no teacher at {taught.teacher}, which a finished student does not need")
            return TrainResult.from_summary(folder.path, summary)
        _prepare_teacher(experiment, schema, training_set, display)
        if workers > 1:
            from training.distributed import train_workers

            train_workers(experiment, schema, folder.path, workers=workers, display=display)
        else:
            strategy = SingleProcess(experiment.training.device)
            train_rank(experiment, schema, folder.path, strategy, display=display)
        return TrainResult.from_summary(folder.path, folder.summary(), was_finished=False)


def open_training_set(experiment: ExperimentConfig, schema: Schema) -> TrainingSet:
    """Opens the training set of an experiment.

    Raises:
        IntegrityError: it is absent, damaged, or was built with another schema.
    """
    training_set = TrainingSet.open(experiment.data.training_set)
    if training_set.schema != schema:
        raise IntegrityError(
            f"{experiment.data.training_set} must be built with the schema of {experiment.schema_file}, "
            "but was built with another",
            hint="build it again, or bring back the schema",
        )
    return training_set


def check_fraction(experiment: ExperimentConfig, training_set: TrainingSet) -> None:
    """Checks that the share of the training requests to learn from leaves one.

    Raises:
        ConfigError: it leaves none.
    """
    fraction, seed = experiment.training.data_fraction, experiment.training.seed
    num_requests = training_set.split("train").num_requests
    if num_requests and not BatchLoader(training_set, "train", 1, seed=seed, fraction=fraction).num_rows:
        raise ConfigError(
            f"training.data_fraction must leave a training request, but {fraction:g} of {num_requests:,} leaves none "
            f"with seed {seed}"
        )


def _prepare_teacher(
    experiment: ExperimentConfig, schema: Schema, training_set: TrainingSet, display: TrainingDisplay
) -> None:
    if not isinstance(experiment.distillation, OfflineDistillationConfig):
        return
    quiet_libraries()
    _check_criterion(experiment.criterion(schema), training_set)
    with _threads(experiment.training.num_threads):
        start = partial(display.start, "scoring with the teacher")
        prepare(experiment, schema, training_set, say=display.say, start=start, advance=display.advance)


def train_rank(
    experiment: ExperimentConfig,
    schema: Schema,
    run_dir: str | Path,
    strategy: Strategy,
    *,
    display: TrainingDisplay,
    stop_file: Path | None = None,
) -> None:
    """One process's part of a run that :class:`RunFolder` has begun. Rank 0 writes the folder.

    Args:
        display: shows what rank 0 has to say.
        stop_file: tells the run to stop, as a signal does, once it exists.
    """
    quiet_libraries()
    keep_freed_memory()
    training_set = open_training_set(experiment, schema)
    folder = RunFolder(Path(run_dir))
    tracker = _tracker(experiment, training_set, folder, display) if strategy.rank == 0 else None
    status = "FAILED"
    devices = [strategy.device] if strategy.device.type == "cuda" else []
    try:
        with _threads(experiment.training.num_threads), torch.random.fork_rng(devices):
            torch.manual_seed(experiment.training.seed)
            Trainer(experiment, schema, training_set, folder, strategy, display, tracker, stop_file).run()
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if tracker is not None:
            tracker.finish(status)


def _check_criterion(criterion: Criterion, training_set: TrainingSet) -> None:
    """Checks that a checkpoint can be chosen, before anything is learnt.

    Raises:
        DataError: the validation split lacks labels, or one of the classes, of a task.
    """
    impressions = training_set.split("validation").impressions
    for task in criterion.tasks:
        labels = impressions.array(label_column(task))
        num_labels, num_positives = int((~np.isnan(labels)).sum()), int((labels > 0).sum())
        if (criterion.metric in ("auc", "gauc", "ne") and not 0 < num_positives < num_labels) or not num_labels:
            raise DataError(
                f"validation {criterion} must be defined, but of task {task!r} the validation split has "
                f"{num_labels:,} labels, {num_positives:,} of them positive",
                hint="name another task in training.selection.task; or move data.split.train_end and "
                "data.split.validation_end so that there are both",
            )


class Trainer:
    """One rank of one run.

    Args:
        experiment: what to train and how.
        schema: the experiment's.
        training_set: opened.
        folder: begun.
        strategy: the processes that train together.
        display: shows progress.
        tracker: tracks the run; None on every rank but 0.
        stop_file: tells the run to stop, as a signal does, once it exists.
    """

    def __init__(
        self,
        experiment: ExperimentConfig,
        schema: Schema,
        training_set: TrainingSet,
        folder: RunFolder,
        strategy: Strategy,
        display: TrainingDisplay,
        tracker: Tracker | None = None,
        stop_file: Path | None = None,
    ) -> None:
        self._experiment = experiment
        self._stop_file = stop_file
        self._config = experiment.training
        self._schema = schema
        self._training_set = training_set
        self._folder = folder
        self._strategy = strategy
        self._display = display
        self._tracker = tracker
        self._criterion = experiment.criterion(schema)
        _check_criterion(self._criterion, training_set)
        self._store = CheckpointStore(
            folder.checkpoints, rank=strategy.rank, world=strategy.world, barrier=strategy.barrier
        )
        model = build_training_model(experiment, schema, training_set)
        self._has_teacher = isinstance(experiment.distillation, OnlineDistillationConfig)
        uses, table_rows = model.lookup.uses, {name: len(weight) for name, (weight, _) in rows_of_tables(model).items()}
        self._model, self._optimizer, self._dense, self._tables, rows = strategy.prepare(
            model, self._config.embedding_optimizer, self._config.dense_optimizer
        )
        self._clipped_apart = learners(self._model, (*self._dense.values(), *self._tables.values()))
        balance = build_balance(self._config.task_balancing, len(schema.tasks), self._dense)
        self._objective = Objective(schema, self._config.task_weights, balance).to(strategy.device)
        self._balancing = self._balance_optimizer()
        groups = [*self._optimizer.param_groups, *(self._balancing.param_groups if self._balancing else ())]
        self._rates = LearningRates(groups)
        # Shuffled epochs pack their requests a little differently, so that they may end a few steps sooner or later.
        self._total_steps = self._config.epochs * sum(1 for _ in self._epoch(self._config.batch_size).plan())
        warmup = self._config.lr_schedule.warmup_steps
        if warmup > self._total_steps:
            display.say(f"lr_schedule.warmup_steps is {warmup:,}: longer than the run's {self._total_steps:,} steps")
        self._decay: MiniBatchAwareDecay | None = None
        if self._config.mini_batch_aware_l2:
            display.say("counting the impressions of every id")
            self._decay = MiniBatchAwareDecay(
                uses,
                rows,
                count_impressions(self._epoch(_COUNTING_ROWS), uses, table_rows),
                self._config.mini_batch_aware_l2,
                strategy.all_gather,
            )
        self._progress = Progress()
        self._unseen: list[tuple[Tensor, int]] = []  # losses still on the device, rows of their global batches
        self._saved_at = self._clock = time.monotonic()

    def _balance_optimizer(self) -> KeyedOptimizer | None:
        """Of what a balance of tasks learns by gradients, if anything. The model's wrapper does not know of it."""
        parameters = dict(self._objective.named_parameters())
        if not parameters:
            return None
        return dense_optimizer(self._config.dense_optimizer.model_copy(update={"weight_decay": 0.0}), parameters)

    def run(self) -> None:
        """Trains to the end and writes the result."""
        for split in ("train", "validation"):
            if self._training_set.split(split).num_rows == 0:
                raise DataError(f"split {split!r} must have rows, got none", hint="move the boundaries in data.split")
        self._resume()
        with stop_signals(self._stop_file) as stop:
            while not self._progress.is_done:
                self._train_epoch(stop)
                self._end_epoch(stop)
                if any(self._agreed(stop.is_set)) and not self._progress.is_done:
                    self._stop(stop)
        self._finish()

    # Steps

    def _epoch(self, batch_size: int) -> BatchLoader:
        """Everything that an epoch learns from, in the order of the split."""
        config = self._config
        return BatchLoader(
            self._training_set,
            "train",
            batch_size,
            seed=config.seed,
            fraction=config.data_fraction,
            history_length=config.history_length,
        )

    def _train_epoch(self, stop: StopRequest) -> None:
        config, progress = self._config, self._progress
        loader = replace(
            self._epoch(config.batch_size),
            shuffle=config.shuffle,
            epoch=progress.epoch,
            start_batch=progress.batch,
            rank=self._strategy.rank,
            world=self._strategy.world,
            prefetch=config.prefetch_batches,
        )
        self._display.start(f"epoch {progress.epoch + 1} of {config.epochs}", loader.num_rows, progress.epoch_rows)
        self._model.train()
        self._clock = time.monotonic()
        with closing(iter(loader)) as batches:
            for loaded in batches:
                self._step(loaded)
                if progress.step % _LOOK_EVERY_STEPS == 0 or progress.step % config.log_every_steps == 0:
                    self._look(stop)
        self._see_losses()
        progress.train_s += time.monotonic() - self._clock

    def _step(self, loaded: LoadedBatch) -> None:
        batch = loaded.batch.to(self._strategy.device)
        assert batch.labels is not None
        factor = self._factor()
        self._rates.set(factor)
        self._optimizer.zero_grad()
        loss = self._objective(self._model(batch), batch.labels, loaded.num_rows)
        if self._decay is not None:
            self._decay.apply(batch, self._config.embedding_optimizer.lr * factor)
        (loss * self._strategy.loss_scale).backward()  # updates the tables whose optimizer is fused
        self._strategy.average_sparse(self._tables.values())
        if self._config.embedding_l2:
            add_l2(self._tables.values(), self._config.embedding_l2)
        if self._config.dense_l2:
            add_l2(without_biases(self._dense), self._config.dense_l2)
        if self._config.gradient_clip_norm is not None:
            for parameters in self._clipped_apart:
                clip_gradients(parameters, self._config.gradient_clip_norm)
        self._optimizer.step()
        if self._balancing is not None:
            for parameter in self._objective.parameters():
                assert parameter.grad is not None
                parameter.grad = self._strategy.all_sum(parameter.grad) / self._strategy.loss_scale
            self._balancing.step()
            self._balancing.zero_grad()
        self._unseen.append((loss.detach(), loaded.num_rows))
        progress = self._progress
        progress.batch += 1
        progress.step += 1
        self._display.advance(loaded.num_rows)

    def _factor(self) -> float:
        """What the learning rates of the next step are multiplied by."""
        progress = self._progress
        return schedule.factor(
            self._config.lr_schedule, progress.step, total_steps=self._total_steps, plateau=progress.plateau
        )

    def _learning_rates(self) -> dict[str, float]:
        """Of the next step."""
        config, factor = self._config, self._factor()
        return {"tables": config.embedding_optimizer.lr * factor, "network": config.dense_optimizer.lr * factor}

    def _look(self, stop: StopRequest) -> None:
        """Checks the losses; saves a checkpoint if it is time or if the process is told to stop."""
        self._see_losses()
        if self._progress.step % self._config.log_every_steps == 0:
            self._log_window()
        late = time.monotonic() - self._saved_at >= self._config.checkpoint_every_s
        save, leave = self._agreed(late and self._strategy.rank == 0, stop.is_set)
        if save or leave:
            now = time.monotonic()
            self._progress.train_s += now - self._clock
            self._save()
            self._clock = time.monotonic()
        if leave:
            self._stop(stop)

    def _agreed(self, *flags: bool) -> list[bool]:
        """Which flags are up on any rank."""
        values = torch.tensor([float(flag) for flag in flags], device=self._strategy.device)
        return [value > 0 for value in self._strategy.all_sum(values).tolist()]

    def _stop(self, stop: StopRequest) -> NoReturn:
        self._display.say(f"stopped after step {self._progress.step}: the same command goes on from here")
        stop.raise_it()

    def _see_losses(self) -> None:
        """Adds up the losses of the last steps, over all ranks.

        Raises:
            TrainingError: one is not finite.
        """
        if not self._unseen:
            return
        losses = self._strategy.all_sum(torch.stack([loss for loss, _ in self._unseen]).double()).tolist()
        progress = self._progress
        for position, (loss, (_, rows)) in enumerate(zip(losses, self._unseen, strict=True)):
            if not -float("inf") < loss < float("inf"):
                behind = len(losses) - 1 - position
                raise self._diverged(loss, progress.step - behind, progress.batch - behind)
            progress.epoch_rows += rows
            progress.window_rows += rows
            progress.total_rows += rows
            progress.epoch_loss += loss * rows
            progress.window_loss += loss * rows
        self._unseen.clear()
        self._display.advance(0, f"loss {progress.epoch_loss / progress.epoch_rows:.4f}")

    def _diverged(self, loss: float, step: int, batch: int) -> TrainingError:
        latest = self._store.latest
        return TrainingError(
            f"the loss must be finite, got {loss} at step {step} (epoch {self._progress.epoch + 1}, batch {batch})",
            hint=(
                f"lower training.embedding_optimizer.lr ({self._config.embedding_optimizer.lr}) or "
                f"training.dense_optimizer.lr ({self._config.dense_optimizer.lr}), set training.gradient_clip_norm, "
                "or look for extreme values among dense features that are kept as they are. "
                + (f"The checkpoint {latest} is sound" if latest else "There is no checkpoint yet")
            ),
        )

    def _log_window(self) -> None:
        progress = self._progress
        loss = progress.window_loss / progress.window_rows
        rates = self._learning_rates()
        line = {"kind": "step", "step": progress.step, "epoch": progress.epoch + 1, "train_loss": loss, "lr": rates}
        self._write_metrics(line)
        if self._tracker is not None:
            self._tracker.log_metrics({"train.loss": loss} | flatten({"train.lr": rates}), progress.step)
        progress.window_rows, progress.window_loss = 0, 0.0

    # Epochs

    def _end_epoch(self, stop: StopRequest) -> None:
        progress, selection = self._progress, self._config.selection
        metrics = evaluate(self._predict("validation", stop))
        teacher = self._teacher_metrics("validation", stop) if self._has_teacher else None
        value = self._criterion.value(plain(metrics))
        if value is None:
            raise DataError(
                f"validation {self._criterion} must be defined",
                hint="no user has clicks and non-clicks there, say: move data.split.train_end and "
                "data.split.validation_end, or choose another training.selection.metric",
            )
        train_loss = progress.epoch_loss / progress.epoch_rows
        progress.epoch += 1
        is_best = progress.best_value is None or (
            value > progress.best_value if selection.higher_is_better else value < progress.best_value
        )
        if is_best:
            progress.best, progress.best_epoch = checkpoint_name(progress.step), progress.epoch
            progress.best_value, progress.worse_epochs = value, 0
        else:
            progress.worse_epochs += 1
        progress.plateau, progress.stalled_epochs = schedule.after_epoch(
            self._config.lr_schedule,
            is_best=is_best,
            plateau=progress.plateau,
            stalled_epochs=progress.stalled_epochs,
        )
        is_patient = selection.patience is None or progress.worse_epochs < selection.patience
        progress.is_done = progress.epoch >= self._config.epochs or not is_patient
        progress.batch, progress.epoch_rows, progress.epoch_loss = 0, 0, 0.0
        line: dict[str, Any] = {
            "kind": "epoch",
            "step": progress.step,
            "epoch": progress.epoch,
            "train_loss": train_loss,
            "validation": plain(metrics),
            "selected_by": value,
            "is_best": is_best,
            "lr": self._learning_rates(),
        }
        if self._objective.balance is not None:
            names = [task.name for task in self._schema.tasks]
            line["task_balance"] = dict(zip(names, self._objective.balance.current.tolist(), strict=True))
        if teacher is not None:
            line["teacher_validation"] = plain(teacher)
        self._write_metrics(line)
        self._save()
        self._tell(train_loss, metrics, value, is_best=is_best)

    def _tell(self, train_loss: float, metrics: Mapping[str, Metrics], value: float, *, is_best: bool) -> None:
        progress = self._progress
        if self._tracker is not None:
            values = _flat_metrics("validation", plain(metrics))
            self._tracker.log_metrics({"train.epoch_loss": train_loss, "epoch": progress.epoch} | values, progress.step)
        first = self._criterion.tasks[0]
        m = metrics[first]
        self._display.say(
            f"epoch {progress.epoch}: train loss {train_loss:.4f}, validation {first} auc {m.auc:.4f} "
            f"gauc {m.gauc:.4f} logloss {m.logloss:.4f}"
            + ("" if str(self._criterion) == f"{first}.auc" else f", {self._criterion} {value:.4f}")
            + (" (best)" if is_best else "")
        )

    def _teacher_metrics(self, split: str, stop: StopRequest | None = None) -> dict[str, Metrics]:
        with scoring_teacher(self._model):
            return evaluate(self._predict(split, stop))

    def _predict(self, split: str, stop: StopRequest | None = None) -> Predictions:
        """Scores a split. Told to stop, all processes do so after the same batch, with the epoch's steps saved."""

        def advance(num_rows: int) -> None:
            self._display.advance(num_rows)
            if stop is not None and any(self._agreed(stop.is_set)):
                self._save()
                self._stop(stop)

        self._display.start(f"scoring {split}", self._training_set.split(split).num_rows)
        return predict(
            self._model,
            self._training_set,
            split,
            self._config.evaluation_batch_size,
            history_length=self._config.history_length,
            strategy=self._strategy,
            advance=advance,
        )

    def _finish(self) -> None:
        """Scores validation and test with the best checkpoint; writes the report and the summary."""
        progress = self._progress
        assert progress.best is not None
        assert progress.best_epoch is not None
        self._store.load(progress.best, {"model": self._model.state_dict()})
        split = "test" if self._training_set.split("test").num_rows else "validation"
        predictions = self._predict(split)
        metrics = evaluate(predictions)
        teacher = self._teacher_metrics(split) if self._has_teacher else None
        if self._strategy.rank != 0:
            return
        lines = self._folder.lines()
        best = next((x for x in lines if x["kind"] == "epoch" and x.get("epoch") == progress.best_epoch), None)
        if best is None:
            raise IntegrityError(
                f"{self._folder.metrics} must hold epoch {progress.best_epoch}, the best one, got no such line",
                hint=f"delete {self._folder.path} and train again",
            )
        result = TrainResult(
            run_dir=self._folder.path,
            fingerprint=self._folder.config()["fingerprint"],
            epochs=progress.epoch,
            steps=progress.step,
            stopped_early=progress.epoch < self._config.epochs,
            best_epoch=progress.best_epoch,
            best_checkpoint=progress.best,
            selected_by=str(self._criterion),
            validation=best["validation"],
            test=plain(metrics) if split == "test" else None,
            teacher={"validation": best["teacher_validation"], split: plain(teacher)} if teacher else None,
            train_rows_per_s=progress.total_rows / progress.train_s if progress.train_s else 0.0,
            train_s=progress.train_s,
        )
        write_run_report(
            self._folder,
            self._experiment,
            self._training_set,
            predictions,
            split,
            result.summary(),
            others={task: [ScoreRow("teacher", "teacher", m)] for task, m in (teacher or {}).items()},
        )
        if self._tracker is not None:
            values = _flat_metrics("test", result.test or {})
            self._tracker.log_metrics(values | {"train.rows_per_s": result.train_rows_per_s}, progress.step)
            self._tracker.log_files([(self._folder.report, ""), (self._folder.metrics, "")])
        write_json(self._folder.path / "summary.json", result.summary())

    # State

    def _state(self) -> dict[str, Any]:
        random = {f"cpu-{self._strategy.rank}": torch.get_rng_state()}
        if self._strategy.device.type == "cuda":
            random[f"cuda-{self._strategy.rank}"] = torch.cuda.get_rng_state(self._strategy.device)
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict(), "random": random}
        if self._objective.balance is not None:
            state["objective"] = self._objective.state_dict()
        if self._balancing is not None:
            state["balancing"] = self._balancing.state_dict()
        return state

    def _save(self) -> None:
        self._progress.metrics_bytes = self._folder.metrics.stat().st_size if self._folder.metrics.exists() else 0
        self._store.save(self._progress.step, self._state(), asdict(self._progress))
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        latest = self._store.latest
        if latest is None:
            if self._strategy.rank == 0:
                self._folder.metrics.unlink(missing_ok=True)
            return
        state = self._state()
        same_world = self._store.world_of(latest) == self._strategy.world
        if not same_world:
            del state["random"]
        self._store.load(latest, state)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._objective.balance is not None:
            self._objective.load_state_dict(state["objective"])
        if self._balancing is not None:
            self._balancing.load_state_dict(state["balancing"])
        if same_world:
            torch.set_rng_state(state["random"][f"cpu-{self._strategy.rank}"])
            if self._strategy.device.type == "cuda":
                torch.cuda.set_rng_state(state["random"][f"cuda-{self._strategy.rank}"], self._strategy.device)
        try:
            self._progress = Progress(**self._store.read_progress(latest))
        except TypeError as err:
            raise CheckpointError(f"{latest} is of another version", hint="train into a new folder") from err
        if self._strategy.rank == 0:
            self._cut_metrics()
        done = self._progress
        self._display.say(f"resuming after step {done.step} (epoch {done.epoch + 1}, batch {done.batch})")

    def _write_metrics(self, line: Mapping[str, Any]) -> None:
        if self._strategy.rank == 0:
            append_line(self._folder.metrics, json.dumps(line, allow_nan=False))

    def _cut_metrics(self) -> None:
        """Removes the lines written after the checkpoint: the steps that they tell of will be taken again."""
        wanted = self._progress.metrics_bytes
        found = self._folder.metrics.stat().st_size if self._folder.metrics.exists() else 0
        if found < wanted:
            raise IntegrityError(
                f"{self._folder.metrics} must have at least {wanted} bytes, got {found}",
                hint=f"delete {self._folder.path} to start the run again",
            )
        if found > wanted:
            os.truncate(self._folder.metrics, wanted)


def _flat_metrics(split: str, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {f"{split}.{task}.{k}": v for task, values in metrics.items() for k, v in values.items() if v is not None}


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Sets torch's threads for a while."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tracker(
    experiment: ExperimentConfig, training_set: TrainingSet, folder: RunFolder, display: TrainingDisplay
) -> Tracker:
    config = folder.config()
    return Tracker(
        experiment.tracking,
        folder.path,
        name=experiment.name,
        params=flatten(config["experiment"]) | {"table_sizes": config["table_sizes"]},
        tags={
            "recsys.fingerprint": config["fingerprint"],
            "recsys.training_set": training_set.fingerprint,
            "recsys.run_dir": str(folder.path.absolute()),
        },
        files=[(folder.path / "config.json", ""), (training_set.folder / "manifest.json", "training_set")],
        say=display.say,
    )
