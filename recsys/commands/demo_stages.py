"""The stages of the demo, in order. Each uses what an earlier run has left, where that is still what it would make."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from feature_store.build import build_training_set
from feature_store.datasets.simulator import SimulatorConfig, simulate
from feature_store.files import find_files
from recsys.batch import Batch
from recsys.commands.configs import shipped_config
from recsys.commands.demo_service import Service
from recsys.commands.terminal import counting, stage
from recsys.config import override
from recsys.errors import ConfigError
from recsys.files import check_can_write, write_json
from recsys.metrics import Metrics, evaluate_scores
from recsys.schema import Schema
from recsys.training_set import TrainingSet
from serving.batch import score_parquet
from serving.scorer import sigmoid
from training.baselines import item_popularity, true_probabilities
from training.console import quiet_libraries
from training.distill import OnlineDistillationConfig
from training.evaluate import Predictions, evaluate, predict
from training.experiment import ExperimentConfig, load_experiment
from training.export import export_artifact
from training.report import ScoreRow
from training.run import RunFolder, TrainedRun
from training.run_report import write_run_report
from training.timing import scoring_ms
from training.tracking import connect, tracked_run
from training.trainer import train

EXPERIMENT = "experiment/din_simulated.yaml"
DISTILLED = "experiment/lightsuan_simulated.yaml"
DISTILLED_EPOCHS = 2  # at most; what the demo is for is seen by then
NUM_TOP = 5
MARKER = "demo.json"
"""In a folder that is a demo's, and so may be written again."""


@dataclass(frozen=True)
class TopCandidate:
    """A candidate that the service put on top.

    Attributes:
        item: its key.
        probability: as the service answered.
        true_probability: that the simulation drew the click from.
        clicked: what was drawn.
    """

    item: Any
    probability: float
    true_probability: float
    clicked: bool


@dataclass(frozen=True)
class Contender:
    """A model in the demo's table.

    Attributes:
        name: of the model and its part in the demo.
        metrics: by name, over the test rows.
        network_parameters: numbers that it has learnt, without the embedding tables.
        scoring_ms: of its network, uncompiled, one thread, for the request that is ranked over HTTP; the median.
    """

    name: str
    metrics: Mapping[str, Any]
    network_parameters: int
    scoring_ms: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, and where it is.

    Attributes:
        model_name: of the model.
        scorers: metrics of ``model``, ``ceiling`` and ``floor`` over the same test rows.
        models: the model, a teacher, and the student that it has taught.
        user: key of the user who was ranked for.
        num_candidates: of that request.
        latency_ms: of its answer.
        top_candidates: the first of the answer.
        score_difference: largest difference of a probability between evaluation, batch scores and the service's answer.
        artifact, report, scores: paths.
        mlflow: tracking URI and run id; None where the run is not tracked.
        seconds: of each stage.
    """

    model_name: str
    scorers: Mapping[str, Metrics]
    models: tuple[Contender, ...]
    user: Any
    num_candidates: int
    latency_ms: float
    top_candidates: tuple[TopCandidate, ...]
    score_difference: float
    artifact: str
    report: str
    scores: str
    mlflow: tuple[str, str] | None
    seconds: Mapping[str, float]

    def metrics(self, scorer: str) -> dict[str, Any]:
        """Metrics of a scorer by name."""
        return asdict(self.scorers[scorer])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        plain = asdict(self)
        if self.mlflow is not None:
            plain["mlflow"] = {"tracking_uri": self.mlflow[0], "run_id": self.mlflow[1]}
        return plain


def run_demo(root: Path, *, impressions: int, epochs: int) -> DemoResult:
    """Runs every stage.

    Args:
        root: folder of everything that is written.
        impressions: to simulate.
        epochs: at most.

    Raises:
        ConfigError: ``root`` cannot be written to, or holds files that are not a demo's.
    """
    if root.exists() and not root.is_dir():
        raise ConfigError(f"--output must be a folder, got the file {root}")
    check_can_write(root / "views", name="--output")
    _claim(root)
    clock = _Clock()
    quiet_libraries()
    overrides = [
        override("data.views", str(root / "views")),
        override("data.training_set", str(root / "training_set")),
        override("training.epochs", epochs),
    ]
    experiment, schema = load_experiment(shipped_config(EXPERIMENT), overrides)
    task = experiment.criterion(schema).tasks[0]

    _simulate(root, impressions)
    clock.lap("simulate")
    training_set = _build(experiment, schema)
    clock.lap("build")
    run = RunFolder(root / "run")
    trained = _train(experiment, schema, training_set, run)
    clock.lap("train")
    predictions, truth, scorers = _evaluate(trained, training_set, root / "views" / "truth.parquet", task)
    clock.lap("evaluate")
    distilled = _distil(experiment, schema, training_set, root, epochs)
    clock.lap("distil")
    models = _contenders(trained, scorers["model"], distilled, training_set, predictions, task)
    clock.lap("compare")
    _export(trained, training_set, root / "artifact")
    clock.lap("export")
    difference = _score(schema, predictions, task, root)
    clock.lap("score")
    answer = _serve(schema, predictions, truth, task, root)
    clock.lap("serve")
    return DemoResult(
        model_name=experiment.model.kind.upper(),
        scorers=scorers,
        models=models,
        user=answer.user,
        num_candidates=answer.num_candidates,
        latency_ms=answer.latency_ms,
        top_candidates=answer.top,
        score_difference=max(difference, answer.difference),
        artifact=str(root / "artifact"),
        report=str(run.report),
        scores=str(root / "test_scores.parquet"),
        mlflow=tracked_run(run.path),
        seconds=clock.seconds(),
    )


class _Clock:
    """Seconds of stages, one after the other."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name], self._last = round(now - self._last, 2), now

    def seconds(self) -> dict[str, float]:
        return {**self._laps, "all": round(self._last - self._begin, 2)}


