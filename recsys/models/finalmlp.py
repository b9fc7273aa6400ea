r"""FinalMLP: two MLPs that see differently gated features, fused by a multi-head bilinear form; and its base, DualMLP.

.. math::
    h_s = 2\,\sigma(g_s(c_s)) \odot e, \qquad o_s = \mathrm{MLP}_s(h_s), \qquad
    \hat y = \sigma\Big(b + w_1^\top o_1 + w_2^\top o_2 + \sum_{j=1}^{k} o_1^{(j)\top} W_j\, o_2^{(j)}\Big)

for two streams s, where e are the vectors of all fields, :math:`c_s` those of the stream's context features, from
tables of their own, and :math:`o^{(j)}` is the j-th of k equal chunks. DualMLP is :math:`\sigma(\mathrm{MLP}_1(e) +
\mathrm{MLP}_2(e))`, each MLP ending in one logit.

Mao, Zhu, Su, Cai, Li, Dong: "FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction", AAAI 2023, arXiv
2304.00902, and the authors' code (FuxiCTR), which decides where the paper is silent.

Shapes: R requests, N candidates (rows), U and C widths of the request's and a row's own fields, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.batch import Bags, Batch
from recsys.derived import Name
from recsys.embedded import Embedded, Space, Use
from recsys.errors import SchemaError, nearest
from recsys.layers import (
    MLP,
    ActivationName,
    BilinearFusion,
    Distinct,
    JoinedMLP,
    OneRequest,
    RequestGatedMLP,
    RowBatchNorm,
    RowGatedMLP,
    Rows,
    StaticGatedMLP,
    rows_of,
)
from recsys.models.base import RankingModel, TrainingOutput, Width
from recsys.models.fields import FieldsConfig, table_width, with_tables, xavier_normal
from recsys.models.inputs import Fields
from recsys.schema import Categorical, Schema


class DualMLPConfig(FieldsConfig):
    """Config of :class:`DualMLP`. Defaults are the authors' winning ones on Avazu."""

    kind: Literal["dualmlp"] = "dualmlp"
    hidden_1: tuple[Width, ...] = Field((400, 400, 400), min_length=1, description="widths of the first MLP")
    hidden_2: tuple[Width, ...] = Field((400,), min_length=1, description="widths of the second MLP")
    activation: ActivationName = Field("relu", description="after every hidden layer; paper: ReLU")
    batch_norm: bool = Field(True, description="of hidden layers before their activation, over rows; the authors: on")
    dropout_1: float = Field(0.3, ge=0.0, lt=1.0, description="after every hidden layer of the first MLP")
    dropout_2: float = Field(0.3, ge=0.0, lt=1.0, description="after every hidden layer of the second MLP")


class FinalMLPConfig(FieldsConfig):
    """Config of :class:`FinalMLP`. Defaults are the authors' winning ones on Avazu, which has empty contexts."""

    kind: Literal["finalmlp"] = "finalmlp"
    hidden_1: tuple[Width, ...] = Field((400, 400, 400), min_length=1, description="widths of the first MLP")
    hidden_2: tuple[Width, ...] = Field((800,), min_length=1, description="widths of the second MLP")
    activation: ActivationName = Field("relu", description="after every hidden layer, the last too; paper: ReLU")
    batch_norm: bool = Field(True, description="of hidden layers before their activation, over rows; the authors: on")
    dropout_1: float = Field(0.3, ge=0.0, lt=1.0, description="after every hidden layer of the first MLP")
    dropout_2: float = Field(0.3, ge=0.0, lt=1.0, description="after every hidden layer of the second MLP")
    context_1: tuple[Name, ...] = Field(
        (), description="features that the first stream's gate sees, such as the user's; empty: a static gate"
    )
    context_2: tuple[Name, ...] = Field((), description="the same of the second stream, such as the item's")
    gate_hidden: tuple[Width, ...] = Field((800,), min_length=1, description="hidden widths of either gate")
    num_heads: int = Field(10, ge=1, description="k, divides the last width of either MLP")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        for name, hidden in (("hidden_1", self.hidden_1), ("hidden_2", self.hidden_2)):
            if hidden[-1] % self.num_heads:
                raise ValueError(f"the last of {name} must be a multiple of num_heads, got {hidden[-1]}")
        return self


