r"""PLE: progressive layered extraction, and with one level CGC, customised gate control.

Beside experts that all tasks share, each task has its own, which no other task reads: tasks that disagree do not pull
at the same weights. A task's gate mixes its own and the shared experts; level after level, the mixtures of one level
are the inputs of the next. At level j, for task t, with :math:`g^{t,0}(x) = x`

.. math:: g^{t,j}(x) = \operatorname{softmax}\!\big( W_{t,j}\, g^{t,j-1}(x) \big)\, S^{t,j}(x), \qquad
          \mathrm{logit}_t = h^t(g^{t,J}(x))

where :math:`S^{t,j}` stacks the outputs of the task's own experts, which take :math:`g^{t,j-1}(x)`, and of the shared
ones, which take :math:`g^{s,j-1}(x)`: the mixture of *all* experts of the level before by a gate of its own.

Tang, Liu, Zhao, Gong: "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for Personalized
Recommendations", RecSys 2020, sections 4.1 (CGC) and 4.2 (PLE).

Shapes: R requests, N candidates (rows), K experts of a level, H width of an expert's output, T tasks, G = T + 1 groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.config import Config
from recsys.embedded import Embedded
from recsys.embeddings import Lookup
from recsys.layers import ActivationName, JoinedLinear, TaskTowers
from recsys.layers.experts import Experts, ExpertsOfOwnInputs, joined_linear, mixture, reset_linears
from recsys.models.base import RankingModel, Width
from recsys.models.inputs import HistoryPooling, PooledInputs
from recsys.schema import Schema


class PLEConfig(Config):
    """Config of :class:`PLE`. The paper tunes its sizes for each model and does not print them."""

    kind: Literal["ple"] = "ple"
    embedding_dim: int = Field(16, ge=4, le=1024, multiple_of=4, description="width of every table")
    history_pooling: HistoryPooling = Field(
        "mean", description="how a history becomes a field: its mean, or attended to by the candidate as in DIN"
    )
    num_levels: int = Field(2, ge=1, le=16, description="1 is CGC")
    num_task_experts: int = Field(1, ge=1, le=256, description="of each task, at each level")
    num_shared_experts: int = Field(2, ge=1, le=256, description="at each level")
    expert_hidden: tuple[Width, ...] = Field((128, 64), min_length=1, description="widths of an expert")
    tower_hidden: tuple[Width, ...] = Field((64,), min_length=1, description="widths of a task's tower")
    activation: ActivationName = Field("relu", description="of experts and towers; paper: ReLU")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="after each layer of experts and towers; paper: none")


class _Mixtures(nn.Module):
    """The gates' part of a level: from logits and experts to what tasks, and the shared experts next, read.

    Experts stand in the order: those of task 0, of task 1, ..., the shared ones. Logits: of task 0 over its own and the
    shared experts, of task 1, ..., and at all levels but the last, of the shared gate over all.
    """

    def __init__(self, num_tasks: int, num_own: int, num_shared: int, *, is_last: bool) -> None:
        super().__init__()
        self.num_experts = num_tasks * num_own + num_shared
        self.sizes = [num_own + num_shared] * num_tasks + ([] if is_last else [self.num_experts])
        self._own = [num_own] * num_tasks + [num_shared]

    def forward(self, logits: Tensor, experts: Tensor) -> Tensor:
        """(N, sum of sizes) and (N, K, H) -> (N, T or T + 1, H)."""
        *own, shared = experts.split(self._own, dim=1)
        read = [torch.cat([mine, shared], dim=1) for mine in own] + [experts]
        parts = logits.split(self.sizes, dim=1)
        return torch.cat([mixture(part.unsqueeze(1), some) for part, some in zip(parts, read, strict=False)], dim=1)


class _FirstLevel(nn.Module):
    """Level 1: everything reads x."""

    def __init__(self, config: PLEConfig, inputs: PooledInputs, num_tasks: int) -> None:
        super().__init__()
        sizes = inputs.request_size, inputs.row_size
        self.mixtures = _Mixtures(
            num_tasks, config.num_task_experts, config.num_shared_experts, is_last=config.num_levels == 1
        )
        self.experts = Experts(
            *sizes,
            self.mixtures.num_experts,
            config.expert_hidden,
            activation=config.activation,
            dropout=config.dropout,
        )
        # DIFF(paper): gates have a bias, 0 at the start, because the layer that multiplies a request once has one.
        self.gates = JoinedLinear(*sizes, sum(self.mixtures.sizes))

    def forward(self, request: Tensor, rows: Tensor, request_of_row: Tensor | None) -> Tensor:
        logits = joined_linear(self.gates, request, rows, request_of_row)
        return self.mixtures(logits, self.experts(request, rows, request_of_row))  # type: ignore[no-any-return]


class _NextLevel(nn.Module):
    """A further level: each task reads its own mixture, shared experts and the shared gate theirs."""

    def __init__(self, config: PLEConfig, num_tasks: int, *, is_last: bool) -> None:
        super().__init__()
        size = config.expert_hidden[-1]
        own, shared = config.num_task_experts, config.num_shared_experts
        self.mixtures = _Mixtures(num_tasks, own, shared, is_last=is_last)
        self.experts = ExpertsOfOwnInputs(
            size,
            [own] * num_tasks + [shared],
            config.expert_hidden,
            activation=config.activation,
            dropout=config.dropout,
        )
        self.gates = nn.ModuleList(nn.Linear(size, experts) for experts in self.mixtures.sizes)

    def forward(self, inputs: Tensor) -> Tensor:
        logits = [gate(x) for gate, x in zip(self.gates, inputs.unbind(1), strict=False)]
        return self.mixtures(torch.cat(logits, dim=1), self.experts(inputs))  # type: ignore[no-any-return]


class PLE(nn.Module):
    """The network of PLE: vectors in, one logit a task out. With ``num_levels`` 1 it is CGC.

    Source: Tang et al., RecSys 2020, sections 4.1 (CGC) and 4.2 (PLE).

    Differs from source: gates have a bias. Inputs are those of :class:`~recsys.models.inputs.PooledInputs`.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: PLEConfig, schema: Schema) -> None:
        super().__init__()
        num_tasks = len(schema.tasks)
        self.inputs = PooledInputs(schema, config.embedding_dim, config.history_pooling)
        self.first = _FirstLevel(config, self.inputs, num_tasks)
        self.further = nn.ModuleList(
            _NextLevel(config, num_tasks, is_last=level == config.num_levels)
            for level in range(2, config.num_levels + 1)
        )
        self.towers = TaskTowers(
            config.expert_hidden[-1],
            config.tower_hidden,
            num_tasks,
            activation=config.activation,
            dropout=config.dropout,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights Xavier-uniform, expert by expert, biases 0; paper: not given."""
        reset_linears(self)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        return self._run(embedded, embedded.request_of_row)

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows."""
        return self._run(embedded, None)

    def _run(self, embedded: Embedded, request_of_row: Tensor | None) -> Tensor:
        mixed_NGH = self.first(*self.inputs(embedded, request_of_row), request_of_row)
        for level in self.further:
            mixed_NGH = level(mixed_NGH)
        return self.towers(mixed_NGH.unbind(1))  # type: ignore[no-any-return]


def build_ple(config: PLEConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds PLE with its tables; histories' items and the candidates share theirs.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no feature of candidates.
    """
    return RankingModel(Lookup(schema, table_sizes, config.embedding_dim), PLE(config, schema))
