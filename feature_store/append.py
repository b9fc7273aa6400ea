"""Appends new log files to a training set: a day of logs is a day of work.

New are the files of the impressions and events views that the set was not built from. Only they are read; users,
items and versions of attributes are read whole. What was built stays as it is, in the same files, linked into the new
version; the version that was there before is kept beside the set, in ``DIR.versions/<number>``, until it is pruned.

The rules:

* **Impressions** must not be earlier than the newest that was built: earlier ones are set aside as broken rows.
* **Late events** count from now on. Rows that were built keep the history that was known when they were built. New
  events of the same user and time as stored ones stand among them as their values say
  (:mod:`feature_store.tied_events`).
* **Users and items** that are new come after the known ones, whose rows never change place. A known one that is named
  again by a new file of its view is a repeated key, as in a build.
* **Vocabularies** grow behind their last id, by the values of new rows of the training period that occur there
  ``min_count`` times; ids stay what they are. Quantiles, means and deviations stay as they were fitted.
* **Times** of the new files are checked by themselves (:mod:`feature_store.time_spans`). They may lack an event type.
* **Derived values** of new rows are those of a build of everything, but for what was set aside. They are computed
  of the new rows and of what the set carries of those before (:mod:`feature_store.carried`): late rows count from now
  on, groups are those that attributes make now. Rows that were built keep their values.
* **Splits** may move forward: boundaries may be later than before, never earlier. Requests change their split then,
  and no file does.

A history stays one slice of one log: users who were active get a new block at the end of the log, with the newest
``max_length`` of their events from before and the new ones in their order. A batch reads the same events as after a
build of everything; the slice itself may be shorter, for it does not reach back to events that no batch reads.
"""

from __future__ import annotations

import os
import shutil
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.appended import entry
from feature_store.build import BuildSummary, DataConfig, describe_files, inputs_of, manifest_of
from feature_store.carried import FOLDER as CARRIED
from feature_store.carried import Carried
from feature_store.derived import Computation, carried_attributes, families, read_as_before, value_kinds
from feature_store.event_log import stable_order
from feature_store.fit import fit_encoder
from feature_store.joined import Joined
from feature_store.point_in_time import first_not_before
from feature_store.replay import replayed
from feature_store.split import microseconds
from feature_store.tables import encoded, write_impressions
from feature_store.tied_events import TieRule
from feature_store.views import Views, windowed
from feature_store.workspace import exclusive, replacing, versions_folder, versions_of
from recsys.encoding import EncodedColumn, Encoder, Ragged
from recsys.encoding.columns import offsets_of
from recsys.errors import SourceError
from recsys.files import check_can_write, write_json
from recsys.schema import Schema
from recsys.training_set import (
    ITEM_ROW,
    ROW_START,
    SEQUENCE,
    SPLITS,
    TIME,
    USER_ROW,
    TrainingSet,
    end_column,
    joined_column,
    open_table,
    start_column,
    write_table,
)

_REBUILD = "build the whole set again: recsys build CONFIG --force"
_LOGS = ("impressions", "events")
_ANEW = ("encoder/", f"{CARRIED}/")
"""Folders that each version has of its own."""


def append_to_training_set(schema: Schema, data: DataConfig) -> BuildSummary:
    """Appends the files of the logs that are new since the last build or append.

    The new version appears whole or not at all, and the old one stays. Without new impressions nothing is done: new
    events wait for them.

    Args:
        schema: what the set was built with.
        data: where it is; its split may be later than that of the set.

    Raises:
        ConfigError: the result's folder cannot be written.
        IntegrityError: there is no training set.
        SourceError: something other than new files is new, or rows that were left out would now belong to a split.
        QuarantineError: too many new rows are broken.
    """
    folder = Path(data.training_set).resolve()
    check_can_write(folder, name="data.training_set")
    with exclusive(folder):
        old = TrainingSet.open(folder)
        inputs = inputs_of(schema, data)
        new_files = _new_files(old, inputs)
        if not new_files["impressions"]:
            return BuildSummary(**{**old.manifest["summary"], "training_set": data.training_set, "skipped": True})
        _check_splits(old, data)
        with replacing(folder, keep_in=versions_folder(folder)) as temporary:
            return _Append(old, schema, data, inputs, new_files, temporary).run()


