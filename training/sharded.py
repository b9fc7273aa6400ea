"""Many processes: embedding tables sharded by rows with TorchRec, everything else replicated.

Every rank takes its share of each global batch. An id is sent to the rank that holds its row, its vector comes back,
and its gradient goes the same way; the dense parameters' gradients are averaged by ``DistributedDataParallel``. The
objective is a sum over the global batch, so that the ranks together take the very step that one process would.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys.layers.activations import Moments
from training.optim import (
    AdamConfig,
    DenseOptimizerConfig,
    EmbeddingOptimizerConfig,
    FusedConfig,
    LazyAdamConfig,
    TableRows,
    dense_optimizer,
    dense_parameters,
    embedding_optimizer,
    optimize_tables,
    rows_of_tables,
    table_parameters,
)
from training.strategy import Prepared


class ShardedProcesses:
    """One rank of the default process group, which must be initialised.

    Args:
        device: where this rank computes.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.device = torch.device(device)
        # DistributedDataParallel and TorchRec both average gradients over ranks; the objective wants their sum.
        self.loss_scale = float(self.world)

    def prepare(
        self,
        model: nn.Module,
        embedding: EmbeddingOptimizerConfig,
        dense: DenseOptimizerConfig,
    ) -> Prepared:
        """Shards every table by rows, replicates the rest, and builds the optimizers.

        Tables whose optimizer is not fused are replicated, not sharded: every rank holds them whole. Dense gradients
        are averaged like all others, sparse ones by :meth:`average_sparse`.
        """
        if not isinstance(embedding, FusedConfig):
            return self._replicated(model, embedding, dense)
        optimizer = embedding_optimizer(embedding)
        sharder = EmbeddingBagCollectionSharder()
        plan: dict[str, Any] = {}
        weights: dict[str, Tensor] = {}
        for path, module in model.named_modules():
            if isinstance(module, EmbeddingBagCollection):
                apply_optimizer_in_backward(optimizer.cls, module.parameters(), optimizer.kwargs)
                plan[path] = construct_module_sharding_plan(
                    module,
                    {table.name: row_wise() for table in module.embedding_bag_configs()},
                    sharder=sharder,
                    local_size=self.world,
                    world_size=self.world,
                    device_type=self.device.type,
                )
                weights |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
        synchronise_moments(model)
        sharders: list[ModuleSharder[nn.Module]] = [sharder]
        parallel = DistributedModelParallel(model, device=self.device, plan=ShardingPlan(plan), sharders=sharders)
        _fill_shards(parallel, weights)
        sharded = [m for m in parallel.modules() if isinstance(m, ShardedEmbeddingBagCollection)]
        for module in sharded:
            _even_bags(module)
        in_tables = {id(p) for module in sharded for p in module.parameters()}
        parameters = {name: p for name, p in parallel.named_parameters() if id(p) not in in_tables}
        combined = _NamedAsInOneProcess(
            [("tables", parallel.fused_optimizer), ("dense", dense_optimizer(dense, parameters))]
        )
        return Prepared(parallel, combined, parameters, {}, _held_rows(parallel, weights))

    def _replicated(
        self, model: nn.Module, embedding: AdamConfig | LazyAdamConfig, dense: DenseOptimizerConfig
    ) -> Prepared:
        model.to(self.device)
        of_tables = optimize_tables(
            table_parameters(model), model, embedding
        )  # before the wrapper looks for sparse ones
        synchronise_moments(model)
        sparse = list(table_parameters(model)) if isinstance(embedding, LazyAdamConfig) else []
        parallel = DistributedModelParallel(
            model,
            device=self.device,
            plan=ShardingPlan({}),
            sharders=[],
            # gloo's all-reduce of sparse tensors corrupts the heap, in torch 2.13; NCCL has none.
            data_parallel_wrapper=DefaultDataParallelWrapper(params_to_ignore=sparse),
        )
        tables, parameters = table_parameters(model), dense_parameters(model)
        optimizer = CombinedOptimizer([("tables", of_tables), ("dense", dense_optimizer(dense, parameters))])
        return Prepared(parallel, optimizer, parameters, tables, rows_of_tables(model))

    def all_sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def average_sparse(self, tables: Iterable[nn.Parameter]) -> None:
        """Every rank's rows, put together and divided by the number of ranks: a few exchanges, whatever the tables."""
        tables = [p for p in tables if p.grad is not None and p.grad.is_sparse]
        if not tables:
            return
        gradients = [p.grad.coalesce() for p in tables]  # type: ignore[union-attr]
        own = torch.tensor([g.values().shape[0] for g in gradients], device=self.device)
        counts = self._gather(own, [len(tables)] * self.world)
        rows_in = [c.tolist() for c in counts]
        values_in = [[n * p.shape[1] for n, p in zip(of_rank, tables, strict=True)] for of_rank in rows_in]
        rows = self._gather(torch.cat([g.indices()[0] for g in gradients]), list(map(sum, rows_in)))
        values = self._gather(torch.cat([g.values().flatten() for g in gradients]), list(map(sum, values_in)))
        rows_of = [r.split(sizes) for r, sizes in zip(rows, rows_in, strict=True)]
        values_of = [v.split(sizes) for v, sizes in zip(values, values_in, strict=True)]
        for index, p in enumerate(tables):
            p.grad = torch.sparse_coo_tensor(
                torch.cat([of[index] for of in rows_of])[None],
                torch.cat([of[index] for of in values_of]).view(-1, p.shape[1]) / self.world,
                p.shape,
            ).coalesce()

    def all_gather(self, rows: np.ndarray) -> list[np.ndarray]:
        """Every rank's array."""
        return [g.cpu().numpy() for g in self._gather(torch.from_numpy(np.ascontiguousarray(rows)).to(self.device))]

    def _gather(self, rows: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Every rank's tensor; the first dimension may differ, and is asked for where the sizes are not known."""
        if sizes is None:
            found = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
            dist.all_gather(found, torch.tensor([len(rows)], device=self.device))
            sizes = [int(size) for size in found]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(gathered, padded)
        return [g[:size] for g, size in zip(gathered, sizes, strict=True)]

    def barrier(self) -> None:
        """Waits for every rank."""
        dist.barrier()


class _NamedAsInOneProcess(CombinedOptimizer):
    """Names the state of sharded tables as that of whole ones is named, so that a checkpoint fits any number of ranks.

    TorchRec 1.8 says ``PATH.embedding_bags.TABLE.weight: {TABLE.momentum1: ...}`` here and ``PATH.TABLE.weight:
    {TABLE.weight.momentum_1: ...}`` there. The values are whole tensors and shards of them, which checkpoints cut anew.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state by the names of one process."""
        return {"state": dict(itertools.starmap(_named_as_in_one_process, super().state_dict()["state"].items()))}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes what :meth:`state_dict` gives."""
        native = {}
        for name, values in super().state_dict()["state"].items():
            portable, renamed = _named_as_in_one_process(name, values)
            found = state_dict["state"][portable]
            native[name] = {inner: found[outer] for inner, outer in zip(values, renamed, strict=True)}
        super().load_state_dict({"state": native})


def _named_as_in_one_process(name: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a parameter's state, and what it holds by name."""
    path, found, table = name.removesuffix(".weight").rpartition(".embedding_bags.")
    if not found:
        return name, dict(values)
    moment = re.compile(rf"{re.escape(table)}\.momentum(\d+)")
    return f"{path}.{table}.weight", {moment.sub(rf"{table}.weight.momentum_\1", key): v for key, v in values.items()}


def _fill_shards(parallel: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies each rank's rows of the tables into its shards: TorchRec starts CPU shards from values of its own."""
    state = parallel.state_dict()
    for name, weight in weights.items():
        for shard in state[name].local_shards():
            row, column = shard.metadata.shard_offsets
            height, width = shard.metadata.shard_sizes
            shard.tensor.detach().copy_(weight[row : row + height, column : column + width])


def _held_rows(parallel: nn.Module, weights: Iterable[str]) -> dict[str, TableRows]:
    """This rank's rows of each table; none where there are fewer rows than ranks."""
    state = parallel.state_dict()
    found = {}
    for name in weights:
        shards = state[name].local_shards()
        assert len(shards) <= 1, "a table is sharded by rows, one shard a rank"
        table = name.split(".")[-2]
        found[table] = (
            TableRows(shards[0].tensor, shards[0].metadata.shard_offsets[0])
            if shards
            else TableRows(torch.empty(0, 1), 0)
        )
    return found


def _even_bags(module: ShardedEmbeddingBagCollection) -> None:
    """Gives every rank as many bags, with empty ones at the end, and drops these again from the result.

    Ranks hold different numbers of candidates and events, and the backward pass of row-wise sharding takes equal ones
    only (on gloo).
    """
    sizes: list[int] = []  # of calls whose results are not yet taken; calls do not nest

    def pad(_: nn.Module, arguments: tuple[KeyedJaggedTensor]) -> tuple[KeyedJaggedTensor]:
        (features,) = arguments
        own = features.stride()
        longest = torch.tensor([own], device=features.device())
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        sizes.append(own)
        missing = int(longest) - own
        if missing == 0:
            return arguments
        lengths = features.lengths().view(len(features.keys()), own)
        lengths = torch.cat([lengths, lengths.new_zeros(lengths.shape[0], missing)], dim=1)
        return (KeyedJaggedTensor(keys=features.keys(), values=features.values(), lengths=lengths.flatten()),)

    def cut(_: nn.Module, __: Any, output: Any) -> KeyedTensor:
        pooled: KeyedTensor = output.wait()
        own = sizes.pop()
        return KeyedTensor(pooled.keys(), pooled.length_per_key(), pooled.values()[:own])

    module.register_forward_pre_hook(pad)
    module.register_forward_hook(cut)


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, in both directions: the sum's gradient on each rank adds up to the gradient of each addend."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def moments_over_ranks(x: Tensor, valid: Tensor | None) -> Moments:
    """Mean and variance of each channel over the valid positions of all ranks.

    The same as :func:`recsys.layers.activations.masked_moments` on the ranks' inputs put together, gradients included.

    Args:
        x: (N, C), finite at positions that are not valid too.
        valid: (N,), True = counts; None = all count.
    """
    weight = x.new_ones(x.shape[0]) if valid is None else valid.to(x.dtype)
    num_positions = torch.as_tensor(x.shape[0] if valid is None else valid.sum(), device=x.device)
    dist.all_reduce(num_positions)
    weight = weight / num_positions.clamp(min=1)
    mean: Tensor = _SumOverRanks.apply(weight @ x)  # type: ignore[no-untyped-call]
    var: Tensor = _SumOverRanks.apply(weight @ (x - mean).square())  # type: ignore[no-untyped-call]
    return Moments(mean, var, num_positions)


def synchronise_moments(model: nn.Module) -> None:
    """Makes every layer with batch statistics take them over all ranks, as one process would over the global batch."""
    for module in model.modules():
        if "moments" in vars(module):
            module.moments = moments_over_ranks  # type: ignore[assignment]
