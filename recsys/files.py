"""Files that are whole, or not there: every writer of the platform puts its results in place through this module.

A process may be killed, and a machine may lose power, at any moment; what is read afterwards must be the old file or
the new one. So a *draft* is written under a hidden name beside its place, made durable (:func:`sync`), and only then
given its name, which POSIX does in one step for files and for folders whose name is free; the change of name is made
durable last. A folder that is replaced needs two renames (:func:`put_in_place`): a process killed between them leaves
the name free, and the old folder whole beside it.

::

    write_text, write_json      a whole file at once
    replacing_file              a file that somebody else's writer writes
    sync, sync_tree             make what was written durable
    append_line                 one more line of a log
    put_in_place                the last step of a folder; the one that it replaces is removed
    exchange                    the same, and the one that it replaces stays
    check_can_write             before the work: can the result be written at all?
    read_object                 a JSON object that we wrote, of which nothing is believed before it was checked
    check_replaceable           may a folder be replaced, or does it hold what somebody else put there?
    sha256_of                   checksum of a file
    damage_of                   what is wrong with a data file that cannot be read, and what to do
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from recsys.errors import ConfigError, IntegrityError, RecsysError

__all__ = [
    "append_line",
    "check_can_write",
    "check_replaceable",
    "damage_of",
    "draft_of",
    "exchange",
    "put_in_place",
    "read_object",
    "replacing_file",
    "sha256_of",
    "sync",
    "sync_tree",
    "write_json",
    "write_text",
]


def draft_of(path: Path) -> Path:
    """A new hidden name beside a file or folder, ``.tmp-NAME-<12 hexadecimal digits>``, for what takes its place."""
    return path.with_name(f".tmp-{path.name}-{secrets.token_hex(6)}")


def sync(path: str | Path) -> None:
    """Makes a file's content, or a folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: str | Path, *, files: bool = True) -> None:
    """Makes a folder and all below it durable.

    Args:
        files: False where every file is durable already, so that only the names are left.
    """
    for path, _, names in os.walk(folder, topdown=False):
        if files:
            for name in names:
                sync(Path(path, name))
        sync(path)


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yields a hidden path beside ``path``; what the block writes there takes its place, unless the block fails.

    Parents are created. The file gets the permissions that the block's writer gives it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically: a killed process leaves the old file or the new one."""
    with replacing_file(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: Any) -> None:
    """Writes readable JSON with a final newline, atomically; equal values give equal bytes."""
    with replacing_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def append_line(path: str | Path, line: str) -> None:
    """Adds a line to a UTF-8 text file and makes it durable; a killed process may leave a part of the line."""
    with Path(path).open("a", encoding="utf-8", newline="") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def put_in_place(draft: Path, folder: Path, *, retired: Path) -> None:
    """Gives a finished and durable folder its name; one that has the name is removed.

    The old folder is removed only after the new one's name is durable. If the new one cannot be put in place, the old
    one gets its name back.

    Args:
        draft: beside ``folder``, on the same disk.
        retired: a free name beside it, for the old folder meanwhile.
    """
    exchange(draft, folder, retired=retired)
    shutil.rmtree(retired, ignore_errors=True)


def exchange(draft: Path, folder: Path, *, retired: Path) -> None:
    """The same, but one that has the name stays, as ``retired``.

    Args:
        draft: beside ``folder``, on the same disk.
        retired: a free name on that disk.
    """
    if not folder.exists():
        draft.rename(folder)
        sync(folder.parent)
        return
    folder.rename(retired)
    try:
        draft.rename(folder)
    except OSError:
        retired.rename(folder)
        raise
    sync(folder.parent)


def check_can_write(path: str | Path, *, name: str) -> None:
    """Refuses a result that could not be written, before the work that leads to it.

    A folder is made and removed again in the nearest folder above ``path`` that exists: permissions, read-only disks
    and file systems that hold no files of ours all answer the same way.

    Args:
        path: of a file or folder that is to be written, there or not.
        name: of the option or setting that gave the path, for the message.

    Raises:
        ConfigError: nothing can be written there.
    """
    path = Path(path)
    above = path.absolute().parent
    with suppress(OSError):
        while not above.exists() and above != above.parent:
            above = above.parent
    try:
        Path(tempfile.mkdtemp(prefix=".tmp-recsys-", dir=above)).rmdir()
        path.exists()  # a name may be too long, or go through a file
    except OSError as err:
        raise ConfigError(
            f"{name} must be a place that can be written to, got {path}: {above}: {err.strerror}",
            hint="choose another place, or check the permissions of the folder above it",
        ) from err