def prune_versions(training_set: str | Path, *, keep: int) -> list[Path]:
    """Deletes older versions of a training set, all but the newest few; the set itself stays.

    Files that another version shares stay with it.

    Args:
        training_set: its folder.
        keep: how many older versions stay.

    Returns:
        The folders that are gone.
    """
    folder = Path(training_set).resolve()
    with exclusive(folder):
        versions = versions_of(folder)
        gone = versions[: max(len(versions) - keep, 0)]
        for version in gone:
            # Out of the way first: a process killed between leaves no version without some of its files.
            doomed = folder.with_name(f"{folder.name}.tmp-{version.name}")
            version.rename(doomed)
            shutil.rmtree(doomed)
    return gone


def _new_files(old: TrainingSet, inputs: Mapping[str, Any]) -> dict[str, set[str]]:
    before = old.manifest["inputs"]
    for what in ("build_version", "schema_fingerprint", "max_quarantined_fraction"):
        if before[what] != inputs[what]:
            raise SourceError(f"{old.folder}: {what} must be as when the set was built, but is not", hint=_REBUILD)
    known = {(f["view"], f["file"]): f for f in before["files"]}
    now = {(f["view"], f["file"]): f for f in inputs["files"]}
    for (view, name), file in known.items():
        if view in _LOGS and now.get((view, name)) != file:
            what = "was changed" if (view, name) in now else "is gone"
            raise SourceError(f"{view}: {name} must be as when the set was built, but {what}", hint=_REBUILD)
    return {log: {name for view, name in now if view == log and (view, name) not in known} for log in _LOGS}


def _check_splits(old: TrainingSet, data: DataConfig) -> None:
    before, now = old.manifest["split"], data.split.boundaries
    for name, time in now.items():
        earlier = before[name]
        if (time is None) != (earlier is None) or (time is not None and time < earlier):
            raise SourceError(f"split.{name} must not be earlier than when the set was built", hint=_REBUILD)
    left_out = old.manifest["summary"]["outside_split"]
    if left_out and "pieces" not in old.manifest and now["test_end"] != before["test_end"]:
        raise SourceError(
            f"split.test_end must be as when the set was built: {left_out:,} impressions outside of all splits were "
            "left out, which may now belong to one",
            hint=_REBUILD,
        )


