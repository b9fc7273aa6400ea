"""From views to a training set: read, check, join by row, look up histories, encode once, write.

The steps, in order:

1. open the views and check their columns; set broken rows aside;
2. number the users and items: those of their views, and those that only the logs name;
3. group impressions into requests, sort them by time, cut them into splits;
4. sort each history's events by user and time; find each request's slice;
5. fit the encoder on what the training period holds;
6. encode column by column, write the tables, the manifest last; put the folder in its place.

A request whose impressions differ in their user or in a context feature contradicts itself: all of its rows are set
aside. A context feature that reads the time column reads the request's time.

Of a user or item that is given twice, the first row counts and the others are set aside. Impressions and events may
repeat.
"""

from __future__ import annotations

import os
import shutil
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field

from feature_store.entities import Entities
from feature_store.event_log import EventLog
from feature_store.point_in_time import Requests, history_slices
from feature_store.quarantine import Quarantine, first_problems
from feature_store.sources import (
    Source,
    Use,
    feature_use,
    find_files,
    open_source,
    settle_key_types,
    settle_value_types,
    to_arrow,
)
from feature_store.split import SplitConfig
from feature_store.workspace import exclusive, replacing, sync
from recsys.config import Config, fingerprint
from recsys.encoding import EncodedColumn, Encoder, EncoderFitter, Ragged
from recsys.errors import RecsysError, SourceError, nearest
from recsys.schema import Dense, Feature, History, ImpressionsView, Schema, Task
from recsys.training_set import (
    FORMAT_VERSION,
    ITEM_ROW,
    ROW_START,
    SOURCE_ROW,
    TIME,
    USER_ROW,
    TrainingSet,
    end_column,
    label_column,
    sha256_of,
    start_column,
    write_json,
    write_table,
)

BUILD_VERSION = 1
"""Raised when the same inputs give another training set, so that finished ones are built again."""


