"""Scores of a whole split, and metrics over them: exact, never averaged over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from recsys.errors import ConfigError
from recsys.metrics import Metrics, evaluate_scores, rela_impr
from recsys.training_set import SOURCE_ROW, USER_ROW, TrainingSet, label_column
from training.baselines import item_popularity
from training.data import BatchLoader, history_lengths
from training.run import TrainedRun
from training.strategy import SingleProcess, Strategy


@dataclass(frozen=True)
class Predictions:
    """Every row of a split, in its order.

    Attributes:
        tasks: names of the tasks.
        logits: ``(N, T)`` float32.
        labels: ``(N, T)`` float32, NaN where missing.
        user_row: ``(N,)`` int64, row of the users table; 0 is a user unknown to it.
        request: ``(N,)`` int64, position of the request in the split.
        source_row: ``(N,)`` int64, row of the impressions view.
        history_length: ``(N,)`` int64, events strictly before the request, all that are stored, in its longest history.
    """

    tasks: tuple[str, ...]
    logits: np.ndarray
    labels: np.ndarray
    user_row: np.ndarray
    request: np.ndarray
    source_row: np.ndarray
    history_length: np.ndarray

    @property
    def groups(self) -> np.ndarray:
        """``(N,)`` int64, what GAUC groups by: the user, or the request of an unknown user: strangers are many."""
        return np.where(self.user_row > 0, self.user_row, -1 - self.request)

    def task(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels ``(N,)`` of one task."""
        column = self.tasks.index(name)
        return self.logits[:, column], self.labels[:, column]


def predict(
    model: nn.Module,
    training_set: TrainingSet,
    split: str,
    batch_size: int = 2048,
    *,
    history_length: int | None = None,
    strategy: Strategy | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Predictions:
    """Scores a split in its own order, in evaluation mode; the model's mode is put back.

    Args:
        model: takes a batch, returns logits ``(N, T)``; on the strategy's device.
        batch_size: rows.
        history_length: newest events of each history to read; the bounds of the schema if not given.
        strategy: the processes that score together; each gets every row's score. One on the model's device if not
            given.
        advance: called with the number of rows scored since the last call.
    """
    if strategy is None:
        parameter = next(model.parameters(), None)
        strategy = SingleProcess("cpu" if parameter is None else str(parameter.device))
    part = training_set.split(split)
    loader = BatchLoader(
        training_set,
        split,
        batch_size,
        rank=strategy.rank,
        world=strategy.world,
        history_length=history_length,
        by_length=True,
    )
    num_tasks = len(training_set.schema.tasks)
    scores, positions = [np.zeros((0, num_tasks), np.float32)], [np.zeros(0, np.int64)]
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: FBGEMM registers its CPU look-up under autograd alone.
        with torch.no_grad(), closing(iter(loader)) as batches:
            for loaded in batches:
                logits = model(loaded.batch.to(strategy.device)).cpu().numpy()
                if not loaded.is_filler:
                    scores.append(logits)
                    positions.append(np.full(len(logits), loaded.index, np.int64))
                advance(loaded.num_rows)
    finally:
        model.train(was_training)
    logits = np.concatenate(strategy.all_gather(np.concatenate(scores)))
    # Ranks hold consecutive parts of every batch: a stable sort by batch puts the loader's order back.
    order = np.argsort(np.concatenate(strategy.all_gather(np.concatenate(positions))), kind="stable")
    in_split = np.empty_like(logits)
    in_split[_rows_of(np.concatenate([np.zeros(0, np.int64), *loader.plan()]), part.row_offsets)] = logits[order]
    rows = np.diff(part.row_offsets)
    schema = training_set.schema
    return Predictions(
        tasks=tuple(task.name for task in schema.tasks),
        logits=in_split,
        labels=_labels(training_set, split),
        user_row=np.repeat(part.requests.array(USER_ROW), rows),
        request=np.repeat(np.arange(part.num_requests), rows),
        source_row=np.array(part.impressions.array(SOURCE_ROW)),
        history_length=np.repeat(history_lengths(training_set, split), rows),
    )


def _labels(training_set: TrainingSet, split: str) -> np.ndarray:
    impressions = training_set.split(split).impressions
    columns = [impressions.array(label_column(task.name)) for task in training_set.schema.tasks]
    return np.stack(columns, axis=1)


def _rows_of(requests: np.ndarray, row_offsets: np.ndarray) -> np.ndarray:
    """The rows of some requests, in their order."""
    starts, sizes = row_offsets[requests], row_offsets[requests + 1] - row_offsets[requests]
    rows: np.ndarray = np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return rows


def evaluate(predictions: Predictions) -> dict[str, Metrics]:
    """Metrics of each task, over the rows that have its label. GAUC groups by :attr:`Predictions.groups`."""
    results = {}
    for task in predictions.tasks:
        logits, labels = predictions.task(task)
        results[task] = evaluate_scores(labels, logits=logits, groups=predictions.groups)
    return results


def base_metrics(
    base: str, training_set: TrainingSet, predictions: Predictions, split: str, batch_size: int = 2048
) -> dict[str, Metrics]:
    """Metrics of what a model is compared with, over the same rows.

    Args:
        base: folder of a run on the same training set, or ``popularity`` for each item's click rate in training.
        predictions: of the model, over ``split``: they give rows, labels and groups.

    Raises:
        ConfigError: the run was trained on another training set, or has other tasks.
        IntegrityError: there is no such run.
    """
    if base == "popularity":
        results = {}
        train_labels = dict(zip(predictions.tasks, _labels(training_set, "train").T, strict=True))
        for task in predictions.tasks:
            labels = predictions.task(task)[1]
            # Without a label in training no item has a rate, and all are alike.
            known = not np.isnan(train_labels[task]).all()
            scores = item_popularity(training_set, split, task) if known else np.full(len(labels), 0.5)
            results[task] = evaluate_scores(labels, probabilities=scores, groups=predictions.groups)
        return results
    trained = TrainedRun.load(base)
    if trained.training_set_fingerprint != training_set.fingerprint:
        raise ConfigError(
            f"base must be a run on the training set {training_set.folder}, but {base} was trained on another",
            hint="metrics over different rows cannot be compared",
        )
    length = trained.experiment.training.history_length
    return evaluate(predict(trained.model, training_set, split, batch_size, history_length=length))


def relative_improvements(
    tasks: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """RelaImpr of AUC and GAUC in percent, by task; None where one of the two is not defined or the base is one half.

    Args:
        tasks: metrics by task, from :func:`plain`.
        base: the same of what is compared with.
    """
    found: dict[str, dict[str, float | None]] = {}
    for task, metrics in tasks.items():
        pairs = {name: (metrics[name], base[task][name]) for name in ("auc", "gauc")}
        values = {n: math.nan if None in pair else rela_impr(*pair) for n, pair in pairs.items()}
        found[task] = {name: None if math.isnan(value) else value for name, value in values.items()}
    return found


def plain(metrics: Mapping[str, Metrics]) -> dict[str, dict[str, Any]]:
    """Metrics by task as plain JSON; what is not defined is null."""
    return {
        task: {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(m).items()}
        for task, m in metrics.items()
    }
