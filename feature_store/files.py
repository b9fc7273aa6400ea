"""Where the files of a view are: a file, a folder of parts, hive partitions, a pattern; here or at an fsspec address.

Files at an address (``s3://bucket/views``, ``https://host/views``, ``memory://views``) are fetched into a folder beside
the result before they are read; only that folder grows with them. What can be reached depends on the fsspec clients
that are installed, and their credentials come from their own settings, never from ours.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from feature_store.formats import SUFFIXES, WORDS, DataFile, format_of
from recsys.errors import MissingDependencyError, SourceError, nearest
from recsys.schema import FormatSpec

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""What Hive and Spark write for a missing value of a partition column."""

_ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://|^[A-Za-z][A-Za-z0-9+.-]*::")
_PARTITION = re.compile(r"^([^=/]+)=(.*)$")


def is_address(root: str | Path) -> bool:
    """Whether this is for fsspec, not for the file system.

    Example:
        >>> is_address("s3://bucket/views"), is_address("data/views")
        (True, False)
    """
    return isinstance(root, str) and _ADDRESS.match(root) is not None


@dataclass(frozen=True)
class Located:
    """One file of a view before it is read.

    Attributes:
        file: name and, for files here, path; of others the path that it will be fetched to.
        address: for fsspec; None for a file here.
        identity: name, size and time of change, by which a build knows that nothing changed.
    """

    file: DataFile
    address: str | None
    identity: Mapping[str, Any]

    def fetch(self) -> DataFile:
        """Brings the file here, if it is not.

        Raises:
            SourceError: it cannot be fetched.
        """
        if self.address is None or self.file.path.is_file():
            return self.file
        system, path = _system(self.address)
        self.file.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.path.with_name(f".{self.file.path.name}.part")
        try:
            system.get_file(path, str(draft))
        except Exception as err:
            raise SourceError(f"{self.file.name} cannot be fetched: {type(err).__name__}: {err}") from err
        draft.rename(self.file.path)
        return self.file


def locate(
    view: str | None, root: str | Path, pattern: str, declared: FormatSpec | None = None, *, cache: Path | None = None
) -> tuple[Located, ...]:
    """The files of a view, in the order that numbers its rows: by name.

    Args:
        view: its name in the schema; None before there is one.
        root: folder or address that ``pattern`` is relative to.
        pattern: a file, a folder of parts, or a glob pattern.
        declared: format of all files; by their names if None.
        cache: where files from elsewhere are fetched to.

    Raises:
        SourceError: there are none, their format is unknown or mixed, a link leads nowhere, a partition is empty, or
            the address does not answer.
    """
    if is_address(root) or is_address(pattern):
        address = pattern if is_address(pattern) else f"{str(root).rstrip('/')}/{pattern}"
        return _locate_remote(view, address, declared, cache or Path(".remote"))
    here = Path(root)
    found = []
    for path in find_files(view, here, pattern, declared):
        status = path.stat()
        name = path.relative_to(here).as_posix() if path.is_relative_to(here) else path.as_posix()
        identity = {"view": view, "file": name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        found.append(Located(DataFile(path, str(path)), None, identity))
    return tuple(found)


def find_files(view: str | None, root: Path, pattern: str, declared: FormatSpec | None = None) -> tuple[Path, ...]:
    """The files of a view that lie here, in the order that numbers its rows.

    Raises:
        SourceError: there are none, their format is unknown or mixed, a link leads nowhere, or a partition is empty.
    """
    field = _field(view)
    path = root / pattern
    if path.is_file():
        files = [path]
    elif path.is_dir():
        inside = [p for p in path.rglob("*") if not _is_hidden(p.relative_to(path))]
        files = [p for p in inside if p.is_file() and (declared is not None or format_of(p.name) is not None)]
        _check_folder(field, inside, files)
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]  # noqa: PTH207 - any root
    if not files:
        beside = [p.name for p in path.parent.iterdir() if p != path] if path.parent.is_dir() else []
        place = f"holds no {_any_format()} file" if path.is_dir() else "does not exist"
        if path.is_symlink():
            place = "is a link to nothing"
        hint = nearest(path.name, beside) if beside and not path.is_dir() else None
        if hint is None and not root.is_absolute():
            hint = f"data.views {str(root)!r} is relative to the working folder, {Path.cwd()}"
        raise SourceError(f"{field}: {path.absolute()} {place}", hint=hint)
    _check_formats(field, str(path), [str(f) for f in files], declared)
    return tuple(sorted(files, key=lambda p: p.as_posix()))


def _field(view: str | None) -> str:
    """What a path was given by, as messages name it."""
    return "PATH" if view is None else f"views.{view}.path"


