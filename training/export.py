"""A trained model becomes an artifact: tables, programs, recorded rows, encoder, snapshot.

The network is exported twice by ``torch.export``: for any number of requests, and for a single one. Where a C++
compiler is at hand the second is also compiled ahead of time (AOTInductor): it is what a service runs, and a fifth of
the time. The first is not: it would take as long again to compile, and batch scoring gains little by it.

The artifact is opened and its recorded rows are replayed before it is given its name.
"""

from __future__ import annotations

import os
import platform
import shutil
import time as clock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from recsys.artifact import (
    COMPILED,
    FEATURES,
    PORTABLE,
    SELF_TEST,
    TOLERANCE,
    X86_64_V3,
    Artifact,
    ArtifactWriter,
    Form,
    input_names,
    unflatten,
    write_self_test,
)
from recsys.batch import Bags, Batch, Column, HistoryBatch
from recsys.config import Config, fingerprint
from recsys.embedded import Space, widths
from recsys.errors import ArtifactError, MissingDependencyError
from recsys.files import write_json
from recsys.models import RankingModel
from recsys.predictor import Predictor, quiet, torch_version
from recsys.schema import UNKNOWN_ID, Schema
from recsys.training_set import TIME, TrainingSet, event_log_paths

Snapshot = Literal["none", "items", "all"]


@dataclass(frozen=True)
class ExportSummary:
    """What an export did.

    Attributes:
        artifact: its folder.
        bytes: size of all files.
        engine: ``compiled`` or ``portable``, what single requests run on here.
        note: why nothing was compiled; None where it was.
        max_error: largest error of the replayed logits, each relative to ``max(1, |logit|)``.
        compile_s: seconds of compilation.
        seconds: seconds in all.
    """

    artifact: str
    bytes: int
    engine: str
    note: str | None
    max_error: float
    compile_s: float
    seconds: float


