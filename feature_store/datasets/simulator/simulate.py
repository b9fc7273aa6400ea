"""Writes a simulated data set: views, true probabilities, and what the best model could reach."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from feature_store.datasets.folder import views_folder
from feature_store.datasets.simulator.ceiling import Ceiling, CeilingCounter, PopularityCounter
from feature_store.datasets.simulator.config import SimulatorConfig
from feature_store.datasets.simulator.traffic import (
    EVENT_TYPES,
    REQUESTS_PER_BLOCK,
    Block,
    Events,
    Traffic,
    empty_block,
)
from feature_store.datasets.simulator.views import (
    EventSorter,
    ViewWriter,
    events_table,
    impressions_table,
    items_tables,
    truth_table,
    users_tables,
)
from feature_store.datasets.simulator.world import World, build_world
from feature_store.datasets.summary import Progress
from recsys.files import write_json

FORMAT_VERSION = 1
MARKER = "simulation.json"
LATER_SHARE = 0.2
"""The last share of the requests, on which the floor is measured."""

_MAX_WORKERS = 8

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SimulationSummary:
    """What was written, and between which figures a model's must fall.

    Attributes:
        config: the configuration with every size written out.
        num_rows: view -> rows.
        num_requests: of the impressions.
        num_events_by_type: event type -> rows.
        first_time: of the first impression, UTC microseconds.
        last_time: of the last impression, UTC microseconds.
        ceiling: of the true probabilities over all impressions.
        later_ceiling: the same over the last fifth of the requests.
        later_popularity_auc: the floor: AUC on that fifth of each item's smoothed click rate before it.
    """

    config: SimulatorConfig
    num_rows: dict[str, int]
    num_requests: int
    num_events_by_type: dict[str, int]
    first_time: int
    last_time: int
    ceiling: Ceiling
    later_ceiling: Ceiling
    later_popularity_auc: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as stored in ``simulation.json``."""
        plain = dataclasses.asdict(dataclasses.replace(self, config=None))  # type: ignore[arg-type]
        return {"format_version": FORMAT_VERSION, **plain, "config": self.config.model_dump(mode="json")}


def simulate(
    config: SimulatorConfig, output_dir: str | Path, progress: Progress | None = None, *, workers: int = 1
) -> SimulationSummary:
    """Writes ``impressions``, ``truth``, ``events``, ``users`` and ``items`` (``.parquet``) and ``simulation.json``.

    Impressions are in the order of time, the rows of a request are contiguous, and ``truth.parquet`` has a row for
    each, in the same order. Views above ``rows_per_file`` rows are folders of files; impressions and truth then have
    the same parts. The same configuration gives the same bytes (with the same versions of numpy and pyarrow),
    whatever ``workers`` is. Memory is O(users + items + one block a worker), whatever the number of impressions.

    Args:
        config: what to simulate.
        output_dir: a folder; it appears complete or not at all. One written before is replaced.
        progress: called after each block with the impressions written and the impressions in all.
        workers: threads that generate blocks. More than eight are not used: one thread writes, and no faster for them.

    Raises:
        SourceError: ``output_dir`` holds something else.
    """
    config = config.resolved()
    with views_folder(Path(output_dir), marker=MARKER) as folder:
        world = build_world(config)
        num_rows = {
            "users": _write_all(folder / "users.parquet", users_tables(world)),
            "items": _write_all(folder / "items.parquet", items_tables(world)),
        }
        summary = _write_log(world, folder, num_rows, progress, min(workers, _MAX_WORKERS))
        write_json(folder / MARKER, summary.to_dict())
    return summary


def _write_log(
    world: World, folder: Path, num_rows: dict[str, int], progress: Progress | None, workers: int
) -> SimulationSummary:
    config, traffic = world.config, Traffic(world)
    log = _LogWriter(world, folder)
    for number, events in enumerate(_in_order(traffic.warm_up, traffic.num_warm_up_blocks, workers)):
        is_last = number + 1 == traffic.num_warm_up_blocks
        log.add_events(events, until=config.start_time_us if is_last else traffic.warm_up_start(number + 1))
    all_rows, later_rows, popularity = CeilingCounter(), CeilingCounter(), PopularityCounter(len(world.items))
    first_later = round((1 - LATER_SHARE) * traffic.num_requests)
    first_time = last_time = 0
    for number, block in enumerate(_in_order(traffic.block, traffic.num_blocks, workers)):
        first_request = number * REQUESTS_PER_BLOCK
        log.add_block(block, first_request, number)
        is_last = number + 1 == traffic.num_blocks
        log.add_events(block.events, until=None if is_last else traffic.block_start(number + 1))
        all_rows.update(block.probabilities, block.clicks)
        later = first_request + block.request_of_row >= first_later
        later_rows.update(block.probabilities[later], block.clicks[later])
        popularity.update(block.items[later], block.clicks[later], is_later=True)
        popularity.update(block.items[~later], block.clicks[~later], is_later=False)
        first_time = int(block.times[0]) if number == 0 else first_time
        last_time = int(block.times[-1])
        if progress is not None:
            progress(log.impressions.num_rows, config.num_impressions)
    log.close()
    return SimulationSummary(
        config=config,
        num_rows={"impressions": log.impressions.num_rows, "events": log.events.num_rows, **num_rows},
        num_requests=traffic.num_requests,
        num_events_by_type=log.num_events_by_type,
        first_time=first_time,
        last_time=last_time,
        ceiling=all_rows.result(),
        later_ceiling=later_rows.result(),
        later_popularity_auc=popularity.auc(),
    )


class _LogWriter:
    """The three views that grow with time."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world, rows_per_file = world, world.config.rows_per_file
        nothing = empty_block()
        impressions, truth = impressions_table(world, nothing, 0, 0), truth_table(nothing)
        events = events_table(world, nothing.events)
        self.impressions = ViewWriter(folder / "impressions.parquet", impressions.schema, rows_per_file=rows_per_file)
        self.truth = ViewWriter(folder / "truth.parquet", truth.schema, rows_per_file=rows_per_file)
        self.events = ViewWriter(folder / "events.parquet", events.schema, rows_per_file=rows_per_file)
        self.num_events_by_type = dict.fromkeys(EVENT_TYPES, 0)
        self._sorter = EventSorter()

    def add_block(self, block: Block, first_request: int, number: int) -> None:
        self.impressions.write(impressions_table(self._world, block, first_request, number))
        self.truth.write(truth_table(block))

    def add_events(self, events: Events, *, until: int | None) -> None:
        self._sorter.add(events)
        ready = self._sorter.take_before(until)
        if ready is None:
            return
        self.events.write(events_table(self._world, ready))
        for kind, count in enumerate(np.bincount(ready.types, minlength=len(EVENT_TYPES))):
            self.num_events_by_type[EVENT_TYPES[kind]] += int(count)

    def close(self) -> None:
        for writer in (self.impressions, self.truth, self.events):
            writer.close()


def _write_all(path: Path, tables: Iterator[Any]) -> int:
    first = next(tables)
    writer = ViewWriter(path, first.schema, rows_per_file=2**62)
    writer.write(first)
    for table in tables:
        writer.write(table)
    writer.close()
    return writer.num_rows


def _in_order(generate: Callable[[int], T], count: int, workers: int) -> Iterator[T]:
    """``generate(0), generate(1), ...`` by so many threads; at most ``workers + 1`` results wait."""
    if workers <= 1:
        yield from map(generate, range(count))
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque()
        for number in range(count):
            waiting.append(pool.submit(generate, number))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