def _any_format() -> str:
    words = list(WORDS.values())
    return ", ".join(words[:-1]) + f" or {words[-1]}"


def _check_folder(field: str, inside: Sequence[Path], files: Sequence[Path]) -> None:
    """A link to nothing is a part that is lost; so is a partition without a file."""
    for path in inside:
        if path.is_symlink() and not path.exists():
            raise SourceError(f"{field}: {path} is a link to a file that does not exist")
    leaves = {folder for file in files for folder in file.parents}
    for path in inside:
        if path.is_dir() and _PARTITION.match(path.name) and path not in leaves:
            raise SourceError(
                f"{field}: partition {path} holds no {_any_format()} file",
                hint="write the partition again, or remove its folder if it is meant to have no rows",
            )


def _check_formats(field: str, place: str, files: Sequence[str], declared: FormatSpec | None) -> None:
    specs = {file: format_of(file, declared) for file in files}
    odd = next((file for file, spec in specs.items() if spec is None), None)
    if odd is not None:
        raise SourceError(
            f"{field}: {odd} must end in {', '.join(e for ends in SUFFIXES.values() for e in ends)}",
            hint=f"or declare the format of the view: format: {{kind: {' | '.join(WORDS)}}}",
        )
    kinds = sorted({WORDS[spec.kind] for spec in specs.values() if spec is not None}, key=list(WORDS.values()).index)
    if len(kinds) > 1:
        got = "both" if len(kinds) == 2 else "all"
        raise SourceError(
            f"{field}: {place} must hold {' or '.join(kinds)}, got {got}",
            hint="give a pattern such as folder/*.parquet",
        )


def _is_hidden(relative: Path | PurePosixPath) -> bool:
    return any(part.startswith((".", "_")) for part in relative.parts)


def partition_values(file: DataFile) -> dict[str, str | None]:
    """Hive partition columns in a file's path, ``.../date=2020-01-01/part.parquet``, as text.

    Example:
        >>> partition_values(DataFile(Path("x/day=3/city=S%C3%A3o/p.parquet"), ""))
        {'day': '3', 'city': 'São'}
    """
    found: dict[str, str | None] = {}
    for part in file.path.parts[:-1]:
        match = _PARTITION.match(part)
        if match:
            found[unquote(match[1])] = None if match[2] == NULL_PARTITION else unquote(match[2])
    return found


def _system(address: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
    except ImportError as err:
        raise MissingDependencyError(f"{address} needs an fsspec client: {err}") from err
    except Exception as err:
        raise SourceError(f"{address} must be an address that fsspec knows: {err}") from err
    return system, path


def _locate_remote(view: str | None, address: str, declared: FormatSpec | None, cache: Path) -> tuple[Located, ...]:
    field = _field(view)
    system, path = _system(address)
    try:
        entries, base = _remote_entries(system, path, declared)
    except Exception as err:
        raise SourceError(f"{field}: {address} cannot be listed: {type(err).__name__}: {err}") from err
    if not entries:
        raise SourceError(f"{field}: {address} must hold a {_any_format()} file, got none, or it does not exist")
    names = {name: system.unstrip_protocol(name) for name in entries}
    _check_formats(field, address, list(names.values()), declared)
    found = []
    for name in sorted(entries):
        entry = entries[name]
        relative = PurePosixPath(name).relative_to(base) if base else PurePosixPath(PurePosixPath(name).name)
        changed = next((entry[k] for k in ("ETag", "etag", "LastModified", "mtime", "created") if entry.get(k)), None)
        identity = {"view": view, "file": names[name], "bytes": entry.get("size"), "changed": str(changed)}
        found.append(Located(DataFile(cache / (view or "inspected") / relative, names[name]), names[name], identity))
    return tuple(found)


def _remote_entries(system: Any, path: str, declared: FormatSpec | None) -> tuple[dict[str, Any], str]:
    """Files by path, and the folder that their places in it are relative to."""
    if glob.has_magic(path):
        listed = system.glob(path, detail=True)
        stem = path[: min(path.index(c) for c in "*?[" if c in path)]
        return {n: e for n, e in listed.items() if e["type"] == "file"}, stem.rpartition("/")[0]
    if system.isfile(path):
        return {path: system.info(path)}, ""
    base = path.rstrip("/")
    listed = system.find(base, detail=True) if system.exists(base) else {}
    kept = {}
    for name, entry in listed.items():
        relative = PurePosixPath(os.path.relpath(name, base))
        if not _is_hidden(relative) and (declared is not None or format_of(relative.name) is not None):
            kept[name] = entry
    return kept, base
