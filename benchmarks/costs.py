"""What experiments cost, side by side: parameters, a training step, scoring one request.

    python -m benchmarks.costs configs/experiment/{din,suan}_kuairand.yaml --set training.num_threads=1

Nothing is trained: times do not depend on what the weights are. A training step is the mean over some of the first
epoch's batches, the same for all experiments; scoring is the network, uncompiled, on one request: the longest
history of the test split, candidates of many requests. All run in one thread, the experiments in turn, so that whatever
else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine_record
from recsys.batch import Batch
from recsys.models import RankingModel, build_model
from recsys.training_set import TrainingSet
from training.data import BatchLoader, LoadedBatch, history_lengths
from training.distill import build_training_model
from training.experiment import load_experiment
from training.objective import Objective
from training.strategy import SingleProcess
from training.sweep import Arm
from training.timing import scoring_ms


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses arguments and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="experiments of one training set")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=4, help="of the first epoch, that steps are timed on")
    parser.add_argument("--requests", type=int, default=100, help="whose candidates are scored")
    parser.add_argument("--repeats", type=int, default=5, help="that count; one more comes first")
    args = parser.parse_args(arguments)
    arms = [Arm(*load_experiment(config, args.overrides)) for config in args.configs]
    found = run(arms, batches=args.batches, requests=args.requests, repeats=args.repeats) | {
        "machine": machine_record()
    }
    sys.stdout.write(markdown(found))


def run(arms: Sequence[Arm], *, batches: int = 4, requests: int = 100, repeats: int = 5) -> dict[str, Any]:
    """Counts parameters and times every experiment.

    Args:
        arms: experiments of one training set and batch size; the batches are those of the first.
        batches: of the first epoch.
        requests: whose candidates are scored, with the longest history of the test split.
        repeats: that count; one more comes first.

    Returns:
        By experiment: parameters, milliseconds of a step and of scoring; what was timed.
    """
    first = arms[0].experiment
    training_set = TrainingSet.open(first.data.training_set)
    loader = BatchLoader(
        training_set,
        "train",
        first.training.batch_size,
        first.training.shuffle,
        seed=first.training.seed,
        fraction=first.training.data_fraction,
        history_length=first.training.history_length,
    )
    with closing(iter(loader)) as epoch:
        loaded = list(islice(epoch, batches))
    request, events = long_request(training_set, requests, first.training.history_length)
    sizes = training_set.encoder.table_sizes
    models = {arm.name: build_model(arm.experiment.model, arm.schema, sizes).eval() for arm in arms}
    times = scoring_ms(models, request, repeats=repeats)
    steps = step_ms(arms, training_set, loaded, repeats=repeats)
    rows = {
        arm.name: parameters(models[arm.name]) | {"step_ms": steps[arm.name], "scoring_ms": times[arm.name]}
        for arm in arms
    }
    return {
        "models": rows,
        "batch_rows": statistics.mean(each.num_rows for each in loaded),
        "candidates": request.num_rows,
        "events": events,
        "machine": machine_record(),
    }


def parameters(model: RankingModel) -> dict[str, int]:
    """Of the network and of the tables."""
    return {
        "network_parameters": sum(p.numel() for p in model.network.parameters()),
        "table_parameters": sum(p.numel() for p in model.lookup.parameters()),
    }


def long_request(training_set: TrainingSet, num_requests: int, history_length: int | None) -> tuple[Batch, int]:
    """The longest history of the test split with the candidates of so many requests all over it; its events."""
    split = training_set.split("test")
    spread = np.linspace(0, split.num_requests - 1, num_requests - 1).astype(np.int64)
    chosen = np.concatenate([[history_lengths(training_set, "test").argmax()], spread])
    batch = Batch.from_training_set(training_set, "test", chosen, max_length=history_length)
    request = replace(batch, request_of_row=torch.zeros_like(batch.request_of_row)).select_requests(torch.tensor([0]))
    return request, max((int(h.lengths) for h in request.histories.values()), default=0)


def step_ms(
    arms: Sequence[Arm], training_set: TrainingSet, batches: Sequence[LoadedBatch], *, repeats: int = 7
) -> dict[str, float]:
    """Time of a training step of each experiment, the mean over the batches, in one thread, the experiments in turn.

    Args:
        arms: a step is the trainer's: forward, backward with the tables' optimizer, step of the network's.
        training_set: theirs.
        batches: a step is taken on each.
        repeats: whose median counts; one more comes first.

    Returns:
        Milliseconds by name.
    """
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = {arm.name: _step(arm, training_set) for arm in arms}
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                for loaded in batches:
                    step(loaded)
                if repeat > 0:
                    times[name].append((time.perf_counter() - began) * 1e3 / len(batches))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in times.items()}


def _step(arm: Arm, training_set: TrainingSet) -> Callable[[LoadedBatch], None]:
    """Takes steps of a new model of the experiment."""
    config = arm.experiment.training
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        model = build_training_model(arm.experiment, arm.schema, training_set)
    network, optimizer, *_ = SingleProcess("cpu").prepare(model, config.embedding_optimizer, config.dense_optimizer)
    objective = Objective(arm.schema, config.task_weights)
    network.train()

    def step(loaded: LoadedBatch) -> None:
        assert loaded.batch.labels is not None
        optimizer.zero_grad()
        objective(network(loaded.batch), loaded.batch.labels, loaded.num_rows).backward()
        optimizer.step()

    return step


def markdown(found: Mapping[str, Any]) -> str:
    """The table, in the order of the experiments."""
    lines = [
        "| experiment | network / table parameters | training step, ms | scoring, ms |",
        "|---|---|---|---|",
        *(
            f"| {name} | {row['network_parameters']:,} / {row['table_parameters']:,} | {row['step_ms']:.0f} "
            f"| {row['scoring_ms']:.2f} |"
            for name, row in found["models"].items()
        ),
    ]
    note = (
        f"A step: {found['batch_rows']:,.0f} rows in the mean; scoring: the network on one request of "
        f"{found['candidates']} candidates and {found['events']:,} events, eager; one thread."
    )
    return "\n".join([*lines, "", note, "", f"Machine: {json.dumps(found['machine'])}", ""])


if __name__ == "__main__":
    main()
