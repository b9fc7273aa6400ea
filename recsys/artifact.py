"""The artifact: everything that scoring needs, in one folder, complete or not there at all.

::

    manifest.json             what it is, what it needs, a checksum of every file
    encoder/                  the fitted encoder
    tables/<table>.npy        float32 (rows, D), memory-mapped: processes on one machine share one copy; a model with
                              further spaces of vectors has tables/<table>@<space>.npy too
    network.pt2               torch.export program of any number of requests
    network.single.pt2        the same of one request: what a service runs where there is no compiled program
    network.single.aoti.pt2   that program compiled (AOTInductor), where a C++ compiler was at hand
    self_test.npz             recorded batches and the logits that the trained model gave them
    features/                 snapshot of items (users, event logs): what is known of them without being told

A program takes a flat list of tensors, named and ordered by :func:`input_names`, and gives logits ``(N, T)``. There
are two forms: *many* requests, and a *single* one, which has no ``request_of_row`` and repeats nothing of the user's
side.

Shapes: R requests, N candidates (rows), L longest history of the batch, D width of a vector, T tasks.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from recsys.batch import Bags, Batch, Column, HistoryBatch
from recsys.config import fingerprint, validate
from recsys.embedded import Embedded, EmbeddedHistory, Space
from recsys.encoding.encoder import Encoder
from recsys.errors import ArtifactError, ConfigError, IntegrityError, SchemaError, nearest
from recsys.files import put_in_place, sha256_of, sync, sync_tree, write_json
from recsys.manifest import EXPORT_AGAIN, FORMAT, FORMAT_VERSION, MANIFEST, read_manifest
from recsys.schema import Categorical, Schema

Form = Literal["many", "single"]
PORTABLE: dict[Form, str] = {"many": "network.pt2", "single": "network.single.pt2"}
COMPILED = "network.single.aoti.pt2"
SELF_TEST = "self_test.npz"
FEATURES = "features"
TOLERANCE = 1e-5
"""A replayed logit ``x`` may be off by so much times ``max(1, |x|)``."""

X86_64_V3 = ("avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt")
"""What the instruction set level x86-64-v3 promises, in the words of ``torch.cpu.get_capabilities()``."""


# What programs take


def input_names(schema: Schema, form: Form, spaces: Sequence[Space] = ()) -> list[str]:
    """Names of a program's inputs, in order.

    ``request/<feature>``, ``candidate/<feature>``, ``<history>/<feature>``, ``<history>/@lengths``,
    ``<history>/@times``, ``@time``, and in the form of many requests ``@request_of_row``; after a side's features
    those of further spaces, ``<side>/<feature>@<space>``.
    """

    def of_side(side: str, features: Sequence[str]) -> list[str]:
        return [f"{side}/{name}" for name in (*features, *(s.key(f) for s in spaces for f in s.of_side(side)))]

    names = of_side("request", [f.name for f in (*schema.features_of("user"), *schema.features_of("context"))])
    names += of_side("candidate", [f.name for f in (*schema.features_of("item"), *schema.features_of("candidate"))])
    for history in schema.histories:
        names += of_side(history.name, [*history.attributes, *(e.name for e in history.event_features)])
        names += [f"{history.name}/@lengths", f"{history.name}/@times"]
    return [*names, "@time"] if form == "single" else [*names, "@time", "@request_of_row"]


def flatten(embedded: Embedded, form: Form) -> list[Tensor]:
    """The tensors of a batch in the order of :func:`input_names`."""
    tensors = [*embedded.request.values(), *embedded.candidate.values()]
    for history in embedded.histories.values():
        tensors += [*history.features.values(), history.lengths, history.times]
    tensors.append(embedded.time)
    if form == "many":
        tensors.append(embedded.request_of_row)
    return tensors


def unflatten(schema: Schema, tensors: Mapping[str, Tensor]) -> Embedded:
    """The inverse of :func:`flatten`, from tensors by name; without ``@request_of_row`` every row is of request 0."""
    request = {n.removeprefix("request/"): t for n, t in tensors.items() if n.startswith("request/")}
    candidate = {n.removeprefix("candidate/"): t for n, t in tensors.items() if n.startswith("candidate/")}
    histories = {}
    for history in schema.histories:
        side = f"{history.name}/"
        of_events = {n.removeprefix(side): t for n, t in tensors.items() if n.startswith(side)}
        lengths, times = of_events.pop("@lengths"), of_events.pop("@times")
        histories[history.name] = EmbeddedHistory(of_events, lengths, times)
    request_of_row = tensors.get("@request_of_row")
    if request_of_row is None:
        some = next(iter(candidate.values()))
        request_of_row = torch.zeros(some.shape[0], dtype=torch.int64)
    return Embedded(request, candidate, histories, request_of_row, tensors["@time"])


# Recorded batches


def write_self_test(path: Path, batches: Mapping[str, Batch], logits: Mapping[str, np.ndarray]) -> None:
    """Records batches (ids and numbers, without labels) and the logits ``(N, T)`` that they must give."""
    arrays: dict[str, np.ndarray] = {}
    for name, batch in batches.items():
        arrays[f"{name}/logits"] = logits[name].astype(np.float32)
        arrays[f"{name}/request_of_row"] = batch.request_of_row.numpy()
        arrays[f"{name}/time"] = batch.time.numpy()
        for part in ("user", "context", "item", "candidate"):
            _record(arrays, f"{name}/{part}", getattr(batch, part))
        for history, events in batch.histories.items():
            arrays[f"{name}/history/{history}/@offsets"] = events.offsets.numpy()
            arrays[f"{name}/history/{history}/@times"] = events.times.numpy()
            _record(arrays, f"{name}/history/{history}", events.features)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _record(arrays: dict[str, np.ndarray], place: str, columns: Mapping[str, Column]) -> None:
    for feature, column in columns.items():
        if isinstance(column, Bags):
            arrays[f"{place}/{feature}/@values"] = column.values.numpy()
            arrays[f"{place}/{feature}/@offsets"] = column.offsets.numpy()
        else:
            arrays[f"{place}/{feature}"] = column.numpy()


def read_self_test(path: Path, schema: Schema) -> dict[str, tuple[Batch, np.ndarray]]:
    """What :func:`write_self_test` wrote: name -> (batch, logits ``(N, T)``).

    Raises:
        ArtifactError: the file cannot be read, or does not fit the schema.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        names = sorted({n.split("/", 1)[0] for n in arrays})
        return {name: (_replayed(arrays, name, schema), arrays[f"{name}/logits"]) for name in names}
    except (OSError, ValueError, KeyError, EOFError) as err:
        raise ArtifactError(f"{path} must hold the recorded rows, got another content", hint=EXPORT_AGAIN) from err