class DataConfig(Config):
    """What a training set is built from, and where it goes."""

    views: str = Field(min_length=1, description="folder that the schema's view paths are relative to")
    training_set: str = Field(min_length=1, description="folder of the result; replaced if it holds a training set")
    split: SplitConfig
    max_quarantined_fraction: float = Field(
        0.1, ge=0.0, le=1.0, description="a view with a larger share of broken rows fails the build"
    )


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
    schema: Schema, data: DataConfig, *, progress: bool = False, force: bool = False
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

    Raises:
        SourceError: a file or column is missing or of the wrong type, or the training period is empty.
        EncodingError: a value cannot be encoded as its feature declares.
        QuarantineError: too many rows of a view are broken.
    """
    folder = Path(data.training_set)
    with _stages(progress) as stage, exclusive(folder):
        inputs = _inputs(schema, data)
        if not force:
            finished = _finished(folder, inputs)
            if finished is not None:
                stage("Up to date")
                return finished
        with replacing(folder) as temporary:
            summary = _Build(schema, data, temporary, stage).run(inputs)
    return summary


def _inputs(schema: Schema, data: DataConfig) -> dict[str, Any]:
    """Everything that decides what is built."""
    root = Path(data.views)
    files = []
    for view, pattern in _patterns(schema).items():
        for file in find_files(view, root, pattern):
            status = file.stat()
            name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()
            files.append({"view": view, "file": name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns})
    return {
        "build_version": BUILD_VERSION,
        "format_version": FORMAT_VERSION,
        "schema_fingerprint": fingerprint(schema),
        "split": data.split.boundaries,
        "max_quarantined_fraction": data.max_quarantined_fraction,
        "files": files,
    }


def _patterns(schema: Schema) -> dict[str, str]:
    """Path of each view that is read."""
    views = schema.views
    found = {"impressions": views.impressions.path}
    if views.events is not None and schema.histories:
        found["events"] = views.events.path
    if views.users is not None:
        found["users"] = views.users.path
    if views.items is not None:
        found["items"] = views.items.path
    return found


def _finished(folder: Path, inputs: Mapping[str, Any]) -> BuildSummary | None:
    """The summary of the set in ``folder`` if it is complete and was built from the same inputs."""
    try:
        manifest = TrainingSet.open(folder).manifest
    except RecsysError:
        return None
    if manifest.get("inputs") != inputs:
        return None
    return BuildSummary(**{**manifest["summary"], "training_set": str(folder), "skipped": True})


@dataclass(frozen=True)
class _Impressions:
    """Valid impressions, in the order of the view; then ``requests`` orders them."""

    source_row: np.ndarray
    requests: Requests

    @property
    def ordered_rows(self) -> np.ndarray:
        """``(N,)`` int64: source rows, request after request."""
        return self.source_row[self.requests.order]


@dataclass
class _Build:
    """One run: the state that its steps share."""

    schema: Schema
    data: DataConfig
    folder: Path
    stage: Callable[[str], None]
    sources: dict[str, Source] = field(default_factory=dict)
    quarantines: dict[str, Quarantine] = field(default_factory=dict)
    unused_events: int = 0

    def run(self, inputs: Mapping[str, Any]) -> BuildSummary:
        began = clock.perf_counter()
        staging = self.folder / ".staging"
        self._open(staging)
        impression_rows = self._valid_rows("impressions", self._impression_problems())
        event_rows = self._valid_rows("events", []) if "events" in self.sources else None
        users = self._entities("user", impression_rows, event_rows)
        items = self._entities("item", impression_rows, event_rows)
        impressions, user_row, item_row = self._group(impression_rows, users, items)
        splits = self.data.split.slices(impressions.requests.time)
        self._check_train(impressions.requests, splits["train"])
        logs = {} if event_rows is None else self._event_logs(event_rows, users, items)
        rows_of = _row_slices(impressions.requests, splits)

        encoder = self._fit(impressions, user_row, item_row, users, items, logs, splits["train"], rows_of["train"])
        self._write_entities("users", encoder, users, logs)
        self._write_entities("items", encoder, items, {})
        self._write_events(encoder, logs)
        self._write_impressions(encoder, impressions, item_row, rows_of)
        self._write_requests(encoder, impressions, user_row, logs, splits, rows_of)
        encoder.save(self.folder / "encoder")
        for view in self.quarantines.values():
            view.write(self.folder / "quarantine")
        shutil.rmtree(staging, ignore_errors=True)

        self.stage("Computing checksums")
        files = _files(self.folder)
        num_rows = {name: s.stop - s.start for name, s in rows_of.items()}
        summary = BuildSummary(
            training_set=self.data.training_set,
            rows=num_rows,
            requests={name: s.stop - s.start for name, s in splits.items()},
            outside_split=impressions.requests.num_rows - sum(num_rows.values()),
            users=len(users.index),
            items=len(items.index),
            users_without_attributes=users.num_without_attributes,
            items_without_attributes=items.num_without_attributes,
            events={name: log.num_events for name, log in logs.items()},
            unused_events=self.unused_events,
            quarantined={name: q.counts for name, q in self.quarantines.items() if q.num_rows},
            table_sizes=encoder.table_sizes,
            bytes=sum(int(entry["bytes"]) for entry in files.values()),
            seconds=round(clock.perf_counter() - began, 3),
        )
        manifest = {
            "format_version": FORMAT_VERSION,
            "name": self.schema.name,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "schema": self.schema.model_dump(mode="json"),
            "schema_fingerprint": fingerprint(self.schema),
            "encoder_fingerprint": encoder.fingerprint,
            "split": self.data.split.boundaries,
            "rows": summary.rows,
            "requests": summary.requests,
            "quarantined": summary.quarantined,
            "build_config": self.data.model_dump(mode="json"),
            "inputs": inputs,
            "summary": summary.to_dict(),
            "files": files,
        }
        write_json(self.folder / "manifest.json", manifest)
        return summary

    # Reading

    def _open(self, staging: Path) -> None:
        """Opens and checks the views, and settles the types of what CSV leaves open."""
        self.stage("Opening the views")
        uses = self._uses()
        for view, pattern in _patterns(self.schema).items():
            self.sources[view] = open_source(view, Path(self.data.views), pattern, uses[view], staging=staging)
        for scope in ("user", "item"):
            self._settle({view: key for view in self.sources if (key := self._key_column(view, scope)) is not None})
        request = self.schema.views.impressions.request
        if request is not None and request not in self.sources["impressions"].key_types:
            self._settle({"impressions": request})
        for view, source in self.sources.items():
            self.sources[view] = settle_value_types(source, uses[view])
            self.quarantines[view] = Quarantine(self.sources[view])

    def _settle(self, columns: Mapping[str, str]) -> None:
        pairs = [(self.sources[view], column) for view, column in columns.items()]
        settled = settle_key_types(pairs, tolerance=self.data.max_quarantined_fraction)
        self.sources.update(zip(columns, settled, strict=True))

    def _key_column(self, view: str, scope: str) -> str | None:
        """Column of a view that holds the user's or the item's key."""
        views = self.schema.views
        if view == "impressions":
            return views.impressions.user if scope == "user" else views.impressions.item
        if view == "events" and views.events is not None:
            return views.events.user if scope == "user" else views.events.item
        entity = views.users if scope == "user" else views.items
        return entity.key if entity is not None and view == f"{scope}s" else None

    def _uses(self) -> dict[str, list[Use]]:
        """What the schema reads of each view."""
        views = self.schema.views
        shown = views.impressions
        uses = {"impressions": self._log_uses("impressions")}
        if shown.request is not None:
            uses["impressions"].append(Use(shown.request, "key", "views.impressions.request"))
        uses["impressions"] += [Use(t.label, "label", f"task {t.name!r}") for t in self.schema.tasks]
        uses["impressions"] += self._feature_uses("impressions", self._features("context", "candidate"))
        if views.events is not None:
            uses["events"] = self._log_uses("events")
            if views.events.type is not None:
                uses["events"].append(Use(views.events.type, "type", "views.events.type"))
            uses["events"] += self._feature_uses("events", self._features("event"))
        if views.users is not None:
            uses["users"] = [Use(views.users.key, "key", "views.users.key")]
            uses["users"] += self._feature_uses("users", self._features("user"))
        if views.items is not None:
            uses["items"] = [Use(views.items.key, "key", "views.items.key")]
            uses["items"] += self._feature_uses("items", self._features("item"))
        return uses

    def _features(self, *scopes: str) -> list[Feature]:
        return [f for f in self.schema.all_features if f.scope in scopes]

    def _log_uses(self, view: str) -> list[Use]:
        columns = self.schema.views.impressions if view == "impressions" else self.schema.views.events
        assert columns is not None
        return [
            Use(columns.user, "key", f"views.{view}.user"),
            Use(columns.item, "key", f"views.{view}.item"),
            Use(columns.time, "time", f"views.{view}.time", columns.time_unit),
        ]

    def _feature_uses(self, view: str, features: Sequence[Feature]) -> list[Use]:
        uses = [feature_use(self.schema, f) for f in features]
        return [u for u in uses if not self._reads_time(view, u)]

    def _reads_time(self, view: str, use: Use) -> bool:
        """Whether a feature reads the view's own time, which is known in microseconds whatever its unit."""
        columns = self.schema.views.impressions if view == "impressions" else self.schema.views.events
        return (
            view in ("impressions", "events")
            and use.role == "instant"
            and columns is not None
            and use.column == columns.time
        )

    # Checking

    def _valid_rows(self, view: str, more: Sequence[tuple[str, pl.Expr]]) -> np.ndarray:
        """``(n,)`` int64: rows of a view that have no problem."""
        self.stage(f"Checking {view}")
        source, quarantine = self.sources[view], self.quarantines[view]
        problems = {reason: expression for use in self._uses()[view] for reason, expression in source.problems(use)}
        valid = first_problems(source, quarantine, [*problems.items(), *more])
        quarantine.enforce(self.data.max_quarantined_fraction)
        return np.flatnonzero(valid)

    def _impression_problems(self) -> list[tuple[str, pl.Expr]]:
        """What can be wrong with labels."""
        source = self.sources["impressions"]
        labels = {t.name: source.typed(Use(t.label, "label", t.name)).fill_nan(None) for t in self.schema.tasks}
        problems = [
            (f"{task.label} is neither 0 nor 1", labels[task.name].is_in([0.0, 1.0]).not_())
            for task in self.schema.tasks
            if task.at_least is None
        ]
        problems.append(("every label is missing", pl.all_horizontal([label.is_null() for label in labels.values()])))
        return problems

    def _check_train(self, requests: Requests, train: slice) -> None:
        if train.stop > train.start:
            return
        times = "there is no valid impression"
        if requests.num_requests:
            first, last = (datetime.fromtimestamp(t / 1e6, UTC).isoformat() for t in requests.time[[0, -1]])
            times = f"impressions span {first} to {last}"
        raise SourceError(
            f"{self.sources['impressions'].place}: the training period must hold an impression, got none: {times}",
            hint="check split.train_end, and views.impressions.time_unit",
        )

    # Joining

    def _entities(self, scope: str, impression_rows: np.ndarray, event_rows: np.ndarray | None) -> Entities:
        """Numbers the users, or the items."""
        self.stage(f"Joining {scope}s")
        logs = [self._keys("impressions", scope).gather(impression_rows)]
        if event_rows is not None:
            logs.append(self._keys("events", scope).gather(event_rows))
        view = f"{scope}s"
        if view not in self.sources:
            column = self._key_column("impressions", scope)
            assert column is not None
            return Entities.join(None, column, None, np.empty(0, dtype=np.int64), logs)
        source, quarantine = self.sources[view], self.quarantines[view]
        column = self._key_column(view, scope)
        assert column is not None
        problems = {reason: e for use in self._uses()[view] for reason, e in source.problems(use)}
        rows = np.flatnonzero(first_problems(source, quarantine, list(problems.items())))
        keys = self._keys(view, scope).gather(rows)
        is_first = keys.is_first_distinct().to_numpy()
        quarantine.add(f"{column} repeats that of an earlier row", rows[~is_first])
        quarantine.enforce(self.data.max_quarantined_fraction)
        return Entities.join(source, column, keys.filter(is_first), rows[is_first], logs)

    def _keys(self, view: str, scope: str) -> pl.Series:
        column = self._key_column(view, scope)
        assert column is not None
        return self.sources[view].column(Use(column, "key", scope))

    def _group(self, rows: np.ndarray, users: Entities, items: Entities) -> tuple[_Impressions, np.ndarray, np.ndarray]:
        """Impressions in requests; then the user row of each request and the item row of each impression."""
        self.stage("Grouping impressions")
        source, columns = self.sources["impressions"], self.schema.views.impressions
        user_row = users.rows_of(self._keys("impressions", "user").gather(rows))
        item_row = items.rows_of(self._keys("impressions", "item").gather(rows))
        time = source.column(Use(columns.time, "time", "", columns.time_unit)).to_numpy()[rows]
        if columns.request is None:
            impressions = _Impressions(rows, Requests.group(time, user_row, item_row))
        else:
            key = source.column(Use(columns.request, "key", "")).gather(rows)
            number = key.rank("dense").cast(pl.Int64).to_numpy() - 1
            requests = Requests.group(time, user_row, item_row, number)
            impressions = _Impressions(rows, self._without_contradictions(requests, rows, user_row, columns))
        order = impressions.requests.order
        return impressions, user_row[order[impressions.requests.row_start]], item_row[order]

    def _without_contradictions(
        self, requests: Requests, rows: np.ndarray, user_row: np.ndarray, columns: ImpressionsView
    ) -> Requests:
        """Sets aside requests whose rows differ in what a request has only one of."""
        source, quarantine = self.sources["impressions"], self.quarantines["impressions"]
        contradictory = np.zeros(requests.num_requests, dtype=bool)
        checks = [(columns.user, pl.Series(user_row))]
        uses = dict.fromkeys(self._feature_uses("impressions", self._features("context")))
        checks += [(use.column, source.column(use).gather(rows)) for use in uses]
        for column, values in checks:
            differing = requests.where_differing(values) & ~contradictory
            is_row = np.repeat(differing, requests.row_counts)
            quarantine.add(f"{column} differs within the request", np.sort(rows[requests.order[is_row]]))
            contradictory |= differing
        quarantine.enforce(self.data.max_quarantined_fraction)
        return requests.without(contradictory)

    def _event_logs(self, rows: np.ndarray, users: Entities, items: Entities) -> dict[str, EventLog]:
        """The event log of each history."""
        self.stage("Sorting events")
        source, columns = self.sources["events"], self.schema.views.events
        assert columns is not None
        user_row = users.rows_of(self._keys("events", "user").gather(rows))
        item_row = items.rows_of(self._keys("events", "item").gather(rows))
        time = source.column(Use(columns.time, "time", "", columns.time_unit)).to_numpy()[rows]
        types = None if columns.type is None else source.column(Use(columns.type, "type", "")).gather(rows)
        is_used = np.zeros(len(rows), dtype=bool)
        logs = {}
        for history in self.schema.histories:
            chosen = _chosen_events(source, history, types, len(rows))
            is_used[chosen] = True
            logs[history.name] = EventLog.build(
                rows[chosen], user_row[chosen], item_row[chosen], time[chosen], num_users=users.num_rows
            )
        self.unused_events = int(len(rows) - np.count_nonzero(is_used))
        return logs

    # Fitting and encoding

    def _fit(
        self,
        impressions: _Impressions,
        user_row: np.ndarray,
        item_row: np.ndarray,
        users: Entities,
        items: Entities,
        logs: Mapping[str, EventLog],
        train: slice,
        train_rows: slice,
    ) -> Encoder:
        """Fits the encoder on the training period.

        A value counts once for each impression that it is part of; values of an event, and of its item where the
        history reads them, once for each event before the period's end.
        """
        fitter = EncoderFitter(self.schema)
        counts = impressions.requests.row_counts[train]
        user_weights = np.bincount(np.repeat(user_row[train], counts), minlength=users.num_rows)
        shown = np.bincount(item_row[train_rows], minlength=items.num_rows)
        end = self.data.split.boundaries["train_end"]
        assert end is not None
        is_past = {name: log.time < end for name, log in logs.items()}
        seen = {n: np.bincount(log.item_row[is_past[n]], minlength=items.num_rows) for n, log in logs.items()}
        for feature in self.schema.all_features:
            self.stage(f"Fitting {feature.name}")
            weights: np.ndarray
            if feature.scope == "user":
                column, weights = users.column(feature_use(self.schema, feature)), user_weights
            elif feature.scope == "item":
                weights = shown.copy()
                for history in self.schema.histories:
                    if feature.name in history.attributes:
                        weights += seen[history.name]
                column = items.column(feature_use(self.schema, feature))
            elif feature.scope == "context":
                column, weights = self._context_column(feature, impressions, train), counts
            elif feature.scope == "candidate":
                column = self._impression_column(feature, impressions, train_rows)
                weights = np.ones(len(column), dtype=np.int64)
            else:
                history_name = self._history_of(feature.name)
                column = self._event_column(feature, logs[history_name])
                weights = is_past[history_name].astype(np.int64)
            fitter.update(feature.name, column, weights)
        return fitter.finish()

    def _history_of(self, event_feature: str) -> str:
        return next(h.name for h in self.schema.histories if event_feature in [f.name for f in h.event_features])

    def _context_column(self, feature: Feature, impressions: _Impressions, requests: slice) -> pa.Array:
        """Raw values of a context feature, one a request."""
        use = feature_use(self.schema, feature)
        if self._reads_time("impressions", use):
            return pa.array(impressions.requests.time[requests])
        first = impressions.requests.row_start[requests]
        return to_arrow(self.sources["impressions"].column(use).gather(impressions.ordered_rows[first]))

    def _impression_column(self, feature: Feature, impressions: _Impressions, rows: slice) -> pa.Array:
        """Raw values of a candidate feature, one an impression."""
        use = feature_use(self.schema, feature)
        source = self.sources["impressions"]
        if self._reads_time("impressions", use):
            use = Use(use.column, "time", use.reader, self.schema.views.impressions.time_unit)
        return to_arrow(source.column(use).gather(impressions.ordered_rows[rows]))

    def _event_column(self, feature: Feature, log: EventLog) -> pa.Array:
        """Raw values of an event feature, one an event of the log."""
        use = feature_use(self.schema, feature)
        if self._reads_time("events", use):
            return pa.array(log.time)
        return to_arrow(self.sources["events"].column(use).gather(log.source_row))

    # Writing

    def _write_entities(self, name: str, encoder: Encoder, entities: Entities, logs: Mapping[str, EventLog]) -> None:
        self.stage(f"Writing {name}")
        columns: dict[str, EncodedColumn] = {}
        for history, log in logs.items():
            columns[start_column(history)] = log.user_offsets[:-1]
            columns[end_column(history)] = log.user_offsets[1:]
        for feature in self._features(name[:-1]):
            raw = entities.column(feature_use(self.schema, feature))
            columns[feature.name] = _encoded(encoder, feature, raw)
        write_table(self.folder / f"{name}.arrow", columns, keys=entities.table_keys)

    def _write_events(self, encoder: Encoder, logs: Mapping[str, EventLog]) -> None:
        for history in self.schema.histories:
            self.stage(f"Writing events of {history.name}")
            log = logs[history.name]
            columns: dict[str, EncodedColumn] = {ITEM_ROW: log.item_row, TIME: log.time}
            for feature in history.event_features:
                columns[feature.name] = _encoded(encoder, feature, self._event_column(feature, log))
            write_table(self.folder / "events" / f"{history.name}.arrow", columns)

    def _write_impressions(
        self, encoder: Encoder, impressions: _Impressions, item_row: np.ndarray, rows_of: Mapping[str, slice]
    ) -> None:
        source, ordered_rows = self.sources["impressions"], impressions.ordered_rows
        labels = {t.name: _labels(source, t) for t in self.schema.tasks}
        for name, rows in rows_of.items():
            self.stage(f"Writing impressions of {name}")
            columns: dict[str, EncodedColumn] = {ITEM_ROW: item_row[rows], SOURCE_ROW: ordered_rows[rows]}
            for task, label in labels.items():
                columns[label_column(task)] = label[ordered_rows[rows]]
            for feature in self._features("candidate"):
                raw = self._impression_column(feature, impressions, rows)
                columns[feature.name] = _encoded(encoder, feature, raw)
            write_table(self.folder / name / "impressions.arrow", columns)

    def _write_requests(
        self,
        encoder: Encoder,
        impressions: _Impressions,
        user_row: np.ndarray,
        logs: Mapping[str, EventLog],
        splits: Mapping[str, slice],
        rows_of: Mapping[str, slice],
    ) -> None:
        requests = impressions.requests
        for name, part in splits.items():
            self.stage(f"Writing requests of {name}")
            columns: dict[str, EncodedColumn] = {
                USER_ROW: user_row[part],
                TIME: requests.time[part],
                ROW_START: requests.row_start[part] - rows_of[name].start,
            }
            for history, log in logs.items():
                start, end = history_slices(log, user_row[part], requests.time[part])
                columns[start_column(history)], columns[end_column(history)] = start, end
            for feature in self._features("context"):
                columns[feature.name] = _encoded(encoder, feature, self._context_column(feature, impressions, part))
            write_table(self.folder / name / "requests.arrow", columns)


