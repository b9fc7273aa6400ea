"""The simulated world as Arrow tables, and the files that they go to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.datasets.simulator import draws
from feature_store.datasets.simulator.draws import Floats, Ints
from feature_store.datasets.simulator.traffic import EVENT_TYPES, Block, Events, concatenate, in_order
from feature_store.datasets.simulator.world import AGE_GROUPS, DEVICES, GENDERS, World

ENTITIES_PER_ROW_GROUP = 262_144
_NUM_CITIES = 200
_ITEMS_PER_BRAND = 12
_GENERIC_TAGS = ("new", "sale", "classic", "limited", "trending", "handmade", "premium", "basic")
_TOPIC_TAG_SHARE = 0.5
_DECLARED_SHARE = 0.4
_GROWING = ("time", "request_id")


def impressions_table(world: World, block: Block, first_request: int, block_number: int) -> pa.Table:
    """A block's impressions; requests are numbered from ``first_request``."""
    config = world.config
    generator = draws.block_generator(config.seed, draws.MISSING, block_number)
    rows, requests = block.request_of_row, len(block.sizes)
    device_missing = generator.random(requests) < config.missing_rate
    return pa.table(
        {
            "request_id": pa.array(first_request + rows),
            "user_id": pa.array(world.users.ids[block.users][rows]),
            "item_id": pa.array(world.items.ids[block.items]),
            "time": pa.array(block.times[rows]),
            "device": _text(DEVICES, block.devices[rows], device_missing[rows]),
            "position": pa.array(1 + block.places, mask=generator.random(len(rows)) < config.missing_rate),
            "is_click": pa.array(block.clicks.astype(np.int8)),
            "is_like": pa.array(block.likes.astype(np.int8)),
            "is_purchase": pa.array(block.purchases.astype(np.int8)),
        }
    )


def truth_table(block: Block) -> pa.Table:
    """The true click probability of every impression of a block, in the same order."""
    return pa.table({"probability": pa.array(block.probabilities)})


def events_table(world: World, events: Events) -> pa.Table:
    """Events in the order given."""
    kinds = events.types.astype(np.int64)
    # A hash of what the event is, so that the same event has no dwell time however the events are cut into tables.
    missing = draws.uniform(world.config.seed, draws.MISSING, events.users, events.items, events.times, kinds)
    return pa.table(
        {
            "user_id": pa.array(world.users.ids[events.users]),
            "item_id": pa.array(world.items.ids[events.items]),
            "time": pa.array(events.times),
            "type": _text(EVENT_TYPES, kinds),
            "dwell_s": pa.array(events.dwell_s, mask=missing < world.config.missing_rate),
        }
    )


