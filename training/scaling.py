r"""Scaling studies: the same experiment at many sizes, one pass over the data each, and the curves through the results.

An *axis* is one setting of the experiment with its values, such as ``model.num_layers`` or ``training.data_fraction``.
Every axis is varied alone around the experiment as given, or all in a full grid. Each size is trained with several
seeds. What a size costs is counted, not timed: parameters outside tables, training rows, and floating-point operations
of the network. Which of two sizes is better is as the experiment's selection has it: the higher AUC, the lower logloss.

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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from recsys.batch import Batch
from recsys.errors import ConfigError, DataError, RecsysError, TrainingError
from recsys.files import write_json
from recsys.models import RankingModel, build_model
from recsys.schema import Schema
from recsys.training_set import TrainingSet
from training.data import BatchLoader
from training.distill import OnlineDistillationConfig
from training.experiment import Criterion, ExperimentConfig, load_experiment
from training.power_law import MIN_POINTS, PowerLaw, fit_power_law
from training.trainer import check_fraction, open_training_set, train

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
        if key.startswith("training.selection"):
            raise ConfigError(f"an axis must not be {key}: all sizes are compared by the one metric of the experiment")
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
    names = short_names([axis.key for axis in axes])
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


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each setting's key; the whole key where several end alike.

    Example:
        >>> short_names(["model.num_layers", "model.lr", "training.lr"])
        {'model.num_layers': 'num_layers', 'model.lr': 'model.lr', 'training.lr': 'training.lr'}
    """
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


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
        training_flops: three times that, for all rows: backward costs twice forward; with those of a teacher that is
            trained along.
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
    cost = cost_of(experiment, training_set)
    loader = BatchLoader(
        training_set, "train", 1, seed=experiment.training.seed, fraction=experiment.training.data_fraction
    )
    return asdict(
        Outcome(
            settings=trial.settings,
            seed=trial.seed,
            metric=float(value),
            parameters=cost.parameters,
            history_length=_history_length(experiment, schema),
            rows=loader.num_rows,
            flops_per_row=cost.flops_per_row,
            training_flops=3.0 * cost.trained_flops_per_row * loader.num_rows,
            train_s=result.train_s,
        )
    )


def failed(folder: str, error: str) -> TrainingError:
    """The error of a study that tells which of its trials failed, and why."""
    cause, _, hint = error.partition("\n\nHint: ")
    advice = f"{hint.rstrip('.')}; or leave" if hint else "leave"
    return TrainingError(
        f"the trial {folder} failed: {cause}", hint=f"{advice} that size out: the finished trials are kept"
    )


def _history_length(experiment: ExperimentConfig, schema: Schema) -> int:
    """Events read of the longest history."""
    longest = max((h.max_length for h in schema.histories), default=0)
    return min(experiment.training.history_length or longest, longest)


class Cost(NamedTuple):
    """What an experiment's network costs.

    Attributes:
        parameters: outside tables, of what is exported.
        flops_per_row: floating-point operations a row of its matrix products, forward.
        trained_flops_per_row: the same of all that training runs forward and backward: with what the losses of the
            model's own take (AW-MoE's second gate of a masked history), and with the teacher's, where it is trained
            along (online distillation). The logits of a frozen teacher are computed once for all trials and looked up
            after that; they are not counted.
    """

    parameters: int
    flops_per_row: float
    trained_flops_per_row: float


def cost_of(experiment: ExperimentConfig, training_set: TrainingSet) -> Cost:
    """Counts what an experiment costs.

    Operations are counted on the first rows of the validation split, a thousand requests at most: attention costs what
    their histories are long.
    """
    schema, sizes = training_set.schema, training_set.encoder.table_sizes
    part = training_set.split("validation")
    batch = Batch.from_training_set(
        training_set,
        "validation",
        slice(0, min(part.num_requests, 1000)),
        max_length=experiment.training.history_length,
    )
    model = build_model(experiment.model, schema, sizes)
    flops, trained = _flops_per_row(model.eval(), batch), _flops_per_row(model.train(), batch)
    if isinstance(experiment.distillation, OnlineDistillationConfig):
        trained += _flops_per_row(build_model(experiment.distillation.teacher, schema, sizes).train(), batch)
    return Cost(_num_parameters(model), flops, trained)


def _num_parameters(model: RankingModel) -> int:
    return sum(p.numel() for p in model.network.parameters())


