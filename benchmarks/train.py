"""Training DIN in one process: rows a second, from mapped files to updated weights.

The model is DIN as its defaults make it, on the simulator's schema; the optimizers are the trainer's defaults. Timed
are whole steps as the trainer takes them: batch, forward, backward with the fused embedding optimizer, dense step.
Everything runs in one thread, the building of batches too, so that the figure does not depend on what else the machine
does with the others.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine_record
from benchmarks.simulated import simulated_training_set, with_max_length
from recsys.models import build_model
from recsys.models.din import DINConfig
from recsys.training_set import TrainingSet
from training.console import quiet_libraries
from training.data import BatchLoader, LoadedBatch
from training.experiment import TrainingConfig
from training.memory import keep_freed_memory
from training.objective import Objective
from training.strategy import SingleProcess


def run(
    num_impressions: int = 100_000,
    *,
    max_lengths: Sequence[int] = (50, 500),
    batch_size: int = 1024,
    steps: int = 10,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Simulates, builds, and trains.

    Args:
        num_impressions: about so many.
        max_lengths: of every history; users have as many events.
        batch_size: rows.
        steps: in each repeat.
        repeats: timed in turn; the median counts. One more comes first and does not count.
        seed: of simulator, shuffle and weights.

    Returns:
        Figures by name: rows a second and milliseconds a step, for ranking requests and for a plain log, at each
        maximum length; the machine.
    """
    quiet_libraries()
    keep_freed_memory()
    figures: dict[str, Any] = {"batch_size": batch_size, "threads": 1, "repeats": repeats}
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
                    seconds, rows = _train(cut, batch_size, steps, repeats, seed)
                    figures |= {
                        f"{kind}_rows_per_s_at_{length}": round(rows / seconds),
                        f"{kind}_step_ms_at_{length}": round(seconds / steps * 1e3, 2),
                    }
    finally:
        torch.set_num_threads(threads)
    return {**figures, "machine": machine_record()}


def _train(training_set: TrainingSet, batch_size: int, steps: int, repeats: int, seed: int) -> tuple[float, float]:
    """Median seconds of ``steps`` steps, and the mean rows in them."""
    config = TrainingConfig()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = build_model(DINConfig(), training_set.schema, training_set.encoder.table_sizes)
        strategy = SingleProcess("cpu")
        network, optimizer, *_ = strategy.prepare(model, config.embedding_optimizer, config.dense_optimizer)
        objective = Objective(training_set.schema, {})
        loader = BatchLoader(training_set, "train", batch_size, config.shuffle, seed=seed, prefetch=0)
        batches = iter(loader)
        network.train()

        def step(loaded: LoadedBatch) -> int:
            assert loaded.batch.labels is not None
            optimizer.zero_grad()
            objective(network(loaded.batch), loaded.batch.labels, loaded.num_rows).backward()
            optimizer.step()
            return loaded.num_rows

        seconds, rows = [], []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            rows.append(sum(step(loaded) for loaded in islice(batches, steps)))
            seconds.append(time.perf_counter() - began)
    if min(rows[1:]) == 0:
        raise ValueError(f"num_impressions must give {steps * (repeats + 1)} batches of {batch_size} rows")
    return statistics.median(seconds[1:]), statistics.mean(rows[1:])
