"""The experiment: one YAML file that says what is learnt from what, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from feature_store.build import DataConfig
from recsys.config import Config, apply_overrides, fingerprint, load_yaml, validate
from recsys.derived import Name
from recsys.errors import ConfigError, nearest
from recsys.models import ModelConfig
from recsys.schema import Schema
from training.balancing import BalancingConfig, NoBalancing
from training.data import ShuffleConfig
from training.distill import DistillationConfig, OfflineDistillationConfig
from training.optim import AdagradConfig, DenseAdamConfig, DenseOptimizerConfig, EmbeddingOptimizerConfig
from training.schedule import ConstantSchedule, ScheduleConfig
from training.tracking import TrackingConfig

MetricName = Literal["auc", "gauc", "logloss", "ne", "ece"]
HIGHER_IS_BETTER: dict[MetricName, bool] = {"auc": True, "gauc": True, "logloss": False, "ne": False, "ece": False}


class SelectionConfig(Config):
    """Which validation metric chooses the checkpoint, and when to stop waiting for a better one."""

    metric: MetricName = "auc"
    task: Name | None = Field(None, description="the schema's first task if not given")
    mean_over_tasks: bool = Field(False, description="the metric's mean over all tasks decides, and none by itself")
    patience: int | None = Field(
        2, ge=1, description="stop after so many epochs in a row without a better one; null: never"
    )

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric."""
        return HIGHER_IS_BETTER[self.metric]

    @model_validator(mode="after")
    def _task_or_mean(self) -> Self:
        if self.mean_over_tasks and self.task is not None:
            raise ValueError(f"task must be null where mean_over_tasks is true, got {self.task!r}")
        return self


@dataclass(frozen=True)
class Criterion:
    """What a checkpoint is chosen by: a metric of one task, or its mean over several.

    Attributes:
        metric: a field of :class:`~recsys.metrics.Metrics`.
        tasks: at least one.
    """

    metric: MetricName
    tasks: tuple[str, ...]

    def __str__(self) -> str:
        if len(self.tasks) == 1:
            return f"{self.tasks[0]}.{self.metric}"
        return f"mean {self.metric} of {', '.join(self.tasks)}"

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric."""
        return HIGHER_IS_BETTER[self.metric]

    @property
    def best_possible(self) -> float:
        """What the metric can be at best: 1 where higher is better, else 0."""
        return 1.0 if self.higher_is_better else 0.0

    def is_better(self, value: float, other: float) -> bool:
        """Whether one value is better than another, and not as good."""
        return value > other if self.higher_is_better else value < other

    def value(self, metrics: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The value in the metrics of every task; None where one of them is not defined."""
        values = [metrics[task][self.metric] for task in self.tasks]
        return None if any(v is None or v != v for v in values) else sum(values) / len(values)


class TrainingConfig(Config):
    """How a model is trained."""

    epochs: int = Field(5, ge=1, description="at most")
    batch_size: int = Field(1024, ge=1, description="rows of a global batch, over all workers")
    seed: int = Field(1, ge=0, lt=2**63, description="of initial weights, dropout and shuffling")
    embedding_optimizer: EmbeddingOptimizerConfig = AdagradConfig()
    dense_optimizer: DenseOptimizerConfig = DenseAdamConfig()
    gradient_clip_norm: float | None = Field(
        None,
        gt=0,
        description="bound on the norm of the whole gradient; without the tables where their optimizer is fused; "
        "a teacher that is trained along has a norm and a bound of its own",
    )
    embedding_l2: float = Field(
        0.0, ge=0, description="lambda of lambda / 2 times the sum of squares of all rows of all tables; for adam"
    )
    dense_l2: float = Field(0.0, ge=0, description="the same of the network's parameters but its biases")
    mini_batch_aware_l2: float = Field(
        0.0, ge=0, description="lambda of DIN's regularisation of the rows of a batch; paper: 0.01"
    )
    lr_schedule: ScheduleConfig = ConstantSchedule()
    task_weights: dict[Name, float] = Field(default_factory=dict, description="weight in the loss; 1 if not given")
    task_balancing: BalancingConfig = NoBalancing()
    shuffle: ShuffleConfig = ShuffleConfig()
    selection: SelectionConfig = SelectionConfig()
    data_fraction: float = Field(1.0, gt=0, le=1, description="share of the training requests to learn from, by seed")
    history_length: int | None = Field(
        None,
        ge=1,
        description="newest events read of each history, fewer than its max_length, in studies; not for export",
    )
    evaluation_batch_size: int = Field(2048, ge=1, description="rows")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = Field(None, ge=1, description="of torch, a process; its own choice if not given")
    prefetch_batches: int = Field(4, ge=0, description="built ahead in the background")
    checkpoint_every_s: float = Field(300.0, gt=0, description="seconds, besides one an epoch")
    log_every_steps: int = Field(100, ge=1, description="steps between two lines of training loss")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.embedding_l2 and self.embedding_optimizer.kind != "adam":
            raise ValueError(
                f"embedding_l2 must be 0 with embedding_optimizer.kind {self.embedding_optimizer.kind!r}, which never "
                f"sees the rows outside a batch, got {self.embedding_l2}; take kind 'adam', or mini_batch_aware_l2"
            )
        return self