def _claim(root: Path) -> None:
    """Marks a new or empty folder as a demo's: what is in it may then be replaced.

    Raises:
        ConfigError: the folder holds something, and no demo has marked it.
    """
    if (root / MARKER).is_file():
        return
    if root.exists() and any(root.iterdir()):
        raise ConfigError(
            f"--output must be a new or empty folder, or one of an earlier demo, got {root}, which holds other files",
            hint="choose another folder, or delete it if its files are not needed",
        )
    write_json(root / MARKER, {"format": "recsys.demo"})


def _simulate(root: Path, impressions: int) -> None:
    views, marker = root / "views", root / MARKER
    config = SimulatorConfig(num_impressions=impressions).resolved()
    wanted = config.model_dump(mode="json")
    with stage(f"simulate {impressions:,} impressions") as tell:
        try:
            written = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            written = {}
        if written.get("simulated") == wanted and written.get("views") == _sizes(views):
            tell("there already")
            return
        simulate(config, views, counting(tell, "impressions"), workers=os.cpu_count() or 1)
        write_json(marker, {"format": "recsys.demo", "simulated": wanted, "views": _sizes(views)})
        tell("")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path in it."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _build(experiment: ExperimentConfig, schema: Schema) -> TrainingSet:
    with stage("build the training set") as tell:
        summary = build_training_set(schema, experiment.data)
        rows = ", ".join(f"{split} {rows:,}" for split, rows in summary.rows.items())
        tell(f"{rows} impressions" + (", there already" if summary.skipped else ""))
        return TrainingSet.open(experiment.data.training_set)


def _distil(first: ExperimentConfig, schema: Schema, training_set: TrainingSet, root: Path, epochs: int) -> TrainedRun:
    """A student and its teacher, trained together on the same data as the first model."""
    overrides = [
        override("data.views", first.data.views),
        override("data.training_set", first.data.training_set),
        override("training.epochs", min(epochs, DISTILLED_EPOCHS)),
    ]
    experiment, _ = load_experiment(shipped_config(DISTILLED), overrides)
    return _train(experiment, schema, training_set, RunFolder(root / "distilled_run"))


