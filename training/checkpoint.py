"""Checkpoints: written whole or not at all, checked before they are believed.

::

    checkpoints/
      latest.json                  names of the newest checkpoints, newest first; replaced last, and atomically
      step-000000001200/
        .metadata  __0_0.distcp    torch.distributed.checkpoint: model, optimizer and random state, one file a rank
        manifest.json              progress of the run; size and sha256 of every file

A checkpoint is written to a hidden folder, synced, renamed, and only then named by ``latest.json``. A process killed at
any moment leaves the old checkpoint or the new one. The newest two are kept, and the best ones that they refer to.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from recsys.errors import CheckpointError
from recsys.files import sha256_of, sync, write_json

FORMAT_VERSION = 1
_KEPT = 2

_log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: created when the first is saved.
        rank: of this process; rank 0 writes everything but the other ranks' own tensors.
        world: number of processes. All of them call :meth:`save` and :meth:`load`, on one shared file system.
        barrier: waits for all processes.
    """

    def __init__(
        self, folder: str | Path, *, rank: int = 0, world: int = 1, barrier: Callable[[], None] = lambda: None
    ) -> None:
        self.folder = Path(folder)
        self._rank = rank
        self._world = world
        self._barrier = barrier

    @property
    def latest(self) -> str | None:
        """Name of the newest checkpoint, or None if there is none.

        If its folder was removed by hand, the one before it.
        """
        return next(iter(self._existing()), None)

    def save(self, step: int, state: dict[str, Any], progress: Mapping[str, Any]) -> str:
        """Writes a checkpoint and makes it the newest.

        Args:
            step: names the checkpoint.
            state: nested dictionaries of tensors.
            progress: plain JSON; ``best`` names the checkpoint that must be kept with this one (None for none; its own
                name for itself).

        Returns:
            The checkpoint's name.

        Raises:
            CheckpointError: it cannot be written, for instance because the disk is full. The one before it is
                untouched.
        """
        name = checkpoint_name(step)
        temporary = self.folder / f".tmp-{name}"
        try:
            if self._rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
                temporary.mkdir()
            self._barrier()
            with _quiet():
                writer = FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
                save(state, storage_writer=writer, no_dist=self._world == 1)
            if self._rank == 0:
                self._commit(name, temporary, progress)
            self._barrier()
        except (OSError, CheckpointException) as err:
            raise CheckpointError(
                f"{self.folder / name} cannot be written: {_first_cause(err)}",
                hint="free some space or choose another run folder; training resumes from the checkpoint before",
            ) from err
        return name

    def _commit(self, name: str, temporary: Path, progress: Mapping[str, Any]) -> None:
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(temporary.iterdir())}
        for file in files:
            sync(temporary / file)
        manifest = {"format_version": FORMAT_VERSION, "world": self._world, "progress": dict(progress), "files": files}
        write_json(temporary / "manifest.json", manifest)
        sync(temporary)
        final = self.folder / name
        if final.exists():  # left by a process that was killed before it could name it
            _remove(final)
        temporary.rename(final)
        sync(self.folder)
        names = [name, *(n for n in self._existing() if n != name)][:_KEPT]
        write_json(self.folder / "latest.json", {"format_version": FORMAT_VERSION, "checkpoints": names})
        sync(self.folder)
        self._sweep()

    def read_progress(self, name: str) -> dict[str, Any]:
        """The progress that a checkpoint was saved with.

        Raises:
            CheckpointError: as :meth:`load`.
        """
        progress: dict[str, Any] = self._manifest(name)["progress"]
        return progress

    def world_of(self, name: str) -> int:
        """Number of processes that a checkpoint was saved by."""
        return int(self._manifest(name)["world"])

    def load(self, name: str, state: dict[str, Any]) -> None:
        """Reads a checkpoint into tensors that are there already.

        Args:
            state: the same structure that was saved, or a part of it; its tensors are overwritten.

        Raises:
            CheckpointError: the checkpoint is absent, incomplete, changed, of another version, or of another model.
        """
        manifest = self._manifest(name)
        folder = self.folder / name
        hint = f"delete {folder} to resume from the checkpoint before it"
        if self._rank == 0:
            for file, entry in manifest["files"].items():
                path = folder / file
                if not path.is_file():
                    raise CheckpointError(f"{path} is missing", hint=hint)
                if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
                    raise CheckpointError(f"{path} was changed after it was written", hint=hint)
        self._barrier()
        try:
            with _quiet():
                load(state, storage_reader=FileSystemReader(folder), no_dist=self._world == 1)
        except (OSError, CheckpointException) as err:
            raise CheckpointError(
                f"{folder} does not fit this model: {_first_cause(err)}",
                hint="train into a new run folder, or bring back the configuration that it was written with",
            ) from err

    def _manifest(self, name: str) -> dict[str, Any]:
        path = self.folder / name / "manifest.json"
        hint = f"delete {path.parent} to resume from the checkpoint before it"
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as err:
            raise CheckpointError(f"{path} does not exist", hint=hint) from err
        except (json.JSONDecodeError, UnicodeDecodeError) as err:
            raise CheckpointError(f"{path} must be JSON", hint=hint) from err
        if manifest.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path.parent} must be of format {FORMAT_VERSION}, got {manifest.get('format_version')}",
                hint="resume with the version of the software that wrote it, or train into a new run folder",
            )
        return manifest

    def _existing(self) -> list[str]:
        try:
            names: list[str] = json.loads((self.folder / "latest.json").read_text(encoding="utf-8"))["checkpoints"]
        except FileNotFoundError:
            return []
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as err:
            raise CheckpointError(
                f"{self.folder / 'latest.json'} must name the newest checkpoints",
                hint=f"delete {self.folder} to start the run again",
            ) from err
        present = [n for n in names if (self.folder / n).is_dir()]
        for name in set(names) - set(present):
            _log.warning("checkpoint %s was removed", self.folder / name)
        return present

    def _sweep(self) -> None:
        """Removes what no newest checkpoint refers to, and what killed processes left behind."""
        existing = self._existing()
        kept = set(existing)
        for name in existing:
            try:
                best = self.read_progress(name).get("best")
            except CheckpointError:  # unreadable: loading it will say so, sweeping must not lose what it may refer to
                return
            if best is not None:
                kept.add(best)
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in kept:
                _remove(path)


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after so many steps."""
    return f"step-{step:012d}"


def _remove(folder: Path) -> None:
    """Removes a folder; killed half-way, it leaves a name that nothing reads."""
    if not folder.name.startswith(".tmp-"):
        folder = folder.rename(folder.with_name(f".tmp-old-{folder.name}"))
    shutil.rmtree(folder)


def _first_cause(err: BaseException) -> str:
    """What went wrong on the first rank that failed, without the traceback that torch puts into the message."""
    failures = getattr(err, "failures", None)
    if failures:
        wrapped = failures[min(failures)]
        err = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    return str(err).splitlines()[0] if str(err) else type(err).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the remark that a single process saves as a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
