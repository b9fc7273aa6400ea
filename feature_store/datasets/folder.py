"""Writes a folder of views so that a reader sees the whole of it or nothing."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recsys.errors import SourceError
from recsys.files import check_can_write, put_in_place, sync_tree

_SUFFIX_LENGTH = 12


@contextmanager
def views_folder(output_dir: Path, *, marker: str) -> Iterator[Path]:
    """Yields an empty temporary folder beside ``output_dir`` that takes its place when the block ends without an error.

    An existing ``output_dir`` is replaced only if it is empty or holds ``marker``, the file that every writer of this
    package leaves there: no folder that holds a user's own files is ever removed. After an error, or when the process
    is killed, ``output_dir`` is as before (or absent, if killed between the two renames of a replacement); what a
    killed process left beside it is removed by the next one.

    Args:
        output_dir: the folder to write; parents are created.
        marker: name of the file that the block must write and that proves the folder to be ours.

    Raises:
        ConfigError: nothing can be written there.
        SourceError: ``output_dir`` is a file, or a folder that this package did not write.
    """
    check_can_write(output_dir, name="output folder")
    output_dir = Path(output_dir).resolve()
    _check_replaceable(output_dir, marker)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _make_temporary(output_dir)
    try:
        yield temporary
        assert (temporary / marker).is_file(), f"the block must write {marker}"
        sync_tree(temporary)
        _check_replaceable(output_dir, marker)
        put_in_place(temporary, output_dir, retired=_beside(output_dir))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _make_temporary(output_dir: Path) -> tuple[Path, int]:
    """Makes the temporary folder and locks it; removes those that no living process holds the lock of."""
    parent = os.open(output_dir.parent, os.O_RDONLY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)  # between mkdir and lock, nobody else may look
        for stale in output_dir.parent.glob(f".tmp-{glob.escape(output_dir.name)}-{'[0-9a-f]' * _SUFFIX_LENGTH}"):
            _remove_if_unlocked(stale)
        temporary = _beside(output_dir)
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(parent)
    return temporary, lock


def _remove_if_unlocked(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def _beside(output_dir: Path) -> Path:
    return output_dir.parent / f".tmp-{output_dir.name}-{uuid.uuid4().hex[:_SUFFIX_LENGTH]}"


def _check_replaceable(output_dir: Path, marker: str) -> None:
    if output_dir.is_dir():
        if any(output_dir.iterdir()) and not (output_dir / marker).is_file():
            raise SourceError(
                f"output folder {output_dir} must be empty or hold {marker}, got a folder with other files",
                hint="choose a new folder: one that exists is replaced as a whole, if this command wrote it",
            )
    elif output_dir.exists():
        raise SourceError(f"output folder {output_dir} must be a folder, got a file")