def _name(experiment: ExperimentConfig) -> str:
    taught = experiment.distillation
    kind = experiment.model.kind.upper()
    return (
        kind if not isinstance(taught, OnlineDistillationConfig) else f"{kind}, taught by {taught.teacher.kind.upper()}"
    )


def _contenders(
    trained: TrainedRun,
    metrics: Metrics,
    distilled: TrainedRun,
    training_set: TrainingSet,
    predictions: Predictions,
    task: str,
) -> tuple[Contender, ...]:
    """The three models, timed in turn on the longest of the test requests."""
    with stage("time the three models") as tell:
        request = Batch.from_training_set(training_set, "test", np.array([np.argmax(np.bincount(predictions.request))]))
        teacher = distilled.load_teacher()
        models = {"first": trained.model, "teacher": teacher, "student": distilled.model}
        times = scoring_ms(models, request)
        config = distilled.experiment.distillation
        assert isinstance(config, OnlineDistillationConfig)
        tell(f"one request of {request.num_rows} candidates")
    rows = (
        ("first", _name(trained.experiment), asdict(metrics)),
        ("teacher", f"{config.teacher.kind.upper()} (the teacher)", distilled.summary["teacher"]["test"][task]),
        ("student", _name(distilled.experiment), distilled.summary["test"][task]),
    )
    return tuple(
        Contender(name, values, sum(p.numel() for p in models[part].network.parameters()), times[part])
        for part, name, values in rows
    )


def _train(experiment: ExperimentConfig, schema: Schema, training_set: TrainingSet, run: RunFolder) -> TrainedRun:
    with stage(f"train {_name(experiment)}", spinner=False) as tell:
        wanted = experiment.run_fingerprint(schema, training_set.fingerprint)
        if (run.path / "config.json").is_file() and run.config()["fingerprint"] != wanted:
            shutil.rmtree(run.path)  # of a demo of another size
        result = train(experiment, schema, run.path)
        state = "there already" if result.was_finished else f"{result.train_rows_per_s:,.0f} rows/s"
        tell(f"epoch {result.best_epoch} of {result.epochs} is best, {state}")
        return TrainedRun.load(run.path)


def _evaluate(
    trained: TrainedRun, training_set: TrainingSet, truth_file: Path, task: str
) -> tuple[Predictions, np.ndarray, dict[str, Metrics]]:
    """Model, ceiling and floor on the rows of the test split; the report with all three."""
    with stage("evaluate on the test period") as tell:
        predictions = predict(trained.model, training_set, "test", trained.experiment.training.evaluation_batch_size)
        _, labels = predictions.task(task)
        truth = true_probabilities(truth_file, training_set, "test")
        floor = item_popularity(training_set, "test", task)
        scorers = {
            "model": evaluate(predictions)[task],
            "ceiling": evaluate_scores(labels, probabilities=truth, groups=predictions.groups),
            "floor": evaluate_scores(labels, probabilities=floor, groups=predictions.groups),
        }
        others = (
            ScoreRow("true probabilities", "ceiling", scorers["ceiling"]),
            ScoreRow("item popularity", "floor", scorers["floor"]),
        )
        folder = trained.folder
        write_run_report(
            folder, trained.experiment, training_set, predictions, "test", trained.summary, others={task: others}
        )
        tracked = tracked_run(folder.path)
        if tracked is not None:
            connect(tracked[0]).log_artifact(tracked[1], str(folder.report))
        tell(f"AUC {scorers['model'].auc:.4f}")
    return predictions, truth, scorers


