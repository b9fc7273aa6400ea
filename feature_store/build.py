"""From views to a training set: read, check, join by row, look up histories, encode once, write.

The steps, in order:

1. open the views and check their columns; set broken rows aside;
2. number the users and items: those of their views, and those that only the logs name;
3. group impressions into requests, sort them by time, cut them into splits;
4. sort each history's events by user and time; find each request's slice;
5. fit the encoder on what the training period holds;
6. encode column by column, put events of one user and one time in order (:mod:`feature_store.tied_events`), write the
   tables, the manifest last; put the folder in its place.

A request whose impressions differ in their user or in a context feature contradicts itself: all of its rows are set
aside. A context feature that reads the time column reads the request's time.

Of a user or item that is given twice, the first row counts and the others are set aside. Impressions and events may
repeat.
"""

from __future__ import annotations

import os
import shutil
import time as clock
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from feature_store.files import is_address, locate
from feature_store.fit import fit_encoder
from feature_store.joined import EventWork, Joined
from feature_store.split import SplitConfig, microseconds
from feature_store.tables import describe_file, write_tables
from feature_store.views import Views, view_format, view_paths, windowed
from feature_store.workspace import exclusive, replacing
from recsys.config import Config, fingerprint
from recsys.encoding import Encoder
from recsys.errors import RecsysError, SourceError
from recsys.files import check_can_write, write_json
from recsys.schema import Schema
from recsys.training_set import FORMAT, FORMAT_VERSION, TrainingSet

__all__ = ["BuildSummary", "DataConfig", "SplitConfig", "build_training_set"]

BUILD_VERSION = 5
"""Raised when the same inputs give another training set, so that finished ones are built again."""


class DataConfig(Config):
    """What a training set is built from, and where it goes."""

    views: str = Field(
        min_length=1,
        description="folder (relative to the working folder) or fsspec address that view paths are relative to",
    )
    training_set: str = Field(
        min_length=1,
        description="folder of the result, relative to the working folder; replaced if it holds a training set",
    )
    split: SplitConfig
    max_quarantined_fraction: float = Field(
        0.1, ge=0.0, le=1.0, description="a view with a larger share of broken rows fails the build"
    )

    @property
    def views_root(self) -> str | Path:
        """Where the views are: a folder here, or an address for fsspec."""
        return self.views if is_address(self.views) else Path(self.views)