def sha256_of(path: str | Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number"}


def read_object(
    path: str | Path, fields: Mapping[str, type], *, hint: str, error: type[IntegrityError] = IntegrityError
) -> dict[str, Any]:
    """Reads a JSON object that the platform wrote, and checks its fields.

    A field named ``files`` must give the size and sha256 of files by their path relative to the object's folder.

    Args:
        path: of the file.
        fields: that it must have, and their types: ``dict``, ``list``, ``str`` or ``int``.
        hint: what to do if it is damaged.
        error: to be raised.

    Raises:
        FileNotFoundError: there is no such file.
        IntegrityError: it cannot be read, is no JSON object, or lacks a field or has another type in it. Given another
            class, an error of that class.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise FileNotFoundError(err.errno, err.strerror, str(path)) from err
    except OSError as err:
        raise error(f"{path} cannot be read: {err.strerror}", hint="check its permissions") from err
    except (ValueError, RecursionError) as err:
        raise error(f"{path} must be readable JSON, got something else", hint=hint) from err
    if not isinstance(found, dict):
        raise error(f"{path} must hold an object, got another type", hint=hint)
    missing = [name for name in fields if name not in found]
    if missing:
        raise error(f"{path} must say {', '.join(missing)}", hint=hint)
    for name, kind in fields.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise error(f"{path}: {name} must be {_WORDS[kind]}, got another type", hint=hint)
    if "files" in fields and not all(map(_is_entry, found["files"].items())):
        raise error(f"{path}: files must give size and sha256 of files in this folder, got something else", hint=hint)
    return found


def _is_entry(entry: tuple[str, Any]) -> bool:
    name, facts = PurePosixPath(entry[0]), entry[1]
    return (
        not name.is_absolute()
        and ".." not in name.parts
        and isinstance(facts, dict)
        and isinstance(facts.get("bytes"), int)
        and isinstance(facts.get("sha256"), str)
    )


def check_replaceable(
    folder: Path, what: str, *, is_ours: Callable[[Mapping[str, Any]], bool], error: type[RecsysError]
) -> None:
    """Refuses to replace a folder that holds anything but what the manifest in it names.

    A folder that is not there or is empty is free. Any other must hold a ``manifest.json`` of the right kind, and no
    file that its ``files`` do not name; files that are missing or damaged are no reason to refuse.

    Args:
        folder: to be replaced.
        what: it should be, such as ``a training set``.
        is_ours: whether a manifest, of which nothing is known but that it is an object, is of that kind.
        error: to be raised.

    Raises:
        RecsysError: of the class ``error``: the folder is left alone.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    rule = f"{folder} must be {what} or not exist, got"
    elsewhere = "choose another place to write to"
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise error(f"{rule} other files: they would be deleted", hint=elsewhere)
    try:
        found = read_object(manifest, {}, hint="")
        if not is_ours(found):
            raise error(f"{rule} something else: {manifest} is not that of {what}", hint=elsewhere)
        named = read_object(manifest, {"files": dict}, hint="")["files"]
    except IntegrityError as err:
        if isinstance(err, error):
            raise
        raise error(
            f"{rule} a folder whose manifest is damaged, so that nothing tells whose files it holds: {err.message}",
            hint=f"if it is {what}, delete {folder} and run the command again; else {elsewhere}",
        ) from err
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name != manifest.name and name not in named and (path.is_symlink() or not path.is_dir()):
            raise error(
                f"{rule} one that also holds {name}, which its manifest does not name: it would be deleted",
                hint=f"move it to another place, or {elsewhere}",
            )


_MAGIC = {"parquet": b"PAR1", "arrow": b"ARROW1"}
"""What a file of a format begins with, and ends with if it is whole."""
_ARROW_STREAM = b"\xff\xff\xff\xff"
_WRITE_AGAIN = (
    "its writing or copying was broken off, or is still going on: write or copy it again, under another name that is "
    "changed once it is whole"
)
_COPY_AGAIN = "write or copy it again, and compare its checksum with that of the original"
_OTHER_FORMAT = "name the file by what it holds; a view may declare it, such as format: {kind: csv}"


def damage_of(path: Path, kind: str, reason: str) -> tuple[str, str | None]:
    """What is wrong with a data file that cannot be read, in words, and what to do.

    Args:
        path: of the file.
        kind: its format: ``"parquet"``, ``"arrow"``, or a text format.
        reason: what its reader says.

    Returns:
        Words and a hint; the reason alone where the file itself is not what is wrong, as with permissions.
    """
    magic = _MAGIC.get(kind)
    try:
        with path.open("rb") as file:
            first = file.read(len(magic) if magic else 4)
            size = file.seek(0, os.SEEK_END)
            file.seek(-min(size, len(first)), os.SEEK_END)
            last = file.read()
    except OSError:
        return reason, None
    if not size:
        return "it is empty", _WRITE_AGAIN
    if magic is None:
        if "Truncated compressed stream" in reason:
            return "it is cut short: its compressed content has no end", _WRITE_AGAIN
        return (f"it is damaged ({reason})", _COPY_AGAIN) if "zlib" in reason else (reason, None)
    if kind == "arrow" and first.startswith(_ARROW_STREAM):
        is_cut = "but only" in reason or "got " in reason
        return (f"it is cut short, or damaged ({reason})" if is_cut else f"it is damaged ({reason})", _WRITE_AGAIN)
    if not (first and magic.startswith(first)):
        return "it does not begin as such a file does", _OTHER_FORMAT
    # The shortest file has the magic at both ends, and something between them.
    if last != magic or size <= 2 * len(magic):
        return "it is cut short: its end is missing", _WRITE_AGAIN
    return f"it is damaged ({reason})", _COPY_AGAIN