def _export(trained: TrainedRun, training_set: TrainingSet, artifact: Path) -> None:
    with stage("export the artifact") as tell:
        summary = export_artifact(
            trained.model,
            training_set,
            artifact,
            name=trained.experiment.name,
            snapshot="all",
            model_config=trained.experiment.model,
            facts={"run_fingerprint": trained.fingerprint},
            stage=tell,
        )
        tell(f"{summary.engine}, {summary.bytes / 2**20:.1f} MiB, largest error {summary.max_error:.1e}")


def _score(schema: Schema, predictions: Predictions, task: str, root: Path) -> float:
    """Batch-scores the test impressions; returns the largest difference to the evaluation."""
    with stage("score a Parquet file") as tell:
        source, target = root / "test_impressions.parquet", root / "test_scores.parquet"
        order = np.argsort(predictions.source_row)
        labels = {t.label for t in schema.tasks}
        _view(schema, root, predictions.source_row[order]).drop(labels).write_parquet(source)
        summary = score_parquet(root / "artifact", source, target)
        scored = pl.read_parquet(target, columns=[f"score_{task}"], glob=False).to_series().to_numpy()
        logits, _ = predictions.task(task)
        difference = float(np.abs(scored - sigmoid(logits[order])).max())
        tell(f"{summary.rows:,} rows, {difference:.0e} from the evaluation's at most")
    return difference


def _view(schema: Schema, root: Path, rows: np.ndarray) -> pl.DataFrame:
    """Rows of the impressions view, by their ascending numbers."""
    files = find_files("impressions", root / "views", schema.views.impressions.path)
    first, last = int(rows[0]), int(rows[-1])
    part = pl.scan_parquet(list(files), glob=False).slice(first, last - first + 1).collect()
    return part[rows - first]


@dataclass(frozen=True)
class _Answer:
    user: Any
    num_candidates: int
    latency_ms: float
    top: tuple[TopCandidate, ...]
    difference: float


def _serve(schema: Schema, predictions: Predictions, truth: np.ndarray, task: str, root: Path) -> _Answer:
    """Starts the service, ranks the longest of the test requests, stops the service."""
    with stage("rank one request over HTTP") as tell:
        request = np.argmax(np.bincount(predictions.request))
        rows = np.flatnonzero(predictions.request == request)
        rows = rows[np.argsort(predictions.source_row[rows])]
        body = _request(schema, root, predictions.source_row[rows])
        with Service(root / "artifact", root / "service.log") as service:
            service.rank(body)  # the first answer pays for what is set up once
            begin = time.perf_counter()
            reply = service.rank(body)
            latency_ms = (time.perf_counter() - begin) * 1e3
        logits, labels = predictions.task(task)
        by_item = {c[schema.views.impressions.item]: row for c, row in zip(body["candidates"], rows, strict=True)}
        ranked = [(entry["item"], entry["score"], by_item[entry["item"]]) for entry in reply["ranked"]]
        difference = max(abs(score - float(sigmoid(logits[[row]])[0])) for _, score, row in ranked)
        tell(f"{len(rows)} candidates in {latency_ms:.1f} ms, {difference:.0e} from the evaluation's at most")
    top = [TopCandidate(i, s, float(truth[row]), bool(labels[row] == 1)) for i, s, row in ranked[:NUM_TOP]]
    return _Answer(body["user_id"], len(rows), latency_ms, tuple(top), difference)


def _request(schema: Schema, root: Path, source_rows: np.ndarray) -> dict[str, Any]:
    """A request as a client would send it, from the rows of the view, given by their ascending numbers."""
    view = schema.views.impressions
    shown = _view(schema, root, source_rows)
    keys = {view.time, view.user, view.item}
    context = sorted({f.source_column for f in schema.features_of("context")} - keys)
    candidate = sorted({f.source_column for f in schema.features_of("candidate")} - keys)
    first = shown.row(0, named=True)
    return {
        "user_id": first[view.user],
        "time": first[view.time],
        "context": {c: first[c] for c in context},
        "candidates": [{c: row[c] for c in (view.item, *candidate)} for row in shown.iter_rows(named=True)],
    }