class FlatNetwork(nn.Module):
    """A network that takes a flat list of tensors, as programs do.

    Args:
        network: takes :class:`~recsys.embedded.Embedded`; where it has a ``single_request`` form, that is what the
            program of a single request is.
        schema: what the features are.
        form: of any number of requests, or of one.
        spaces: of vectors, besides the main one.
    """

    def __init__(self, network: nn.Module, schema: Schema, form: Form, spaces: Sequence[Space] = ()) -> None:
        super().__init__()
        self.network = network
        self._schema = schema
        self._names = input_names(schema, form, spaces)
        single = getattr(network, "single_request", None)
        self._forward: Callable[..., Tensor] = single if form == "single" and single is not None else network

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits ``(N, T)``."""
        return self._forward(unflatten(self._schema, dict(zip(self._names, tensors, strict=True))))


def export_artifact(
    model: RankingModel,
    training_set: TrainingSet,
    out: str | Path,
    *,
    name: str,
    compile: bool | Literal["auto"] = "auto",  # noqa: A002 - the word that torch uses
    snapshot: Snapshot = "items",
    model_config: Config | None = None,
    facts: Mapping[str, Any] | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> ExportSummary:
    """Writes an artifact.

    Args:
        model: trained, on the CPU, its tables whole.
        training_set: what it was trained on: encoder, recorded rows and snapshot come from there.
        out: the artifact's folder; an artifact that is there is replaced.
        name: of the model.
        compile: whether to compile the program of single requests; ``auto``: where a C++ compiler is at hand, and an
            export whose compilation fails goes on without.
        snapshot: what to take along of the training set's entities: ``items`` for the candidates' features, ``all``
            for users and event logs too, so that a request needs no more than keys.
        model_config: recorded in the manifest.
        facts: plain JSON recorded in the manifest, such as metrics and the run.
        stage: called with the name of each stage as it begins.

    Raises:
        ArtifactError: ``out`` is something else, or the artifact does not reproduce the model's logits.
        MissingDependencyError: ``compile=True`` and there is no C++ compiler.
    """
    began = clock.perf_counter()
    if compile is True and _compiler() is None:
        raise MissingDependencyError(
            "compile=True needs a C++ compiler, found none",
            hint="install g++, or set CXX, or export with compile=auto",
        )
    schema = training_set.schema
    was_training = model.training
    model.eval()
    try:
        with ArtifactWriter(out) as writer:
            stage("Writing tables")
            tables = {n: writer.write_table(n, w) for n, w in _tables(model, training_set).items()}
            training_set.encoder.save(writer.folder / "encoder")
            _copy_snapshot(training_set, writer.folder / FEATURES, snapshot)
            stage("Recording rows")
            batches = recorded_batches(training_set)
            with torch.inference_mode(), quiet():
                logits = {n: model(b).numpy() for n, b in batches.items()}
            write_self_test(writer.folder / SELF_TEST, batches, logits)
            stage("Exporting the network")
            forms: tuple[Form, ...] = ("many", "single")
            exported = {f: _export(model, schema, f) for f in forms}
            for form, program in exported.items():
                with quiet():
                    torch.export.save(program, writer.folder / PORTABLE[form])
            stage("Compiling the network")
            compiled, note, compile_s = _compiled(exported["single"], writer.folder / COMPILED, compile)
            stage("Checking the artifact")
            folder = writer.draft(
                {
                    "name": name,
                    "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "schema": schema.model_dump(mode="json"),
                    "schema_fingerprint": fingerprint(schema),
                    "encoder_fingerprint": training_set.encoder.fingerprint,
                    "training_set_fingerprint": training_set.fingerprint,
                    "training_period_us": _period(training_set),
                    "model": None if model_config is None else model_config.model_dump(mode="json"),
                    "tasks": [t.name for t in schema.tasks],
                    "tables": tables,
                    "spaces": [space.to_json() for space in model.lookup.spaces],
                    "inputs": {form: input_names(schema, form, model.lookup.spaces) for form in forms},
                    "programs": {"portable": PORTABLE, "compiled": compiled},
                    "torch": torch_version(),
                    "self_test": {"file": SELF_TEST, "tolerance": TOLERANCE},
                    "facts": dict(facts or {}),
                }
            )
            predictor = Predictor(Artifact.open(folder, verify=False), engine="auto" if compiled else "portable")
            predictor.load_many()
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            writer.publish()
    finally:
        model.train(was_training)
    seconds = clock.perf_counter() - began
    return ExportSummary(str(out), size, predictor.engine, note, predictor.max_error, compile_s, round(seconds, 3))


def _tables(model: RankingModel, training_set: TrainingSet) -> dict[str, np.ndarray]:
    """Weight of each embedding table, by name, from the look-up's state."""
    found = {}
    for key, value in model.lookup.state_dict().items():
        parts = key.split(".")
        if len(parts) >= 3 and parts[-3] == "embedding_bags" and parts[-1] == "weight":
            found[parts[-2]] = value.detach().cpu().float().numpy()
    sizes = training_set.encoder.table_sizes
    if {n: len(w) for n, w in found.items() if "@" not in n} != dict(sizes):
        raise ArtifactError(
            f"model must have the tables {', '.join(sizes)} with the encoder's rows, got {', '.join(found) or 'none'}",
            hint="export the model together with the training set that it was trained on",
        )
    return found


def _period(training_set: TrainingSet) -> list[int] | None:
    """First and last time of the training split's requests, UTC microseconds; None where it is empty."""
    times = training_set.split("train").requests.array(TIME)
    return [int(times.min()), int(times.max())] if len(times) else None


def _copy_snapshot(training_set: TrainingSet, folder: Path, snapshot: Snapshot) -> None:
    if snapshot == "none":
        return
    folder.mkdir()
    files = ["items.arrow"]
    if snapshot == "all":
        logs = [path for h in training_set.schema.histories for path in event_log_paths(training_set.folder, h.name)]
        files += ["users.arrow", *(path.relative_to(training_set.folder).as_posix() for path in logs)]
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(training_set.folder / file, folder / file)
    write_json(folder / "manifest.json", {"encoder_fingerprint": training_set.encoder.fingerprint})


