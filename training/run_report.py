"""The report of a run, from what the run has left behind."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from recsys.config import fingerprint
from recsys.errors import IntegrityError
from recsys.metrics import Metrics
from recsys.schema import Schema
from recsys.training_set import SPLITS, TrainingSet
from training.evaluate import Predictions, evaluate
from training.experiment import ExperimentConfig
from training.report import (
    DataSummary,
    LearningCurve,
    ReportData,
    ScoreRow,
    TaskReport,
    history_buckets,
    reliability_bins,
    write_report,
)
from training.run import RunFolder


def write_run_report(
    folder: RunFolder,
    experiment: ExperimentConfig,
    training_set: TrainingSet,
    predictions: Predictions,
    split: str,
    summary: Mapping[str, Any],
    *,
    others: Mapping[str, Sequence[ScoreRow]] | None = None,
) -> None:
    """Writes ``report.html`` of a run.

    Args:
        predictions: of the best model, over ``split``.
        summary: the run's result.
        others: by task, the scores of others over the same rows: the ceiling, the floor.
    """
    metrics = evaluate(predictions)
    data = ReportData(
        title=experiment.name,
        subtitle=f"{experiment.model.kind} on {training_set.schema.name}",
        created_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        split=split,
        tasks=tuple(
            _task(predictions, task, metrics[task], (others or {}).get(task, ())) for task in predictions.tasks
        ),
        data=_data(training_set),
        config=experiment.model_dump(mode="json"),
        environment=_environment(summary),
        curve=_curve(folder, experiment, training_set.schema, summary),
    )
    write_report(folder.report, data)


def _task(predictions: Predictions, task: str, metrics: Metrics, others: Sequence[ScoreRow]) -> TaskReport:
    logits, labels = predictions.task(task)
    probabilities = 1.0 / (1.0 + np.exp(-np.clip(logits.astype(np.float64), -700.0, 700.0)))
    return TaskReport(
        name=task,
        scores=(ScoreRow("this model", "model", metrics), *others),
        reliability=reliability_bins(labels, probabilities),
        history=history_buckets(predictions.history_length, labels, logits),
    )


def _curve(
    folder: RunFolder, experiment: ExperimentConfig, schema: Schema, summary: Mapping[str, Any]
) -> LearningCurve:
    lines = folder.lines()
    epochs = [line for line in lines if line["kind"] == "epoch"]
    if not epochs:
        raise IntegrityError(
            f"{folder.metrics} must hold the epochs of the run, got none", hint=f"delete {folder.path} and train again"
        )
    steps_per_epoch = epochs[0]["step"]
    criterion = experiment.criterion(schema)
    points = [(e["epoch"], criterion.value(e["validation"])) for e in epochs]
    losses = [(line["step"] / steps_per_epoch, line["train_loss"]) for line in lines if line["kind"] == "step"]
    return LearningCurve(
        train_loss=tuple(losses) or tuple((e["epoch"], e["train_loss"]) for e in epochs),
        validation=tuple((epoch, value) for epoch, value in points if value is not None),
        validation_name=str(summary["selected_by"]),
        best_epoch=summary["best_epoch"],
        higher_is_better=experiment.training.selection.higher_is_better,
    )


def _data(training_set: TrainingSet) -> DataSummary:
    manifest = training_set.manifest
    rows = {f"{name} impressions": training_set.split(name).num_rows for name in SPLITS}
    rows |= {f"{name} requests": training_set.split(name).num_requests for name in SPLITS}
    rows |= {f"{name} events": table.num_rows for name, table in training_set.events.items()}
    rows |= {"users": training_set.users.num_rows - 1, "items": training_set.items.num_rows - 1}
    return DataSummary(
        name=str(manifest.get("name", training_set.schema.name)),
        rows=rows,
        fingerprints={
            "training set": training_set.fingerprint,
            "schema": fingerprint(training_set.schema),
            "encoder": str(manifest["encoder_fingerprint"]),
        },
        quarantined={
            f"{view}: {reason}": int(rows)
            for view, reasons in manifest["quarantined"].items()
            for reason, rows in reasons.items()
        },
        boundaries={name.replace("_", " "): _moment(time) for name, time in manifest["split"].items()},
    )


def _moment(time: int | None) -> str:
    """A boundary of a split in words; None is the beginning of the data."""
    if time is None:
        return "first impression"
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time)).isoformat(sep=" ")


def _environment(summary: Mapping[str, Any]) -> dict[str, str]:
    versions = {}
    for package in ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pyarrow", "mlflow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        **versions,
        "machine": platform.machine(),
        "torch threads": str(torch.get_num_threads()),
        "run fingerprint": str(summary["fingerprint"]),
        "steps": f"{summary['steps']:,}",
        "training": f"{summary['train_s']:.1f} s, {summary['train_rows_per_s']:,.0f} rows/s",
    }