class DualMLP(nn.Module):
    """Two MLPs over the same input, whose logits add up.

    Source: Mao et al., AAAI 2023, section on two-stream models.

    Differs from source: histories and sets of ids enter as means; one logit a task.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: DualMLPConfig, schema: Schema) -> None:
        super().__init__()
        self.fields = Fields(schema, config.embedding_dim)
        self.mlps = nn.ModuleList(
            JoinedMLP(
                self.fields.request_size,
                self.fields.row_size,
                hidden,
                activation=config.activation,
                dropout=dropout,
                norm=RowBatchNorm if config.batch_norm else None,
            )
            for hidden, dropout in ((config.hidden_1, config.dropout_1), (config.hidden_2, config.dropout_2))
        )
        # DIFF(paper): one logit a task, because there may be several.
        self.outputs = nn.ModuleList(
            nn.Linear(hidden[-1], len(schema.tasks)) for hidden in (config.hidden_1, config.hidden_2)
        )
        xavier_normal(self)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        return self._logits(embedded, rows_of(embedded.request_of_row, embedded.time.shape[0]))

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows, ``request_of_row`` not read."""
        return self._logits(embedded, OneRequest())

    def _logits(self, embedded: Embedded, which: Rows) -> Tensor:
        request_RU, rows_NC = (fields.flatten(1) for fields in self.fields(embedded))
        one_NT, other_NT = (
            output(which.mlp(mlp, request_RU, rows_NC))  # type: ignore[arg-type]
            for mlp, output in zip(self.mlps, self.outputs, strict=True)
        )
        return one_NT + other_NT  # type: ignore[no-any-return]