# Recorded rows


def recorded_batches(training_set: TrainingSet, *, num_requests: int = 6, max_rows: int = 200) -> dict[str, Batch]:
    """Batches that try the programs at their edges.

    Several requests of the newest period, the longest histories among them; the same without what is known of them;
    and single
    requests: one of several candidates, one of one candidate, one without any history.
    """
    splits = [s for s in ("test", "validation", "train") if training_set.split(s).num_requests >= 2]
    split = splits[0] if splits else "train"
    part = training_set.split(split)
    spread = np.unique(np.linspace(0, part.num_requests - 1, num_requests).astype(np.int64))
    most_rows = int(np.argmax(np.diff(part.row_offsets)[:100_000]))
    chosen = np.unique([*spread, most_rows])
    while len(chosen) > 2 and np.diff(part.row_offsets)[chosen].sum() > max_rows:
        chosen = chosen[:-1]
    several = Batch.from_training_set(training_set, split, chosen)
    if several.num_requests == 1:
        several = several.select_requests(torch.tensor([0, 0]))
    lengths = sum(h.lengths for h in several.histories.values())
    longest = int(torch.argmax(cast("Tensor", lengths))) if several.histories else 0
    single = several.select_requests(torch.tensor([longest]))
    one = several.exploded().select_requests(torch.tensor([0]))
    return {
        "many": _bare(several),
        "many-unknown": _unknown(several),
        "single": _bare(single),
        "single-candidate": _bare(one),
        "single-unknown": _unknown(single),
    }


def _bare(batch: Batch) -> Batch:
    """Without what a service does not have."""
    return Batch(
        batch.request_of_row, batch.time, batch.user, batch.context, batch.item, batch.candidate, batch.histories
    )


def _unknown(batch: Batch) -> Batch:
    """The same requests with nothing known of them."""

    def blank(columns: Mapping[str, Column], n: int) -> dict[str, Column]:
        result: dict[str, Column] = {}
        for feature, column in columns.items():
            if isinstance(column, Bags):
                result[feature] = Bags(column.values[:0], torch.zeros(n + 1, dtype=torch.int64))
            elif column.is_floating_point():
                result[feature] = torch.zeros(n, *column.shape[1:])
            else:
                result[feature] = torch.full((n,), UNKNOWN_ID)
        return result

    num_requests, num_rows = batch.num_requests, batch.num_rows
    histories = {
        name: HistoryBatch(torch.zeros(num_requests + 1, dtype=torch.int64), h.times[:0], blank(h.features, 0))
        for name, h in batch.histories.items()
    }
    return Batch(
        batch.request_of_row,
        batch.time,
        blank(batch.user, num_requests),
        blank(batch.context, num_requests),
        blank(batch.item, num_rows),
        blank(batch.candidate, num_rows),
        histories,
    )


# Programs


def _export(model: RankingModel, schema: Schema, form: Form) -> torch.export.ExportedProgram:
    """Exports one form of a network, with rows, histories and requests of any number."""
    spaces = model.lookup.spaces
    inputs, dynamic = example_inputs(schema, form, model.lookup.embedding_dim, spaces)
    flat = FlatNetwork(model.network, schema, form, spaces).eval()
    with torch.no_grad(), quiet():
        return torch.export.export(flat, tuple(inputs), dynamic_shapes=(tuple(dynamic),))


