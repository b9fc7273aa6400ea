"""Two processes with sharded tables take the steps that one process takes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recsys.config import validate
from recsys.errors import ConfigError
from recsys.layers import unified_encoder
from recsys.layers.activations import Dice, masked_moments
from recsys.models.suan import SUANConfig
from recsys.schema import Schema
from recsys.training_set import TrainingSet
from tests.synthetic import SCHEMA, SPLIT
from tests.training_sets import build_synthetic
from training.checkpoint import CheckpointStore
from training.data import BatchLoader, LoadedBatch
from training.experiment import ExperimentConfig
from training.run import RunFolder
from training.trainer import Trainer, train

pytestmark = [pytest.mark.dist, pytest.mark.slow]


SUAN: dict[str, Any] = {"embedding_dim": 8, "hidden": (8,), "num_layers": 1}
TEACHER = {"kind": "suan"} | SUAN


def experiment(
    folder: Path, *, distillation: dict[str, Any] | None = None, **training: Any
) -> tuple[ExperimentConfig, Schema]:
    values = {
        "name": "sharded",
        "schema_file": "unused.yaml",
        "data": {"views": str(folder / "views"), "training_set": str(folder / "training_set"), "split": SPLIT},
        "model": {"kind": "din", "embedding_dim": 8, "hidden": [16, 8]},
        "training": {
            "epochs": 8,
            "batch_size": 32,
            "log_every_steps": 1,
            "num_threads": 1,
            "device": "cpu",
            "selection": {"patience": 100},
        }
        | training,
        "distillation": distillation,
        "tracking": {"enabled": False},
    }
    return validate(ExperimentConfig, values, source="test"), validate(Schema, SCHEMA, source="test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    training_set: TrainingSet = build_synthetic(path, num_requests=220)
    assert training_set.split("train").num_rows > 13 * 32
    return path


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if line["kind"] == "step"]


def in_processes(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Runs ``function(*arguments)`` on every rank of a gloo group."""
    store = arguments[0] / f"store-{function.__name__}-{world}"
    mp.start_processes(_rank, args=(function, world, str(store), arguments), nprocs=world, start_method="spawn")


