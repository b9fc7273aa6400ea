r"""INFNet: a task-aware information flow network, first version of the paper.

Fields, events and tasks are tokens of three types. A few *proxies* stand for each type: they, and the task tokens,
query the tokens of the other types (heterogeneous flow); then the proxies of a type gate the type's own tokens
(homogeneous flow). Tasks take part from the first block on, and the cost is linear in the number of tokens.

"INFNet: A Task-aware Information Flow Network for Large-Scale Recommendation Systems" (Kuaishou), 2025, arXiv
2508.11565 version 1. The second version of the paper ("Aggregate and Broadcast") describes other blocks, and is not
this model. There is no official code. Where the text leaves a choice, there is an option, and its description names
both readings.

Fields, events and tasks (C, S, T) and their proxies go through a stack of
:class:`~recsys.layers.information_flow.FlowBlock`, which has the equations of both flows:

.. math::
    \tilde C &= \operatorname{Reshape}(\varphi_{cat}(\operatorname{Flatten}(C))), \qquad
    \tilde S = \Big[ \sum_t \varphi_{seq}(s_{1,t});\ \dots \Big], \qquad \tilde T\ \text{learnt} \\
    C, S, T, \tilde C, \tilde S, \tilde T &\leftarrow \mathrm{Block}(C, S, T, \tilde C, \tilde S, \tilde T)
    \quad \text{block after block} \\
    \mathrm{logit}_i &= \mathrm{MLP}_i(T_i)

with residuals and norms as the options say.

**What is computed once a request.** Events' tokens, their proxies and the fields of user and context are a request's. A
PGU multiplies all tokens of a type by one vector, so the tokens are never written again: see
:mod:`recsys.layers.token_attention`. In the first block, tasks ask the events once a request, whatever its candidates.

Shapes: R requests, N candidates (rows), L events of all histories, M fields, D ``embedding_dim``, F histories, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.config import Config
from recsys.embedded import Embedded, EmbeddedHistory, widths
from recsys.embeddings import Lookup
from recsys.errors import SchemaError
from recsys.layers import ActivationName, Dice, PReLU, TaskTowers
from recsys.layers.information_flow import (
    GATED_BY,
    QUERIES,
    SOURCES,
    CategoricalProxies,
    FlowBlock,
    Plan,
    SequenceProxies,
)
from recsys.layers.token_attention import (
    Call,
    GatedTokens,
    ProxyGate,
    QueryProjection,
    SourceProjection,
    cross_attention,
)
from recsys.models.base import RankingModel, Width
from recsys.models.inputs import candidate_features, event_features, request_features
from recsys.schema import Dense, Schema


class INFNetConfig(Config):
    """Config of :class:`INFNet`. A number in brackets is that of the ambiguity of the paper that an option settles."""

    kind: Literal["infnet"] = "infnet"
    embedding_dim: int = Field(
        16, ge=4, le=1024, multiple_of=4, description="D, of every token; paper: one of 8, 16, 32, 64, 96, 128"
    )
    num_blocks: int = Field(
        2, ge=1, le=16, description="[4] paper: not given. [5] The heads read the output of the last one, by any count"
    )
    num_heads: int = Field(1, ge=1, description="[4] of every cross-attention; paper: none mentioned")
    key_dim: int | None = Field(None, ge=1, description="[4] d_k of a head; paper: not given; D / num_heads if null")
    gate_hidden: tuple[Width, ...] | None = Field(
        None, min_length=1, description="[4] widths of a gate's hidden layers; paper: not given; one of D if null"
    )
    gate_proxies: Literal["updated", "input"] = Field(
        "updated",
        description="[1] proxies that gate: those of the heterogeneous stage (the paper's prose), or the block's input "
        "(its formula)",
    )
    residual: bool = Field(
        True,
        description="[2] add the block's input to proxies and task tokens, at any depth (worth it from two blocks on); "
        "paper: in the prose, not in the formulas",
    )
    gate_residual: bool = Field(
        False, description="[2] PGU(X) = X * gate + X; paper: in the prose, not in the formulas"
    )
    layer_norm: bool = Field(
        True, description="[3] LayerNorm after each sum (of attentions, of a history); paper: none stated"
    )
    input_norm: bool = Field(
        False, description="LayerNorm of all field and event tokens at the start; paper: none stated"
    )
    position: Literal["none", "learned"] = Field(
        "none", description="[6] add to each event a vector of its place, newest first, and of its history; paper: none"
    )
    categorical_proxies: int = Field(4, ge=1, description="m; paper: 4 (section on proxy counts)")
    shared_task_tokens: int = Field(2, ge=1, description="N_s; paper: 2")
    sequence_proxies: int | None = Field(
        None,
        ge=1,
        description="[7] of each history; paper: 1 (formula) or 4 in all (text); null: 1, or 4 of an only one",
    )
    sequence_pooling: Literal["sum", "mean"] = Field("sum", description="[8] of a history; paper: sum; version 2: mean")
    target_attention: bool = Field(
        False, description="[9] one more field a history: its events attended to by the candidate; paper: no"
    )
    heads_read: Literal["task_token", "task_and_shared_tokens"] = Field(
        "task_token", description="[10] what a head reads: its own token (paper), or the shared ones too"
    )
    projections: Literal["per_call", "per_source"] = Field(
        "per_call",
        description="[11] keys and values: of each cross-attention, or shared by all onto one type (queries are not); "
        "paper: open",
    )
    unused_updates: bool = Field(
        False,
        description="[12] also update what nothing reads, in the last block: parameters as the "
        "equations imply, the same logits",
    )
    gate_bias: float = Field(0.0, description="initial bias of the gates; 0: they start around one half")
    proxy_hidden: tuple[Width, ...] = Field(
        (64,), min_length=1, description="hidden widths of the MLPs that make proxies (ReLU); paper: not given"
    )
    hidden: tuple[Width, ...] = Field((128, 64), min_length=1, description="widths of a head; paper: not given")
    activation: ActivationName = Field("relu", description="of the heads")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="in the heads; paper: 0, 0.1 or 0.2")
    variant: Literal["full", "without_task_tokens", "without_gates", "without_flow"] = Field(
        "full",
        description="the paper's ablations: no task tokens, no PGU (reads no gate_*), no heterogeneous flow (reads "
        "nothing that is said of attention)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.embedding_dim % self.num_heads:
            raise ValueError(f"num_heads must be a divisor of embedding_dim {self.embedding_dim}, got {self.num_heads}")
        if self.heads_read != "task_token" and self.variant in ("without_task_tokens", "without_flow"):
            raise ValueError(
                f"heads_read must be 'task_token' in the variant {self.variant!r}, got {self.heads_read!r}"
            )
        if self.target_attention and self.variant == "without_flow":
            raise ValueError("target_attention must be false in the variant 'without_flow', got true")
        return self


def plan_blocks(config: INFNetConfig) -> tuple[list[Plan], set[str]]:
    """What each block must compute for the heads' sake, found from the last block to the first.

    Returns:
        The blocks, and which of ``QUERIES`` the first one reads.
    """
    has_tasks = config.variant != "without_task_tokens"
    proxies = set() if has_tasks else {"categorical", "sequence"}
    if config.heads_read == "task_and_shared_tokens":
        proxies.add("shared")
    tokens = {"task"} if has_tasks else set()
    plans: list[Plan] = []
    for _ in range(config.num_blocks):
        if config.unused_updates:
            proxies |= {"categorical", "sequence", *(["shared"] if has_tasks else [])}
            tokens |= {"categorical", "sequence", *(["task"] if has_tasks else [])}
        gates = set() if config.variant == "without_gates" else tokens
        gating = {GATED_BY[kind] for kind in gates}
        streams = proxies | (gating if config.gate_proxies == "updated" else set()) | (tokens & {"task"})
        plans.append(Plan(tuple(q for q in QUERIES if q in streams), tuple(k for k in GATED_BY if k in gates)))
        read = {source for stream in streams for source in SOURCES[stream] if has_tasks or source != "task"}
        proxies = (streams - {"task"}) | (gating if config.gate_proxies == "input" else set())
        tokens = tokens | read
    return plans[::-1], proxies | (tokens & {"task"})


class Tokens(nn.Module):
    """The tokens of a batch: one a field, one an event.

    Differs from source: a dense feature is mapped linearly (the paper makes buckets of it: declare it as a bucketed
    categorical for that); events share the candidates' tables, and each history has a linear map of its own from the
    attributes of an event, side by side, to its token (the paper has tables of their own, and leaves open how several
    attributes become one token).

    Attributes:
        request_names, row_names: fields in order.
    """

    def __init__(self, schema: Schema, dim: int, *, input_norm: bool, position: Literal["none", "learned"]) -> None:
        super().__init__()
        width = widths(schema, dim)
        self.request_names = request_features(schema)
        self.row_names = candidate_features(schema)
        self.dim = dim
        dense = [f for f in schema.features if isinstance(f, Dense)]
        self._dense = {f.name: position for position, f in enumerate(dense)}
        # DIFF(paper): a linear map, not buckets, because the schema says already which numbers are bucketed.
        self.dense = nn.ModuleList(nn.Linear(f.dim, dim) for f in dense)
        self._histories = [(h.name, event_features(h)) for h in schema.histories]
        # DIFF(paper): events are looked up in the candidates' tables; the paper's histories have tables of their own.
        # RECONSTRUCTION: attributes side by side, then a map to D.
        self.event = nn.ModuleList(nn.Linear(sum(width[n] for n in names), dim) for _, names in self._histories)
        self.place = nn.ModuleList(
            _NoPlaces() if position == "none" else _LearnedPlaces(h.max_length, dim) for h in schema.histories
        )
        norm: Callable[[], nn.Module] = (lambda: nn.LayerNorm(dim)) if input_norm else nn.Identity
        self.field_norm, self.event_norm = norm(), norm()

    def forward(self, embedded: Embedded) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Fields of requests (R, M_u, D) and of rows (N, M_c, D); events (R, L_h, D) and ``valid`` of each history."""
        num_requests = embedded.histories[self._histories[0][0]].lengths.shape[0]
        request_RMD = (
            self._fields(embedded.request, self.request_names)
            if self.request_names
            else embedded.candidate[self.row_names[0]].new_zeros(num_requests, 0, self.dim)
        )
        rows_NMD = self._fields(embedded.candidate, self.row_names)
        events, valid = [], []
        for (name, features), event, place in zip(self._histories, self.event, self.place, strict=True):
            history: EmbeddedHistory = embedded.histories[name]
            token_RLD = event(torch.cat([history.features[feature] for feature in features], dim=2))
            events.append(self.event_norm(place(token_RLD, history.lengths)))
            valid.append(torch.arange(token_RLD.shape[1], device=token_RLD.device) < history.lengths.unsqueeze(1))
        return request_RMD, rows_NMD, events, valid

    def _fields(self, vectors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        tokens = [
            self.dense[self._dense[name]](vectors[name]) if name in self._dense else vectors[name] for name in names
        ]
        return self.field_norm(torch.stack(tokens, dim=1))  # type: ignore[no-any-return]


class _NoPlaces(nn.Module):
    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # noqa: ARG002 - called alike
        return tokens


class _LearnedPlaces(nn.Module):
    """Adds to an event what place it has, the newest first, and which history it is of."""

    def __init__(self, max_length: int, dim: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(max_length, dim))
        self.history = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        place_RL = lengths.unsqueeze(1) - 1 - torch.arange(tokens.shape[1], device=tokens.device)
        return tokens + self.place[place_RL.clamp(0, self.place.shape[0] - 1)] + self.history


class _TargetFields(nn.Module):
    """One more field a history: what of it the candidate attends to."""

    def __init__(self, schema: Schema, dim: int, *, num_heads: int, key_dim: int | None) -> None:
        super().__init__()
        width = widths(schema, dim)
        self._attributes = [list(h.attributes) for h in schema.histories]
        self.candidate = nn.ModuleList(nn.Linear(sum(width[n] for n in names), dim) for names in self._attributes)
        self.query = nn.ModuleList(QueryProjection(dim, num_heads=num_heads, key_dim=key_dim) for _ in self.candidate)
        self.source = nn.ModuleList(SourceProjection(dim, num_heads=num_heads, key_dim=key_dim) for _ in self.candidate)

    def forward(self, candidate: Mapping[str, Tensor], histories: Sequence[GatedTokens]) -> list[Tensor]:
        fields = []
        for names, linear, query, source, tokens in zip(
            self._attributes, self.candidate, self.query, self.source, histories, strict=True
        ):
            queries = linear(torch.cat([candidate[name] for name in names], dim=1)).unsqueeze(1)
            fields += cross_attention([Call(queries, query, source)], tokens)  # type: ignore[arg-type]
        return fields


class _NoTargetFields(nn.Module):
    def forward(self, candidate: Mapping[str, Tensor], histories: Sequence[GatedTokens]) -> list[Tensor]:  # noqa: ARG002
        return []


class _Inputs(NamedTuple):
    """Tokens of a batch, ready for blocks.

    Attributes:
        request, rows: fields (R, M_u, D) and (N, M_c, D).
        events, valid: of each history, (R, L_h, D) and (R, L_h).
        request_of_row: None where R = 1.
    """

    request: Tensor
    rows: Tensor
    events: list[Tensor]
    valid: list[Tensor]
    request_of_row: Tensor | None

    def to_rows(self, of_requests: Tensor) -> Tensor:
        """Gives rows what is their request's: (R, ...) -> (N, ...), or (1, ...) -> (...), to be broadcast."""
        if self.request_of_row is None:
            return of_requests.squeeze(0)
        return of_requests.index_select(0, self.request_of_row)


class INFNet(nn.Module):
    """The network of INFNet: vectors in, one logit a task out. Also its ablations that keep the heterogeneous flow.

    Source: arXiv 2508.11565, version 1.

    Differs from source: see :class:`Tokens`; padding is masked, and a user without events sees zeros; keys and values
    are folded into queries and results (equal in exact arithmetic); what no head reads is not computed.

    Without task tokens (``variant``), heads read the proxies of fields and histories side by side; the paper does not
    say what they read there.

    Args:
        config: sizes and readings.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no history, or no feature of candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: INFNetConfig, schema: Schema) -> None:
        super().__init__()
        require_tokens(schema)
        dim, num_tasks = config.embedding_dim, len(schema.tasks)
        has_tasks = config.variant != "without_task_tokens"
        plans, first = plan_blocks(config)
        num_proxies = proxy_counts(config, schema)
        self.tokens = Tokens(schema, dim, input_norm=config.input_norm, position=config.position)
        sizes = {"num_heads": config.num_heads, "key_dim": config.key_dim}
        self.target = _TargetFields(schema, dim, **sizes) if config.target_attention else _NoTargetFields()  # type: ignore[arg-type]
        self.proxies = nn.ModuleDict()
        if "categorical" in first:
            num_rows_fields = len(self.tokens.row_names) + (len(schema.histories) if config.target_attention else 0)
            self.proxies["categorical"] = CategoricalProxies(
                len(self.tokens.request_names) * dim,
                num_rows_fields * dim,
                dim,
                num_proxies["categorical"],
                hidden=config.proxy_hidden,
            )
        if "sequence" in first:
            self.proxies["sequence"] = build_sequence_proxies(config, schema)
        sizes_of_tasks = {"shared": config.shared_task_tokens, "task": num_tasks}
        self.task_tokens = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(size, dim)) for name, size in sizes_of_tasks.items() if name in first}
        )
        self.blocks = nn.ModuleList(
            FlowBlock(
                plan,
                num_proxies,
                dim,
                has_tasks=has_tasks,
                num_heads=config.num_heads,
                key_dim=config.key_dim,
                projections=config.projections,
                layer_norm=config.layer_norm,
                residual=config.residual,
                gate_proxies=config.gate_proxies,
                gate_hidden=config.gate_hidden or (dim,),
                gate_bias=config.gate_bias,
                gate_residual=config.gate_residual,
            )
            for plan in plans
        )
        self._read_by_all = ["shared"] if config.heads_read == "task_and_shared_tokens" else []
        if not has_tasks:
            self._read_by_all += ["categorical", "sequence"]  # RECONSTRUCTION: the paper does not say
        self._read_by_each = ["task"] if has_tasks else []
        head_size = dim * (sum(num_proxies[name] for name in self._read_by_all) + len(self._read_by_each))
        self.heads = build_heads(config, head_size, num_tasks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections and weights Xavier-uniform, biases 0, task tokens and places normal (0.02); paper: not given."""
        reset_infnet(self)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        return self._run(embedded, embedded.request_of_row)

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows."""
        return self._run(embedded, None)

    def _run(self, embedded: Embedded, request_of_row: Tensor | None) -> Tensor:
        request_RMD, rows_NMD, events, valid = self.tokens(embedded)
        inputs = _Inputs(request_RMD, rows_NMD, events, valid, request_of_row)
        of_requests_RLD, valid_RL = torch.cat(events, dim=1), torch.cat(valid, dim=1)
        events_NLD, valid_NL = inputs.to_rows(of_requests_RLD), inputs.to_rows(valid_RL)
        of_requests = GatedTokens((of_requests_RLD,), valid_RL)
        lengths = [real.shape[1] for real in valid]
        histories = [
            GatedTokens((tokens,), real)
            for tokens, real in zip(events_NLD.split(lengths, dim=-2), valid_NL.split(lengths, dim=-1), strict=True)
        ]
        rows_NMD = torch.cat([inputs.rows, *self.target(embedded.candidate, histories)], dim=1)
        streams: dict[str, Tensor] = {**self.task_tokens}
        if "categorical" in self.proxies:
            streams["categorical"] = self.proxies["categorical"](inputs.request, rows_NMD, request_of_row)
        if "sequence" in self.proxies:
            streams["sequence"] = inputs.to_rows(self.proxies["sequence"](inputs.events, inputs.valid))
        tokens = {
            "categorical": GatedTokens((inputs.to_rows(inputs.request), rows_NMD)),
            "sequence": GatedTokens((events_NLD,), valid_NL),
        }
        if "task" in streams:
            tokens["task"] = GatedTokens((streams["task"],))
        for number, block in enumerate(self.blocks):
            streams, tokens = block(streams, tokens, of_requests if number == 0 else None, inputs.to_rows)
        return self._logits(streams, rows_NMD.shape[0])

    def _logits(self, streams: Mapping[str, Tensor], num_rows: int) -> Tensor:
        by_all = [streams[name].flatten(-2).expand(num_rows, -1) for name in self._read_by_all]
        inputs = []
        for task in range(len(self.heads)):
            by_each = [streams[name][..., task, :].expand(num_rows, -1) for name in self._read_by_each]
            inputs.append(torch.cat([*by_each, *by_all], dim=1))
        return self.heads(inputs)  # type: ignore[no-any-return]


class INFNetWithoutFlow(nn.Module):
    """The paper's ablation without heterogeneous flow: types of tokens meet in the heads only.

    RECONSTRUCTION: the paper does not say what remains. Here, every type gates itself with its own proxies, block after
    block; proxies are then made again from the gated tokens; a head reads its task token and the proxies of fields and
    histories, side by side.

    Args, errors and shape are :class:`INFNet`'s.
    """

    def __init__(self, config: INFNetConfig, schema: Schema) -> None:
        super().__init__()
        require_tokens(schema)
        dim, num_tasks = config.embedding_dim, len(schema.tasks)
        num_proxies = proxy_counts(config, schema)
        self.tokens = Tokens(schema, dim, input_norm=config.input_norm, position=config.position)
        self.categorical_proxies = CategoricalProxies(
            len(self.tokens.request_names) * dim,
            len(self.tokens.row_names) * dim,
            dim,
            num_proxies["categorical"],
            hidden=config.proxy_hidden,
        )
        self.sequence_proxies = build_sequence_proxies(config, schema)
        self.task = nn.Parameter(torch.empty(num_tasks, dim))
        self.shared = nn.Parameter(torch.empty(config.shared_task_tokens, dim))
        self.gates = nn.ModuleList(
            nn.ModuleDict(
                {
                    kind: ProxyGate(
                        num_proxies[proxies], dim, hidden=config.gate_hidden or (dim,), bias=config.gate_bias
                    )
                    for kind, proxies in GATED_BY.items()
                }
            )
            for _ in range(config.num_blocks)
        )
        self._ungated = 1.0 if config.gate_residual else 0.0
        self.heads = build_heads(config, dim * (1 + num_proxies["categorical"] + num_proxies["sequence"]), num_tasks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As :meth:`INFNet.reset_parameters`."""
        reset_infnet(self)
        for tokens in (self.task, self.shared):
            nn.init.normal_(tokens, std=TOKEN_STD)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        return self._run(embedded, embedded.request_of_row)

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows."""
        return self._run(embedded, None)

    def _run(self, embedded: Embedded, request_of_row: Tensor | None) -> Tensor:
        request_RMD, rows_NMD, events, valid = self.tokens(embedded)
        inputs = _Inputs(request_RMD, rows_NMD, events, valid, request_of_row)
        fields_NPD = self.categorical_proxies(inputs.request, inputs.rows, request_of_row)
        events_RPD = self.sequence_proxies(inputs.events, inputs.valid)
        gate_ND, gate_RD, gate_D = (
            torch.stack([blocks[kind](proxies) + self._ungated for blocks in self.gates]).prod(0)  # type: ignore[index]
            for kind, proxies in (("categorical", fields_NPD), ("sequence", events_RPD), ("task", self.shared))
        )
        # Gates of fields are a row's own: so, from here on, are the fields of its request.
        gate_N1D = gate_ND.unsqueeze(1)
        fields_NPD = self.categorical_proxies(inputs.to_rows(inputs.request) * gate_N1D, inputs.rows * gate_N1D, None)
        events_NPD = inputs.to_rows(self.sequence_proxies(inputs.events, inputs.valid, gate_RD))
        num_rows = inputs.rows.shape[0]
        proxies_NP = torch.cat([fields_NPD.flatten(1), events_NPD.flatten(-2).expand(num_rows, -1)], dim=1)
        task_TD = self.task * gate_D
        return self.heads([torch.cat([task_D.expand(num_rows, -1), proxies_NP], dim=1) for task_D in task_TD])  # type: ignore[no-any-return]


TOKEN_STD = 0.02
"""Standard deviation of learnt tokens at the start."""


def require_tokens(schema: Schema) -> None:
    """Checks that there are sequence tokens, and tokens of candidates.

    Raises:
        SchemaError: there is no history, or no feature of candidates.
    """
    candidate_features(schema)
    if not schema.histories:
        raise SchemaError(
            "histories must name at least one history for the model 'infnet', got none",
            hint="declare views.events and a history a kind of event in the schema",
        )


def proxy_counts(config: INFNetConfig, schema: Schema) -> dict[str, int]:
    """How many proxies each type has."""
    num_histories = len(schema.histories)
    each = config.sequence_proxies or (1 if num_histories > 1 else 4)
    return {
        "categorical": config.categorical_proxies,
        "sequence": each * num_histories,
        "shared": config.shared_task_tokens,
    }


def build_sequence_proxies(config: INFNetConfig, schema: Schema) -> SequenceProxies:
    """phi_seq as the config says."""
    return SequenceProxies(
        config.embedding_dim,
        proxy_counts(config, schema)["sequence"] // len(schema.histories),
        hidden=config.proxy_hidden,
        pooling=config.sequence_pooling,
        layer_norm=config.layer_norm,
    )


def build_heads(config: INFNetConfig, input_size: int, num_tasks: int) -> TaskTowers:
    """One MLP a task, ending in one logit."""
    return TaskTowers(input_size, config.hidden, num_tasks, activation=config.activation, dropout=config.dropout)


def reset_infnet(network: nn.Module) -> None:
    """Initialises every part of an INFNet."""
    for module in network.modules():
        if isinstance(module, (Dice, PReLU)):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (QueryProjection, SourceProjection)):
            for weight in module.parameters():
                nn.init.xavier_uniform_(weight.detach().flatten(0, 1))
        elif isinstance(module, (_LearnedPlaces, nn.ParameterDict)):
            for token in module.parameters():
                nn.init.normal_(token, std=TOKEN_STD)
    for module in network.modules():
        if isinstance(module, ProxyGate):  # its last bias is its own
            module.reset_parameters()


NETWORKS: dict[str, type[INFNet] | type[INFNetWithoutFlow]] = {
    "full": INFNet,
    "without_task_tokens": INFNet,
    "without_gates": INFNet,
    "without_flow": INFNetWithoutFlow,
}


def build_infnet(config: INFNetConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds INFNet, or one of its ablations, with its tables; histories' items and the candidates share theirs.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no history, or no feature of candidates.
    """
    network = NETWORKS[config.variant](config, schema)
    return RankingModel(Lookup(schema, table_sizes, config.embedding_dim), network)
