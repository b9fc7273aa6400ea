"""Every model on one simulated log whose true click probabilities are known.

    python -m benchmarks.models --output FOLDER --impressions 1000000 --seeds 3 --threads 1

Simulates, builds, and trains each model as ``recsys sweep`` does: the epoch with the best validation AUC is tested, and
nothing looks at test labels to choose. Writes ``models.json`` and ``models.md`` into the output folder: test AUC with
its spread, the distance to the AUC of the true probabilities, parameters, the time of a training step, and the time
that the network takes for the longest test request, uncompiled. Times are in one thread, all models in turn, so that
whatever else the machine does falls on all of them. The table holds the models asked for; runs that have finished are
not run again.

The models share their recipe (Adagrad 0.05 on tables, Adam 0.001, batch 1,024) and their tables' width, 16, where the
width is not what they are about. None was tuned on this log, so the table tells how they start, not how far they go.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.costs import parameters, step_ms
from benchmarks.machine import machine_record
from benchmarks.simulated import ROOT
from recsys.batch import Batch
from recsys.config import apply_overrides, load_yaml, override, validate
from recsys.files import write_json, write_text
from recsys.metrics import evaluate_scores
from recsys.models import RankingModel
from recsys.schema import Schema
from recsys.training_set import TrainingSet, label_column
from training.baselines import item_popularity, true_probabilities
from training.data import BatchLoader
from training.experiment import ExperimentConfig
from training.run import TrainedRun
from training.sweep import Arm, Spread, run_sweep
from training.timing import scoring_ms

SCHEMA = ROOT / "configs" / "schema" / "simulated.yaml"
SUAN = {"kind": "suan", "embedding_dim": 16, "num_layers": 2, "hidden": [200, 80], "candidate_mapping": "slots"}
SUAN_NARROW = {"kind": "suan", "embedding_dim": 8, "num_layers": 2, "hidden": [64, 32], "candidate_mapping": "slots"}
LIGHT_SUAN = {
    "kind": "lightsuan",
    "embedding_dim": 8,
    "num_layers": 1,
    "hidden": [64, 32],
    "candidate_mapping": "slots",
    "window": 8,
    "dilation": 4,
}
ARMS: dict[str, dict[str, Any]] = {
    "lr": {"kind": "lr"},
    "fm": {"kind": "fm", "embedding_dim": 16},
    "dnn": {"kind": "dnn", "embedding_dim": 16},
    "wide_deep": {"kind": "wide_deep", "embedding_dim": 16},
    "deepfm": {"kind": "deepfm", "embedding_dim": 16},
    "dcnv2": {"kind": "dcnv2", "embedding_dim": 16},
    "dualmlp": {"kind": "dualmlp", "embedding_dim": 16},
    "finalmlp": {"kind": "finalmlp", "embedding_dim": 16},
    "mmoe": {"kind": "mmoe", "embedding_dim": 16},
    "ple": {"kind": "ple", "embedding_dim": 16},
    "infnet": {"kind": "infnet", "embedding_dim": 16, "input_norm": True},
    "mean_pooling": {"kind": "din", "embedding_dim": 16, "pooling": "mean"},
    "din": {"kind": "din", "embedding_dim": 16},
    "aw_moe": {"kind": "aw_moe", "embedding_dim": 16},
    "aw_moe_contrastive": {
        "kind": "aw_moe",
        "embedding_dim": 16,
        "contrastive_weight": 0.05,
        "mask_probability": 0.1,
    },
    "twin": {"kind": "twin", "embedding_dim": 16},
    "dare": {"kind": "dare", "embedding_dim": 16, "attention_dim": 16},
    "suan": SUAN,
    "suan_narrow": SUAN_NARROW,  # one grade above the LightSUAN below: a layer more
    "lightsuan": LIGHT_SUAN,
    "lightsuan_distilled": LIGHT_SUAN,
}
"""Models by name of the arm."""

TAUGHT = {"lightsuan_distilled": {"mode": "online", "temperature": 1.0, "weight": 1.0, "teacher": SUAN}}
"""Distillation by name of the arm."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses arguments and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="views, training set, runs, results")
    parser.add_argument("--impressions", type=int, default=1_000_000)
    parser.add_argument("--models", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="at most; the best on validation counts")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    run(
        args.output.absolute(),
        impressions=args.impressions,
        models=args.models,
        seeds=range(1, args.seeds + 1),
        epochs=args.epochs,
        threads=args.threads,
    )


