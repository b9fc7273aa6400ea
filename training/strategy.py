"""What differs between one process and many: devices, wrapping the model, and exchanges between ranks.

The trainer is written against :class:`Strategy`. :class:`SingleProcess` is the plain case.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from training.optim import (
    DenseOptimizerConfig,
    EmbeddingOptimizerConfig,
    FusedConfig,
    TableRows,
    dense_optimizer,
    dense_parameters,
    fuse_embeddings,
    optimize_tables,
    rows_of_tables,
    table_parameters,
)


class Prepared(NamedTuple):
    """A model that is ready to train.

    Attributes:
        model: takes a batch, returns logits ``(N, T)``; on the strategy's device.
        optimizer: everything that has state; its ``step`` updates what the backward pass has not.
        dense: parameters outside the tables, by name; ``step`` updates them.
        tables: the tables that have gradients, by name; ``step`` updates them too. None where the optimizer is fused.
        rows: what this process holds of each table, by table.
    """

    model: nn.Module
    optimizer: KeyedOptimizer
    dense: dict[str, nn.Parameter]
    tables: dict[str, nn.Parameter]
    rows: dict[str, TableRows]


class Strategy(Protocol):
    """One rank's view of the processes that train together."""

    @property
    def rank(self) -> int:
        """0 to ``world - 1``; only rank 0 writes files and talks."""
        ...

    @property
    def world(self) -> int:
        """Number of processes."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        ...

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before ``backward``, to undo an averaging of gradients over ranks."""
        ...

    def prepare(
        self,
        model: nn.Module,
        embedding: EmbeddingOptimizerConfig,
        dense: DenseOptimizerConfig,
    ) -> Prepared:
        """Places the model, fuses or shards its tables, and builds its optimizers. The model given is used up."""
        ...

    def average_sparse(self, tables: Iterable[nn.Parameter]) -> None:
        """Averages the sparse gradients of tables over ranks; the backward pass has averaged all others.

        Args:
            tables: the same on every rank, in the same order; their gradients are replaced, coalesced.
        """
        ...

    def all_sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks, on every rank."""
        ...

    def all_gather(self, rows: np.ndarray) -> list[np.ndarray]:
        """Every rank's array, on every rank; the lengths may differ, the other dimensions and the dtype may not."""
        ...

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        ...


class SingleProcess:
    """One process, one device.

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one.
    """

    rank = 0
    world = 1
    loss_scale = 1.0

    def __init__(self, device: str = "cpu") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)

    def prepare(
        self,
        model: nn.Module,
        embedding: EmbeddingOptimizerConfig,
        dense: DenseOptimizerConfig,
    ) -> Prepared:
        """Fuses the embedding optimizer into the tables' backward pass, if it is one that can be."""
        model.to(self.device)
        tables: dict[str, nn.Parameter] = {}
        if isinstance(embedding, FusedConfig):
            of_tables = fuse_embeddings(model, embedding, device=self.device)
        else:
            tables = table_parameters(model)
            of_tables = optimize_tables(tables, model, embedding)
        parameters = dense_parameters(model)
        optimizer = CombinedOptimizer([("tables", of_tables), ("dense", dense_optimizer(dense, parameters))])
        return Prepared(model, optimizer, parameters, tables, rows_of_tables(model))

    def average_sparse(self, tables: Iterable[nn.Parameter]) -> None:
        """Nothing to average."""

    def all_sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def all_gather(self, rows: np.ndarray) -> list[np.ndarray]:
        """The one array."""
        return [rows]

    def barrier(self) -> None:
        """Nothing to wait for."""
