"""The same build with the events spread over Ray workers: the same files, byte for byte.

Events are by far the most rows. Three Ray Data pipelines go over them:

1. **scan**: one task a file of the events view checks its rows and finds the keys of its users and items;
2. **spill**: one task a file numbers users and items, and writes its events shard by shard of users
   (:mod:`feature_store.event_shards`);
3. **sort**: one task a shard joins what all files hold of it, in the order of the view, and sorts each history.

A task holds one file or one shard in memory. What tasks hand to each other lies in the staging folder, which all
workers must see: on one machine it is a folder of the disk, on a cluster one that is shared. The process that
builds does the rest: it numbers the entities, groups the impressions, computes derived values, and fits, encodes and
writes.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from feature_store.build import BuildSummary, DataConfig, build_training_set
from feature_store.entities import Entities
from feature_store.event_checks import EventChecks
from feature_store.event_log import EventLog
from feature_store.event_shards import EventBlock, EventShards, sorted_events
from feature_store.joined import Happened, event_columns, numbered, user_bounds
from feature_store.quarantine import code_of
from feature_store.sources import IN_ORDER, to_arrow
from feature_store.time_spans import TimeCounts
from feature_store.views import Views
from recsys.config import validate
from recsys.encoding import KeyIndex
from recsys.schema import Schema

Row = dict[str, Any]


def build_distributed(
    schema: Schema, data: DataConfig, *, workers: int, progress: bool = False, force: bool = False
) -> BuildSummary:
    """Builds a training set as :func:`~feature_store.build.build_training_set` does, with Ray workers for the events.

    Args:
        schema: what the data is.
        data: where it is.
        workers: tasks that run at once. A Ray cluster that this process is connected to is used; else one is started
            here, with so many cores, and stopped at the end.
        progress: whether to show a progress bar on stderr.
        force: build even if nothing changed.
    """
    with _ray(workers):
        return build_training_set(schema, data, progress=progress, force=force, work=RayEvents(workers))


@contextmanager
def _ray(workers: int) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


class RayEvents:
    """Looks through events and sorts them with Ray Data.

    Args:
        workers: tasks that run at once.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def scan(self, views: Views) -> Happened:
        """See :class:`~feature_store.joined.EventWork`."""
        problems = views.problems("events")
        columns = {scope: views.key_expression("events", scope) for scope in ("user", "item")}
        folder = _folder(views)
        plans = [
            {"number": number, "plan": _packed(scan.select(**columns, code=code_of(problems))), "folder": str(folder)}
            for number, scan in enumerate(views.sources["events"].scans)
        ]
        self._map(scan_file, plans)
        codes = np.concatenate([np.load(folder / f"codes-{p['number']}.npy") for p in plans])
        for code, (reason, _) in enumerate(problems, start=1):
            views.quarantine("events", reason, np.flatnonzero(codes == code))
        np.save(folder / "is_valid.npy", codes == 0)
        keys = {
            scope: pl.concat([pl.read_ipc(folder / f"{scope}-{p['number']}.arrow") for p in plans])["key"].unique()
            for scope in columns
        }
        return Happened(codes == 0, keys)

    def logs(
        self, views: Views, happened: Happened, users: Entities, items: Entities, checks: EventChecks
    ) -> tuple[dict[str, EventLog], int]:
        """See :class:`~feature_store.joined.EventWork`."""
        folder, histories = _folder(views), views.schema.histories
        bounds = user_bounds(users)
        for scope, entities in (("users", users), ("items", items)):
            pl.DataFrame({"key": pl.Series(entities.index.keys)}).write_ipc(folder / f"{scope}.arrow")
        np.save(folder / "bounds.npy", bounds)
        shared: Row = {"folder": str(folder), "schema": views.schema.model_dump_json()}
        first, last = checks.times.impressions or (-1, -1)
        plans, first_row = [], 0
        for number, scan in enumerate(views.sources["events"].scans):
            plan = {"number": number, "plan": _packed(scan.select(**event_columns(views))), "first_row": first_row}
            span = {"first_impression": first, "last_impression": last}
            plans.append({**shared, **plan, **span, "num_events": len(happened.is_valid)})
            first_row += len(np.load(folder / f"codes-{number}.npy", mmap_mode="r"))
        spilled = self._map(spill_file, plans)
        for plan in plans:
            checks.times.merge(pl.read_ipc(folder / f"times-{plan['number']}.arrow"))
        checks.run()
        shards = [{**shared, "shard": shard, "num_files": len(plans)} for shard in range(len(bounds) - 1)]
        self._map(sort_shard, shards)
        logs = {history.name: _joined_log(folder, bounds, bit) for bit, history in enumerate(histories)}
        return logs, sum(row["num_unused"] for row in spilled)

    def _map(self, task: Any, rows: list[Row]) -> list[Row]:
        """What a task gives for each row, one Ray task a row."""
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        # One core a task, so that as many run at once as there are workers.
        done: list[Row] = dataset.map(task, num_cpus=1, concurrency=min(self._workers, len(rows))).take_all()
        return done


