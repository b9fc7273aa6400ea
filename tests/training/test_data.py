from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.batch import Batch
from recsys.errors import ConfigError
from recsys.training_set import SOURCE_ROW, TrainingSet
from training.data import (
    BatchLoader,
    LoadedBatch,
    ShuffleConfig,
    bucketed,
    history_lengths,
    packed,
    prefetched,
    share,
    shuffled_requests,
)

SHUFFLE = ShuffleConfig(block_requests=4, buffer_blocks=3)


def stream(num_requests: int, *, seed: int = 0, epoch: int = 0, shuffle: ShuffleConfig = SHUFFLE) -> np.ndarray:
    return np.concatenate(list(shuffled_requests(num_requests, shuffle, seed=seed, epoch=epoch)))


@given(
    num_requests=st.integers(1, 200),
    block_requests=st.integers(1, 20),
    buffer_blocks=st.integers(1, 8),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_is_a_permutation_read_through_a_bounded_buffer(
    num_requests: int, block_requests: int, buffer_blocks: int, seed: int
) -> None:
    shuffle = ShuffleConfig(block_requests=block_requests, buffer_blocks=buffer_blocks)
    buffers = list(shuffled_requests(num_requests, shuffle, seed=seed, epoch=0))
    assert np.array_equal(np.sort(np.concatenate(buffers)), np.arange(num_requests))
    for requests in buffers:
        assert len(requests) <= block_requests * buffer_blocks
        assert len(np.unique(requests // block_requests)) <= buffer_blocks


def test_the_order_is_decided_by_seed_and_epoch_alone() -> None:
    assert np.array_equal(stream(500, seed=3, epoch=2), stream(500, seed=3, epoch=2))
    assert not np.array_equal(stream(500, seed=3, epoch=2), stream(500, seed=3, epoch=1))
    assert not np.array_equal(stream(500, seed=3, epoch=2), stream(500, seed=4, epoch=2))


def test_requests_of_different_blocks_are_mixed() -> None:
    """Within a full buffer every position is equally likely: the first place holds each request about equally often."""
    shuffle = ShuffleConfig(block_requests=2, buffer_blocks=5)
    first = np.array([stream(10, seed=s, shuffle=shuffle)[0] for s in range(2000)])
    counts = np.bincount(first, minlength=10)
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(200 * 0.9))  # 5 standard deviations of a binomial


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    batch_size=st.integers(1, 20),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_batches_are_the_greedy_packing_of_the_stream_however_it_is_cut(
    sizes: list[int], batch_size: int, cuts: list[int]
) -> None:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    pieces = np.split(np.arange(len(sizes)), sorted(min(c, len(sizes)) for c in cuts))
    expected: list[list[int]] = []
    for request, size in enumerate(sizes):
        if expected and sum(sizes[r] for r in expected[-1]) + size <= batch_size:
            expected[-1].append(request)
        else:
            expected.append([request])
    assert [b.tolist() for b in packed(iter(pieces), offsets, batch_size)] == expected


def test_flat_logs_give_batches_of_exactly_the_size() -> None:
    batches = list(packed(shuffled_requests(1000, SHUFFLE, seed=0, epoch=0), np.arange(1001), 64))
    assert [len(b) for b in batches] == [64] * 15 + [40]


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=80), pool=st.integers(2, 5), seed=st.integers(0, 99))
def test_buckets_hold_every_request_of_their_pool_once_and_no_two_overlap_in_length(
    lengths: list[int], pool: int, seed: int
) -> None:
    length, size = np.array(lengths), 4
    drawn = np.random.default_rng(seed).permutation(len(lengths))
    batches = np.split(drawn, range(size, len(drawn), size))
    offsets = np.arange(len(lengths) + 1)

    def cut() -> list[np.ndarray]:
        return list(bucketed(iter(batches), lambda r: length[r], offsets, size, pool, seed=[seed, 0]))

    again = cut()
    assert [b.tolist() for b in again] == [b.tolist() for b in cut()]
    assert sorted(len(b) for b in again) == sorted(len(b) for b in batches)
    for first in range(0, len(batches), pool):
        old, new = batches[first : first + pool], again[first : first + pool]
        assert sorted(np.concatenate(old)) == sorted(np.concatenate(new))
        spans = sorted((length[b].min(), length[b].max()) for b in new)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40), world=st.integers(1, 6), seed=st.integers(0, 1000))
