"""Batch scoring: impressions in Parquet files to the same files with a probability a task.

Files are read and written in pieces, so memory does not grow with them. The output appears complete or not at all.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.encoding.columns import Array
from recsys.errors import ConfigError, SourceError
from serving.features import DerivedSource, WithDerived
from serving.frames import FrameReader, score_table
from serving.output import (
    check_output,
    input_files,
    is_folder_output,
    open_parquet,
    sign,
    unreadable,
    unsigned,
    writing_file,
    writing_folder,
)
from serving.scorer import Scorer

_ROW_GROUP = 131_072
"""Rows of a row group of the output."""
_LONGEST_REQUEST = 1_000_000
"""Rows; a request longer than that is scored in pieces."""


@dataclass(frozen=True)
class BatchSummary:
    """What batch scoring did.

    Attributes:
        output: the file or folder written.
        rows: scored.
        columns: names of the added columns.
        rows_with_unknown_user: rows whose user is not stored.
        rows_with_unknown_item: rows whose item is not stored.
        seconds: time taken.
        given_derived: derived values that were columns of the input, in place of what would be computed.
    """

    output: str
    rows: int
    columns: tuple[str, ...]
    rows_with_unknown_user: int
    rows_with_unknown_item: int
    seconds: float
    given_derived: tuple[str, ...] = ()

    @property
    def rows_per_s(self) -> float:
        """Rows scored a second."""
        return self.rows / self.seconds if self.seconds > 0 else 0.0


def score_parquet(
    scorer: Scorer | str | Path,
    input_path: str | Path,
    output: str | Path,
    *,
    features: str | Path | None = None,
    derived: DerivedSource | None = None,
    batch_size: int = 4096,
    column: str = "score_{task}",
    progress: bool = False,
) -> BatchSummary:
    """Scores impressions.

    Every column of the input is kept, rows keep their order, and one float64 column a task is added. Users, items and
    histories come from the scorer's stored features; columns of users or items in the input count only where none are
    stored. Derived values are columns of the input, under their names; those that it lacks come from ``derived``, or
    from an online store.

    Args:
        scorer: the model and its stored features, or the folder of an artifact.
        input_path: a Parquet file, or a folder of them, in the form of the schema's impressions view.
        output: a file, or for a folder a folder with the same parts; ``name.parquet`` joins the parts of a folder in
            one file.
        features: folder of stored features, for an artifact; its own snapshot if not given.
        derived: computes derived values, each as it was known at its request's time; if not given, the stored features
            hold them, as an online store does, or they are columns of the input.
        batch_size: rows scored at once, about.
        column: name of the added columns; ``{task}`` stands for the task.
        progress: whether to show a progress bar on stderr.

    Raises:
        SourceError: a file is missing or cannot be read, or lacks a column.
        ConfigError: the output is the input, holds it or lies in it, would take the place of files that batch scoring
            did not write, or cannot be written; or an added column is there already.
        ArtifactError: the artifact cannot be used.
    """
    began = clock.perf_counter()
    source, target = Path(input_path), Path(output)
    check_output(source, target)
    if not isinstance(scorer, Scorer):
        scorer = Scorer.load(scorer, features=features)
    if derived is not None:
        scorer = Scorer(scorer.predictor, WithDerived(scorer.assembler.features, derived))
    files = input_files(source)
    added = tuple(column.format(task=task) for task in scorer.artifact.tasks)
    if len(set(added)) < len(added):
        raise ConfigError(f"column must tell the tasks apart, got {column!r}", hint="write {task} in it")
    totals = np.zeros(3, np.int64)
    stored = scorer.assembler.features
    is_stored = stored.has_users and stored.has_items
    reader = FrameReader(
        scorer.artifact.schema, reads_entities=not is_stored, is_complete=True, has_derived=stored.has_derived
    )
    num_rows = sum(open_parquet(f).metadata.num_rows for f in files)
    given: set[str] = set()
    for file in files:
        given.update(_check(file, reader, added))
    with _progress(num_rows, shown=progress) as advance:
        if is_folder_output(source, target):
            with writing_folder(source, target) as draft:
                for file in files:
                    name = file.relative_to(source)
                    (draft / name).parent.mkdir(parents=True, exist_ok=True)
                    totals += _score_files(
                        [file], draft / name, scorer, reader, added, batch_size, advance, part=name.as_posix()
                    )
        else:
            with writing_file(source, target) as draft:
                totals += _score_files(files, draft, scorer, reader, added, batch_size, advance, part=target.name)
    seconds = clock.perf_counter() - began
    names = tuple(one.name for one in scorer.artifact.schema.derived if one.name in given)
    return BatchSummary(str(target), int(totals[0]), added, int(totals[1]), int(totals[2]), round(seconds, 3), names)


def _score_files(
    files: list[Path],
    target: Path,
    scorer: Scorer,
    reader: FrameReader,
    added: tuple[str, ...],
    batch_size: int,
    advance: Callable[[int], None],
    *,
    part: str,
) -> np.ndarray:
    """Scores files one after the other into one; returns rows, rows with unknown users, rows with unknown items.

    Args:
        part: name of the result, by which it is known again.
    """
    totals = np.zeros(3, np.int64)
    schema = unsigned(open_parquet(files[0]).schema_arrow)
    for name in added:
        schema = schema.append(pa.field(name, pa.float64()))
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        for file in files:
            for table in _pieces(file, batch_size, reader.schema.views.impressions.request):
                scores = score_table(scorer, table, reader, source=str(file), batch_size=batch_size)
                for position, name in enumerate(added):
                    table = table.append_column(name, pa.array(scores.probabilities[:, position]))
                try:
                    waiting.append(table.cast(schema))
                except (pa.ArrowInvalid, ValueError) as err:
                    raise SourceError(
                        f"{file} must have the columns of {files[0].name}", hint="write the parts with one schema"
                    ) from err
                totals += (table.num_rows, scores.num_unknown_users, scores.num_unknown_items)
                advance(table.num_rows)
                if sum(t.num_rows for t in waiting) >= _ROW_GROUP:
                    writer.write_table(pa.concat_tables(waiting), row_group_size=_ROW_GROUP)
                    waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=_ROW_GROUP)
        sign(writer, part, int(totals[0]))
    return totals


def _pieces(file: Path, batch_size: int, request: str | None) -> Iterator[pa.Table]:
    """A file in tables of ``batch_size`` rows or more; a request whose rows follow each other is never cut."""
    kept: pa.Table | None = None
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=max(batch_size, 1)):
                table = pa.Table.from_batches([batch])
                if kept is not None:
                    table = pa.concat_tables([kept, table])
                end = table.num_rows
                if request is not None and request in table.column_names and end < _LONGEST_REQUEST:
                    end = _last_boundary(table.column(request))
                kept = table.slice(end)
                if end:
                    yield table.slice(0, end)
    except (pa.ArrowException, OSError) as err:
        raise unreadable(file, err) from err
    if kept is not None and kept.num_rows:
        yield kept


def _last_boundary(requests: Array) -> int:
    """The first row of the last request."""
    codes = requests.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    others = np.flatnonzero(codes != codes[-1])
    return int(others[-1]) + 1 if len(others) else 0


def _check(file: Path, reader: FrameReader, added: tuple[str, ...]) -> set[str]:
    """Refuses a file that cannot be scored; returns the names of derived values that are columns of it."""
    names = open_parquet(file).schema_arrow.names
    reader.check(names, str(file))
    taken = [name for name in added if name in names]
    if taken:
        raise ConfigError(f"{file} has a column {taken[0]!r} already", hint="choose another name for the added columns")
    features = [f for f in reader.schema.features if reader.schema.derived_of(f) is not None]
    return {f.source_column for f in features if f.source_column in names}


@contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Scoring", total=total)
        yield lambda rows: bar.advance(task, rows)