def _folder(views: Views) -> Path:
    folder = views.staging / "ray"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _packed(frame: pl.LazyFrame) -> bytes:
    return frame.serialize()


def _read(plan: bytes) -> pl.DataFrame:
    return pl.LazyFrame.deserialize(io.BytesIO(plan)).collect(optimizations=IN_ORDER)


def scan_file(row: Row) -> Row:
    """Checks the events of a file; writes the code of each row's problem, and the keys of the valid ones."""
    folder, number = Path(row["folder"]), row["number"]
    block = _read(row["plan"])
    codes = block["code"].to_numpy()
    np.save(folder / f"codes-{number}.npy", codes)
    valid = block.filter(codes == 0)
    for scope in ("user", "item"):
        valid.select(key=pl.col(scope).unique()).write_ipc(folder / f"{scope}-{number}.arrow")
    return {"number": number}


def spill_file(row: Row) -> Row:
    """Numbers the valid events of a file and writes them shard by shard; counts their times by type."""
    folder, number = Path(row["folder"]), row["number"]
    schema = validate(Schema, _parsed(row["schema"]), source="schema")
    users, items = (KeyIndex(_keys(folder / f"{scope}.arrow")) for scope in ("users", "items"))
    block = _read(row["plan"])
    rows = slice(row["first_row"], row["first_row"] + block.height)
    is_valid = np.load(folder / "is_valid.npy", mmap_mode="r")[rows]
    source_row = np.arange(rows.start, rows.stop)[is_valid]
    valid = block.filter(is_valid)
    impressions = None if row["first_impression"] < 0 else (row["first_impression"], row["last_impression"])
    times = TimeCounts(impressions, is_typed="type" in valid.columns)
    times.add(valid["time"], valid["type"] if times.is_typed else None)
    times.by_type.write_ipc(folder / f"times-{number}.arrow")
    found = numbered(source_row, valid, users, items, schema.histories)
    bounds = np.load(folder / "bounds.npy")
    shards = EventShards(
        bounds,
        num_items=len(items) + 1,
        num_events=row["num_events"],
        num_histories=len(schema.histories),
        folder=folder / f"spill-{number}",
    )
    shards.add(found)
    for shard in range(shards.num_shards):
        events = shards.take(shard)
        np.savez(folder / f"events-{number}-{shard}.npz", *events.columns)
    return {"num_unused": len(source_row) - found.num_events}


def sort_shard(row: Row) -> Row:
    """Sorts the events of a shard, one log a history."""
    folder, shard = Path(row["folder"]), row["shard"]
    schema = validate(Schema, _parsed(row["schema"]), source="schema")
    parts = []
    for number in range(row["num_files"]):
        with np.load(folder / f"events-{number}-{shard}.npz") as stored:
            parts.append([stored[name] for name in stored.files])
    events = EventBlock(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    bounds = np.load(folder / "bounds.npy")
    users = slice(int(bounds[shard]), int(bounds[shard + 1]))
    for history in range(len(schema.histories)):
        log = sorted_events(events, history, users)
        columns = {name: getattr(log, name).astype(np.int64) for name in (*EventLog.COLUMNS, "user_offsets")}
        np.savez(folder / f"log-{history}-{shard}.npz", **columns)
    return {"shard": shard}


def _joined_log(folder: Path, bounds: np.ndarray, history: int) -> EventLog:
    offsets = np.zeros(int(bounds[-1]) + 1, dtype=np.int64)
    columns: Mapping[str, list[np.ndarray]] = {name: [] for name in EventLog.COLUMNS}
    begun = 0
    for shard in range(len(bounds) - 1):
        with np.load(folder / f"log-{history}-{shard}.npz") as stored:
            for name, parts in columns.items():
                parts.append(stored[name])
            ends = stored["user_offsets"][1:] + begun
        offsets[int(bounds[shard]) + 1 : int(bounds[shard + 1]) + 1] = ends
        begun += len(columns["time"][-1])
    return EventLog(**{name: np.concatenate(parts) for name, parts in columns.items()}, user_offsets=offsets)


def _keys(path: Path) -> pa.Array[Any]:
    return to_arrow(pl.read_ipc(path)["key"])


def _parsed(text: str) -> Any:
    import json

    return json.loads(text)