class FinalMLP(nn.Module):
    """Two gated MLPs and their bilinear fusion.

    Source: Mao et al., AAAI 2023; initialisation, the place of batch normalisation, the tables of the contexts and the
    biases of the fusion as in the authors' code.

    Differs from source: a gate with an empty context is :class:`~recsys.layers.StaticGatedMLP`, one learnt weight a
    dimension, which is what the source's becomes in training (see there), without its dead parameters; a gate that sees
    the request only is computed once a request; histories and sets of ids enter as means; one logit a task.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no feature of candidates, or a context names no feature of requests or candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: FinalMLPConfig, schema: Schema) -> None:
        super().__init__()
        self.fields = Fields(schema, config.embedding_dim)
        self.context_names = (config.context_1, config.context_2)
        for number, context in enumerate(self.context_names, start=1):
            _check_context(number, context, schema)
        # Contexts are looked up in tables of their own, and stay among the fields too.
        selected = [
            Fields(schema, config.embedding_dim, space=_space_name(number), only=context)
            for number, context in enumerate(self.context_names, start=1)
        ]
        self.contexts = nn.ModuleList(selected)
        sizes = ((config.hidden_1, config.dropout_1), (config.hidden_2, config.dropout_2))
        self.streams = nn.ModuleList(
            self._stream(config, context, hidden, dropout)
            for context, (hidden, dropout) in zip(selected, sizes, strict=True)
        )
        xavier_normal(self)
        self.fusion = BilinearFusion(
            config.hidden_1[-1], config.hidden_2[-1], num_heads=config.num_heads, num_tasks=len(schema.tasks)
        )

    def _stream(self, config: FinalMLPConfig, context: Fields, hidden: Sequence[int], dropout: float) -> nn.Module:
        request_size, row_size = self.fields.request_size, self.fields.row_size
        norm = RowBatchNorm if config.batch_norm else None
        context_size = context.request_size + context.row_size
        if context.row_size:
            mlp = MLP(request_size + row_size, hidden, activation=config.activation, dropout=dropout, norm=norm)
            return RowGatedMLP(context_size, config.gate_hidden, request_size, row_size, mlp)
        joined = JoinedMLP(request_size, row_size, hidden, activation=config.activation, dropout=dropout, norm=norm)
        if context.request_size:
            return RequestGatedMLP(context_size, config.gate_hidden, request_size, row_size, joined)
        # DIFF(paper): an empty context is one learnt weight a dimension, without the source's dead parameters.
        return StaticGatedMLP(request_size, row_size, joined)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        return self._logits(embedded, rows_of(embedded.request_of_row, embedded.time.shape[0]))

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows, ``request_of_row`` not read."""
        return self._logits(embedded, OneRequest())

    def training_forward(self, embedded: Embedded, batch: Batch) -> TrainingOutput:
        """Logits (N, T), without further losses: the same function, the gate of each context id computed once.

        A batch of thousands of rows has a few hundred users and repeats its items too, and a gate has more weights than
        the MLP behind it.
        """
        which = rows_of(embedded.request_of_row, embedded.time.shape[0])
        return TrainingOutput(self._logits(embedded, which, [self._distinct(batch, c) for c in self.context_names]), {})

    def _distinct(self, batch: Batch, context: Sequence[str]) -> Distinct | None:
        """Which contexts of a gate are the same, where they are those of one feature, and that of single ids."""
        if len(context) != 1:
            return None
        ids = {**batch.user, **batch.context, **batch.item, **batch.candidate}[context[0]]
        return None if isinstance(ids, Bags) or ids.is_floating_point() else Distinct.of(ids)

    def _logits(self, embedded: Embedded, which: Rows, distinct: Sequence[Distinct | None] = (None, None)) -> Tensor:
        request_RU, rows_NC = (fields.flatten(1) for fields in self.fields(embedded))
        one_NH, other_NH = (
            stream(*(fields.flatten(1) for fields in context(embedded)), request_RU, rows_NC, which, same)
            for context, stream, same in zip(self.contexts, self.streams, distinct, strict=True)
        )
        return self.fusion(one_NH, other_NH)  # type: ignore[no-any-return]


def _space_name(number: int) -> str:
    return f"gate_{number}"


def _check_context(number: int, context: Sequence[str], schema: Schema) -> None:
    known = [f.name for scope in ("user", "context", "item", "candidate") for f in schema.features_of(scope)]
    for name in context:
        if name not in known:
            raise SchemaError(
                f"model.context_{number} must name features of requests or candidates, got {name!r}",
                hint=nearest(name, known),
            )


def gate_spaces(config: FinalMLPConfig, schema: Schema) -> tuple[Space, ...]:
    """Tables of the gates' contexts: each gate has its own."""
    sides = {"user": "request", "context": "request", "item": "candidate", "candidate": "candidate"}
    spaces = []
    for number, context in enumerate((config.context_1, config.context_2), start=1):
        uses = tuple(
            Use(side, f.name)
            for scope, side in sides.items()
            for f in schema.features_of(scope)  # type: ignore[arg-type]
            if f.name in context and isinstance(f, Categorical)
        )
        if uses:
            spaces.append(Space(_space_name(number), table_width(config.embedding_dim), uses))
    return tuple(spaces)


def build_dualmlp(config: DualMLPConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds DualMLP with its tables.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no feature of candidates.
    """
    return with_tables(DualMLP(config, schema), config, schema, table_sizes)


def build_finalmlp(config: FinalMLPConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds FinalMLP with its tables.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no feature of candidates, or a context names no feature of requests or candidates.
    """
    return with_tables(FinalMLP(config, schema), config, schema, table_sizes, spaces=gate_spaces(config, schema))