_DECIDES_NOTHING = frozenset(
    {
        "evaluation_batch_size",
        "device",
        "num_threads",
        "prefetch_batches",
        "checkpoint_every_s",
        "log_every_steps",
    }
)
"""Settings of training that change how a result is come by, not the result: an interrupted run may change them."""


class ExperimentConfig(Config):
    """One run: its data, its model, its training.

    Example:
        >>> experiment, schema = load_experiment("configs/experiment/din_simulated.yaml")  # doctest: +SKIP
        >>> experiment.training.batch_size  # doctest: +SKIP
        1024
    """

    name: Name
    schema_file: str = Field(
        min_length=1, description="relative to this file, unlike the folders of data: those start at the working folder"
    )
    data: DataConfig
    model: ModelConfig
    training: TrainingConfig = TrainingConfig()
    distillation: DistillationConfig | None = Field(None, description="what teaches the model; only the model is kept")
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check_distillation(self) -> ExperimentConfig:
        if self.distillation is None:
            return self
        if self.training.task_balancing != NoBalancing():
            raise ValueError(
                "training.task_balancing must be of kind 'none' where distillation is given: it weighs labels"
            )
        if self.training.mini_batch_aware_l2 and self.distillation.mode == "online":
            raise ValueError(
                "training.mini_batch_aware_l2 must be 0 where distillation.mode is 'online', "
                f"got {self.training.mini_batch_aware_l2}: it knows the tables of one model"
            )
        return self

    def run_fingerprint(self, schema: Schema, training_set: str, teacher: Mapping[str, str] | None = None) -> str:
        """sha256 of everything that decides what a run results in.

        Args:
            training_set: its fingerprint.
            teacher: identity of the frozen teacher, where it is not to be read from the teacher's folder.

        Raises:
            ConfigError: the model is taught by a run that has not finished.
        """
        training = self.training.model_dump(mode="json", exclude=set(_DECIDES_NOTHING))
        deciding: dict[str, Any] = {
            "schema": schema.model_dump(mode="json"),
            "training_set": training_set,
            "model": self.model.model_dump(mode="json"),
            "training": training,
        }
        if isinstance(self.distillation, OfflineDistillationConfig):
            deciding["distillation"] = self.distillation.resolved(teacher)
        elif self.distillation is not None:
            deciding["distillation"] = self.distillation.model_dump(mode="json")
        return fingerprint(deciding)

    def criterion(self, schema: Schema) -> Criterion:
        """The validation metric that chooses the checkpoint."""
        selection, names = self.training.selection, tuple(task.name for task in schema.tasks)
        if selection.mean_over_tasks:
            return Criterion(selection.metric, names)
        return Criterion(selection.metric, (selection.task or names[0],))


def load_experiment(path: str | Path, overrides: Iterable[str] = ()) -> tuple[ExperimentConfig, Schema]:
    """Reads an experiment and the schema that it names.

    The schema's path is relative to the experiment's file: both belong together, wherever they are used from. The
    folders of data are relative to the working folder, as all paths on the command line are.

    Args:
        path: a YAML file.
        overrides: ``a.b=c`` each.

    Raises:
        ConfigError: with every violation and its path.
    """
    path = Path(path)
    experiment = validate(ExperimentConfig, apply_overrides(load_yaml(path), overrides), source=str(path))
    schema = Schema.load(_schema_path(path, experiment.schema_file))
    check_tasks(experiment, schema, source=str(path))
    check_history_length(experiment, schema, source=str(path))
    return experiment, schema


def _schema_path(experiment: Path, schema_file: str) -> Path:
    """Where the schema of an experiment is."""
    path = experiment.parent / schema_file
    if path.exists():
        return path
    beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    raise ConfigError(
        f"{experiment}: schema_file must be a file, relative to this one, got {schema_file!r}: {path.resolve()} does "
        "not exist",
        hint=nearest(path.name, beside) if beside else "only the folders of data start at the working folder",
    )


def check_tasks(experiment: ExperimentConfig, schema: Schema, *, source: str) -> None:
    """Checks that the tasks that training names are the schema's.

    Raises:
        ConfigError: one is not.
    """
    tasks = [task.name for task in schema.tasks]
    named: dict[str, Any] = {f"training.task_weights.{name}": name for name in experiment.training.task_weights}
    if experiment.training.selection.task is not None:
        named["training.selection.task"] = experiment.training.selection.task
    for place, name in named.items():
        if name not in tasks:
            message = f"{source}: {place} must be a task of the schema, got {name!r}"
            raise ConfigError(message, hint=nearest(name, tasks))
    for name, weight in experiment.training.task_weights.items():
        if weight < 0:
            raise ConfigError(f"{source}: training.task_weights.{name} must be at least 0, got {weight}")
    if not any(experiment.training.task_weights.get(name, 1.0) > 0 for name in tasks):
        raise ConfigError(
            f"{source}: training.task_weights must be more than 0 for one task at least, got 0 for all",
            hint="nothing would be learnt",
        )


def check_history_length(experiment: ExperimentConfig, schema: Schema, *, source: str) -> None:
    """Checks that a bound on histories is within the schema's own, for which models are built.

    Raises:
        ConfigError: it is above those of all histories.
    """
    length, longest = experiment.training.history_length, max((h.max_length for h in schema.histories), default=0)
    if length is not None and schema.histories and length > longest:
        raise ConfigError(
            f"{source}: training.history_length must be at most {longest}, the max_length of the longest history, "
            f"got {length}",
            hint="raise histories.max_length in the schema",
        )
