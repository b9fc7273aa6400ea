"""Several experiments, each with several seeds, side by side: what a comparison of models or settings is made of.

::

    FOLDER/<experiment>/seed-<seed>/   one run folder each; a finished one is not trained again
    FOLDER/sweep.json                  every run, and the means
    FOLDER/sweep.md                    the same as a table; both written again after every run

Each run selects its own epoch on the validation split, and the test split is scored once with it. Nothing here reads a
test metric to choose anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recsys.errors import ConfigError, nearest
from recsys.files import write_json, write_text
from recsys.metrics import rela_impr
from recsys.schema import Schema
from training.experiment import ExperimentConfig
from training.trainer import TrainResult, open_training_set, train

METRICS = ("auc", "gauc", "logloss")
"""Metrics of the table."""


@dataclass(frozen=True)
class Arm:
    """One experiment of a sweep; its seed is replaced by each of the sweep's."""

    experiment: ExperimentConfig
    schema: Schema

    @property
    def name(self) -> str:
        """Of the experiment, and of its folder."""
        return self.experiment.name

    def with_seed(self, seed: int) -> ExperimentConfig:
        """The experiment with another seed."""
        training = self.experiment.training.model_copy(update={"seed": seed})
        return self.experiment.model_copy(update={"training": training})


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds.

    Attributes:
        mean: over the seeds whose value is defined; NaN if there are none.
        sd: of the sample (divided by n - 1); NaN for fewer than two.
        num_seeds: these seeds.
    """

    mean: float
    sd: float
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        """Of the values that are defined."""
        known = np.array([v for v in values if v is not None], dtype=np.float64)
        mean = float(known.mean()) if len(known) else math.nan
        return cls(mean, float(known.std(ddof=1)) if len(known) > 1 else math.nan, len(known))


def run_sweep(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    base: str | None = None,
    workers: int = 1,
    say: Callable[[str], None] = lambda _: None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains every arm with every seed, seed by seed, and writes the table after each run.

    Interrupted, it goes on where it stopped: runs that have finished are read, one that was begun resumes.

    Args:
        arms: with different names.
        seeds: different ones.
        folder: of the sweep.
        base: name of the arm that RelaImpr is relative to; the first if not given.
        workers: processes of each run.
        say: told of each run.
        progress: show each run's progress on stderr.

    Returns:
        What ``sweep.json`` holds.

    Raises:
        ConfigError: names or seeds repeat, the base is none of the arms, the arms are not trained and tested on one
            training set, or a folder holds another run.
    """
    names = [arm.name for arm in arms]
    _check(arms, names, seeds, base)
    folder = Path(folder)
    results: dict[str, dict[int, TrainResult]] = {name: {} for name in names}
    table: dict[str, Any] = {}
    for place, (seed, arm) in enumerate([(seed, arm) for seed in seeds for arm in arms], 1):
        say(f"run {place} of {len(seeds) * len(arms)}: {arm.name}, seed {seed}")
        run_dir = folder / arm.name / f"seed-{seed}"
        result = train(arm.with_seed(seed), arm.schema, run_dir, workers=workers, progress=progress)
        results[arm.name][seed] = result
        table = summarise(results, base or names[0])
        write_json(folder / "sweep.json", table)
        write_text(folder / "sweep.md", markdown(table))
    return table


