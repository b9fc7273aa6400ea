"""Batches for training and evaluation: shuffled, resumable, shared out over ranks, prefetched.

**Shuffling in bounded memory.** A permutation of millions of requests would read the mapped files at random. Instead,
blocks of neighbouring requests are permuted, a buffer is filled with the next ``buffer_blocks`` of them, and the
requests in the buffer are shuffled. Everything derives from ``(seed, epoch, buffer)``, so the order is a pure function
of the configuration: no state is carried along, and resuming at batch 1,000 of epoch 3 computes the order up to there
without reading a row.

**Batches are whole requests**, as many as fit in ``batch_size`` rows and at least one. Nothing is dropped. Where each
request has one row, every batch but the epoch's last has ``batch_size`` rows exactly.

**Ranks** share out each *global* batch, so that two ranks together see the batches that one process sees.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from pydantic import Field

from recsys.batch import Batch
from recsys.config import Config
from recsys.errors import ConfigError
from recsys.training_set import USER_ROW, TrainingSet, end_column, start_column


class ShuffleConfig(Config):
    """How requests are shuffled; up to ``block_requests * buffer_blocks`` requests are shuffled fully."""

    block_requests: int = Field(1024, ge=1, description="neighbouring requests that travel together")
    buffer_blocks: int = Field(256, ge=1, description="blocks that are shuffled into each other")
    length_bucket_batches: int = Field(
        1,
        ge=1,
        le=65_536,
        description="batches at a time whose requests are sorted by the length of their histories and cut again, so "
        "that those of a batch are alike and little is padded; the new batches are shuffled. 1: batches stay as they "
        "are drawn. For histories of all lengths up to hundreds of events, 50 is a good number",
    )


def shuffled_requests(num_requests: int, shuffle: ShuffleConfig, *, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Every request of an epoch once, a buffer at a time.

    Args:
        num_requests: requests are ``0`` up to this.
        seed: at least 0; of the run.
        epoch: at least 0.

    Yields:
        Positions of requests, int64.
    """
    num_blocks = -(-num_requests // shuffle.block_requests)
    blocks = np.random.default_rng([seed, epoch]).permutation(num_blocks)
    for number, first in enumerate(range(0, num_blocks, shuffle.buffer_blocks)):
        starts = blocks[first : first + shuffle.buffer_blocks, None] * shuffle.block_requests
        requests = (starts + np.arange(shuffle.block_requests)).reshape(-1)
        requests = requests[requests < num_requests]
        np.random.default_rng([seed, epoch, number]).shuffle(requests)
        yield requests


def ordered_requests(num_requests: int, *, piece: int = 1 << 18) -> Iterator[np.ndarray]:
    """Every request in the order of the split, a piece at a time."""
    for first in range(0, num_requests, piece):
        yield np.arange(first, min(first + piece, num_requests), dtype=np.int64)


def sampled(pieces: Iterator[np.ndarray], fraction: float, *, seed: int) -> Iterator[np.ndarray]:
    """A part of a stream of requests: each is in it or not whatever the order, and a larger part holds a smaller one.

    Args:
        pieces: positions of requests.
        fraction: about how many, in (0, 1].
        seed: at least 0; which ones.
    """
    for piece in pieces:
        if fraction < 1:
            # The finaliser of splitmix64: a number in [0, 2^64) for each request, the same in every epoch.
            value = piece.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (seed + 1) % 2**64)
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            value ^= value >> np.uint64(31)
            piece = piece[value < np.uint64(fraction * 2.0**64)]
        yield piece