def _replayed(arrays: Mapping[str, np.ndarray], name: str, schema: Schema) -> Batch:
    def columns(place: str, features: list[str]) -> dict[str, Column]:
        found: dict[str, Column] = {}
        for feature in features:
            plain = arrays.get(f"{place}/{feature}")
            if plain is not None:
                found[feature] = torch.from_numpy(plain)
            else:
                values, offsets = (arrays[f"{place}/{feature}/@{part}"] for part in ("values", "offsets"))
                found[feature] = Bags(torch.from_numpy(values), torch.from_numpy(offsets))
        return found

    histories = {}
    for history in schema.histories:
        place = f"{name}/history/{history.name}"
        histories[history.name] = HistoryBatch(
            torch.from_numpy(arrays[f"{place}/@offsets"]),
            torch.from_numpy(arrays[f"{place}/@times"]),
            columns(place, [*history.attributes, *(f.name for f in history.event_features)]),
        )
    return Batch(
        request_of_row=torch.from_numpy(arrays[f"{name}/request_of_row"]),
        time=torch.from_numpy(arrays[f"{name}/time"]),
        user=columns(f"{name}/user", [f.name for f in schema.features_of("user")]),
        context=columns(f"{name}/context", [f.name for f in schema.features_of("context")]),
        item=columns(f"{name}/item", [f.name for f in schema.features_of("item")]),
        candidate=columns(f"{name}/candidate", [f.name for f in schema.features_of("candidate")]),
        histories=histories,
    )