@dataclass(frozen=True)
class _Append:
    """One append.

    Attributes:
        old: the set as it is.
        schema: what the data is.
        data: where it is.
        inputs: what the new version is built from.
        new_files: of each log.
        folder: of the new version, empty.
    """

    old: TrainingSet
    schema: Schema
    data: DataConfig
    inputs: Mapping[str, Any]
    new_files: Mapping[str, set[str]]
    folder: Path

    def run(self) -> BuildSummary:
        """Writes the new version."""
        began = clock.perf_counter()
        number = 1 + len(list((self.old.folder / "parts").glob("*")))
        part = f"parts/{number:05d}"
        self._link(skipped=("manifest.json", "users.arrow", "items.arrow"))
        views = self._views()
        joined, carried = self._derive(self._join(views))
        if carried is not None:
            carried.write(self.folder)
        train_end = microseconds(self.data.split.train_end)
        in_train = self.data.split.slices(joined.requests.time)["train"]
        newer = fit_encoder(joined, in_train, train_end=train_end, stage=lambda _: None)
        encoder = self.old.encoder.grown(newer)
        encoder.save(self.folder / "encoder")
        write_impressions(
            self.folder / part / "impressions.arrow",
            joined,
            encoder,
            slice(0, joined.requests.num_rows),
            first_row=self._first_row,
        )
        blocks = {h.name: self._write_events(joined, encoder, h.name, number) for h in self.schema.histories}
        self._write_requests(self.folder / part / "requests.arrow", joined, encoder, blocks)
        self._write_entities(joined, encoder, blocks)
        for quarantine in views.quarantines.values():
            quarantine.write(self.folder / part / "quarantine")
        shutil.rmtree(views.staging, ignore_errors=True)
        return self._finish(views, joined, encoder, part, began)

    def _link(self, *, skipped: tuple[str, ...]) -> None:
        """Makes the files that stay as they are part of the new version, at no cost."""
        for name in self.old.manifest["files"]:
            if name not in skipped and not name.startswith(_ANEW):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(self.old.folder / name, self.folder / name)

    def _views(self) -> Views:
        whole = ("users", "items", *(view.name for view in self.schema.views.versions))
        only = {v: {f["file"] for f in self.inputs["files"] if f["view"] == v} for v in whole}
        only |= self.new_files
        return Views(
            self.schema,
            self.data.views_root,
            staging=self.folder / ".staging",
            max_quarantined_fraction=self.data.max_quarantined_fraction,
            only={view: files for view, files in only.items() if files},
        )

    def _join(self, views: Views) -> Joined:
        return Joined.join(
            views,
            lambda _: None,
            not_before=self._newest,
            known={"user": self.old.users, "item": self.old.items},
            is_derived=False,
        )

    def _derive(self, joined: Joined) -> tuple[Joined, Carried | None]:
        """Computes derived values, of the new rows and of what is carried of those before."""
        if not windowed(self.schema):
            return joined.with_derived() if self.schema.derived else (joined, None)
        last = int(joined.requests.time[-1]) if joined.requests.num_requests else 0
        return joined.with_derived(before=self._carried(joined), newest=max(self._newest, last))

    def _carried(self, joined: Joined) -> Carried:
        names = [specs[0].name for specs in families(self.schema).values()]
        carried = Carried.open(self.old.folder, names, carried_attributes(self.schema))
        if carried is None:
            kinds = value_kinds(joined.views)
            widened = {log: {c for c, kind in columns.items() if kind == "number"} for log, columns in kinds.items()}
        else:
            widened = read_as_before(joined.views, carried.kinds)
        if carried is None or widened or not Computation(joined).holds(carried):
            carried = replayed(
                self.old,
                self.schema,
                self.data,
                newest=self._newest,
                staging=joined.views.staging / "replayed",
                as_numbers=widened,
            )
            read_as_before(joined.views, carried.kinds)
        return carried

    @cached_property
    def _newest(self) -> int:
        """Time of the newest request that was built."""
        return max(self._last_times(), default=0)

    def _last_times(self) -> Iterator[int]:
        for path in [self.old.folder / name for name in self._parts()]:
            times = open_table(path / "requests.arrow").array(TIME)
            if len(times):
                yield int(times[-1])

    def _parts(self) -> list[str]:
        """Folders of requests and impressions, in the order of their times."""
        return [*SPLITS, *sorted(p.relative_to(self.old.folder).as_posix() for p in self.old.folder.glob("parts/*"))]

    @property
    def _first_row(self) -> int:
        return int(self.old.manifest["source_rows"]["impressions"])

    def _write_events(self, joined: Joined, encoder: Encoder, name: str, number: int) -> _Blocks:
        """Writes the blocks of active users: newest known events, and new ones."""
        history, old = self.schema.history(name), self.old.events[name]
        fresh = joined.logs[name]
        num_users = joined.users.num_rows
        first, last = (_grown(self.old.users.array(column(name)), num_users) for column in (start_column, end_column))
        is_active = np.diff(fresh.user_offsets) > 0
        is_active[joined.user_row] = True
        users = np.flatnonzero(is_active)
        # Requests to come are not before the newest one built: what it could have read is all that they can read.
        seen = first_not_before(old.array(TIME), first[users], last[users], np.full(len(users), self._newest))
        first_kept = np.maximum(seen - history.max_length, first[users])
        num_kept = last[users] - first_kept
        kept = _ranges(first_kept, num_kept)
        num_fresh = np.diff(fresh.user_offsets)[users]
        chosen = _ranges(fresh.user_offsets[users], num_fresh)
        user = np.concatenate([np.repeat(users, num_kept), np.repeat(users, num_fresh)])
        time = np.concatenate([old.array(TIME)[kept], fresh.time[chosen]])
        order = stable_order(user, time)
        columns: dict[str, EncodedColumn] = {
            ITEM_ROW: np.concatenate([old.array(ITEM_ROW)[kept], fresh.item_row[chosen]])[order],
            TIME: time[order],
        }
        sequence = joined.event_sequence(name)
        if sequence is not None:
            columns[SEQUENCE] = np.concatenate([old.array(SEQUENCE)[kept], sequence[chosen]])[order]
        for feature in history.event_features:
            new = _taken(encoded(encoder, feature, joined.event_column(feature, name)), chosen)
            columns[feature.name] = _taken(joined_column([_taken(old.columns[feature.name], kept), new]), order)
        sizes = num_kept + num_fresh
        # New items lie behind those known: rows are not in the order of keys.
        rule = TieRule(encoder, history, item_keys=joined.items.table_keys)
        columns = rule.settle(columns, offsets_of(sizes))
        write_table(self.folder / "events" / f"{name}.{number}.arrow", columns)
        first, last = first.copy(), last.copy()
        first[users] = old.num_rows + np.cumsum(sizes) - sizes
        last[users] = first[users] + sizes
        return _Blocks(first, last, old.num_rows, time[order], len(chosen))

    def _write_requests(self, path: Path, joined: Joined, encoder: Encoder, blocks: Mapping[str, _Blocks]) -> None:
        requests, user_row = joined.requests, joined.user_row
        columns: dict[str, EncodedColumn] = {
            USER_ROW: user_row,
            TIME: requests.time,
            ROW_START: requests.row_start,
        }
        for history in self.schema.histories:
            block = blocks[history.name]
            start, stop = block.first[user_row] - block.base, block.last[user_row] - block.base
            end = first_not_before(block.time, start, stop, requests.time)
            if history.max_age_us is not None:
                start = first_not_before(block.time, start, end, requests.time - history.max_age_us)
            columns[start_column(history.name)] = start + block.base
            columns[end_column(history.name)] = end + block.base
        for feature in self.schema.features_of("context"):
            raw = joined.context_column(feature, slice(0, requests.num_requests))
            columns[feature.name] = encoded(encoder, feature, raw)
        write_table(path, columns)

    def _write_entities(self, joined: Joined, encoder: Encoder, blocks: Mapping[str, _Blocks]) -> None:
        columns: dict[str, EncodedColumn] = {}
        for name, block in blocks.items():
            columns[start_column(name)], columns[end_column(name)] = block.first, block.last
        for scope, table in (("user", joined.users), ("item", joined.items)):
            for feature in self.schema.features_of(scope):  # type: ignore[arg-type]
                columns[feature.name] = encoded(encoder, feature, joined.entity_column(feature))
            write_table(self.folder / f"{scope}s.arrow", columns, keys=table.table_keys)
            columns = {}

    def _finish(self, views: Views, joined: Joined, encoder: Encoder, part: str, began: float) -> BuildSummary:
        pieces: dict[str, list[dict[str, Any]]] = {}
        for name in SPLITS:
            cuts = {p: self._cut(p, name) for p in [*self._parts(), part]}
            found = [{"part": p, "requests": list(cut)} for p, cut in cuts.items() if cut[0] < cut[1]]
            pieces[name] = found or [{"part": name, "requests": [0, 0]}]
        kept = {n: e for n, e in self.old.manifest["files"].items() if (self.folder / n).is_file()}
        written = {"users.arrow", "items.arrow"}
        kept = {n: e for n, e in kept.items() if n not in written and not n.startswith(_ANEW)}
        files = {**kept, **describe_files(self.folder, but=kept)}
        before = self.old.manifest["summary"]
        broken = {view: q.counts for view, q in views.quarantines.items() if q.num_rows}
        splits = {name: self._open(pieces[name]) for name in SPLITS}
        all_rows = sum(open_table(self.folder / p / "impressions.arrow").num_rows for p in [*self._parts(), part])
        rows = {name: n for name, (n, _) in splits.items()}
        summary = BuildSummary(
            training_set=self.data.training_set,
            rows=rows,
            requests={name: n for name, (_, n) in splits.items()},
            outside_split=all_rows - sum(rows.values()),
            users=len(joined.users.index),
            items=len(joined.items.index),
            users_without_attributes=joined.users.num_without_attributes,
            items_without_attributes=joined.items.num_without_attributes,
            events={name: before["events"][name] + log.num_events for name, log in joined.logs.items()},
            unused_events=before["unused_events"] + joined.num_unused_events,
            quarantined=_added(before["quarantined"], broken),
            table_sizes=encoder.table_sizes,
            bytes=sum(int(entry["bytes"]) for entry in files.values()),
            seconds=round(clock.perf_counter() - began, 3),
            notes=views.notes,
            time_spans=_widened(before.get("time_spans", {}), joined.time_spans),
        )
        source_rows = dict(self.old.manifest["source_rows"])
        for view, source in views.sources.items():
            source_rows[view] = source.num_rows + (source_rows[view] if view in _LOGS else 0)
        manifest = manifest_of(self.schema, self.data, encoder, summary, self.inputs, files, source_rows)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        appended = entry(self.old, part, at, self.new_files, self._newest)
        write_json(
            self.folder / "manifest.json",
            {**manifest, "pieces": pieces, "appends": [*self.old.manifest.get("appends", []), appended]},
        )
        return summary

    def _cut(self, part: str, split: str) -> tuple[int, int]:
        times = open_table(self.folder / part / "requests.arrow").array(TIME)
        found = self.data.split.slices(times)[split]
        return int(found.start), int(found.stop)

    def _open(self, pieces: list[dict[str, Any]]) -> tuple[int, int]:
        """Impressions and requests of some pieces."""
        rows = requests = 0
        for piece in pieces:
            first, stop = piece["requests"]
            table = open_table(self.folder / piece["part"] / "requests.arrow")
            shown = open_table(self.folder / piece["part"] / "impressions.arrow")
            edges = np.append(table.array(ROW_START), shown.num_rows)[[first, stop]]
            rows, requests = rows + int(edges[1] - edges[0]), requests + stop - first
        return rows, requests