def packed(pieces: Iterator[np.ndarray], row_offsets: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Cuts a stream of requests into batches of whole requests.

    Args:
        pieces: positions of requests.
        row_offsets: ``(R + 1,)``, the rows of each request of the split.
        batch_size: rows; a request with more makes a batch by itself.

    Yields:
        Positions of the requests of one batch, in the order of the stream.
    """
    pending = np.zeros(0, dtype=np.int64)
    for piece in pieces:
        pending = np.concatenate([pending, piece])
        ends = np.cumsum(row_offsets[pending + 1] - row_offsets[pending])
        start = 0
        while True:
            taken = ends[start - 1] if start else 0
            stop = max(int(np.searchsorted(ends, taken + batch_size, side="right")), start + 1)
            if stop >= len(pending):  # the next piece may hold a request that still fits
                break
            yield pending[start:stop]
            start = stop
        pending = pending[start:]
    if len(pending):
        yield pending


def history_lengths(training_set: TrainingSet, split: str, requests: np.ndarray | slice = slice(None)) -> np.ndarray:
    """``(n,)`` int64: events strictly before each request, all that are stored, in its longest history.

    Args:
        requests: positions; all of the split if not given.
    """
    stored = training_set.split(split).requests
    lengths = [
        stored.array(end_column(history.name))[requests] - stored.array(start_column(history.name))[requests]
        for history in training_set.schema.histories
    ]
    none = np.zeros(len(stored.array(USER_ROW)[requests]), np.int64)
    longest: np.ndarray = np.maximum.reduce([none, *lengths])
    return longest


def by_length(pieces: Iterator[np.ndarray], length: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """Sorts each piece of a stream of requests by ``length``, the longest first, and is stable."""
    for piece in pieces:
        yield piece[np.argsort(-length(piece), kind="stable")]


def bucketed(
    batches: Iterator[np.ndarray],
    length: Callable[[np.ndarray], np.ndarray],
    row_offsets: np.ndarray,
    batch_size: int,
    pool: int,
    *,
    seed: Sequence[int],
) -> Iterator[np.ndarray]:
    """Cuts every ``pool`` batches again into batches of requests of about one length, in shuffled order.

    Which batch a request is in still depends on the shuffle: on who else is in its pool.

    Args:
        batches: positions of the requests of each.
        length: of requests, given their positions.
        row_offsets: see :func:`packed`.
        batch_size: rows.
        pool: batches that are looked at together.
        seed: of the order of the new batches.

    Yields:
        Positions of the requests of one batch.
    """
    for number in itertools.count():
        pooled = list(islice(batches, pool))
        if not pooled:
            return
        again = list(packed(by_length(iter([np.concatenate(pooled)]), length), row_offsets, batch_size))
        for position in np.random.default_rng([*seed, number, 1]).permutation(len(again)):
            yield again[position]


def share(requests: np.ndarray, row_offsets: np.ndarray, rank: int, world: int) -> np.ndarray:
    """A rank's requests of a global batch: a contiguous part, balanced by rows; in rank order they make the batch."""
    if world == 1:
        return requests
    ends = np.cumsum(row_offsets[requests + 1] - row_offsets[requests])
    middles = ends - (row_offsets[requests + 1] - row_offsets[requests]) / 2
    owner = np.minimum(middles * world // max(int(ends[-1]), 1), world - 1)
    mine: np.ndarray = requests[owner == rank]
    return mine


@dataclass(frozen=True)
class LoadedBatch:
    """A rank's part of one global batch.

    Attributes:
        batch: what the model takes.
        index: position of the global batch in its epoch.
        num_rows: rows of the global batch.
        is_filler: the global batch had fewer requests than there are ranks, and none is left for this one. ``batch`` is
            then a request of another rank with every label missing, so that all ranks make the same calls.
    """

    batch: Batch
    index: int
    num_rows: int
    is_filler: bool = False


@dataclass(frozen=True)
class BatchLoader:
    """Iterates over the batches of one pass over a split, built by a background thread.

    Each ``iter()`` starts a pass at ``start_batch`` and a thread that ends with it. Close the iterator
    (``contextlib.closing``) where it may be left early.

    Args:
        training_set: where the rows are.
        split: ``train``, ``validation`` or ``test``.
        batch_size: rows of a global batch.
        shuffle: how to shuffle; None for the order of the split.
        seed: of the shuffle.
        epoch: the pass; each has its own order.
        start_batch: global batches to skip, unread.
        rank: of this process.
        world: number of processes.
        prefetch: batches built ahead; 0 builds them in the caller's thread.
        fraction: share of the requests to read, in (0, 1]; the same ones in every epoch.
        history_length: newest events of each history to read; the schema's bounds if not given.
        by_length: without ``shuffle``: a piece of the split at a time, its requests sorted by the length of their
            histories, so that little is padded.

    Example:
        >>> loader = BatchLoader(training_set, "train", 1024, ShuffleConfig(), seed=1)  # doctest: +SKIP
        >>> for loaded in loader:  # doctest: +SKIP
        ...     logits = model(loaded.batch)
    """

    training_set: TrainingSet
    split: str
    batch_size: int
    shuffle: ShuffleConfig | None = None
    seed: int = 0
    epoch: int = 0
    start_batch: int = 0
    rank: int = 0
    world: int = 1
    prefetch: int = 4
    fraction: float = 1.0
    history_length: int | None = None
    by_length: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank must be at least 0 and below world, got {self.rank} of {self.world}")

    @property
    def num_rows(self) -> int:
        """Rows of the part of the split that is read."""
        part = self.training_set.split(self.split)
        if self.fraction == 1:
            return part.num_rows
        pieces = sampled(ordered_requests(part.num_requests), self.fraction, seed=self.seed)
        return sum(int((part.row_offsets[p + 1] - part.row_offsets[p]).sum()) for p in pieces)

    def plan(self) -> Iterator[np.ndarray]:
        """Positions of the requests of each global batch, from the first."""
        part, shuffle = self.training_set.split(self.split), self.shuffle
        if shuffle is None:
            stream = ordered_requests(part.num_requests)
        else:
            stream = shuffled_requests(part.num_requests, shuffle, seed=self.seed, epoch=self.epoch)
        stream = sampled(stream, self.fraction, seed=self.seed)
        if shuffle is None and self.by_length:
            stream = by_length(stream, self._length)
        batches = packed(stream, part.row_offsets, self.batch_size)
        if shuffle is not None and shuffle.length_bucket_batches > 1:
            pool, seed = shuffle.length_bucket_batches, [self.seed, self.epoch]
            return bucketed(batches, self._length, part.row_offsets, self.batch_size, pool, seed=seed)
        return batches

    def _length(self, requests: np.ndarray) -> np.ndarray:
        """As far as it is read."""
        longest = max((history.max_length for history in self.training_set.schema.histories), default=0)
        bound = longest if self.history_length is None else min(longest, self.history_length)
        lengths: np.ndarray = np.minimum(history_lengths(self.training_set, self.split, requests), bound)
        return lengths

    def __iter__(self) -> Generator[LoadedBatch]:
        if self.prefetch == 0:
            return self._batches()
        return prefetched(self._batches, self.prefetch)

    def _batches(self) -> Generator[LoadedBatch]:
        row_offsets = self.training_set.split(self.split).row_offsets
        for index, requests in enumerate(islice(self.plan(), self.start_batch, None), self.start_batch):
            num_rows = int((row_offsets[requests + 1] - row_offsets[requests]).sum())
            mine = share(requests, row_offsets, self.rank, self.world)
            is_filler = len(mine) == 0
            taken = requests[-1:] if is_filler else mine
            batch = Batch.from_training_set(self.training_set, self.split, taken, max_length=self.history_length)
            if is_filler and batch.labels is not None:
                batch = replace(batch, labels=torch.full_like(batch.labels, torch.nan))
            yield LoadedBatch(batch, index, num_rows, is_filler)


_END = object()


def prefetched(make: Callable[[], Generator[LoadedBatch]], depth: int) -> Generator[LoadedBatch]:
    """Runs a generator in a thread, at most ``depth`` items ahead of its consumer.

    An exception in the thread is raised in the consumer with its own traceback. When the consumer closes this
    generator, or drops it, the thread ends after the item in hand.
    """
    items: queue.Queue[object] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: object) -> bool:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.05)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            with closing(make()) as source:
                for item in source:
                    if not put(item):
                        return
        except BaseException as err:  # noqa: BLE001 - handed to the consumer, which raises it
            put(err)
        else:
            put(_END)

    thread = threading.Thread(target=produce, name="batch-prefetch", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            assert isinstance(item, LoadedBatch)
            yield item
    finally:
        stopped.set()
        thread.join()
