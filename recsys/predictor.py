"""An artifact's model, ready to score: tables mapped, programs loaded, recorded rows replayed.

The look-up reads the memory-mapped tables and puts :class:`~recsys.embedded.Embedded` together with the same function
as the trainer. The network runs as a compiled program where there is one that fits this machine, else as an exported
one.

Shapes: R requests, N candidates (rows), T tasks.
"""

from __future__ import annotations

import logging
import platform
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from recsys.artifact import PORTABLE, SELF_TEST, TOLERANCE, Artifact, Form, flatten, read_self_test
from recsys.batch import Bags, Batch, Column
from recsys.compiled import CompiledProgram
from recsys.embedded import Embedded, Space, Use, assemble
from recsys.errors import ArtifactError
from recsys.manifest import Engine

_LOUD = ("torch", "torch.export", "torch._inductor", "torch._dynamo", "torch.__trace")
Program = Callable[[list[Tensor]], Tensor]
"""Flat inputs -> logits ``(N, T)``."""


class Predictor:
    """Batches to logits, from an artifact.

    Safe to call from several threads, which score side by side: either program runs without the interpreter's lock.

    Args:
        artifact: opened.
        engine: ``compiled`` insists on the compiled program of single requests, ``portable`` does without, ``auto``
            takes it where it is there and fits this machine.

    Attributes:
        artifact: what it scores with.
        engine: ``compiled`` or ``portable``, what single requests run on.
        engine_note: why they do not run on the compiled program; None where they do.
        max_error: largest error of the replayed logits, each relative to ``max(1, |logit|)``.

    Raises:
        ArtifactError: a program cannot be loaded here, or replayed rows do not give the recorded logits.
    """

    def __init__(self, artifact: Artifact, *, engine: Engine = "auto") -> None:
        self.artifact = artifact
        self._table_of = {feature: artifact.tables[table] for feature, table in artifact.table_of.items()}
        self._num_tasks = len(artifact.tasks)
        self._single: Program
        self.engine: Literal["compiled", "portable"] = "portable"
        self.engine_note: str | None = "the portable program was asked for"
        entry = artifact.manifest["programs"].get("compiled")
        if engine != "portable":
            self.engine_note = unfit(entry, torch.cpu.get_capabilities())
            if self.engine_note is None:
                self.engine, self.engine_note = self._load_compiled(entry)
            if engine == "compiled" and self.engine_note is not None:
                raise ArtifactError(
                    f"{artifact.folder}: the compiled program cannot run here: {self.engine_note}",
                    hint="export the artifact again on this machine, or use the portable program",
                )
        if self.engine == "portable":
            self._single = _load_portable(artifact, "single")
        self._many: Program | None = None
        self._lock = threading.Lock()
        self.max_error = self._replay("single")

    def _load_compiled(self, entry: Mapping[str, Any]) -> tuple[Literal["compiled", "portable"], str | None]:
        try:
            self._single = CompiledProgram(self.artifact.folder / entry["file"])
        except (OSError, RuntimeError) as err:
            # Its library is unpacked into a temporary folder, which may not allow execution, or be full.
            return "portable", f"it cannot be loaded ({(str(err).splitlines() or [type(err).__name__])[0][:200]})"
        return "compiled", None

    def logits(self, batch: Batch) -> np.ndarray:
        """Scores candidates.

        Args:
            batch: of any number of requests.

        Returns:
            ``(N, T)`` float32.
        """
        if batch.num_rows == 0:
            return np.zeros((0, self._num_tasks), np.float32)
        form: Form = "single" if batch.num_requests == 1 else "many"
        if form == "many":
            self.load_many()
        return self._run(batch, form)

    def _run(self, batch: Batch, form: Form) -> np.ndarray:
        program = self._single if form == "single" else self._many
        assert program is not None
        with torch.inference_mode():
            logits: np.ndarray = program(flatten(self.embed(batch), form)).numpy()
        return logits

    def load_many(self) -> None:
        """Loads the program of many requests now rather than when it is first used.

        Raises:
            ArtifactError: it cannot be loaded, or replayed rows do not give the recorded logits.
        """
        if self._many is not None:
            return
        with self._lock:
            if self._many is None:
                self._many = _load_portable(self.artifact, "many")
                try:
                    self.max_error = max(self.max_error, self._replay("many"))
                except ArtifactError:
                    self._many = None
                    raise

    def embed(self, batch: Batch) -> Embedded:
        """Looks up the batch's ids in the mapped tables; sets of ids are averaged, an empty set is zero."""
        return assemble(batch, self._vectors, self.artifact.spaces)

    def _vectors(self, use: Use, column: Column, space: Space | None) -> Tensor:
        table = self._table_of[use.feature if space is None else space.key(use.feature)]
        if isinstance(column, Bags):
            return functional.embedding_bag(column.values, table, column.offsets, mode="mean", include_last_offset=True)
        return functional.embedding(column, table)

    def _replay(self, form: Form) -> float:
        """Scores the recorded rows, which also warms the program up; returns the largest relative error."""
        worst = 0.0
        recorded = read_self_test(self.artifact.folder / SELF_TEST, self.artifact.schema)
        for name, (batch, expected) in recorded.items():
            if (batch.num_requests == 1) != (form == "single"):
                continue
            logits = self._run(batch, form)
            if logits.shape != expected.shape:
                raise ArtifactError(f"{self.artifact.folder}: recorded rows {name!r} must give logits {expected.shape}")
            error = float(np.max(np.abs(logits - expected) / np.maximum(1.0, np.abs(expected)), initial=0.0))
            worst = max(worst, error if np.isfinite(logits).all() else np.inf)
        if not worst <= TOLERANCE:
            raise ArtifactError(
                f"{self.artifact.folder}: recorded rows must give the recorded logits within {TOLERANCE:g}, "
                f"got {worst:.2g}",
                hint="export the artifact again here; if it stays, the artifact and the libraries do not fit",
            )
        return worst