def _attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Scores and weighted sums: ``2 R H L S (d + e)`` of (R, H, L, d), (R, H, S, d) and (R, H, S, e)."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _vector_flops(matrix: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


_UNKNOWN_TO_THE_COUNTER = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mv: _vector_flops,
}
"""Products that torch's counter would count as 0: the fused form of attention on a CPU, a matrix by a vector."""


def _flops_per_row(model: RankingModel, batch: Batch) -> float:
    """Of a model of one's own: in training mode its running statistics move."""
    counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_THE_COUNTER)
    with torch.no_grad(), torch.random.fork_rng([]), counter:
        model(batch)
    return float(counter.get_total_flops() / max(batch.num_rows, 1))


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


def curves_of(axes: Sequence[Axis], outcomes: Sequence[Outcome], criterion: Criterion) -> list[Curve]:
    """One curve an axis, over the sizes that differ from the experiment in no other; then the frontier.

    The frontier holds the sizes that no cheaper one is as good as, in the mean over seeds.

    Args:
        criterion: what the outcomes are measured by.
    """
    curves = []
    for axis in axes:
        name, cost = _cost_of_axis(axis)
        points = [outcomes[place] for place in _along(axis, axes, [o.settings for o in outcomes])]
        curves.append(_curve(axis.key, name, [cost(o) for o in points], [o.metric for o in points], criterion))
    best: list[Size] = []
    sign = -1 if criterion.higher_is_better else 1
    for size in sorted(sizes_of(outcomes), key=lambda s: (s.outcomes[0].training_flops, sign * s.mean)):
        if not best or criterion.is_better(size.mean, best[-1].mean):
            best.append(size)
    frontier = [o for size in best for o in size.outcomes]
    flops, values = [o.training_flops for o in frontier], [o.metric for o in frontier]
    return [*curves, _curve("training_flops", "training FLOPs, best sizes", flops, values, criterion)]


def _along(axis: Axis, axes: Sequence[Axis], sizes: Sequence[dict[str, str]]) -> list[int]:
    """Places of the sizes that differ in no other axis from the experiment, or from the first values of a grid."""
    alone = [place for place, size in enumerate(sizes) if set(size) <= {axis.key}]
    if len(alone) >= 2:
        return alone
    first = {a.key: a.values[0] for a in axes if a.key != axis.key}
    return [place for place, size in enumerate(sizes) if all(size.get(k) == v for k, v in first.items())]


def _cost_of_axis(axis: Axis) -> tuple[str, Callable[[Outcome], float]]:
    if axis.key == FRACTION:
        return "training rows", lambda o: float(o.rows)
    if axis.key == LENGTH:
        return "history length", lambda o: float(o.history_length)
    return "parameters outside tables", lambda o: float(o.parameters)


def _curve(axis: str, name: str, x: list[float], y: list[float], criterion: Criterion) -> Curve:
    try:
        law = fit_power_law(
            np.array(x), np.array(y), bound=criterion.best_possible, is_falling=not criterion.higher_is_better
        )
    except DataError as err:
        return Curve(axis, name, tuple(x), tuple(y), None, err.message)
    return Curve(axis, name, tuple(x), tuple(y), law)


@dataclass(frozen=True)
class Recommendation:
    """The cheapest size that reaches a target.

    Attributes:
        target: of the metric.
        settings: of the size; None if none reaches it.
        mean: its metric.
        flops_per_row: what it costs to score a row.
        needed: for each axis whose curve reaches the target, the x where it does, within what was tried or beyond; no
            curve that is not identified is asked.
    """

    target: float
    settings: dict[str, str] | None
    mean: float | None
    flops_per_row: float | None
    needed: dict[str, float]