def test_ranks_share_a_batch_in_order_and_evenly(sizes: list[int], world: int, seed: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    requests = np.random.default_rng(seed).permutation(len(sizes))
    shares = [share(requests, offsets, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(shares), requests)
    for part in shares:
        assert abs(sum(sizes[r] for r in part) - sum(sizes) / world) <= max(sizes)


def rows_of(batches: list[LoadedBatch]) -> list[list[int]]:
    rows = []
    for loaded in batches:
        assert loaded.batch.source_row is not None
        rows.append([] if loaded.is_filler else loaded.batch.source_row.tolist())
    return rows


def loader(training_set: TrainingSet, **settings: Any) -> BatchLoader:
    return BatchLoader(training_set, "train", 32, SHUFFLE, seed=7, **settings)


def test_an_epoch_loads_every_row_once(training_set: TrainingSet) -> None:
    rows = list(chain.from_iterable(rows_of(list(loader(training_set)))))
    assert sorted(rows) == sorted(training_set.split("train").impressions.array(SOURCE_ROW).tolist())


def test_batches_of_one_length_load_every_row_once_and_pad_less(training_set: TrainingSet) -> None:
    shuffle = SHUFFLE.model_copy(update={"length_bucket_batches": 6})
    plain, alike = loader(training_set), BatchLoader(training_set, "train", 32, shuffle, seed=7)
    rows = list(chain.from_iterable(rows_of(list(alike))))
    assert sorted(rows) == sorted(chain.from_iterable(rows_of(list(plain))))
    assert [b.tolist() for b in alike.plan()] != [b.tolist() for b in replace(alike, epoch=1).plan()]

    def padded(batches: BatchLoader) -> int:
        return sum(int(history_lengths(training_set, "train", b).max()) * len(b) for b in batches.plan())

    assert padded(alike) < 0.9 * padded(plain)
    in_order = BatchLoader(training_set, "train", 32, by_length=True)
    lengths = np.concatenate([history_lengths(training_set, "train", b) for b in in_order.plan()])
    bound = max(history.max_length for history in training_set.schema.histories)
    assert (np.diff(np.minimum(lengths, bound)) <= 0).all()


def test_resuming_gives_the_rest_without_reading_what_it_skips(
    training_set: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = list(loader(training_set, prefetch=0))
    read = []
    original = Batch.from_training_set

    def counting(opened: TrainingSet, split: str, requests: np.ndarray, **rest: Any) -> Batch:
        read.append(len(requests))
        return original(opened, split, requests, **rest)

    monkeypatch.setattr(Batch, "from_training_set", counting)
    rest = list(loader(training_set, start_batch=10))
    assert rows_of(rest) == rows_of(full)[10:]
    assert [b.index for b in rest] == list(range(10, len(full)))
    assert len(read) == len(full) - 10


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_the_batches_of_one_process(training_set: TrainingSet, world: int) -> None:
    single = list(loader(training_set))
    ranks = [list(loader(training_set, rank=rank, world=world)) for rank in range(world)]
    assert [list(chain.from_iterable(parts)) for parts in zip(*map(rows_of, ranks), strict=True)] == rows_of(single)
    assert [[b.num_rows for b in rank] for rank in ranks] == [[b.num_rows for b in single]] * world


def test_a_rank_without_requests_gets_one_that_counts_for_nothing(training_set: TrainingSet) -> None:
    ranks = [list(BatchLoader(training_set, "train", 1, rank=rank, world=2)) for rank in range(2)]
    for parts in zip(*ranks, strict=True):
        assert [part.is_filler for part in parts].count(True) == 1
        for part in parts:
            assert part.batch.labels is not None
            assert part.batch.num_rows > 0
            assert bool(part.batch.labels.isnan().all()) == part.is_filler


def test_prefetching_changes_nothing(training_set: TrainingSet) -> None:
    plain = list(loader(training_set, prefetch=0))
    ahead = list(loader(training_set, prefetch=3))
    assert rows_of(plain) == rows_of(ahead)
    for one, other in zip(plain, ahead, strict=True):
        assert torch.equal(one.batch.histories["clicked"].times, other.batch.histories["clicked"].times)


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "batch-prefetch"]


def test_an_iterator_left_early_ends_its_thread(training_set: TrainingSet) -> None:
    with closing(iter(loader(training_set, prefetch=1))) as batches:
        next(batches)
        assert len(prefetch_threads()) == 1
    assert prefetch_threads() == []


def test_the_thread_runs_no_further_ahead_than_asked() -> None:
    built = []

    def make() -> Generator[Any]:
        for number in range(100):
            built.append(number)
            yield number

    with closing(prefetched(make, 2)) as items:
        with pytest.raises(AssertionError):  # plain numbers are no batches; by now the thread runs
            next(items)
        time.sleep(0.1)
        assert len(built) <= 4  # one taken, two queued, one in hand


def test_an_error_in_the_thread_comes_out_with_its_traceback(
    training_set: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_read(*_: object, **__: object) -> Batch:
        raise OSError("disk on fire")

    monkeypatch.setattr(Batch, "from_training_set", broken_read)
    with pytest.raises(OSError, match="disk on fire") as caught:
        list(loader(training_set))
    assert "broken_read" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert prefetch_threads() == []


def test_settings_out_of_range_are_refused(training_set: TrainingSet) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        BatchLoader(training_set, "train", 0)
    with pytest.raises(ConfigError, match="rank must be at least 0 and below world, got 2 of 2"):
        BatchLoader(training_set, "train", 8, rank=2, world=2)