def users_tables(world: World) -> Iterator[pa.Table]:
    """The users view, a row group at a time. Some users have no row, some attributes are null.

    ``declared_categories`` is what a user once said to like: the categories of the interests at the start of the
    warm-up, if the user said anything at all.
    """
    config, users = world.config, world.users
    cities = np.cumsum(1.0 / np.arange(1, _NUM_CITIES + 1))
    for start in range(0, len(users), ENTITIES_PER_ROW_GROUP):
        u = np.arange(start, min(start + ENTITIES_PER_ROW_GROUP, len(users)))
        u = u[_draw(config.seed, 0, u) >= config.missing_entity_rate]
        segments = users.segments[u]
        topics = world.interests(u, np.full(len(u), -float(config.warm_up_days))).topics
        categories = np.sort(topics // config.topics_per_category, axis=1)
        is_repeat = np.zeros_like(categories, dtype=np.bool_)
        is_repeat[:, 1:] = categories[:, 1:] == categories[:, :-1]
        said = _draw(config.seed, 1, u)[:, None] < _DECLARED_SHARE
        declared = _lists(_category_names(config.num_categories), categories, said & ~is_repeat)
        yield pa.table(
            {
                "user_id": pa.array(users.ids[u]),
                "age_group": _text(
                    AGE_GROUPS, segments // len(GENDERS), _missing(config.seed, 2, u, 2 * config.missing_rate)
                ),
                "gender": _text(GENDERS, segments % len(GENDERS), _missing(config.seed, 3, u, config.missing_rate)),
                "city": pa.array(
                    1 + draws.sample_cumulative(cities, _draw(config.seed, 4, u)),
                    mask=_missing(config.seed, 5, u, config.missing_rate),
                ),
                "account_age_days": pa.array(np.floor(-700.0 * np.log1p(-_draw(config.seed, 6, u))).astype(np.int64)),
                "declared_categories": declared,
            }
        )


def items_tables(world: World) -> Iterator[pa.Table]:
    """The items view, a row group at a time. Some items have no row, some attributes are null, some tag lists empty.

    Half of the items carry a tag of their hidden topic; the other tags say nothing.
    """
    config, items = world.config, world.items
    topic_tags = tuple(f"t{t:04d}" for t in range(config.num_topics))
    brands_per_category = max(2, len(items) // config.num_categories // _ITEMS_PER_BRAND)
    for start in range(0, len(items), ENTITIES_PER_ROW_GROUP):
        i = np.arange(start, min(start + ENTITIES_PER_ROW_GROUP, len(items)))
        i = i[_draw(config.seed, 10, i) >= config.missing_entity_rate]
        categories = items.categories[i]
        generic = np.floor(_draw(config.seed, 11, i) * len(_GENERIC_TAGS)).astype(np.int64)
        tags = np.stack([items.topics[i], config.num_topics + generic], axis=1)
        tagged = np.stack([_draw(config.seed, 12, i) < _TOPIC_TAG_SHARE, _draw(config.seed, 13, i) < 0.6], axis=1)
        brand = categories * brands_per_category + np.floor(_draw(config.seed, 14, i) * brands_per_category).astype(
            np.int64
        )
        yield pa.table(
            {
                "item_id": pa.array(items.ids[i]),
                "category": _text(
                    _category_names(config.num_categories),
                    categories,
                    _missing(config.seed, 15, i, config.missing_rate / 4),
                ),
                "brand": pa.array(1000 + brand, mask=_missing(config.seed, 16, i, config.missing_rate)),
                "tags": _lists(topic_tags + _GENERIC_TAGS, tags, tagged),
                "price": pa.array(
                    np.round(items.prices[i], 2).astype(np.float64),
                    mask=_missing(config.seed, 17, i, config.missing_rate),
                ),
                "age_days": pa.array(np.floor(-200.0 * np.log1p(-_draw(config.seed, 18, i))).astype(np.int64)),
            }
        )


class EventSorter:
    """Puts events of consecutive blocks into the order of time, holding back only what a later block may precede."""

    def __init__(self) -> None:
        self._held: list[Events] = []

    def add(self, events: Events) -> None:
        """Takes events that happen at or after the time of the last :meth:`take_before`."""
        self._held.append(events)

    def take_before(self, time: int | None) -> Events | None:
        """The events before ``time`` in order, or all that are held if it is None."""
        if not self._held:
            return None
        held = in_order(concatenate(self._held))
        end = len(held.times) if time is None else int(np.searchsorted(held.times, time))
        self._held = [held.select(slice(end, None))] if end < len(held.times) else []
        return held.select(slice(end)) if end else None


class ViewWriter:
    """Writes a view of any size: one file if it is small, a folder of files of the same name if not.

    Files change between tables, so that two views written with the same tables and the same ``rows_per_file`` have
    the same parts.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, rows_per_file: int) -> None:
        self.num_rows = 0
        self._path, self._schema, self._rows_per_file = path, schema, rows_per_file
        self._parts = path.parent / f".parts-{path.name}"
        self._parts.mkdir()
        self._rows_in_part = 0
        self._num_parts = 0
        self._open_part()

    def write(self, table: pa.Table) -> None:
        """Appends a table as one row group."""
        if self._rows_in_part >= self._rows_per_file:
            self._writer.close()
            self._open_part()
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self.num_rows += table.num_rows
        self._rows_in_part += table.num_rows

    def close(self) -> None:
        """Finishes the last file and puts the view into its place."""
        self._writer.close()
        if self._num_parts > 1:
            self._parts.rename(self._path)
            return
        (self._parts / _part_name(0)).rename(self._path)
        self._parts.rmdir()

    def _open_part(self) -> None:
        path = self._parts / _part_name(self._num_parts)
        # A dictionary pays where values repeat all over a file, not for numbers that only grow or hardly ever repeat.
        repeating = [f.name for f in self._schema if not pa.types.is_floating(f.type) and f.name not in _GROWING]
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=repeating,  # type: ignore[arg-type]
        )
        self._num_parts += 1
        self._rows_in_part = 0


def _part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _category_names(num_categories: int) -> tuple[str, ...]:
    return tuple(f"c{c:02d}" for c in range(num_categories))


def _draw(seed: int, purpose: int, positions: Ints) -> Floats:
    return draws.uniform(seed, draws.ATTRIBUTES, purpose, positions)


def _missing(seed: int, purpose: int, positions: Ints, rate: float) -> npt.NDArray[np.bool_]:
    return _draw(seed, 100 + purpose, positions) < rate


def _text(names: tuple[str, ...], positions: Ints, missing: npt.NDArray[np.bool_] | None = None) -> Any:
    taken: Any = pa.array(positions, mask=missing)
    return pa.array(names, pa.string()).take(taken)


def _lists(names: tuple[str, ...], positions: Ints, kept: npt.NDArray[np.bool_]) -> Any:
    """List column of the positions that are kept of a matrix of them; rows with none are empty or null."""
    lengths = kept.sum(axis=1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    # Every second row without values is null instead of empty: readers meet both.
    is_null: Any = pa.array((lengths == 0) & (np.arange(len(lengths)) % 2 == 0))
    starts: Any = pa.array(offsets)
    return pa.ListArray.from_arrays(starts, _text(names, positions[kept]), mask=is_null)
