r"""MMoE: multi-gate mixture of experts.

Tasks share experts instead of a bottom; each task mixes them by a gate of its own, and a tower of its own makes its
logit:

.. math:: g^t(x) = \operatorname{softmax}(W_t x), \qquad
          f^t(x) = \sum_k g^t(x)_k\, e_k(x), \qquad
          \mathrm{logit}_t = h^t(f^t(x))

Ma, Zhao, Yi, Chen, Hong, Chi: "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts",
KDD 2018, section 4.2.

Shapes: R requests, N candidates (rows), K experts, H width of an expert's output, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from recsys.config import Config
from recsys.embedded import Embedded
from recsys.embeddings import Lookup
from recsys.layers import ActivationName, JoinedLinear, TaskTowers
from recsys.layers.experts import Experts, joined_linear, mixture, reset_linears
from recsys.models.base import RankingModel, Width
from recsys.models.inputs import HistoryPooling, PooledInputs
from recsys.schema import Schema


class MMoEConfig(Config):
    """Config of :class:`MMoE`. The paper tunes its sizes on its own data; the defaults are ours."""

    kind: Literal["mmoe"] = "mmoe"
    embedding_dim: int = Field(16, ge=4, le=1024, multiple_of=4, description="width of every table")
    history_pooling: HistoryPooling = Field(
        "mean", description="how a history becomes a field: its mean, or attended to by the candidate as in DIN"
    )
    num_experts: int = Field(8, ge=1, le=1024, description="K, shared by all tasks")
    expert_hidden: tuple[Width, ...] = Field((128, 64), min_length=1, description="widths of an expert")
    tower_hidden: tuple[Width, ...] = Field((64,), min_length=1, description="widths of a task's tower")
    activation: ActivationName = Field("relu", description="of experts and towers; paper: ReLU")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="after each layer of experts and towers; paper: none")


class MMoE(nn.Module):
    """The network of MMoE: vectors in, one logit a task out.

    Source: Ma et al., KDD 2018, section 4.2.

    Differs from source: gates have a bias. Inputs are those of :class:`~recsys.models.inputs.PooledInputs`; the
    paper's own are features only.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: MMoEConfig, schema: Schema) -> None:
        super().__init__()
        num_tasks = len(schema.tasks)
        self.inputs = PooledInputs(schema, config.embedding_dim, config.history_pooling)
        sizes = self.inputs.request_size, self.inputs.row_size
        self.experts = Experts(
            *sizes, config.num_experts, config.expert_hidden, activation=config.activation, dropout=config.dropout
        )
        # All tasks' gates side by side.
        # DIFF(paper): with a bias, 0 at the start, because the layer that multiplies a request once has one.
        self.gates = JoinedLinear(*sizes, num_tasks * config.num_experts)
        self._gates_shape = (num_tasks, config.num_experts)
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
        request_RU, rows_NC = self.inputs(embedded, request_of_row)
        experts_NKH = self.experts(request_RU, rows_NC, request_of_row)
        gates_NTK = joined_linear(self.gates, request_RU, rows_NC, request_of_row).unflatten(1, self._gates_shape)
        mixed_NTH = mixture(gates_NTK, experts_NKH)
        return self.towers(mixed_NTH.unbind(1))  # type: ignore[no-any-return]


def build_mmoe(config: MMoEConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds MMoE with its tables; histories' items and the candidates share theirs.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no feature of candidates.
    """
    return RankingModel(Lookup(schema, table_sizes, config.embedding_dim), MMoE(config, schema))
