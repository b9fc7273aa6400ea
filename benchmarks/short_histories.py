"""Who gains from a model: users of short histories, or those of long ones.

    recsys sweep configs/experiment/{din,aw_moe,aw_moe_cl}_kuairand.yaml --folder runs/aw_moe
    python -m benchmarks.short_histories --sweep runs/aw_moe --base din_kuairand --models aw_moe_kuairand

Takes the runs of a finished sweep, scores a split with each, and cuts its users into quarters by the number of events
before their first request in it. A model's gain is its AUC minus the base's of the same seed, over all rows and over
those of a quarter's users; what is told is the mean over seeds and the standard deviation.

Users that the training set does not know are one request each, as in GAUC.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine_record
from recsys.files import write_json, write_text
from recsys.metrics import auc
from training.evaluate import Predictions, predict
from training.run import TrainedRun
from training.sweep import Spread

QUARTERS = ("shortest", "second", "third", "longest")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses arguments and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sweep", type=Path, required=True, help="folder of a finished sweep")
    parser.add_argument("--base", required=True, help="experiment that gains are over")
    parser.add_argument("--models", nargs="+", required=True, help="experiments that gain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--task", help="the first if not given")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--output", type=Path, help="folder of the results; SWEEP/short_histories if not given")
    args = parser.parse_args(arguments)
    found = run(args.sweep, base=args.base, models=args.models, seeds=args.seeds, task=args.task, split=args.split)
    output = args.output or args.sweep / "short_histories"
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "short_histories.json", found | {"machine": machine_record()})
    write_text(output / "short_histories.md", markdown(found))
    sys.stdout.write(markdown(found))


def run(
    sweep: Path, *, base: str, models: Sequence[str], seeds: Sequence[int], task: str | None = None, split: str = "test"
) -> dict[str, Any]:
    """Scores a split with every run.

    Args:
        sweep: its folder.
        base: name of an experiment of it.
        models: names of others.
        seeds: of the sweep.
        task: the first if not given.
        split: what to score.

    Returns:
        AUC by seed of every experiment over ``all`` and each of ``QUARTERS``, gains over the base with mean and
        deviation, users, rows and bounds of each quarter.

    Raises:
        IntegrityError: a run is absent or has not finished.
    """
    figures: dict[str, dict[str, list[float]]] = {}
    sizes: dict[str, Any] = {}
    for name in (base, *models):
        for seed in seeds:
            trained = TrainedRun.load(sweep / name / f"seed-{seed}")
            config = trained.experiment.training
            predictions = predict(
                trained.model,
                trained.training_set(),
                split,
                config.evaluation_batch_size,
                history_length=config.history_length,
            )
            task = task or predictions.tasks[0]
            parts, sizes = quarters(predictions, task)
            for part, rows in parts.items():
                logits, labels = (values[rows] for values in predictions.task(task))
                figures.setdefault(name, {}).setdefault(part, []).append(auc(labels, logits))
    gains = {
        name: {part: _spread(np.subtract(figures[name][part], figures[base][part])) for part in ("all", *QUARTERS)}
        for name in models
    }
    return {"task": task, "split": split, "base": base, "auc": figures, "gain": gains, "quarters": sizes}


def quarters(predictions: Predictions, task: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Rows with a label, all and those of each quarter of users; and what is in each.

    A user's length is that before the earliest request. Users of one length are all in one quarter, so that quarters
    may be uneven.
    """
    known = np.flatnonzero(~np.isnan(predictions.task(task)[1]))
    users, of_row = np.unique(predictions.groups[known], return_inverse=True)
    length = np.full(len(users), np.iinfo(np.int64).max)
    np.minimum.at(length, of_row, predictions.history_length[known])
    bounds = np.quantile(length, [0.25, 0.5, 0.75], method="lower")
    quarter = np.searchsorted(bounds, length, side="left")
    parts, sizes = {"all": known}, {}
    for number, name in enumerate(QUARTERS):
        inside = quarter == number
        parts[name] = known[inside[of_row]]
        spans = length[inside]
        sizes[name] = {
            "users": int(inside.sum()),
            "rows": len(parts[name]),
            "events": [int(spans.min()), int(spans.max())] if len(spans) else None,
        }
    return parts, sizes


def _spread(values: np.ndarray) -> dict[str, float]:
    spread = Spread.of(values.tolist())
    return {"mean": spread.mean, "sd": spread.sd}


def markdown(found: Mapping[str, Any]) -> str:
    """A table: gains of AUC over the base."""
    heads = [f"{name}: {_span(found['quarters'][name])}" for name in QUARTERS]
    title = f"Gain of {found['task']} AUC over {found['base']}, {found['split']} split"
    lines = [
        f"{title}; quarters of users by events before their first request in it.",
        "",
        "| model | all | " + " | ".join(heads) + " |",
        "|" + "---|" * (2 + len(QUARTERS)),
    ]
    for name, gain in found["gain"].items():
        cells = [f"{gain[part]['mean']:+.4f} ± {gain[part]['sd']:.4f}" for part in ("all", *QUARTERS)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    base = found["auc"][found["base"]]
    lines.append(
        f"| AUC of {found['base']} | " + " | ".join(f"{np.mean(base[p]):.4f}" for p in ("all", *QUARTERS)) + " |"
    )
    return "\n".join([*lines, ""])


def _span(quarter: Mapping[str, Any]) -> str:
    if quarter["events"] is None:
        return "nobody"
    first, last = quarter["events"]
    return f"{first} to {last} events ({quarter['users']:,} users, {quarter['rows']:,} rows)"


if __name__ == "__main__":
    main()
