from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store import event_shards
from feature_store.event_log import EventLog, stable_order
from feature_store.event_shards import NUM_SHARDS, EventBlock, EventShards, distinct, in_shard_order, shard_bounds
from feature_store.sources import to_arrow
from tests.feature_store.small_views import build, make_views, same_sets


def random_events(num_events: int, num_users: int, seed: int) -> EventBlock:
    rng = np.random.default_rng(seed)
    return EventBlock(
        np.sort(rng.choice(10 * num_events, num_events, replace=False)),
        rng.integers(1, num_users + 1, num_events),
        rng.integers(0, 50, num_events),
        rng.integers(0, 20, num_events),  # many ties
        rng.integers(1, 4, num_events).astype(np.uint64),
    )


@pytest.mark.parametrize("memory_bytes", [1 << 30, 1])
def test_sorted_shard_by_shard_is_sorted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    monkeypatch.setattr(event_shards, "MEMORY_BYTES", memory_bytes)
    num_users, events = 40, random_events(5_000, 40, seed=3)
    bounds = shard_bounds(to_arrow(in_shard_order(pl.Series(np.arange(num_users) * 7)))) + 1
    shards = EventShards(bounds, num_items=50, num_events=50_000, num_histories=2, folder=tmp_path / "shards")
    for start in range(0, events.num_events, 700):
        shards.add(EventBlock(*(c[start : start + 700] for c in events.columns)))
    assert (memory_bytes == 1) == (tmp_path / "shards").exists()
    for history, log in enumerate(shards.logs()):
        is_in = (events.histories >> np.uint64(history)) & np.uint64(1) == 1
        chosen = [c[is_in] for c in events.columns[:4]]
        expected = EventLog.build(*chosen, num_users=num_users + 1)
        for name in (*EventLog.COLUMNS, "user_offsets"):
            np.testing.assert_array_equal(getattr(log, name), getattr(expected, name), err_msg=name)


def test_users_of_a_shard_are_neighbours() -> None:
    keys = in_shard_order(pl.Series([f"user {i}" for i in range(1_000)]))
    bounds = shard_bounds(to_arrow(keys))
    assert sorted(keys.to_list()) == sorted(f"user {i}" for i in range(1_000))
    assert bounds[0] == 0
    assert bounds[-1] == 1_000
    sizes = np.diff(bounds)
    assert len(sizes) == NUM_SHARDS
    assert sizes.min() > 0
    assert sizes.max() < 40  # 15.6 expected; a hash that puts 40 in one shard is no hash
    for start, stop in itertools.pairwise(bounds.tolist()):
        assert keys[start:stop].is_sorted()


def test_a_build_that_spills_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = make_views(num_events=2_000)
    in_memory = build(tmp_path / "a", views)
    monkeypatch.setattr(event_shards, "MEMORY_BYTES", 1)
    monkeypatch.setattr("feature_store.sources._BLOCK_ROWS", 128)
    same_sets(in_memory, build(tmp_path / "b", views))
    assert not list((tmp_path / "b" / "training_set").rglob("*.bin"))


@given(
    st.one_of(
        st.lists(st.integers(-3, 3), max_size=30),
        st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.integers(5, 9)), max_size=30),
    )
)
def test_distinct_keys_are_those_of_a_set(keys: list[int | None]) -> None:
    found = distinct(pl.Series("user", keys, dtype=pl.Int64))
    assert len(found) == len(set(keys))
    assert set(found) == set(keys)
    assert found.name == "user"


@pytest.mark.parametrize("num_values", [1, 3, 1_000_000])
def test_equal_rows_keep_their_order(num_values: int) -> None:
    rng = np.random.default_rng(0)
    keys = [rng.integers(0, num_values, 3_000), rng.integers(0, 2, 3_000)]
    np.testing.assert_array_equal(stable_order(*keys), np.lexsort(keys[::-1]))