def _check(arms: Sequence[Arm], names: Sequence[str], seeds: Sequence[int], base: str | None) -> None:
    for what, values in (("experiments", names), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(
                f"{what} must be at least one and all different, got {', '.join(map(str, values)) or 'none'}",
                hint="give each experiment file a name of its own, and each seed once",
            )
    if base is not None and base not in names:
        raise ConfigError(f"base must be one of the experiments, got {base!r}", hint=nearest(base, names))
    sets = {arm.name: open_training_set(arm.experiment, arm.schema).fingerprint for arm in arms}
    other = next((name for name in names if sets[name] != sets[names[0]]), None)
    if other is not None:
        raise ConfigError(
            f"data.training_set must be the same in all experiments, but that of {other!r} is not that of {names[0]!r}",
            hint="metrics over different rows cannot stand in one table",
        )


def summarise(results: Mapping[str, Mapping[int, TrainResult]], base: str) -> dict[str, Any]:
    """Means and spreads by arm, as plain JSON; RelaImpr is of the mean AUC (or GAUC) over the base's.

    Args:
        results: by arm, then seed; an arm without a result yet is left out.
        base: the arm to compare with.
    """
    arms: dict[str, Any] = {}
    for name, by_seed in results.items():
        if not by_seed:
            continue
        runs = list(by_seed.values())
        arms[name] = {
            "selected_by": runs[0].selected_by,
            "validation": _spreads([run.validation for run in runs]),
            "test": _spreads([run.test for run in runs if run.test is not None]),
            "best_epoch": _plain(Spread.of([run.best_epoch for run in runs])),
            "train_s": _plain(Spread.of([run.train_s for run in runs])),
            "seeds": {
                str(seed): {
                    "run": str(run.run_dir),
                    "fingerprint": run.fingerprint,
                    "best_epoch": run.best_epoch,
                    "validation": run.validation,
                    "test": run.test,
                }
                for seed, run in by_seed.items()
            },
        }
    for arm in arms.values():
        arm["rela_impr"] = _rela_impr(arm, arms.get(base))
    return {"base": base, "arms": arms}


def _spreads(metrics: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By task and metric."""
    if not metrics:
        return {}
    return {
        task: {metric: _plain(Spread.of([m[task][metric] for m in metrics])) for metric in METRICS}
        | {"gauc_users": max(int(m[task]["gauc_users"]) for m in metrics)}
        for task in metrics[0]
    }


def _plain(spread: Spread) -> dict[str, Any]:
    mean, sd = (None if math.isnan(v) else v for v in (spread.mean, spread.sd))
    return {"mean": mean, "sd": sd, "seeds": spread.num_seeds}


def _rela_impr(arm: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, dict[str, float | None]]:
    """Percent, by task and metric, on the test split."""
    if base is None:
        return {}
    found: dict[str, dict[str, float | None]] = {}
    for task, metrics in arm["test"].items():
        found[task] = {}
        for metric in ("auc", "gauc"):
            own, other = metrics[metric]["mean"], base["test"].get(task, {}).get(metric, {}).get("mean")
            value = math.nan if own is None or other is None else rela_impr(own, other)
            found[task][metric] = None if math.isnan(value) else value
    return found


def markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown: a section a task, a row an arm."""
    arms: Mapping[str, Any] = table["arms"]
    tasks = list(dict.fromkeys(task for arm in arms.values() for task in arm["validation"]))
    parts = []
    for task in tasks:
        header = [
            "experiment",
            "seeds",
            "validation AUC",
            "test AUC",
            "RelaImpr",
            "test GAUC",
            "RelaImpr",
            "test logloss",
        ]
        lines = [f"## {task}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        for name, arm in arms.items():
            validation, test = arm["validation"][task], arm["test"].get(task)
            impr = arm["rela_impr"].get(task, {})
            cells = [name, str(validation["auc"]["seeds"]), _cell(validation["auc"])]
            cells += [
                _cell(test["auc"] if test else None),
                _percent(impr.get("auc")),
                _cell(test["gauc"] if test else None),
                _percent(impr.get("gauc")),
                _cell(test["logloss"] if test else None),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        users = {arm["test"][task]["gauc_users"] for arm in arms.values() if task in arm["test"]}
        note = f" GAUC is over {max(users):,} users with both classes." if users else ""
        parts.append("\n".join(lines) + f"\n\nRelaImpr is over `{table['base']}`.{note}\n")
    rules = {name: arm["selected_by"] for name, arm in arms.items()}
    if len(set(rules.values())) <= 1:
        rule = f"Each run's epoch was selected by its validation {next(iter(rules.values()), '')}."
    else:
        listed = "; ".join(f"`{name}` by {selected}" for name, selected in rules.items())
        rule = f"Each run's epoch was selected on the validation split: {listed}."
    closing = f"Mean ± standard deviation over seeds. {rule}\n"
    return "\n".join([*parts, closing])


def _cell(spread: Mapping[str, Any] | None) -> str:
    if spread is None or spread["mean"] is None:
        return "–"
    return f"{spread['mean']:.4f}" + ("" if spread["sd"] is None else f" ± {spread['sd']:.4f}")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f} %"
