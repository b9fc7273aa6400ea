r"""Distillation: a large teacher's probabilities as soft labels of a light student. Only the student is exported.

.. math:: L = \underbrace{\mathrm{BCE}(\sigma(z_s), y)}_{\text{student}}
              + \underbrace{\mathrm{BCE}(\sigma(z_t), y)}_{\text{teacher, online only}}
              + \lambda\, \tau^2\, \mathrm{BCE}\big(\sigma(z_s / \tau),\ \bar\sigma(z_t / \tau)\big)

summed over tasks with the tasks' weights, over the rows that have the task's label. The third term's gradient stops at
the teacher (the bar). Dividing logits by :math:`\tau` divides its gradient by about :math:`\tau^2`, which the factor
undoes.

- ``online``: teacher and student are trained together, from scratch, on the same batches. Each has its own tables and
  its own bound on the norm of its gradient. They share nothing but the third term, so the teacher is what it would have
  become alone, up to random draws: its first weights, and masks of dropout, come after the student's.
- ``offline``: the teacher is a finished run. It is frozen; its logits of every training row are computed once, kept in
  the teacher's run folder, and read again by every student after that. It must have learnt nothing of the student's
  validation and test periods, and its checkpoint must not have been chosen by the latter (:func:`check_teacher`).

Source: SUAN, Lai et al., RecSys 2025, arXiv 2508.15326 (online; three terms and a temperature); Hinton, Vinyals,
Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531 (the squared temperature).
# RECONSTRUCTION: weight, temperature, stop-gradient and separate tables are the sensible reading; no source gives them.

Shapes: N rows, T tasks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from feature_store.split import SplitConfig
from feature_store.time_spans import iso
from recsys.batch import Batch
from recsys.config import Config, fingerprint, validate
from recsys.embeddings import Lookup
from recsys.errors import ConfigError, DataError, IntegrityError
from recsys.files import read_object, replacing_file, sha256_of, write_json
from recsys.losses import binary_cross_entropy
from recsys.models import ModelConfig, RankingModel, TrainingOutput, build_model, split_output
from recsys.schema import Schema
from recsys.training_set import SOURCE_ROW, Table, TrainingSet, label_column

if TYPE_CHECKING:
    from training.experiment import ExperimentConfig
    from training.run import TrainedRun

FORMAT_VERSION = 1
STUDENT = "student"
TEACHER = "teacher"
"""What a checkpoint calls them."""
LOGITS = "distillation"
"""Folder of a teacher's cached logits, in its run folder."""


class _DistillationConfig(Config):
    temperature: float = Field(2.0, gt=0, le=100, description="softens both probabilities; paper: unknown")
    weight: float = Field(1.0, ge=0, description="of the third term; paper: unknown")


class OnlineDistillationConfig(_DistillationConfig):
    """Teacher and student trained together."""

    mode: Literal["online"] = "online"
    teacher: ModelConfig = Field(description="any model of the same schema, written as model is")