def _rank(rank: int, function: Callable[..., None], world: int, store: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def test_two_ray_workers_follow_one_process_for_100_steps(folder: Path, tmp_path: Path) -> None:
    config, schema = experiment(folder)
    one = train(config, schema, tmp_path / "one", progress=False)
    two = train(config, schema, tmp_path / "two", workers=2, progress=False)

    single, sharded = losses(tmp_path / "one"), losses(tmp_path / "two")

    assert len(single) == len(sharded) >= 100
    assert single[-1] < 0.9 * single[0], "the run must have moved"
    np.testing.assert_allclose(sharded[:100], single[:100], rtol=0, atol=1e-5)
    assert two.test is not None
    assert one.test is not None
    assert two.test["click"]["num_rows"] == one.test["click"]["num_rows"]
    assert two.test["click"]["logloss"] == pytest.approx(one.test["click"]["logloss"], abs=1e-4)
    # What two processes have saved, one process reads.
    again = train(config, schema, tmp_path / "two", progress=False)
    assert again.was_finished
    assert again.best_checkpoint == two.best_checkpoint


@pytest.mark.parametrize(
    "settings",
    [
        {
            "embedding_optimizer": {"kind": "adam", "lr": 0.01},
            "embedding_l2": 0.05,
            "dense_l2": 0.01,
            "gradient_clip_norm": 0.3,
            "lr_schedule": {"kind": "plateau", "warmup_steps": 5},
        },
        {
            "embedding_optimizer": {"kind": "lazy_adam", "lr": 0.01},
            "gradient_clip_norm": 0.3,
            "mini_batch_aware_l2": 0.5,
            "lr_schedule": {"kind": "exponential", "rate": 0.5, "every_steps": 10},
            "task_balancing": {"kind": "uncertainty"},
        },
        {
            "embedding_optimizer": {"kind": "sgd", "lr": 1.0},
            "mini_batch_aware_l2": 5.0,
            "lr_schedule": {"kind": "cosine", "warmup_steps": 5},
        },
        {
            "distillation": {"mode": "online", "teacher": TEACHER},
            "gradient_clip_norm": 0.1,
        },
        {
            "distillation": {"mode": "online", "teacher": TEACHER},
            "embedding_optimizer": {"kind": "adam", "lr": 0.01},
            "gradient_clip_norm": 0.1,
        },
    ],
    ids=["adam", "lazy_adam", "fused", "taught", "taught, adam"],
)
def test_two_ranks_follow_one_process_with_any_recipe(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    config, schema = experiment(folder, **settings, epochs=2)
    train(config, schema, tmp_path / "one", progress=False)
    RunFolder(tmp_path / "two").begin(config, schema, TrainingSet.open(folder / "training_set"), resume=True)
    in_processes(_train_two, 2, tmp_path, folder, settings)
    single, sharded = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(single) == len(sharded) > 25
    assert abs(single[-1] - single[0]) > 1e-2, "the run must have moved"
    np.testing.assert_allclose(sharded, single, rtol=0, atol=2e-5)


def test_two_ranks_follow_one_process_where_histories_are_encoded_in_groups(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank forms other groups than one process does, and computes them again for the gradient."""
    config, schema = experiment(folder, epochs=2)
    config = config.model_copy(update={"model": SUANConfig(**SUAN)})
    monkeypatch.setattr(unified_encoder, "_PAIRS_OF_A_GROUP", 100)
    monkeypatch.setattr(unified_encoder, "_PAIRS_KEPT", 0)
    train(config, schema, tmp_path / "one", progress=False)
    RunFolder(tmp_path / "two").begin(config, schema, TrainingSet.open(folder / "training_set"), resume=True)
    in_processes(_train_groups, 2, tmp_path, folder)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=2e-5)


def _train_groups(tmp_path: Path, folder: Path) -> None:
    from training.console import TrainingDisplay
    from training.sharded import ShardedProcesses
    from training.trainer import train_rank

    unified_encoder._PAIRS_OF_A_GROUP, unified_encoder._PAIRS_KEPT = 100, 0
    config, schema = experiment(folder, epochs=2)
    config = config.model_copy(update={"model": SUANConfig(**SUAN)})
    train_rank(config, schema, tmp_path / "two", ShardedProcesses(), display=TrainingDisplay(enabled=False))


def _train_two(tmp_path: Path, folder: Path, settings: dict[str, Any]) -> None:
    from training.console import TrainingDisplay
    from training.sharded import ShardedProcesses
    from training.trainer import train_rank

    config, schema = experiment(folder, **settings, epochs=2)
    train_rank(config, schema, tmp_path / "two", ShardedProcesses(), display=TrainingDisplay(enabled=False))


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad", "sgd", "lazy_adam"])
def test_two_ranks_told_to_stop_while_they_score_stop_together_and_one_goes_on(
    folder: Path, tmp_path: Path, optimizer: str
) -> None:
    settings = {"embedding_optimizer": {"kind": optimizer, "lr": 0.05}, "epochs": 2, "evaluation_batch_size": 8}
    config, schema = experiment(folder, **settings)
    train(config, schema, tmp_path / "one", progress=False)
    RunFolder(tmp_path / "two").begin(config, schema, TrainingSet.open(folder / "training_set"), resume=True)
    in_processes(_stopped_while_scoring, 2, tmp_path, folder, settings)
    store = CheckpointStore(tmp_path / "two" / "checkpoints")
    assert len(losses(tmp_path / "two")) == int(str(store.latest)[5:]) == len(losses(tmp_path / "one")) / 2
    train(config, schema, tmp_path / "two", progress=False)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=2e-5)


def test_ray_workers_told_to_stop_save_their_steps_and_one_process_goes_on(folder: Path, tmp_path: Path) -> None:
    config, schema = experiment(folder)
    train(config, schema, tmp_path / "one", progress=False)
    metrics = tmp_path / "two" / "metrics.jsonl"

    def interrupt() -> None:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train(config, schema, tmp_path / "two", workers=2, progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    steps = int(str(CheckpointStore(tmp_path / "two" / "checkpoints").latest)[5:])
    assert 5 <= len(losses(tmp_path / "two")) == steps < len(losses(tmp_path / "one")), "no step is lost"
    assert not list((tmp_path / "two").glob(".ray-*"))
    train(config, schema, tmp_path / "two", progress=False)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-4)


def test_two_ranks_go_on_where_one_has_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"embedding_optimizer": {"kind": "rowwise_adagrad", "lr": 0.05}}
    config, schema = experiment(folder, **settings, epochs=2)
    train(config, schema, tmp_path / "one", progress=False)

    steps = iter(range(1000))

    def stopped(self: Trainer, loaded: LoadedBatch, original: Any = Trainer._step) -> None:
        original(self, loaded)
        if next(steps) == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config, schema, tmp_path / "two", progress=False)
    assert 7 < len(losses(tmp_path / "two")) < len(losses(tmp_path / "one"))
    in_processes(_train_two, 2, tmp_path, folder, settings)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=2e-5)


def _stopped_while_scoring(tmp_path: Path, folder: Path, settings: dict[str, Any]) -> None:
    from training.console import TrainingDisplay
    from training.sharded import ShardedProcesses
    from training.trainer import train_rank

    config, schema = experiment(folder, **settings)
    scored = [0]

    def signalled(self: BatchLoader, original: Any = BatchLoader.__iter__) -> Iterator[LoadedBatch]:
        for loaded in original(self):
            if self.split == "validation":
                scored[0] += 1
                if scored[0] == 2 and dist.get_rank() == 1:  # the other one learns it from this one
                    os.kill(os.getpid(), signal.SIGINT)
            yield loaded

    BatchLoader.__iter__ = signalled  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train_rank(config, schema, tmp_path / "two", ShardedProcesses(), display=TrainingDisplay(enabled=False))
    assert scored[0] == 2, "the rest of the split is not scored"


def _moments_equal(folder: Path) -> None:
    from training.sharded import moments_over_ranks

    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    valid = torch.tensor([True, False, True, True, False, True, True])
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    mine = slice(0, 2) if rank == 0 else slice(2, 7)  # uneven shares

    whole = x.clone().requires_grad_()
    mean, var, count = masked_moments(whole, valid)
    (((whole - mean) / (var + 1e-3).sqrt()) * weight).sum().backward()

    part = x[mine].clone().requires_grad_()
    part_mean, part_var, part_count = moments_over_ranks(part, valid[mine])
    (((part - part_mean) / (part_var + 1e-3).sqrt()) * weight[mine]).sum().backward()

    torch.testing.assert_close(part_mean, mean)
    torch.testing.assert_close(part_var, var)
    assert int(part_count) == int(count)
    assert whole.grad is not None
    torch.testing.assert_close(part.grad, whole.grad[mine])
    nothing = moments_over_ranks(x[:0], valid[:0])
    assert int(nothing.num_positions) == 0
    assert nothing.mean.abs().sum() == 0


def test_batch_statistics_over_ranks_equal_those_of_the_whole_batch(tmp_path: Path) -> None:
    in_processes(_moments_equal, 2, tmp_path)


def _exchanges(folder: Path) -> None:
    from training.sharded import ShardedProcesses

    strategy = ShardedProcesses()
    assert strategy.all_sum(torch.tensor([strategy.rank + 1.0])).tolist() == [3.0]
    rows = np.full((strategy.rank * 2, 3), strategy.rank, dtype=np.int64)  # rank 0 has none
    gathered = strategy.all_gather(rows)
    assert [g.shape for g in gathered] == [(0, 3), (2, 3)]
    assert gathered[1].dtype == np.int64
    strategy.barrier()


def test_exchanges_between_ranks_of_uneven_shares(tmp_path: Path) -> None:
    in_processes(_exchanges, 2, tmp_path)


def _sparse_averages(folder: Path) -> None:
    from training.sharded import ShardedProcesses

    strategy = ShardedProcesses()
    gradients = [
        [([0, 4, 4], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), ([], []), ([2], [[1.0]])],
        [([4, 1], [[7.0, 8.0], [1.0, 1.0]]), ([0], [[1.0, 2.0, 3.0]]), ([2], [[-1.0]])],
    ]
    tables = []
    for (rows, values), (height, width) in zip(gradients[strategy.rank], [(5, 2), (1, 3), (3, 1)], strict=True):
        table = torch.nn.Parameter(torch.zeros(height, width))
        table.grad = torch.sparse_coo_tensor(
            torch.tensor([rows], dtype=torch.int64), torch.tensor(values).view(-1, width), table.shape
        )
        tables.append(table)
    dense = torch.nn.Parameter(torch.zeros(2))
    dense.grad = torch.ones(2)
    strategy.average_sparse([*tables, dense])
    found = [table.grad for table in tables]
    assert all(g is not None and g.is_coalesced() for g in found)
    assert found[0].indices().tolist() == [[0, 1, 4]]  # type: ignore[union-attr]
    assert found[0].values().tolist() == [[0.5, 1.0], [0.5, 0.5], [7.5, 9.0]]  # type: ignore[union-attr]
    assert found[1].to_dense().tolist() == [[0.5, 1.0, 1.5]]  # type: ignore[union-attr]
    assert found[2].to_dense().tolist() == [[0.0], [0.0], [0.0]]  # type: ignore[union-attr]
    assert dense.grad.tolist() == [1.0, 1.0], "dense gradients are averaged by the backward pass"
    strategy.average_sparse([dense])


def test_sparse_gradients_are_averaged_over_ranks(tmp_path: Path) -> None:
    in_processes(_sparse_averages, 2, tmp_path)


def test_no_sparse_tensor_is_all_reduced(folder: Path, tmp_path: Path) -> None:
    """gloo's all-reduce of sparse tensors breaks the heap about once in some thousand calls."""
    config, schema = experiment(folder, embedding_optimizer={"kind": "lazy_adam", "lr": 0.01}, epochs=2)
    RunFolder(tmp_path / "two").begin(config, schema, TrainingSet.open(folder / "training_set"), resume=True)
    in_processes(_no_sparse_reduction, 2, tmp_path, folder)


def _no_sparse_reduction(tmp_path: Path, folder: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as trace:
        _train_two(tmp_path, folder, {"embedding_optimizer": {"kind": "lazy_adam", "lr": 0.01}})
    names = {event.key for event in trace.key_averages()}
    assert any("all_gather" in name for name in names), sorted(names)
    assert not any("sparse" in name and "reduce" in name for name in names), sorted(names)


def test_an_error_raised_in_a_worker_comes_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    from recsys.errors import TrainingError

    config, schema = experiment(folder, dense_optimizer={"kind": "sgd", "lr": 1.0e30})
    with pytest.raises(TrainingError, match="finite"):
        train(config, schema, tmp_path / "run", workers=2, progress=False)


def test_synchronised_moments_replace_those_of_every_dice_layer() -> None:
    from training.sharded import moments_over_ranks, synchronise_moments

    model = torch.nn.Sequential(Dice(2), torch.nn.Sequential(Dice(3)))
    synchronise_moments(model)
    assert [m.moments for m in model.modules() if isinstance(m, Dice)] == [moments_over_ranks] * 2


def test_gradnorm_is_refused_with_several_workers(folder: Path, tmp_path: Path) -> None:
    config, schema = experiment(folder, task_balancing={"kind": "gradnorm", "shared": ["mlp.first"]})
    with pytest.raises(ConfigError, match=r"task_balancing.kind must be 'none' or 'uncertainty' with 2 workers"):
        train(config, schema, tmp_path / "run", workers=2, progress=False)
    assert not (tmp_path / "run").exists()