@dataclass(frozen=True)
class _Blocks:
    """The log of a history after an append.

    Attributes:
        first: ``(U,)`` int64, the first event of each user in the whole log.
        last: ``(U,)`` int64, one past the last.
        base: events in the log before.
        time: ``(E,)`` int64, times of the events behind them.
        num_fresh: events that are new.
    """

    first: np.ndarray
    last: np.ndarray
    base: int
    time: np.ndarray
    num_fresh: int


def _grown(column: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([column, np.zeros(length - len(column), dtype=np.int64)])


def _ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``start[0], start[0] + 1, ...``, ``length[0]`` of them, then those of the next."""
    shift = start - (np.cumsum(length) - length)
    return np.repeat(shift, length) + np.arange(int(length.sum()), dtype=np.int64)


def _taken(column: EncodedColumn, rows: np.ndarray) -> EncodedColumn:
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


def _widened(before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Spans of everything: texts of one format and one zone are in the order of their times."""
    spans = {log: list(span) for log, span in before.items()}
    for log, (first, last) in now.items():
        earlier = spans.get(log, [first, last])
        spans[log] = [min(first, earlier[0]), max(last, earlier[1])]
    return spans


def _added(before: Mapping[str, Mapping[str, int]], now: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Broken rows of the logs add up; users and items are read whole each time."""
    total = {view: dict(reasons) for view, reasons in before.items() if view in _LOGS}
    for view, reasons in now.items():
        for reason, count in reasons.items():
            found = total.setdefault(view, {})
            found[reason] = found.get(reason, 0) + count
    return total
