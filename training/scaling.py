r"""Scaling studies: the same experiment at many sizes, one pass over the data each, and the curves through the results.

An *axis* is one setting of the experiment with its values, such as ``model.num_layers`` or ``training.data_fraction``.
Every axis is varied alone around the experiment as given, or all in a full grid. Each size is trained with several
seeds. What a size costs is counted, not timed: parameters outside tables, training rows, and floating-point operations
of the network.

A study is resumable: each trial is a run folder of its own, finished ones are kept, interrupted ones go on.

Studies read the validation split; the test split is scored by every run, as always, and decides nothing here.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from recsys.batch import Batch
from recsys.errors import ConfigError, DataError
from recsys.files import write_json
from recsys.models import build_model
from recsys.training_set import TrainingSet
from training.data import BatchLoader
from training.experiment import ExperimentConfig, load_experiment
from training.power_law import PowerLaw, fit_power_law
from training.trainer import open_training_set, train

FRACTION, LENGTH = "training.data_fraction", "training.history_length"
_FORCED = ("training.epochs=1", "training.selection.patience=null")


@dataclass(frozen=True)
class Axis:
    """One setting and its values.

    Attributes:
        key: of the experiment, ``a.b``.
        values: as text, as YAML has them.
    """

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Reads ``a.b=1,2,4``; a value that holds a comma is written in brackets.

        Raises:
            ConfigError: it is not of that form, or has fewer than two different values.

        Example:
            >>> Axis.parse("model.hidden=[32],[64,32]").values
            ('[32]', '[64,32]')
        """
        key, equals, rest = text.partition("=")
        values, depth, start = [], 0, 0
        for place, letter in enumerate(rest):
            depth += (letter in "[{") - (letter in "]}")
            if letter == "," and depth == 0:
                values.append(rest[start:place].strip())
                start = place + 1
        values.append(rest[start:].strip())
        if not equals or not key or "" in values or len(set(values)) < 2:
            raise ConfigError(
                f"an axis must be a setting with two values or more, got {text!r}",
                hint="for example training.data_fraction=0.01,0.1,1",
            )
        if key in ("training.seed", "training.epochs"):
            raise ConfigError(
                f"an axis must not be {key}: a study passes over the data once, and --seeds names the seeds"
            )
        return cls(key, tuple(values))


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        settings: value by axis that differs from the experiment as given.
        seed: of the run.
        folder: the run folder.
    """

    settings: dict[str, str]
    seed: int
    folder: str

    @property
    def overrides(self) -> list[str]:
        """As ``recsys train --set`` takes them."""
        return [*_FORCED, f"training.seed={self.seed}", *(f"{k}={v}" for k, v in self.settings.items())]


def trials_of(axes: Sequence[Axis], seeds: Sequence[int], out: Path, *, grid: bool) -> list[Trial]:
    """Every trial of a study, the experiment as given among them unless all is a grid."""
    ends = [axis.key.rpartition(".")[2] for axis in axes]
    names = {a.key: end if ends.count(end) == 1 else a.key for a, end in zip(axes, ends, strict=True)}
    if grid:
        keys = [axis.key for axis in axes]
        sizes = [dict(zip(keys, values, strict=True)) for values in itertools.product(*(a.values for a in axes))]
    else:
        sizes = [{}, *({axis.key: value} for axis in axes for value in axis.values)]
    return [
        Trial(
            size,
            seed,
            str(out / "runs" / "-".join([*(_file_name(names[k], v) for k, v in size.items()), f"seed{seed}"])),
        )
        for size in sizes
        for seed in seeds
    ]


def _file_name(name: str, value: str) -> str:
    kept = "".join(c if c.isalnum() or c in "._" else "_" for c in value)
    return f"{name}={kept}"


@dataclass(frozen=True)
class Outcome:
    """What a trial resulted in, and what it cost.

    Attributes:
        settings, seed: of the trial.
        metric: on the validation split.
        parameters: outside tables.
        history_length: events read of the longest history.
        rows: training rows.
        flops_per_row: of the network's matrix products, forward, for one row of the study's example batch.
        training_flops: three times that, for all rows: backward costs twice forward.
        train_s: seconds in training steps.
    """

    settings: dict[str, str]
    seed: int
    metric: float
    parameters: int
    history_length: int
    rows: int
    flops_per_row: float
    training_flops: float
    train_s: float


def run_trial(config: str | Path, overrides: Sequence[str], trial: Trial) -> dict[str, Any]:
    """Trains a trial, or finds it trained, and counts what it costs.

    Args:
        config: the experiment's file.
        overrides: of the whole study.

    Raises:
        RecsysError: as training does.
    """
    experiment, schema = load_experiment(config, [*overrides, *trial.overrides])
    result = train(experiment, schema, trial.folder, progress=False)
    training_set = open_training_set(experiment, schema)
    criterion = experiment.criterion(schema)
    value = criterion.value(result.validation)
    if value is None:
        raise DataError(f"validation {criterion} is not defined for {trial.folder}")
    parameters, flops_per_row = cost_of(experiment, training_set)
    loader = BatchLoader(
        training_set, "train", 1, seed=experiment.training.seed, fraction=experiment.training.data_fraction
    )
    longest = max((h.max_length for h in schema.histories), default=0)
    return asdict(
        Outcome(
            settings=trial.settings,
            seed=trial.seed,
            metric=float(value),
            parameters=parameters,
            history_length=experiment.training.history_length or longest,
            rows=loader.num_rows,
            flops_per_row=flops_per_row,
            training_flops=3.0 * flops_per_row * loader.num_rows,
            train_s=result.train_s,
        )
    )


def cost_of(experiment: ExperimentConfig, training_set: TrainingSet) -> tuple[int, float]:
    """Parameters outside tables, and floating-point operations a row of the network's matrix products.

    Counted on the first rows of the validation split, a thousand requests at most: attention costs what their
    histories are long.
    """
    schema = training_set.schema
    model = build_model(experiment.model, schema, training_set.encoder.table_sizes).eval()
    part = training_set.split("validation")
    batch = Batch.from_training_set(
        training_set,
        "validation",
        slice(0, min(part.num_requests, 1000)),
        max_length=experiment.training.history_length,
    )
    with torch.no_grad():
        embedded = model.lookup(batch)
        with FlopCounterMode(display=False) as counter:
            model.network(embedded)
    parameters = sum(p.numel() for p in model.network.parameters())
    return parameters, counter.get_total_flops() / max(batch.num_rows, 1)


@dataclass(frozen=True)
class Size:
    """One size of a study, over its seeds.

    Attributes:
        settings: what differs from the experiment as given.
        mean, deviation: of the metric over seeds; the deviation is NaN with one seed.
        outcomes: of the seeds.
    """

    settings: dict[str, str]
    mean: float
    deviation: float
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Curve:
    """A fitted axis.

    Attributes:
        axis: key of the setting, or ``training_flops`` for the frontier of the whole study.
        x_name: what the curve is a function of.
        x: one a point.
        y: one a point.
        law: None where it cannot be fitted.
        note: why not.
    """

    axis: str
    x_name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    law: PowerLaw | None
    note: str | None = None


def sizes_of(outcomes: Sequence[Outcome]) -> list[Size]:
    """Outcomes by size, in the order of their first trial."""
    by_size: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_size.setdefault(json.dumps(outcome.settings, sort_keys=True), []).append(outcome)
    return [
        Size(
            same[0].settings,
            statistics.fmean(o.metric for o in same),
            statistics.stdev(o.metric for o in same) if len(same) > 1 else math.nan,
            tuple(same),
        )
        for same in by_size.values()
    ]


def curves_of(axes: Sequence[Axis], outcomes: Sequence[Outcome]) -> list[Curve]:
    """One curve an axis, over the sizes that differ from the experiment in no other; then the frontier.

    The frontier holds the sizes that no cheaper one beats in the mean over seeds.
    """
    curves = []
    for axis in axes:
        name, cost = _cost_of_axis(axis)
        points = [o for o in outcomes if set(o.settings) <= {axis.key}]
        if len(points) < 2:  # a full grid: the other axes at their first value
            first = {a.key: a.values[0] for a in axes if a.key != axis.key}
            points = [o for o in outcomes if all(o.settings.get(k) == v for k, v in first.items())]
        curves.append(_curve(axis.key, name, [cost(o) for o in points], [o.metric for o in points]))
    best: list[Size] = []
    for size in sorted(sizes_of(outcomes), key=lambda s: (s.outcomes[0].training_flops, -s.mean)):
        if not best or size.mean > best[-1].mean:
            best.append(size)
    frontier = [o for size in best for o in size.outcomes]
    flops = [o.training_flops for o in frontier]
    return [*curves, _curve("training_flops", "training FLOPs, best sizes", flops, [o.metric for o in frontier])]


def _cost_of_axis(axis: Axis) -> tuple[str, Callable[[Outcome], float]]:
    if axis.key == FRACTION:
        return "training rows", lambda o: float(o.rows)
    if axis.key == LENGTH:
        return "history length", lambda o: float(o.history_length)
    return "parameters outside tables", lambda o: float(o.parameters)


def _curve(axis: str, name: str, x: list[float], y: list[float]) -> Curve:
    try:
        return Curve(axis, name, tuple(x), tuple(y), fit_power_law(np.array(x), np.array(y)))
    except DataError as err:
        return Curve(axis, name, tuple(x), tuple(y), None, err.message)


@dataclass(frozen=True)
class Recommendation:
    """The cheapest size that reaches a target.

    Attributes:
        target: of the metric.
        settings: of the size; None if none reaches it.
        mean: its metric.
        flops_per_row: what it costs to score a row.
        needed: for each axis whose curve reaches the target, the x where it does; it may lie beyond all sizes tried.
    """

    target: float
    settings: dict[str, str] | None
    mean: float | None
    flops_per_row: float | None
    needed: dict[str, float]


def recommend(target: float, outcomes: Sequence[Outcome], curves: Sequence[Curve]) -> Recommendation:
    """The size that scores a row with the fewest operations among those whose mean reaches the target."""
    good = [size for size in sizes_of(outcomes) if size.mean >= target]
    chosen = min(good, key=lambda s: (s.outcomes[0].flops_per_row, s.outcomes[0].training_flops), default=None)
    needed = {c.axis: x for c in curves if c.law is not None and (x := c.law.needed(target)) is not None}
    if chosen is None:
        return Recommendation(target, None, None, None, needed)
    return Recommendation(target, chosen.settings, chosen.mean, chosen.outcomes[0].flops_per_row, needed)


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        name: of the experiment.
        metric: ``task.metric``, on the validation split.
        outcomes: one a trial.
        curves: one an axis, and the frontier.
        recommendation: None where no target was given.
    """

    name: str
    metric: str
    outcomes: tuple[Outcome, ...]
    curves: tuple[Curve, ...]
    recommendation: Recommendation | None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return _plain(asdict(self))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_study(
    config: str | Path,
    axes: Sequence[Axis],
    out: str | Path,
    *,
    seeds: int = 1,
    grid: bool = False,
    target: float | None = None,
    workers: int = 1,
    overrides: Sequence[str] = (),
    advance: Callable[[int, int], None] = lambda _, __: None,
) -> Study:
    """Runs a study, or goes on with one, and writes ``study.json`` and ``study.html`` into its folder.

    Args:
        config: the experiment's file; its training set must be built.
        axes: at least one.
        out: the study's folder.
        seeds: seeds a size, from the experiment's own on.
        grid: all combinations instead of one axis at a time.
        target: of the metric, to recommend a size for.
        workers: trials at a time; above 1 they run under Ray Tune.
        overrides: ``a.b=c`` each, for all trials.
        advance: called with trials done, and of how many.

    Raises:
        ConfigError: an axis or an override does not fit the experiment.
        RecsysError: a trial fails; those that are done are kept.
    """
    from training.scaling_report import write_study_report

    out = Path(out)
    experiment, schema = load_experiment(config, overrides)
    first = experiment.training.seed
    trials = {}
    for trial in trials_of(axes, range(first, first + seeds), out, grid=grid):
        # A value that does not fit is told before hours of training; one that is the experiment's own is trained once.
        sized, _ = load_experiment(config, [*overrides, *trial.overrides])
        trials.setdefault(sized.model_dump_json(), trial)
    for axis in axes:
        if axis.key == LENGTH and not schema.histories:
            raise ConfigError(f"{config}: {LENGTH} must not be an axis of a schema without histories")
    open_training_set(experiment, schema)
    if workers > 1:
        from training.tune import run_trials

        results = run_trials(
            config, overrides, list(trials.values()), workers=workers, folder=out / "tune", advance=advance
        )
    else:
        results = []
        for number, trial in enumerate(trials.values()):
            advance(number, len(trials))
            results.append(run_trial(config, overrides, trial))
        advance(len(trials), len(trials))
    outcomes = tuple(Outcome(**result) for result in results)
    curves = tuple(curves_of(axes, outcomes))
    metric = str(experiment.criterion(schema))
    study = Study(
        experiment.name,
        metric,
        outcomes,
        curves,
        None if target is None else recommend(target, outcomes, curves),
    )
    write_json(out / "study.json", study.to_json())
    write_study_report(study, out / "study.html")
    return study