def example_inputs(
    schema: Schema, form: Form, embedding_dim: int, spaces: Sequence[Space] = ()
) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Inputs of a program to trace it with, and which of their dimensions vary.

    Every dimension that varies has a size of its own here: the exporter takes equal sizes for the same dimension.
    """
    num_requests, num_rows = (1, 17) if form == "single" else (3, 17)
    width = widths(schema, embedding_dim, spaces)
    length = {h.name: 23 + 2 * place for place, h in enumerate(schema.histories)}
    generator = torch.Generator().manual_seed(0)
    any_number = torch.export.Dim.DYNAMIC
    of_requests: dict[int, Any] = {} if form == "single" else {0: any_number}
    inputs: list[Tensor] = []
    dynamic: list[dict[int, Any]] = []
    for name in input_names(schema, form, spaces):
        side, _, feature = name.partition("/")
        if name == "@request_of_row":
            tensor = torch.arange(num_rows) * num_requests // num_rows
            varies: dict[int, Any] = {0: any_number}
        elif name == "@time":
            tensor, varies = torch.zeros(num_requests, dtype=torch.int64), of_requests
        elif side == "request":
            tensor, varies = torch.randn(num_requests, width[feature], generator=generator), of_requests
        elif side == "candidate":
            tensor, varies = torch.randn(num_rows, width[feature], generator=generator), {0: any_number}
        elif feature == "@lengths":
            tensor, varies = torch.full((num_requests,), length[side] - 1), of_requests
        elif feature == "@times":
            tensor, varies = torch.zeros(num_requests, length[side], dtype=torch.int64), {**of_requests, 1: any_number}
        else:
            tensor = torch.randn(num_requests, length[side], width[feature], generator=generator)
            varies = {**of_requests, 1: any_number}
        inputs.append(tensor)
        dynamic.append(varies)
    return inputs, dynamic


def _compiled(
    program: torch.export.ExportedProgram,
    path: Path,
    compile: bool | Literal["auto"],  # noqa: A002
) -> tuple[dict[str, Any] | None, str | None, float]:
    """Compiles a program ahead of time; returns its entry in the manifest, why there is none, and the seconds taken."""
    if compile is False:
        return None, "compilation was switched off", 0.0
    compiler = _compiler()
    if compiler is None:
        return None, "no C++ compiler was found", 0.0
    began = clock.perf_counter()
    options, features = _target(torch.cpu.get_capabilities())
    options["cpp.cxx"] = (None, compiler)
    try:
        with quiet():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except Exception as err:
        if compile is True:
            raise ArtifactError(
                f"the network cannot be compiled ({type(err).__name__}: {_first_line(err)})",
                hint="export with compile=auto to go on without",
            ) from err
        path.unlink(missing_ok=True)
        return None, f"compilation failed ({type(err).__name__}: {_first_line(err)})", 0.0
    seconds = round(clock.perf_counter() - began, 3)
    entry = {
        "form": "single",
        "file": path.name,
        "torch": torch_version(),
        "machine": platform.machine(),
        "cpu_features": list(features),
        "compile_s": seconds,
    }
    return entry, None, seconds


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _target(capabilities: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Compiler options, and the processor features that the result needs.

    Where the processor allows it, the instruction set is x86-64-v3 rather than this machine's own: the program then
    runs on any server of the last ten years, and is as fast, since most of its time goes into matrix products that
    choose their instructions as they run.
    """
    options: dict[str, Any] = {
        "compile_threads": 1,  # no pool of processes for two files
        "cpp.vec_isa_ok": True,  # the processor's features are known: no test program
        "aot_inductor.compile_wrapper_opt_level": "O0",  # the wrapper calls; it does not compute
        "aot_inductor.precompile_headers": False,  # pays only from the third compilation on
    }
    if platform.machine() == "x86_64" and all(capabilities.get(f) for f in X86_64_V3):
        return {**options, "cpp.march": "x86-64-v3", "cpp.simdlen": 256}, X86_64_V3
    own = tuple(sorted(name for name, value in capabilities.items() if value is True))
    return options, own


def _first_line(err: Exception) -> str:
    return next(iter(str(err).strip().splitlines()), "")[:300]