def recommend(
    target: float, outcomes: Sequence[Outcome], curves: Sequence[Curve], criterion: Criterion
) -> Recommendation:
    """The size that scores a row with the fewest operations among those whose mean is the target or better."""
    good = [size for size in sizes_of(outcomes) if not criterion.is_better(target, size.mean)]
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
        higher_is_better: direction of the metric.
        outcomes: one a trial.
        curves: one an axis, and the frontier.
        recommendation: None where no target was given.
    """

    name: str
    metric: str
    higher_is_better: bool
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
    warn: Callable[[str], None] = lambda _: None,
) -> Study:
    """Runs a study, or goes on with one, and writes ``study.json`` and ``study.html`` into its folder.

    Args:
        config: the experiment's file; its training set must be built.
        axes: at least one.
        out: the study's folder.
        seeds: seeds a size, from the experiment's own on.
        grid: all combinations instead of one axis at a time.
        target: of the metric, at least or (where lower is better) at most, to recommend a size for.
        workers: trials at a time; above 1 they run under Ray Tune.
        overrides: ``a.b=c`` each, for all trials.
        advance: called with trials done, and of how many.
        warn: told, before any training, of each axis that has too few different x for a power law.

    Raises:
        ConfigError: an axis or an override does not fit the experiment; no size can reach the target.
        RecsysError: a trial fails; those that are done are kept.
    """
    from training.scaling_report import write_study_report

    out = Path(out)
    keys = [axis.key for axis in axes]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{twice[0]} must be varied once, got two axes", hint="name all its values in one --vary")
    experiment, schema = load_experiment(config, overrides)
    criterion = experiment.criterion(schema)
    if target is not None and (math.isnan(target) or criterion.is_better(target, criterion.best_possible)):
        raise ConfigError(
            f"target must be at {'most' if criterion.higher_is_better else 'least'} {criterion.best_possible:g}, "
            f"the best that {criterion} can be, got {target:g}"
        )
    first = experiment.training.seed
    trials: dict[str, Trial] = {}
    planned: dict[str, ExperimentConfig] = {}
    for trial in trials_of(axes, range(first, first + seeds), out, grid=grid):
        # A value that does not fit is told before hours of training; one that is the experiment's own is trained once.
        sized, _ = load_experiment(config, [*overrides, *trial.overrides])
        same = as_read(sized, schema).model_dump_json()
        trials.setdefault(same, trial)
        planned.setdefault(same, sized)
    for axis in axes:
        if axis.key == LENGTH and not schema.histories:
            raise ConfigError(f"{config}: {LENGTH} must not be an axis of a schema without histories")
    training_set = open_training_set(experiment, schema)
    for sized in planned.values():
        check_fraction(sized, training_set)
    for axis in axes:
        places = _along(axis, axes, [trial.settings for trial in trials.values()])
        sizes = [list(planned.values())[place] for place in places]
        if (number := _num_x(axis, sizes, training_set)) < MIN_POINTS:
            name, _ = _cost_of_axis(axis)
            warn(
                f"{axis.key}: its sizes have {number} different {name}, and a power law takes {MIN_POINTS}: "
                "they will be compared, and no law fitted to them"
            )
    if workers > 1:
        from training.tune import run_trials

        results = run_trials(
            config, overrides, list(trials.values()), workers=workers, folder=out / "tune", advance=advance
        )
    else:
        results = []
        for number, trial in enumerate(trials.values()):
            advance(number, len(trials))
            try:
                results.append(run_trial(config, overrides, trial))
            except RecsysError as err:
                raise failed(trial.folder, str(err)) from err
        advance(len(trials), len(trials))
    outcomes = tuple(Outcome(**result) for result in results)
    curves = tuple(curves_of(axes, outcomes, criterion))
    study = Study(
        experiment.name,
        str(criterion),
        criterion.higher_is_better,
        outcomes,
        curves,
        None if target is None else recommend(target, outcomes, curves, criterion),
    )
    write_json(out / "study.json", study.to_json())
    write_study_report(study, out / "study.html")
    return study


def as_read(experiment: ExperimentConfig, schema: Schema) -> ExperimentConfig:
    """The experiment without a ``training.history_length`` that cuts no history."""
    length = experiment.training.history_length
    if length is None or any(length < history.max_length for history in schema.histories):
        return experiment
    return experiment.model_copy(update={"training": experiment.training.model_copy(update={"history_length": None})})


def _num_x(axis: Axis, sizes: Sequence[ExperimentConfig], training_set: TrainingSet) -> int:
    """How many different x the curve of an axis will have."""
    if axis.key == FRACTION:
        return len({size.training.data_fraction for size in sizes})
    if axis.key == LENGTH:
        return len({_history_length(size, training_set.schema) for size in sizes})
    models = {size.model.model_dump_json(): size.model for size in sizes}
    smallest = dict.fromkeys(training_set.encoder.table_sizes, 2)  # a network does not depend on how long tables are
    return len({_num_parameters(build_model(model, training_set.schema, smallest)) for model in models.values()})