@dataclass(frozen=True)
class BuildSummary:
    """What a build did.

    Attributes:
        training_set: its folder.
        rows: impressions by split.
        requests: requests by split.
        outside_split: impressions outside all periods.
        users: rows of the users table, the unknown user not counted.
        items: rows of the items table, the unknown item not counted.
        users_without_attributes: users that only the logs name.
        items_without_attributes: items that only the logs name.
        events: events by history.
        unused_events: events whose type is in no history.
        quarantined: broken rows by view and reason.
        table_sizes: rows of each embedding table, padding and unknown included.
        bytes: size of all files.
        seconds: time taken.
        skipped: the set was there already, built from the same inputs.
        notes: what is no fault, but worth knowing: parts without rows, columns without values, histories longer than
            what a batch reads, event types that never occur, times that hardly overlap, NaN in what is summed.
        time_spans: first and last time of ``impressions`` and of each event type, as ISO 8601 text.
    """

    training_set: str
    rows: Mapping[str, int]
    requests: Mapping[str, int]
    outside_split: int
    users: int
    items: int
    users_without_attributes: int
    items_without_attributes: int
    events: Mapping[str, int]
    unused_events: int
    quarantined: Mapping[str, Mapping[str, int]]
    table_sizes: Mapping[str, int]
    bytes: int
    seconds: float
    skipped: bool = False
    notes: Sequence[str] = ()
    time_spans: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Impressions of all splits."""
        return sum(self.rows.values())

    @property
    def num_quarantined(self) -> int:
        """Broken rows of all views."""
        return sum(n for reasons in self.quarantined.values() for n in reasons.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)


def build_training_set(
    schema: Schema,
    data: DataConfig,
    *,
    progress: bool = False,
    force: bool = False,
    work: EventWork | None = None,
) -> BuildSummary:
    """Builds the training set of a schema, or finds it built already.

    The folder appears whole or not at all; a run that is killed at any moment leaves nothing that is read as finished.
    A set built from the same schema, settings and files (by size and modification time) is left as it is. Only one
    process builds a folder at a time; others wait.

    Args:
        schema: what the data is.
        data: where it is.
        progress: whether to show a progress bar on stderr.
        force: build even if nothing changed.
        work: who looks through the events and sorts them; this process if not given. The result is the same.

    Raises:
        ConfigError: the result's folder cannot be written.
        SourceError: a file or column is missing or of the wrong type, times cannot be meant
            (:mod:`feature_store.time_spans`), or the training period is empty.
        EncodingError: a value cannot be encoded as its feature declares.
        QuarantineError: too many rows of a view are broken.
    """
    # Resolved, so that a link keeps pointing at the set, and the work lies on the disk of the result.
    folder = Path(data.training_set).resolve()
    check_can_write(folder, name="data.training_set")
    with _stages(progress, _num_stages(schema)) as stage, exclusive(folder):
        inputs = inputs_of(schema, data)
        if not force:
            finished = _finished(data.training_set, inputs)
            if finished is not None:
                stage("Up to date")
                return finished
        with replacing(folder) as temporary:
            summary = _build(schema, data, temporary, inputs, stage, work)
    return summary


def inputs_of(schema: Schema, data: DataConfig) -> dict[str, Any]:
    """Everything that decides what is built."""
    return {
        "build_version": BUILD_VERSION,
        "format_version": FORMAT_VERSION,
        "schema_fingerprint": fingerprint(schema),
        "split": data.split.boundaries,
        "max_quarantined_fraction": data.max_quarantined_fraction,
        "files": view_files(schema, data),
    }


def view_files(schema: Schema, data: DataConfig) -> list[dict[str, Any]]:
    """Name, size and time of change of every file of the views that are read.

    Raises:
        SourceError: there is none.
    """
    return [
        dict(located.identity)
        for view, pattern in view_paths(schema).items()
        for located in locate(view, data.views_root, pattern, view_format(schema, view))
    ]


def _finished(training_set: str, inputs: Mapping[str, Any]) -> BuildSummary | None:
    """The summary of a set if it is complete and was built from the same inputs."""
    try:
        manifest = TrainingSet.open(training_set).manifest
    except RecsysError:
        return None
    if manifest.get("inputs") != inputs:
        return None
    try:
        return BuildSummary(**{**manifest["summary"], "training_set": training_set, "skipped": True})
    except TypeError:  # damaged: of other fields
        return None


def _build(
    schema: Schema,
    data: DataConfig,
    folder: Path,
    inputs: Mapping[str, Any],
    stage: Callable[[str], None],
    work: EventWork | None,
) -> BuildSummary:
    """Builds into an empty folder; the manifest comes last."""
    began = clock.perf_counter()
    stage("Opening the views")
    staging = folder / ".staging"
    limit = data.max_quarantined_fraction
    views = Views(schema, data.views_root, staging=staging, max_quarantined_fraction=limit)
    joined = Joined.join(views, stage, work=work, is_derived=False)
    splits = data.split.slices(joined.requests.time)
    _check_train(joined, splits["train"])
    if schema.derived:
        stage("Computing derived values")
        newest = int(joined.requests.time[splits["test"].stop - 1]) if windowed(schema) else None
        joined, carried = joined.with_derived(newest=newest)
        if carried is not None:
            carried.write(folder)
    encoder = fit_encoder(joined, splits["train"], train_end=microseconds(data.split.train_end), stage=stage)
    described = write_tables(folder, joined, encoder, splits, stage=stage)
    encoder.save(folder / "encoder")
    for quarantine in views.quarantines.values():
        quarantine.write(folder / "quarantine")
    shutil.rmtree(staging, ignore_errors=True)
    stage("Computing checksums")
    files = describe_files(folder, described=described)
    rows = {name: joined.rows_of(part) for name, part in splits.items()}
    num_rows = {name: part.stop - part.start for name, part in rows.items()}
    summary = BuildSummary(
        training_set=data.training_set,
        rows=num_rows,
        requests={name: part.stop - part.start for name, part in splits.items()},
        outside_split=joined.requests.num_rows - sum(num_rows.values()),
        users=len(joined.users.index),
        items=len(joined.items.index),
        users_without_attributes=joined.users.num_without_attributes,
        items_without_attributes=joined.items.num_without_attributes,
        events={name: log.num_events for name, log in joined.logs.items()},
        unused_events=joined.num_unused_events,
        quarantined={name: q.counts for name, q in views.quarantines.items() if q.num_rows},
        table_sizes=encoder.table_sizes,
        bytes=sum(int(entry["bytes"]) for entry in files.values()),
        seconds=round(clock.perf_counter() - began, 3),
        notes=views.notes,
        time_spans={log: list(times) for log, times in joined.time_spans.items()},
    )
    source_rows = {view: source.num_rows for view, source in views.sources.items()}
    write_json(folder / "manifest.json", manifest_of(schema, data, encoder, summary, inputs, files, source_rows))
    return summary


def manifest_of(
    schema: Schema,
    data: DataConfig,
    encoder: Encoder,
    summary: BuildSummary,
    inputs: Mapping[str, Any],
    files: Mapping[str, Any],
    source_rows: Mapping[str, int],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": schema.name,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "schema": schema.model_dump(mode="json"),
        "schema_fingerprint": fingerprint(schema),
        "encoder_fingerprint": encoder.fingerprint,
        "split": data.split.boundaries,
        "rows": summary.rows,
        "requests": summary.requests,
        "quarantined": summary.quarantined,
        "build_config": data.model_dump(mode="json"),
        "inputs": inputs,
        "summary": summary.to_dict(),
        "files": files,
        "source_rows": source_rows,
    }


def _check_train(joined: Joined, train: slice) -> None:
    if train.stop > train.start:
        return
    found = "there is no valid impression"
    if joined.requests.num_requests:
        first, last = (datetime.fromtimestamp(t / 1e6, UTC).isoformat() for t in joined.requests.time[[0, -1]])
        found = f"impressions span {first} to {last}"
    raise SourceError(
        f"{joined.views.sources['impressions'].place}: the training period must hold an impression, got none: {found}",
        hint="check split.train_end, and views.impressions.time_unit",
    )


def describe_files(
    folder: Path, *, but: Container[str] = (), described: Mapping[Path, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """What :func:`~feature_store.tables.describe_file` says of every file, by its name in the folder.

    Args:
        folder: of the set.
        but: names of files to leave out.
        described: what is known already, by path.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in but)
    known = described or {}

    def describe(path: Path) -> dict[str, Any]:
        return known[path] if path in known else describe_file(path)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        entries = list(pool.map(describe, paths))
    return {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}


def _num_stages(schema: Schema) -> int:
    """Opening, six of joining, derived values, one a feature, users, items, one a history, three splits, checksums."""
    return 1 + 6 + bool(schema.derived) + len(schema.all_features) + 2 + len(schema.histories) + 3 + 1


@contextmanager
def _stages(progress: bool, num_stages: int) -> Iterator[Callable[[str], None]]:
    """Yields what is called with the name of each stage as it begins; shows a bar on stderr if ``progress``."""
    if not progress:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Waiting for other builds", total=num_stages)
        begun = 0

        def begin(name: str) -> None:
            nonlocal begun
            bar.update(task, description=name, completed=begun)
            begun += 1

        yield begin