# The folder


class ArtifactWriter:
    """Fills a hidden folder beside the artifact's place, and renames it when it is complete.

    A process killed at any moment leaves the old artifact, or the new one, or none.

    Example:
        >>> with ArtifactWriter("artifacts/din") as writer:  # doctest: +SKIP
        ...     writer.write_table("item", weights)
        ...     writer.publish({...})

    Args:
        out: the artifact's folder; one that is there is replaced, anything else is left alone.

    Raises:
        ArtifactError: ``out`` exists and is not an artifact, or cannot be written to.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        if self.out.exists() and not (self.out / MANIFEST).is_file() and not _is_empty_folder(self.out):
            raise ArtifactError(
                f"{self.out} must be an artifact or not exist, got something else",
                hint="choose another place to write to",
            )
        self.folder = self._hidden()

    def _hidden(self) -> Path:
        return self.out.with_name(f".tmp-{self.out.name}-{os.getpid()}-{secrets.token_hex(4)}")

    def __enter__(self) -> Self:
        try:
            self._sweep()
            self.folder.mkdir(parents=True)
        except OSError as err:
            raise ArtifactError(
                f"{self.out} must be a place that can be written to: {err.strerror}",
                hint="choose another place to write to",
            ) from err
        return self

    def _sweep(self) -> None:
        """Removes what killed processes left."""
        for path in self.out.parent.glob(f".tmp-{glob.escape(self.out.name)}-*-*"):
            process = path.name.rsplit("-", 2)[1]
            if process.isdigit() and not Path(f"/proc/{process}").exists():
                shutil.rmtree(path, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_table(self, name: str, weight: np.ndarray) -> dict[str, Any]:
        """Writes an embedding table; returns its entry in the manifest."""
        path = self.folder / "tables" / f"{name}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.ascontiguousarray(weight, dtype=np.float32), allow_pickle=False)
        rows, dim = weight.shape
        return {"rows": rows, "dim": dim, "dtype": "float32", "file": f"tables/{name}.npy"}

    def draft(self, fields: Mapping[str, Any]) -> Path:
        """Writes the manifest into the hidden folder, which can then be opened and tried before it is published.

        Args:
            fields: the manifest but for the format and the files.
        """
        files = {}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file() and p != self.folder / MANIFEST):
            sync(path)
            relative = path.relative_to(self.folder).as_posix()
            files[relative] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **fields, "files": files}
        write_json(self.folder / MANIFEST, manifest)
        return self.folder

    def publish(self) -> Path:
        """Gives the folder its name; an artifact that was there is replaced."""
        sync_tree(self.folder, files=False)
        put_in_place(self.folder, self.out, retired=self._hidden())
        return self.out


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


class Artifact:
    """An opened artifact.

    Attributes:
        folder: where it is.
        manifest: what it says of itself.
        schema: what the features are.
        encoder: raw values to ids.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], schema: Schema, encoder: Encoder) -> None:
        self.folder = folder
        self.manifest = manifest
        self.schema = schema
        self.encoder = encoder

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Self:
        """Opens an artifact; tables are mapped, not read.

        Args:
            verify: compare every file's sha256 with the manifest, else only its size.

        Raises:
            ArtifactError: it is absent, of another version, incomplete, or changed.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for relative, entry in manifest["files"].items():
            path = folder / relative
            if not path.is_file():
                raise ArtifactError(f"{path} is missing", hint=f"copy the whole folder again, or {EXPORT_AGAIN}")
            if path.stat().st_size != entry["bytes"] or (verify and sha256_of(path) != entry["sha256"]):
                raise ArtifactError(
                    f"{path} was changed or cut short after it was written",
                    hint=f"copy the whole folder again, or {EXPORT_AGAIN}",
                )
        try:
            schema = validate(Schema, manifest["schema"], source=str(folder / MANIFEST))
            encoder = Encoder.load(folder / "encoder")
        except (ConfigError, IntegrityError) as err:
            raise ArtifactError(f"{folder}: {err.message}", hint=err.hint or EXPORT_AGAIN) from err
        if encoder.fingerprint != manifest["encoder_fingerprint"]:
            raise ArtifactError(
                f"{folder / 'encoder'} must be the encoder that the model was trained with, got another",
                hint=EXPORT_AGAIN,
            )
        artifact = cls(folder, manifest, schema, encoder)
        artifact._check_tables()
        return artifact

    def _check_tables(self) -> None:
        sizes = self.encoder.table_sizes
        for name, rows in {t: sizes[t.partition("@")[0]] for t in (*sizes, *self.table_of.values())}.items():
            entry = self.manifest["tables"].get(name)
            if entry is None or entry["rows"] != rows:
                got = "none" if entry is None else f"{entry['rows']} rows"
                raise ArtifactError(
                    f"{self.folder}: table {name!r} must have the {rows} rows of its encoder, got {got}",
                    hint=EXPORT_AGAIN,
                )

    @cached_property
    def spaces(self) -> tuple[Space, ...]:
        """Spaces of vectors besides the main one."""
        return tuple(Space.from_json(space) for space in self.manifest["spaces"])

    @cached_property
    def table_of(self) -> dict[str, str]:
        """Name of the table of each categorical feature, and of ``<feature>@<space>`` in further spaces."""
        main = {f.name: f.table_name for f in self.schema.all_features if isinstance(f, Categorical)}
        return main | {s.key(use.feature): s.key(main[use.feature]) for s in self.spaces for use in s.uses}

    @property
    def name(self) -> str:
        """Name of the model."""
        return str(self.manifest["name"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the logits."""
        return tuple(t.name for t in self.schema.tasks)

    @property
    def training_period(self) -> tuple[int, int] | None:
        """First and last time of the training requests, UTC microseconds; None if the manifest does not say."""
        period = self.manifest.get("training_period_us")
        return None if period is None else (int(period[0]), int(period[1]))

    def task_position(self, task: str | None) -> int:
        """Column of a task's logit; of the first one if not given.

        Raises:
            SchemaError: there is no such task.
        """
        if task is None:
            return 0
        if task not in self.tasks:
            raise SchemaError(f"task must be one of the model's, got {task!r}", hint=nearest(task, self.tasks))
        return self.tasks.index(task)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the checksums of every file."""
        return fingerprint({name: entry["sha256"] for name, entry in self.manifest["files"].items()})

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """The embedding tables, ``(rows, D)`` float32 each, memory-mapped.

        Raises:
            ArtifactError: a file is not what the manifest says.
        """
        tables = {}
        for name, entry in self.manifest["tables"].items():
            path = self.folder / entry["file"]
            try:
                # Mapped copy-on-write: shared by processes until written to, and nothing writes.
                array = np.load(path, mmap_mode="c", allow_pickle=False)
            except (OSError, ValueError, EOFError) as err:
                raise ArtifactError(f"{path} cannot be read as a table", hint=EXPORT_AGAIN) from err
            if array.shape != (entry["rows"], entry["dim"]) or array.dtype != np.float32:
                raise ArtifactError(
                    f"{path} must be float32 ({entry['rows']}, {entry['dim']}), got {array.dtype} {array.shape}",
                    hint=EXPORT_AGAIN,
                )
            tables[name] = torch.from_numpy(array)
        return tables

    @property
    def features_folder(self) -> Path | None:
        """Folder of the snapshot, if there is one."""
        folder = self.folder / FEATURES
        return folder if folder.is_dir() else None