def run(
    output: Path, *, impressions: int, models: Sequence[str], seeds: Sequence[int], epochs: int, threads: int
) -> dict[str, Any]:
    """Simulates, builds, trains, and writes the table after each seed of all models.

    Args:
        output: folder; what an earlier call left there is kept.
        impressions: about so many are simulated.
        models: keys of ``ARMS``.
        seeds: of the models; the log is the same for all.
        epochs: at most.
        threads: of a training run.

    Returns:
        What ``models.json`` holds.
    """
    arms = [_arm(name, output, epochs, threads) for name in models]
    training_set = _prepare(output, impressions, arms[0].experiment)
    found: dict[str, Any] = {}
    for position in range(len(seeds)):
        table = run_sweep(arms, seeds[: position + 1], output / "runs", say=_say, progress=sys.stderr.isatty())
        found = _figures(table, arms, training_set, output / "views" / "truth.parquet")
        found |= {"epochs": epochs, "threads": threads, "machine": machine_record()}
        write_json(output / "models.json", found)
        write_text(output / "models.md", markdown(found))
    return found


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _arm(name: str, output: Path, epochs: int, threads: int) -> Arm:
    overrides = [
        override("data.views", str(output / "views")),
        override("data.training_set", str(output / "training_set")),
        override("training.epochs", epochs),
        override("training.num_threads", threads),
        "training.selection.patience=null",
        "tracking.uri=null",
    ]
    path = ROOT / "configs" / "experiment" / "din_simulated.yaml"
    document = apply_overrides(load_yaml(path), overrides) | {"name": name, "model": ARMS[name]}
    if name in TAUGHT:
        document["distillation"] = TAUGHT[name]
    return Arm(validate(ExperimentConfig, document, source=name), Schema.load(SCHEMA))


def _prepare(output: Path, impressions: int, experiment: ExperimentConfig) -> TrainingSet:
    from feature_store.build import build_training_set
    from feature_store.datasets.simulator import SimulatorConfig, simulate

    if not (output / "views" / "truth.parquet").exists():
        simulate(SimulatorConfig(num_impressions=impressions), output / "views")
    build_training_set(Schema.load(SCHEMA), experiment.data)
    return TrainingSet.open(output / "training_set")


def _figures(
    table: Mapping[str, Any], arms: Sequence[Arm], training_set: TrainingSet, truth_file: Path
) -> dict[str, Any]:
    """The sweep's means, with ceiling, floor, parameters and times."""
    task = training_set.schema.tasks[0].name
    split = training_set.split("test")
    labels = split.impressions.array(label_column(task))
    ceiling = evaluate_scores(labels, probabilities=true_probabilities(truth_file, training_set, "test"))
    floor = evaluate_scores(labels, probabilities=item_popularity(training_set, "test", task))
    rows_of = np.diff(split.row_offsets)
    request = Batch.from_training_set(training_set, "test", np.array([int(rows_of.argmax())]))
    models = {
        name: TrainedRun.load(next(iter(arm["seeds"].values()))["run"]).model for name, arm in table["arms"].items()
    }
    batch = next(iter(BatchLoader(training_set, "train", arms[0].experiment.training.batch_size, prefetch=0)))
    times, steps = scoring_ms(models, request), step_ms(arms, training_set, [batch])
    rows = {
        name: _row(arm, task, models[name], ceiling.auc) | {"scoring_ms": times[name], "step_ms": steps[name]}
        for name, arm in table["arms"].items()
    }
    return {
        "test_rows": split.num_rows,
        "train_rows": training_set.split("train").num_rows,
        "candidates": int(rows_of.max()),
        "batch_size": arms[0].experiment.training.batch_size,
        "ceiling": {"auc": ceiling.auc, "logloss": ceiling.logloss},
        "floor": {"auc": floor.auc, "logloss": floor.logloss},
        "models": rows,
    }


def _row(arm: Mapping[str, Any], task: str, model: RankingModel, ceiling: float) -> dict[str, Any]:
    runs = [one["test"][task]["auc"] for one in arm["seeds"].values()]
    spread = Spread.of(runs)
    return {
        "auc": runs,
        "mean": spread.mean,
        "sd": None if len(runs) < 2 else spread.sd,
        "to_ceiling": ceiling - spread.mean,
        "logloss": arm["test"][task]["logloss"]["mean"],
        "best_epochs": [one["best_epoch"] for one in arm["seeds"].values()],
    } | parameters(model)


def markdown(found: Mapping[str, Any]) -> str:
    """The table, best first."""
    columns = ("model", "seeds", "test AUC", "below the ceiling", "logloss", "network / table parameters")
    lines = [
        f"| {' | '.join(columns)} | training step, ms | scoring, ms |",
        "|---|---|---|---|---|---|---|---|",
        f"| true probabilities | | {found['ceiling']['auc']:.4f} | 0 | {found['ceiling']['logloss']:.4f} | | | |",
    ]
    for name, row in sorted(found["models"].items(), key=lambda item: -item[1]["mean"]):
        spread = "" if row["sd"] is None else f" ± {row['sd']:.4f}"
        lines.append(
            f"| {name} | {len(row['auc'])} | {row['mean']:.4f}{spread} | {row['to_ceiling']:.4f} "
            f"| {row['logloss']:.4f} "
            f"| {row['network_parameters']:,} / {row['table_parameters']:,} | {row['step_ms']:.0f} "
            f"| {row['scoring_ms']:.2f} |"
        )
    lines.append(f"| item popularity | | {found['floor']['auc']:.4f} | | {found['floor']['logloss']:.4f} | | | |")
    note = (
        f"{found['train_rows']:,} training and {found['test_rows']:,} test impressions; at most {found['epochs']} "
        f"epochs, {found['threads']} thread(s); a step: {found['batch_size']:,} rows; scoring: the network on one "
        f"request of {found['candidates']} candidates, eager."
    )
    return "\n".join([*lines, "", note, "", f"Machine: {json.dumps(found['machine'])}", ""])


if __name__ == "__main__":
    main()
