"""Batch iteration: rows a second out of the memory-mapped training set, at short and long histories.

Twice: for ranking requests of 10 to 50 candidates, whose history is gathered once a request, and for a plain log of one
candidate a request, the worst case. Batches are shuffled as in training and built in the caller's thread, so that the
figure is the cost of building them; a trainer builds them in the background.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine_record
from benchmarks.simulated import simulated_training_set, with_max_length
from recsys.training_set import TrainingSet
from training.data import BatchLoader, ShuffleConfig


def run(
    num_impressions: int = 200_000,
    *,
    max_lengths: Sequence[int] = (50, 500),
    batch_size: int = 1024,
    max_batches: int = 150,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Simulates, builds, and iterates over batches.

    Args:
        num_impressions: about so many.
        max_lengths: of every history; users have as many events.
        batch_size: rows.
        max_batches: of a pass; passes over long histories of a plain log would take minutes.
        repeats: passes; the median counts. One more pass comes first and does not count.
        seed: of simulator and shuffle.

    Returns:
        Figures by name: rows a second, events a second and the mean history length, for each kind of log and each
        maximum length; the machine.
    """
    figures: dict[str, Any] = {"batch_size": batch_size, "repeats": repeats}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for kind, max_candidates in (("requests", 50), ("flat", 1)):
            with tempfile.TemporaryDirectory(prefix="recsys-bench-") as scratch:
                training_set = simulated_training_set(
                    Path(scratch),
                    num_impressions=num_impressions,
                    history_length=2 * max(max_lengths),
                    max_candidates=max_candidates,
                    seed=seed,
                )
                for length in max_lengths:
                    cut = with_max_length(training_set, length)
                    passes = [_pass(cut, batch_size, max_batches, seed, epoch) for epoch in range(repeats + 1)][1:]
                    rows, events, requests, _ = passes[0]
                    figures |= {
                        f"{kind}_rows_per_s_at_{length}": round(statistics.median(p[0] / p[3] for p in passes)),
                        f"{kind}_events_per_s_at_{length}": round(statistics.median(p[1] / p[3] for p in passes)),
                        f"{kind}_mean_history_at_{length}": round(events / requests, 1),
                        f"{kind}_rows_per_request": round(rows / requests, 1),
                    }
    finally:
        torch.set_num_threads(threads)
    return {**figures, "machine": machine_record()}


def _pass(
    training_set: TrainingSet, batch_size: int, max_batches: int, seed: int, epoch: int
) -> tuple[int, int, int, float]:
    """Rows, events and requests of a pass, and its seconds."""
    loader = BatchLoader(training_set, "train", batch_size, ShuffleConfig(), seed=seed, epoch=epoch, prefetch=0)
    rows = events = requests = 0
    began = time.perf_counter()
    for loaded in loader:
        rows += loaded.batch.num_rows
        requests += loaded.batch.num_requests
        events += sum(len(history.times) for history in loaded.batch.histories.values())
        if loaded.index + 1 == max_batches:
            break
    return rows, events, requests, time.perf_counter() - began
