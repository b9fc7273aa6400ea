"""Where batch scores come from and go to: what may be read, and what may be replaced. Nothing here imports torch.

A folder of scores is replaced by the next one, so it must be told from a folder of a user's own Parquet files. Every
part that is written says so in its footer (:func:`sign`): its own name, rows and columns. A file beside the parts would
say it too, but some readers of Parquet folders refuse a folder that holds anything else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.errors import ConfigError, SourceError
from recsys.files import check_can_write, damage_of, draft_of, put_in_place, replacing_file, sync_tree

_KEY = "recsys.scores"
_ELSEWHERE = "choose another place for the scores"


def input_files(source: Path) -> list[Path]:
    """The Parquet files of an input, sorted; hidden ones and those in hidden folders are left out.

    Raises:
        SourceError: there are none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise SourceError(f"{source} does not exist", hint="give a Parquet file or a folder of them")
    files = sorted(
        p
        for p in source.rglob("*.parquet")
        if p.is_file() and not any(part[0] in "._" for part in p.relative_to(source).parts)
    )
    if not files:
        raise SourceError(f"{source} must hold Parquet files, got none")
    return files


def open_parquet(file: Path) -> pq.ParquetFile:
    """Opens a file and reads its footer.

    Raises:
        SourceError: it is no Parquet file, or cannot be read.
    """
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as err:
        raise unreadable(file, err) from err


def unreadable(file: Path, err: Exception) -> SourceError:
    """The error of a Parquet file that cannot be read: what is wrong with it, and what to do."""
    words, hint = damage_of(file, "parquet", str(err).splitlines()[0])
    return SourceError(f"{file} cannot be read as Parquet: {words}", hint=hint)


def is_folder_output(source: Path, target: Path) -> bool:
    """Whether scores are written as a folder with the parts of the input."""
    return source.is_dir() and target.suffix != ".parquet"


def check_output(source: Path, target: Path) -> None:
    """Refuses an output that would cost the user a file, or could not be written.

    The input is never replaced: the output must not be it, hold it or lie in it, whatever links lead there. A file is
    replaced; a folder only if it is empty, or if all that it holds are parts that batch scoring wrote.

    Raises:
        ConfigError: the output is refused.
        SourceError: there is no input.
    """
    files = input_files(source)
    place = target.resolve()
    inputs = [source.resolve(), *(f.resolve() for f in files)]
    if place in inputs:
        raise ConfigError(f"output must not be the input, got {target}", hint=_ELSEWHERE)
    if any(place in path.parents for path in inputs):
        raise ConfigError(f"output must not hold the input, got {target} for {source}", hint=_ELSEWHERE)
    if inputs[0] in place.parents:
        raise ConfigError(f"output must not lie in the input, got {target} for {source}", hint=_ELSEWHERE)
    if is_folder_output(source, target):
        _check_replaceable(target)
    elif target.is_dir():
        raise ConfigError(f"output must be a file, got the folder {target}", hint="name a file in it")
    check_can_write(target, name="output")


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"output must be a folder, as the input is, got the file {target}", hint=_ELSEWHERE)
    for path in sorted(target.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or _is_signed(path, path.relative_to(target).as_posix())):
            raise ConfigError(
                f"output must be a new folder or one of scores, got {target}, which holds other files, such as "
                f"{path.relative_to(target)}: they would be deleted",
                hint=_ELSEWHERE,
            )


def sign(writer: pq.ParquetWriter, part: str, rows: int) -> None:
    """Writes into a part's footer that it is one, before the writer is closed.

    Args:
        part: its name relative to the folder of the output.
        rows: of the part.
    """
    writer.add_key_value_metadata({_KEY: json.dumps({"part": part, "rows": rows, "columns": writer.schema.names})})


def unsigned(schema: pa.Schema) -> pa.Schema:
    """The schema without the signature that an input may bring along."""
    kept = {key: value for key, value in (schema.metadata or {}).items() if key != _KEY.encode()}
    return schema.remove_metadata().with_metadata(kept)


def _is_signed(path: Path, part: str) -> bool:
    """Whether a file is a part under the name, and with the rows and columns, that it was written with."""
    try:
        with pq.ParquetFile(path) as file:
            signature = json.loads((file.metadata.metadata or {})[_KEY.encode()])
            found = {"part": part, "rows": file.metadata.num_rows, "columns": file.schema_arrow.names}
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return False
    return bool(signature == found)


@contextmanager
def writing_file(source: Path, target: Path) -> Iterator[Path]:
    """Yields a draft that takes the place of a file; see :func:`check_output`."""
    check_output(source, target)
    with replacing_file(target) as draft:
        yield draft


@contextmanager
def writing_folder(source: Path, target: Path) -> Iterator[Path]:
    """Yields a draft that takes the place of a folder; see :func:`check_output`, which is asked again at the end."""
    check_output(source, target)
    place = target.resolve()
    draft = draft_of(place)
    try:
        draft.mkdir(parents=True)
        yield draft
        sync_tree(draft)
        _check_replaceable(place)
        put_in_place(draft, place, retired=draft.with_name(f"{draft.name}-old"))
    finally:
        shutil.rmtree(draft, ignore_errors=True)