def _chosen_events(source: Source, history: History, types: pl.Series | None, num_events: int) -> np.ndarray:
    """Positions of the events that a history holds.

    Raises:
        SourceError: there are events, but none of a type that the history names.
    """
    if history.event_types is None or types is None:
        return np.arange(num_events)
    chosen = np.flatnonzero(types.is_in(list(history.event_types)).fill_null(False).to_numpy())
    if num_events and not len(chosen):
        present = types.drop_nulls().unique().sort().to_list()
        raise SourceError(
            f"{source.place}: history {history.name!r} must find events of type {', '.join(history.event_types)}, "
            "got none",
            hint=nearest(history.event_types[0], present),
        )
    return chosen


def _labels(source: Source, task: Task) -> np.ndarray:
    """``(num_rows,)`` float32: the label of each row of the view, NaN where it is missing."""
    values = source.column(Use(task.label, "label", task.name)).fill_null(np.nan).to_numpy()
    if task.at_least is None:
        return values.astype(np.float32)
    return np.where(np.isnan(values), np.nan, values >= task.at_least).astype(np.float32)


def _row_slices(requests: Requests, splits: Mapping[str, slice]) -> dict[str, slice]:
    """Rows of each slice of requests."""
    offsets = np.append(requests.row_start, requests.num_rows)
    return {name: slice(int(offsets[s.start]), int(offsets[s.stop])) for name, s in splits.items()}


def _encoded(encoder: Encoder, feature: Feature, raw: pa.Array) -> EncodedColumn:
    column = encoder.encode(feature.name, raw)
    if isinstance(feature, Dense) and feature.dim == 1:
        assert not isinstance(column, Ragged)
        return column.reshape(-1)
    return column


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size, checksum and, of tables, rows of every file; makes those durable that were not."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())

    def describe(path: Path) -> dict[str, Any]:
        sync(path)
        entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        if path.suffix == ".arrow":
            with pa.memory_map(str(path), "r") as file:
                entry["rows"] = pa.ipc.open_file(file).get_batch(0).num_rows
        return entry

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        entries = list(pool.map(describe, paths))
    return {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}


@contextmanager
def _stages(progress: bool) -> Iterator[Callable[[str], None]]:
    """Yields what is called with the name of each stage as it begins."""
    if not progress:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Waiting for the lock", total=None)
        yield lambda name: bar.update(task, description=name)
