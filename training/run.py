"""The run folder: everything that one training run leaves behind.

::

    config.json       the resolved experiment, the schema, and the fingerprints that decide the result; written first
    checkpoints/      see training.checkpoint
    metrics.jsonl     training loss every so many steps, validation metrics every epoch
    mlflow.json       where the run is tracked, if it is
    report.html       written when training has ended
    summary.json      the result; written last, so a run is finished if and only if it exists
    .lock             held while a process trains here
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from recsys.config import validate
from recsys.errors import ConfigError, IntegrityError
from recsys.files import read_object, write_json
from recsys.models import RankingModel, build_model
from recsys.schema import Schema
from recsys.training_set import TrainingSet
from training.checkpoint import CheckpointStore
from training.distill import (
    TEACHER,
    OfflineDistillationConfig,
    OnlineDistillationConfig,
    is_gone,
    student_state,
    teacher_identity,
)
from training.experiment import ExperimentConfig

FORMAT_VERSION = 1
_CONFIG: dict[str, type] = {
    "fingerprint": str,
    "experiment": dict,
    "schema": dict,
    "training_set": dict,
    "table_sizes": dict,
}
_SUMMARY: dict[str, type] = {"best_checkpoint": str, "selected_by": str, "finished_at": str}


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and what its files say.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def mlflow(self) -> Path:
        """Where the run is tracked."""
        return self.path / "mlflow.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here.

        Raises:
            ConfigError: one does already, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as err:
            raise ConfigError(f"run folder {self.path} cannot be written: {err.strerror}") from err
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                raise ConfigError(
                    f"run folder {self.path} must be free, but another process trains into it",
                    hint="wait for it to end, or choose another run folder",
                ) from err
            yield
        finally:
            os.close(descriptor)

    @property
    def is_finished(self) -> bool:
        """Whether the run's result is there."""
        return (self.path / "summary.json").exists()

    def begin(
        self, experiment: ExperimentConfig, schema: Schema, training_set: TrainingSet, *, resume: bool
    ) -> dict[str, Any] | None:
        """Makes the folder ready for a run.

        Args:
            resume: False removes what an earlier run of the same fingerprint has left.

        Returns:
            The summary of the run if it has finished already.

        Raises:
            ConfigError: the folder holds another run.
            IntegrityError: the folder's files are damaged.
        """
        found = self._read("config.json", {})
        if found is not None and found.get("format_version") == FORMAT_VERSION:
            found = self.config()
        teacher = self._teacher(experiment, found if resume else None)
        wanted = experiment.run_fingerprint(schema, training_set.fingerprint, teacher)
        if found is not None and found.get("fingerprint") != wanted:
            raise ConfigError(
                f"run folder {self.path} must be empty or hold this very run, but holds one of another fingerprint: "
                + _difference(found, experiment, schema, training_set),
                hint=f"choose another run folder, delete {self.path}, or bring back its configuration",
            )
        if found is not None and not resume:
            self._clear()
            found = None
        if found is None:
            self._clear()
            write_json(
                self.path / "config.json",
                {
                    "format_version": FORMAT_VERSION,
                    "fingerprint": wanted,
                    "experiment": experiment.model_dump(mode="json"),
                    "schema": schema.model_dump(mode="json"),
                    "training_set": {
                        "path": str(training_set.folder.absolute()),
                        "fingerprint": training_set.fingerprint,
                        "encoder_fingerprint": training_set.manifest["encoder_fingerprint"],
                        "split": training_set.manifest["split"],
                    },
                    "teacher": teacher,
                    "table_sizes": dict(training_set.encoder.table_sizes),
                },
            )
        return self._read("summary.json", _SUMMARY)

    def _teacher(self, experiment: ExperimentConfig, found: Mapping[str, Any] | None) -> dict[str, str] | None:
        """Identity of the frozen teacher, if there is one.

        A student that has finished is finished, wherever its teacher has gone since: its own note counts then. Names
        that the teacher had after the student was trained are not noted, so one that leads nowhere is as good as the
        first; what is there under another name is taken for another teacher.

        Args:
            found: configuration of the run that the folder holds.

        Raises:
            ConfigError: the teacher is no finished run.
        """
        config = experiment.distillation
        if not isinstance(config, OfflineDistillationConfig):
            return None
        try:
            return teacher_identity(config.teacher)
        except ConfigError:
            noted = (found or {}).get("teacher")
            was_named = ((found or {}).get("experiment", {}).get("distillation") or {}).get("teacher")
            is_another = was_named != config.teacher and not is_gone(config.teacher)
            if not isinstance(noted, dict) or is_another or self._read("summary.json", {}) is None:
                raise
            return noted

    def _clear(self) -> None:
        """Removes a run, its configuration last: killed half-way, the folder still says whose rest it holds."""
        for file in (self.path / "summary.json", self.report, self.metrics, self.mlflow):
            file.unlink(missing_ok=True)
        if self.checkpoints.is_dir():
            shutil.rmtree(self.checkpoints)
        (self.path / "config.json").unlink(missing_ok=True)

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds.

        Raises:
            IntegrityError: there is none, or it is damaged or of another version.
        """
        found = self._read("config.json", {})
        if found is None:
            raise IntegrityError(f"{self.path} must be a run folder, got no config.json", hint="train a model first")
        if found.get("format_version") != FORMAT_VERSION:
            raise IntegrityError(
                f"{self.path / 'config.json'} must be of format {FORMAT_VERSION}, got {found.get('format_version')}"
            )
        found = self._read("config.json", _CONFIG) or {}
        if not all(isinstance(found["training_set"].get(name), str) for name in ("path", "fingerprint")) or not all(
            isinstance(rows, int) for rows in found["table_sizes"].values()
        ):
            raise IntegrityError(
                f"{self.path / 'config.json'} must name its training set and the sizes of its tables, got other types",
                hint=f"delete {self.path} and train again",
            )
        return found

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds.

        Raises:
            IntegrityError: the run has not finished, or the file is damaged.
        """
        found = self._read("summary.json", _SUMMARY)
        if found is None:
            raise IntegrityError(
                f"the run in {self.path} must have finished, got no summary.json", hint="run its training command again"
            )
        return found

    def lines(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, in order; a last one that a killed process has left unfinished is left out.

        Raises:
            IntegrityError: another line is no JSON object, or does not say its kind and step; it is named.
        """
        try:
            text = self.metrics.read_bytes()
        except FileNotFoundError:
            return []
        return [self._line(number, line) for number, line in enumerate(text.split(b"\n")[:-1], start=1)]

    def _line(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {"kind", "step"} <= line.keys():
            raise IntegrityError(
                f"{self.metrics}, line {number} must be a JSON object with kind and step, got something else",
                hint=f"delete {self.path} and train again",
            )
        return line

    def _read(self, name: str, fields: Mapping[str, type]) -> dict[str, Any] | None:
        try:
            return read_object(self.path / name, fields, hint=f"delete {self.path} and train again")
        except FileNotFoundError:
            return None


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, with its best model.

    Attributes:
        folder: where it is.
        experiment: as it was trained.
        schema: as it was trained.
        table_sizes: rows of each embedding table.
        training_set_path: where the training set was.
        training_set_fingerprint: of the set that it was trained on.
        fingerprint: of the run.
        model: with the weights that were best on the validation split, in evaluation mode, on the CPU.
        summary: the result.
    """

    folder: RunFolder
    experiment: ExperimentConfig
    schema: Schema
    table_sizes: Mapping[str, int]
    training_set_path: Path
    training_set_fingerprint: str
    fingerprint: str
    model: RankingModel
    summary: Mapping[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a finished run.

        Raises:
            IntegrityError: it is absent or has not finished, or its checkpoint is damaged.
        """
        folder = RunFolder(Path(path))
        config, summary = folder.config(), folder.summary()
        source = str(folder.path / "config.json")
        experiment = validate(ExperimentConfig, config["experiment"], source=source)
        schema = validate(Schema, config["schema"], source=source)
        model = build_model(experiment.model, schema, config["table_sizes"])
        state = student_state(experiment, model.state_dict())
        CheckpointStore(folder.checkpoints).load(summary["best_checkpoint"], {"model": state})
        return cls(
            folder=folder,
            experiment=experiment,
            schema=schema,
            table_sizes=config["table_sizes"],
            training_set_path=Path(config["training_set"]["path"]),
            training_set_fingerprint=config["training_set"]["fingerprint"],
            fingerprint=config["fingerprint"],
            model=model.eval(),
            summary=summary,
        )

    def load_teacher(self) -> RankingModel:
        """The teacher that was trained along, with the weights of the same checkpoint, in evaluation mode, on the CPU.

        Raises:
            ConfigError: there was none.
            CheckpointError: the checkpoint is damaged.
        """
        config = self.experiment.distillation
        if not isinstance(config, OnlineDistillationConfig):
            raise ConfigError(
                f"the run in {self.folder.path} must have trained a teacher along, but has not",
                hint="that is what distillation.mode=online does; an offline teacher is a run of its own",
            )
        teacher = build_model(config.teacher, self.schema, self.table_sizes)
        state = {f"{TEACHER}.{name}": tensor for name, tensor in teacher.state_dict().items()}
        CheckpointStore(self.folder.checkpoints).load(self.summary["best_checkpoint"], {"model": state})
        return teacher.eval()

    def training_set(self) -> TrainingSet:
        """The training set that the run was trained on.

        Raises:
            IntegrityError: it is gone, or was built again since and has other contents.
        """
        opened = TrainingSet.open(self.training_set_path)
        if opened.fingerprint != self.training_set_fingerprint:
            raise IntegrityError(
                f"{self.training_set_path} must be the training set of {self.folder.path}, but was built again",
                hint="train again, or build the set with the configuration that the run was made with",
            )
        return opened


def _difference(
    found: Mapping[str, Any], experiment: ExperimentConfig, schema: Schema, training_set: TrainingSet
) -> str:
    """Names the settings that differ, for the message."""
    if found.get("format_version") != FORMAT_VERSION:
        return "its format differs"
    wanted = experiment.model_dump(mode="json")
    old = found["experiment"]
    parts = []
    for part in ("model", "training", "distillation"):
        before, now = flatten({part: old.get(part) or {}}), flatten({part: wanted[part] or {}})
        parts += [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    if found.get("schema") != schema.model_dump(mode="json"):
        parts.append("schema")
    if found["training_set"]["fingerprint"] != training_set.fingerprint:
        parts.append("the training set")
    return (", ".join(parts[:6]) or "its format") + (" and more differ" if len(parts) > 6 else " differ")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots.

    Example:
        >>> flatten({"a": {"b": 1}, "c": [2, 3]})
        {'a.b': 1, 'c': [2, 3]}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
