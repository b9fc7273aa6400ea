"""A folder that appears whole or not at all.

Work happens in ``DIR.tmp-<random>`` beside the folder, under an exclusive lock on ``DIR.lock``; the last step is a
rename. A process killed at any moment leaves the old folder, the new one, or (between two renames) the old one under a
name that the next run puts back. The lock belongs to the process, so a killed one leaves none behind; its file stays,
since deleting it would let two processes lock two different files.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recsys.errors import SourceError
from recsys.files import check_replaceable, exchange, put_in_place, sync, sync_tree
from recsys.training_set import is_training_set

_MARK = "manifest.json"
"""What the block writes last; without it, no set is put back after a kill."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the lock of ``folder``, waiting for it, and clears what a killed process left beside it.

    Raises:
        SourceError: the parent folder cannot be written to.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as err:
        raise SourceError(f"{folder.parent} must be a folder that can be written to: {err.strerror}") from err
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _recover(folder)
        yield
    finally:
        os.close(descriptor)


def _recover(folder: Path) -> None:
    replaced = sorted(folder.parent.glob(f"{glob.escape(folder.name)}.tmp-old-*"))
    if not folder.exists() and replaced and (replaced[-1] / _MARK).is_file():
        replaced[-1].rename(folder)
    is_complete = any((p / _MARK).is_file() for p in folder.parent.glob(f"{glob.escape(folder.name)}.tmp-*"))
    if not folder.exists() and is_complete and versions_of(folder):  # killed between the renames of an append
        versions_of(folder)[-1].rename(folder)
    for stale in folder.parent.glob(f"{glob.escape(folder.name)}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def replacing(folder: Path, *, keep_in: Path | None = None) -> Iterator[Path]:
    """Yields a new folder that takes the place of ``folder`` if the block ends well, and vanishes if it does not.

    Hold :func:`exclusive` around it. The block writes ``manifest.json`` last.

    Args:
        folder: to replace.
        keep_in: a folder where the one that is replaced is kept, under the next number.

    Raises:
        SourceError: ``folder`` holds something that is not ours to delete.
    """
    _check_replaceable(folder)
    token = secrets.token_hex(6)
    temporary = folder.with_name(f"{folder.name}.tmp-{token}")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary, files=False)  # the build has made its files durable
        _check_replaceable(folder)  # again, for the work took a while
        if keep_in is None:
            put_in_place(temporary, folder, retired=folder.with_name(f"{folder.name}.tmp-old-{token}"))
        else:
            exchange(temporary, folder, retired=_next_version(keep_in))
            sync(keep_in)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    check_replaceable(folder, "a training set", is_ours=is_training_set, error=SourceError)


def versions_folder(folder: Path) -> Path:
    """Where the older versions of a folder are."""
    return folder.with_name(f"{folder.name}.versions")


def versions_of(folder: Path) -> list[Path]:
    """The older versions of a folder, the oldest first."""
    kept = versions_folder(folder)
    return sorted(p for p in kept.iterdir() if p.name.isdigit()) if kept.is_dir() else []


def _next_version(kept: Path) -> Path:
    kept.mkdir(exist_ok=True)
    numbers = [int(p.name) for p in kept.iterdir() if p.name.isdigit()]
    return kept / f"{max(numbers, default=0) + 1:06d}"