def unfit(entry: Mapping[str, Any] | None, capabilities: Mapping[str, Any]) -> str | None:
    """Why a compiled program cannot run on this machine; None if it can.

    Args:
        entry: of the manifest; None where nothing was compiled.
        capabilities: of the processor, as ``torch.cpu.get_capabilities()`` gives them.
    """
    if entry is None:
        return "nothing was compiled when the artifact was exported"
    if entry["torch"] != torch_version():
        return f"it was compiled with torch {entry['torch']}, this is torch {torch_version()}"
    if entry["machine"] != platform.machine():
        return f"it was compiled for {entry['machine']}, this is {platform.machine()}"
    missing = [name for name in entry["cpu_features"] if not capabilities.get(name)]
    if missing:
        return f"it needs the processor features {', '.join(missing)}, which this one lacks"
    return None


def torch_version() -> str:
    """Version of torch without the name of its build."""
    return torch.__version__.split("+")[0]


def _load_portable(artifact: Artifact, form: Form) -> Program:
    path = artifact.folder / PORTABLE[form]
    try:
        with quiet():
            # The guards say again what the artifact's schema and the assembling code hold, on every call.
            module = torch.export.load(path).module(check_guards=False)
    except Exception as err:
        wrote = artifact.manifest.get("torch")
        raise ArtifactError(
            f"{path} cannot be loaded by torch {torch_version()} ({type(err).__name__})",
            hint=f"it was written by torch {wrote}: install that version, or export the artifact again",
        ) from err
    return lambda inputs: module(*inputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back the warnings and log lines of torch's exporter and compiler; errors still raise."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def load_predictor(folder: str | Path, *, engine: Engine = "auto", verify: bool = True) -> Predictor:
    """Opens an artifact and makes it ready.

    Raises:
        ArtifactError: see :meth:`Artifact.open <recsys.artifact.Artifact.open>` and :class:`Predictor`.
    """
    return Predictor(Artifact.open(folder, verify=verify), engine=engine)