class OfflineDistillationConfig(_DistillationConfig):
    """A finished run teaches."""

    mode: Literal["offline"] = "offline"
    teacher: str = Field(min_length=1, description="run folder of the teacher, relative to the working folder")

    @field_validator("teacher", mode="before")
    @classmethod
    def _is_a_folder(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            raise ValueError(  # noqa: TRY004 - pydantic collects these
                "must be the folder of a finished run where mode is 'offline', got a model; "
                "write mode: online to train that model along with the student"
            )
        return value

    def resolved(self, teacher: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What decides the student's result: the teacher's run and checkpoint, wherever they lie.

        Args:
            teacher: its identity, where it is known already.

        Raises:
            ConfigError: the teacher is no finished run.
        """
        return self.model_dump(mode="json") | {"teacher": dict(teacher or teacher_identity(self.teacher))}


DistillationConfig = Annotated[OnlineDistillationConfig | OfflineDistillationConfig, Field(discriminator="mode")]


def teacher_identity(run_dir: str | Path) -> dict[str, str]:
    """Fingerprint and best checkpoint of a finished run.

    Raises:
        ConfigError: the folder is no finished run.
    """
    folder = Path(run_dir)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return {"fingerprint": config["fingerprint"], "checkpoint": summary["best_checkpoint"]}
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"distillation.teacher must be the folder of a finished run, got {folder}",
            hint="train the teacher first, with `recsys train`",
        ) from err


def is_gone(run_dir: str | Path) -> bool:
    """Whether nothing lies where a teacher should, or nothing that can be reached."""
    return not os.path.exists(run_dir)  # noqa: PTH110 - a Path raises where the name is too long, say


def check_teacher(experiment: ExperimentConfig, training_set: TrainingSet) -> None:
    """Checks that a frozen teacher knows nothing of what the student is validated and tested on.

    The teacher's training period must end no later than the student's, and the period that chose its checkpoint no
    later than the one that chooses the student's. Both may begin and end earlier. A folder that is no finished run
    passes: what is wrong with it is said where it is read.

    Raises:
        ConfigError: the teacher has learnt from the student's validation or test period, or was chosen by the latter.
    """
    config = experiment.distillation
    theirs = _periods_of(config.teacher) if isinstance(config, OfflineDistillationConfig) else None
    if theirs is None:
        return
    assert isinstance(config, OfflineDistillationConfig)
    own = training_set.manifest["split"]
    for end, does, period in (
        ("train_end", "trained", "validation and test periods"),
        ("validation_end", "validated", "test period"),
    ):
        last, bound = theirs[end], own[end]
        assert last is not None
        if last > bound:
            raise ConfigError(
                f"distillation.teacher must know nothing of the student's {period}, but {config.teacher} was {does} on "
                f"{_period(theirs, end)}, the student is {does} on {_period(own, end)}",
                hint=f"build a training set with data.split.{end} {iso(bound)} or earlier, and train the teacher on it",
            )


_BEGINS = {"train_end": "train_start", "validation_end": "train_end"}


def _period(split: Mapping[str, int | None], end: str) -> str:
    first, last = split[_BEGINS[end]], split[end]
    assert last is not None
    return f"the time until {iso(last)}" if first is None else f"{iso(first)} to {iso(last)}"


def _periods_of(run_dir: str | Path) -> dict[str, int | None] | None:
    """Boundaries of the training set of a run, UTC microseconds; None where the folder is none of a run."""
    path = Path(run_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        # Runs that did not note those of their training set have said them in their experiment.
        split = config["training_set"].get("split") or config["experiment"]["data"]["split"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return validate(SplitConfig, split, source=f"{path}: split").boundaries


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    r"""The third term, a sum over labelled rows of each task.

    .. math:: \tau^2 \sum_{n: y_{nt} \text{ present}}
              \mathrm{BCE}\big(\sigma(z^s_{nt} / \tau),\ \sigma(z^t_{nt} / \tau)\big)

    Its least value is not 0 but the entropy of the teacher's probabilities.

    Args:
        student: (N, T) logits.
        teacher: (N, T) logits; no gradient flows to them.
        labels: (N, T), NaN where missing: such a row teaches nothing.
        temperature: tau, above 0.

    Returns:
        (T,).
    """
    soft = torch.sigmoid(teacher.detach() / temperature)
    targets = torch.where(torch.isnan(labels), torch.nan, soft.to(student.dtype))
    return binary_cross_entropy(student / temperature, targets).total * temperature**2


class Distillation(nn.Module):
    """A student that is being taught: trains as ``student`` does, with the teacher's terms among its losses.

    In evaluation it is the student; within :func:`scoring_teacher`, the teacher.

    Args:
        student: what is trained, selected by validation, and exported.
        config: of the terms.

    Attributes:
        scores_teacher: whether evaluation asks the teacher.
    """

    def __init__(self, student: RankingModel, config: OnlineDistillationConfig | OfflineDistillationConfig) -> None:
        super().__init__()
        self.student = student
        self.temperature, self.weight = config.temperature, config.weight
        self.scores_teacher = False

    @property
    def lookup(self) -> Lookup:
        """The student's."""
        return self.student.lookup

    def forward(self, batch: Batch) -> Tensor | TrainingOutput:
        """Logits (N, T) in evaluation; in training with the losses of teacher and distillation."""
        if not self.training:
            logits: Tensor = self._evaluated(batch)
            return logits
        assert batch.labels is not None
        logits, losses = split_output(self.student(batch))
        taught, losses_of_teacher = self._teach(batch)
        third = distillation_loss(logits, taught, batch.labels, temperature=self.temperature)
        return TrainingOutput(logits, losses | losses_of_teacher | {"distillation": self.weight * third})

    def _evaluated(self, batch: Batch) -> Tensor:
        logits: Tensor = self.student(batch)
        return logits

    def _teach(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's logits, and the losses that train the teacher."""
        raise NotImplementedError


class OnlineDistillation(Distillation):
    """The teacher learns on the same batches, from losses of its own.

    Args:
        student: see :class:`Distillation`.
        teacher: any model of the same schema; tables of its own.
        config: of the terms.
    """

    def __init__(self, student: RankingModel, teacher: RankingModel, config: OnlineDistillationConfig) -> None:
        super().__init__(student, config)
        self.teacher = teacher

    def _evaluated(self, batch: Batch) -> Tensor:
        logits: Tensor = self.teacher(batch) if self.scores_teacher else self.student(batch)
        return logits

    def _teach(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        logits, losses = split_output(self.teacher(batch))
        own = {"teacher": binary_cross_entropy(logits, batch.labels).total}
        return logits, own | {f"teacher.{name}": loss for name, loss in losses.items()}


class OfflineDistillation(Distillation):
    """The teacher's logits are looked up by the rows of the impressions view.

    Args:
        student: see :class:`Distillation`.
        logits: of every training row.
        config: of the terms.
    """

    def __init__(self, student: RankingModel, logits: TeacherLogits, config: OfflineDistillationConfig) -> None:
        super().__init__(student, config)
        self.logits = logits

    def _teach(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.source_row is not None
        found = self.logits.of_rows(batch.source_row.cpu().numpy())
        return torch.from_numpy(found).to(batch.source_row.device), {}


def learners(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters, apart by who learns: those of the model, and those of the teacher that is trained with it, if any.

    What bounds the gradient of one must not depend on the other's.

    Args:
        model: wrapped or not.
        parameters: of the model; the replicas of this process, where there are several.
    """
    taught = [module for module in model.modules() if isinstance(module, OnlineDistillation)]
    of_teacher = {id(parameter) for module in taught for parameter in module.teacher.parameters()}
    apart: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        apart[id(parameter) in of_teacher].append(parameter)
    return [one for one in apart if one]


@contextmanager
def scoring_teacher(model: nn.Module) -> Iterator[None]:
    """Evaluation of ``model``, wrapped or not, gives the teacher's logits for a while."""
    taught = [module for module in model.modules() if isinstance(module, OnlineDistillation)]
    assert taught, "the model must have a teacher that is trained with it"
    for module in taught:
        module.scores_teacher = True
    try:
        yield
    finally:
        for module in taught:
            module.scores_teacher = False


def build_training_model(
    experiment: ExperimentConfig, schema: Schema, training_set: TrainingSet
) -> RankingModel | Distillation:
    """What is trained: the experiment's model, alone or with what teaches it.

    A student starts from the weights that it would start from alone.

    Raises:
        SchemaError: the schema lacks what a model needs.
        IntegrityError: the cached logits of the teacher are absent or damaged; :func:`prepare` makes them.
    """
    sizes = training_set.encoder.table_sizes
    student = build_model(experiment.model, schema, sizes)
    match experiment.distillation:
        case None:
            return student
        case OnlineDistillationConfig() as config:
            return OnlineDistillation(student, build_model(config.teacher, schema, sizes), config)
        case OfflineDistillationConfig() as config:
            return OfflineDistillation(student, TeacherLogits.open(config.teacher, training_set), config)


def student_state(experiment: ExperimentConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's state under the names that a checkpoint of the experiment has for it."""
    if experiment.distillation is None:
        return state
    return {f"{STUDENT}.{name}": tensor for name, tensor in state.items()}


# Cached logits


@dataclass(frozen=True)
class TeacherLogits:
    """A frozen teacher's logits of training rows.

    ::

        <teacher's run folder>/distillation/
          <key>.npy     source_row int64, logits (T,) float32; by ascending row of the impressions view
          <key>.json    what they are of, and the checksum; written last

    The key is the fingerprint of teacher, checkpoint and training set: what changes makes another file.

    Attributes:
        source_rows: (N,) int64, ascending.
        logits: (N, T) float32, tasks in the order of the student's schema; both are views of the mapped file.
        place: of the file, for messages.
    """

    source_rows: np.ndarray
    logits: np.ndarray
    place: Path

    @classmethod
    def open(cls, run_dir: str | Path, training_set: TrainingSet) -> Self:
        """Opens what :func:`prepare` has written.

        Raises:
            ConfigError: the folder is no finished run.
            IntegrityError: the logits are absent, incomplete, or were changed.
        """
        path, key = _place(run_dir, training_set)
        hint = f"delete {path.parent} and run the same command again"
        try:
            manifest = read_object(path.with_suffix(".json"), {}, hint=hint)
        except FileNotFoundError as err:
            raise IntegrityError(f"{path.with_suffix('.json')} does not exist", hint=hint) from err
        if manifest.get("format_version") != FORMAT_VERSION or manifest.get("key") != key:
            raise IntegrityError(f"{path} must be the logits of this teacher for this training set", hint=hint)
        if not path.is_file() or sha256_of(path) != manifest.get("sha256"):
            raise IntegrityError(f"{path} is missing, or was changed after it was written", hint=hint)
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        return cls(rows["source_row"], rows["logits"], path)

    def of_rows(self, source_rows: np.ndarray) -> np.ndarray:
        """Logits (n, T) of some rows of the impressions view.

        Raises:
            IntegrityError: the teacher has not scored one.
        """
        at = np.searchsorted(self.source_rows, source_rows)
        at = np.minimum(at, len(self.source_rows) - 1)
        missing = self.source_rows[at] != source_rows
        if missing.any():
            raise IntegrityError(
                f"{self.place} must hold every training row, but has none for row {source_rows[missing][0]} of the "
                "impressions view",
                hint=f"delete {self.place.parent} and run the same command again",
            )
        return np.ascontiguousarray(self.logits[at])


def prepare(
    experiment: ExperimentConfig,
    schema: Schema,
    training_set: TrainingSet,
    *,
    say: Callable[[str], None] = lambda _: None,
    start: Callable[[int], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Makes what a run needs of its teacher before it begins: the logits of a frozen one, where they are not there yet.

    Scoring takes long, so it comes last: what can be refused without a score is refused before.

    Args:
        say: told what is being done.
        start: called with the number of rows to be scored, before the first; not where the logits are there.
        advance: called with the number of rows scored since the last call.

    Raises:
        ConfigError: the teacher is no finished run.
        DataError: it lacks a task of the student, its rows are not the student's, or a logit is not finite.
        IntegrityError: its checkpoint or its training set is damaged or gone.
        SchemaError: the schema lacks what the student's model needs.
    """
    config = experiment.distillation
    if not isinstance(config, OfflineDistillationConfig):
        return
    path, key = _place(config.teacher, training_set)
    if path.with_suffix(".json").exists():
        TeacherLogits.open(config.teacher, training_set)
        return
    from training.evaluate import predict
    from training.run import TrainedRun

    # What a schema must have does not depend on how long tables are.
    build_model(experiment.model, schema, dict.fromkeys(training_set.encoder.table_sizes, 2))
    teacher = TrainedRun.load(config.teacher)
    columns = _columns(teacher, schema)
    taught = teacher.training_set()
    splits = _splits_with_rows(taught, training_set)
    tables = [taught.split(split).impressions for split in splits]
    source_row = np.concatenate([table.array(SOURCE_ROW) for table in tables])
    order = np.argsort(source_row, kind="stable")
    rows = np.zeros(len(order), dtype=[("source_row", np.int64), ("logits", np.float32, (len(columns),))])
    rows["source_row"] = source_row[order]
    labels = np.concatenate([_labels(table, schema) for table in tables])[order]
    _check_rows(rows["source_row"], labels, training_set, schema, config.teacher)
    say(f"scoring the training rows with the teacher {config.teacher}")
    start(len(rows))
    predictions = [
        predict(
            teacher.model,
            taught,
            split,
            experiment.training.evaluation_batch_size,
            history_length=teacher.experiment.training.history_length,
            advance=advance,
        )
        for split in splits
    ]
    rows["logits"] = np.concatenate([p.logits for p in predictions])[order][:, columns]
    if not np.isfinite(rows["logits"]).all():
        raise DataError(f"the teacher {config.teacher} must give finite logits, but some are not")
    with replacing_file(path) as draft, draft.open("wb") as file:
        np.save(file, rows)
    manifest = {"format_version": FORMAT_VERSION, "key": key, "tasks": [t.name for t in schema.tasks]}
    write_json(path.with_suffix(".json"), manifest | {"rows": len(rows), "sha256": sha256_of(path)})


def _place(run_dir: str | Path, training_set: TrainingSet) -> tuple[Path, str]:
    """File of the logits, and the key that names it."""
    key = fingerprint({"teacher": teacher_identity(run_dir), "training_set": training_set.fingerprint})
    return Path(run_dir) / LOGITS / f"{key[:16]}.npy", key


def _splits_with_rows(teacher: TrainingSet, student: TrainingSet) -> list[str]:
    """Splits of the teacher's training set that reach into the student's training period."""
    begins = {"train": None, "validation": "train_end", "test": "validation_end"}
    ends = student.manifest["split"]["train_end"]
    return [
        split
        for split, first in begins.items()
        if first is None or (teacher.manifest["split"][first] < ends and teacher.split(split).num_rows)
    ]


def _columns(teacher: TrainedRun, schema: Schema) -> list[int]:
    """The teacher's logit column of each task of the student."""
    theirs = [task.name for task in teacher.schema.tasks]
    for task in schema.tasks:
        if task.name not in theirs:
            raise DataError(
                f"the teacher {teacher.folder.path} must have every task of the student, but lacks {task.name!r}",
                hint=f"it has {', '.join(theirs)}",
            )
    return [theirs.index(task.name) for task in schema.tasks]


def _labels(impressions: Table, schema: Schema) -> np.ndarray:
    """(N, T), NaN where missing."""
    return np.stack([impressions.array(label_column(task.name)) for task in schema.tasks], axis=1)


def _check_rows(
    source_row: np.ndarray, labels: np.ndarray, training_set: TrainingSet, schema: Schema, teacher: str
) -> None:
    """Checks that both training sets are of one impressions view: the same rows have the same labels."""
    impressions = training_set.split("train").impressions
    rows = np.asarray(impressions.array(SOURCE_ROW))
    at = np.minimum(np.searchsorted(source_row, rows), len(source_row) - 1)
    own = _labels(impressions, schema)
    known = source_row[at] == rows
    if known.all() and np.array_equal(labels[at], own, equal_nan=True):
        return
    what = f"{int((~known).sum()):,} training rows are unknown to it" if not known.all() else "their labels differ"
    raise DataError(
        f"the teacher {teacher} must have been trained on the student's impressions, but {what}",
        hint="build both training sets of the same views; the teacher's must begin no later than the student's "
        "training period, and its test period must end no earlier",
    )
