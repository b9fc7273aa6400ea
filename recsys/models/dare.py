r"""DARE: decoupled attention and representation embeddings, and the baselines that its paper compares with.

A long history is used in two stages: a cheap score ranks all events by relevance to the candidate, and only the K best
are weighed and pooled. Models before it score and pool with the same vectors. Their gradients pull those in different
directions, and the pooling wins. DARE gives each role its own tables, and the scoring ones may be narrow.

Feng, Pan, Wu, Chen, Wang, Li, Hu, Jiang, Long: "Long-Sequence Recommendation Models Need Decoupled Embeddings", ICLR
2025, arXiv 2410.02604. Numbers of sections refer to it; "the code" is the authors' (thuml/DARE).

Shapes: R requests, N candidates (rows), L history length, K events kept, A width of an attention vector, V width of a
representation vector, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from recsys.batch import Batch
from recsys.config import Config, InconsistentError
from recsys.embedded import Embedded, EmbeddedHistory, Space, Use, widths
from recsys.embeddings import Lookup
from recsys.errors import SchemaError
from recsys.layers import MLP, ActivationName, Dice, JoinedMLP, PReLU, RowBatchNorm
from recsys.losses import binary_cross_entropy
from recsys.models.base import RankingModel, TrainingOutput, Width
from recsys.models.inputs import candidate_features, event_features, request_features
from recsys.ops.search_attention import (
    attention_pool,
    masked,
    relevance,
    relevance_single_request,
    top_k_pool,
    top_k_pool_single_request,
)
from recsys.schema import Categorical, History, MultiCategorical, Schema

CODE_STD = 0.01
"""Deviation of initial weights in the code."""


class _LongHistoryConfig(Config):
    embedding_dim: int = Field(
        16, ge=4, le=1024, multiple_of=4, description="width of a feature's representation vector; paper: 16, 64, 128"
    )
    top_k: int = Field(20, ge=1, le=4096, description="events that the search keeps; the code: 20 of 200")
    num_slots: int = Field(200, ge=1, le=65536, description="places counted back from the newest event; the code: 200")
    hidden: tuple[Width, ...] = Field((200, 80), min_length=1, description="widths of the head; the code: 200, 80")
    auxiliary_hidden: tuple[Width, ...] = Field(
        (200,), min_length=1, description="widths of the head that sees all events, in training only; the code: 200"
    )
    auxiliary_weight: float = Field(1.0, ge=0, description="of that head's loss; the code: 1; 0: without the head")
    activation: ActivationName = Field("prelu", description="the code: PReLU")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="after each layer of the head; the code: none")
    initialisation: Literal["xavier", "code"] = Field(
        "xavier",
        description="'code': every weight but biases N(0, 0.01), of tables, batch norm and PReLU too, as the code does",
    )


class DAREConfig(_LongHistoryConfig):
    """Config of :class:`LongHistoryNetwork` as DARE. Defaults are the authors' code's where it gives them."""

    kind: Literal["dare"] = "dare"
    attention_dim: int = Field(
        16,
        ge=4,
        le=1024,
        multiple_of=4,
        description="width of a feature's attention vector; paper: half does too",
    )


class TWINConfig(_LongHistoryConfig):
    """Config of :class:`LongHistoryNetwork` as TWIN and the variants that section 5 compares with.

    TWIN itself: one set of tables for all roles. Chang et al., "TWIN: TWo-stage Interest Network for Lifelong User
    Behavior Modeling in CTR Prediction at Kuaishou", KDD 2023, as the authors of DARE implement it.
    """

    kind: Literal["twin"] = "twin"
    tables: Literal["shared", "attention_by_side", "by_role_and_side"] = Field(
        "shared",
        description="'by_role_and_side': TWIN-4E; 'attention_by_side': attention tables of candidates and of events "
        "differ, representation is shared (in the code only)",
    )
    projection: bool = Field(False, description="TWIN w/ proj.: linear maps of the shared vectors for each role")
    has_product: bool = Field(True, description="false: TWIN w/o TR, the pooled vector alone")
    search: Literal["attention", "category", "hash", "sampling"] = Field(
        "attention",
        description="'category': SIM-hard, the newest events of the candidate's category, then the newest others; "
        "'hash': ETA, by the Hamming distance of random signs; 'sampling': SDIM, the sum of the events whose signs "
        "agree with the candidate's, no scores at all",
    )
    category: str | None = Field(
        None,
        min_length=1,
        description="for search 'category', which has no default: the attribute of each history that says what events "
        "and candidates are alike; of one value each, values that the encoder does not know are one",
    )
    hash_bits: int = Field(32, ge=1, le=1024, description="of search 'hash' and 'sampling'; FuxiCTR for ETA: 32")
    hash_width: int = Field(
        2, ge=1, le=16, description="of search 'sampling': signs that must agree at once; reconstruction"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        problems = []
        if self.search != "category" and self.category is not None:
            problems.append(f"category must not be given where search is {self.search!r}, got {self.category!r}")
        for name, searches in (("hash_bits", ("hash", "sampling")), ("hash_width", ("sampling",))):
            if self.search not in searches and getattr(self, name) != type(self).model_fields[name].default:
                problems.append(f"{name} must not be given where search is {self.search!r}, got {getattr(self, name)}")
        if self.search == "sampling":
            if self.auxiliary_weight > 0:
                problems.append(
                    f"auxiliary_weight must be 0 where search is 'sampling', which has no scores to train, "
                    f"got {self.auxiliary_weight}"
                )
            if self.tables != "shared" or self.projection:
                problems.append("tables must be 'shared' and projection false where search is 'sampling'")
            if self.hash_bits % self.hash_width:
                problems.append(
                    f"hash_bits must be a multiple of hash_width, got {self.hash_bits} and {self.hash_width}"
                )
        if problems:
            raise InconsistentError(problems)
        return self


class Roles(NamedTuple):
    """In which space of tables each role finds its vectors; an empty name is the main one."""

    attention_events: str
    attention_candidate: str
    values_events: str
    values_candidate: str


DARE_ROLES = Roles("attention", "attention", "", "")
TWIN_ROLES: Mapping[str, Roles] = {
    "shared": Roles("", "", "", ""),
    "attention_by_side": Roles("attention", "attention_candidate", "", ""),
    "by_role_and_side": Roles("attention", "attention_candidate", "", "values_candidate"),
}


class EventTokens(nn.Module):
    """Vectors of one role: events and candidates side by side, from embedded features and the place in the history.

    What only events have (event features, and how many events ago it was) the candidate has as a learnt vector, as the
    code gives the candidate the time slot 0.

    Args:
        shared: names of what events and candidates both have, in the order of the vector.
        own: names and widths of the event features.
        spaces: of the events' and of the candidate's vectors; dense features have no tables, and are in none.
        schema: what the features are.
    """

    def __init__(self, shared: list[str], own: dict[str, int], spaces: tuple[str, str], schema: Schema) -> None:
        super().__init__()

        def keys(names: Iterable[str], space: str) -> list[str]:
            return [_key(name, space if isinstance(schema.feature(name), Categorical) else "") for name in names]

        self._event_keys, self._candidate_keys = keys(shared, spaces[0]), keys(shared, spaces[1])
        self._own = keys(own, spaces[0])
        self.own_size = sum(own.values())
        self.absent = nn.Parameter(torch.empty(self.own_size)) if own else None

    def candidates(self, embedded: Embedded, slots: nn.Embedding) -> tuple[Tensor, Tensor]:
        """What candidates share with events (N, S), and what they have instead of the rest (O,)."""
        shared_NS = torch.cat([embedded.candidate[key] for key in self._candidate_keys], dim=1)
        slot_D = slots.weight[0]
        return shared_NS, slot_D if self.absent is None else torch.cat([self.absent, slot_D])

    def events(self, history: EmbeddedHistory, slots: nn.Embedding) -> tuple[Tensor, Tensor]:
        """The same of events: (R, L, S) and (R, L, O)."""
        shared_RLS = torch.cat([history.features[key] for key in self._event_keys], dim=2)
        age_RL = history.lengths.unsqueeze(1) - torch.arange(shared_RLS.shape[1], device=shared_RLS.device)
        slots_RLD = slots(age_RL.clamp(1, slots.num_embeddings - 1))  # the newest event is in slot 1
        return shared_RLS, torch.cat([*(history.features[key] for key in self._own), slots_RLD], dim=2)


class Projected(nn.Module):
    """Linear maps of what candidates and events share: TWIN w/ proj."""

    # DIFF(paper): one map of the whole vector, the slot not in it; the scripts of the code map each feature by itself.

    def __init__(self, size: int) -> None:
        super().__init__()
        self.candidate = nn.Linear(size, size, bias=False)
        self.events = nn.Linear(size, size, bias=False)


def _category(history: History, schema: Schema, config: DAREConfig | TWINConfig) -> str:
    """The attribute by which events and candidates are alike, for search 'category'.

    Raises:
        SchemaError: it is not given, or no attribute of the history with one value each.
    """
    assert isinstance(config, TWINConfig)
    kinds = {name: schema.feature(name) for name in history.attributes}
    choices = [n for n, f in kinds.items() if isinstance(f, Categorical) and not isinstance(f, MultiCategorical)]
    if config.category not in choices:
        got = "none" if config.category is None else repr(config.category)
        raise SchemaError(
            "model.category must name a categorical attribute with one value each of history "
            f"{history.name!r} where search is 'category', got {got}",
            hint="it has " + (", ".join(choices) or "no such attribute: add one to the schema"),
        )
    return str(config.category)


class SearchedHistory(nn.Module):
    r"""One history: search, attention, and what the head takes of it.

    .. math:: s_j = \frac{\langle q, k_j \rangle}{\sqrt{S}} + \frac{\langle q', k'_j \rangle}{\sqrt{O}}

    with what candidates and events share (S wide), and what only events have (O wide, the slot among it): the code
    scales the two apart, where the paper writes one root (section 4.1).

    Args:
        history: of the schema.
        schema: what its features are.
        config: sizes and, for TWIN, the variant.
        roles: spaces of the vectors.
        attention_dim: width of a categorical feature's attention vector.
    """

    def __init__(
        self, history: History, schema: Schema, config: DAREConfig | TWINConfig, roles: Roles, attention_dim: int
    ) -> None:
        super().__init__()
        self.name, self.top_k = history.name, config.top_k
        categorical = [n for n in history.attributes if isinstance(schema.feature(n), Categorical)]
        if not categorical:
            raise SchemaError(
                f"history {history.name!r} must have a categorical attribute for the model {config.kind!r}, got none",
                hint="name the item's key among its attributes",
            )
        width = widths(schema, config.embedding_dim)
        own = {f.name: width[f.name] for f in history.event_features}
        self.search = config.search if isinstance(config, TWINConfig) else "attention"
        # Signs of what a candidate has too; nothing is scored.
        is_scored = self.search != "sampling"
        own_categorical = {n: attention_dim for n in own if is_scored and isinstance(schema.feature(n), Categorical)}
        # DIFF(paper): dense attributes and event features are pooled but not scored, because the score is of tables.
        self.attention = EventTokens(categorical, own_categorical, roles[:2], schema)
        self.values = EventTokens(list(history.attributes), own, roles[2:], schema)
        # The table of slots is a role's own exactly where the other tables are.
        self.slots = nn.Embedding(config.num_slots + 1, config.embedding_dim)
        is_shared = roles.attention_events == roles.values_events
        self.attention_slots = None if is_shared else nn.Embedding(config.num_slots + 1, attention_dim)
        shared = attention_dim * len(categorical)
        self._scales = (1 / math.sqrt(shared), 1 / math.sqrt(self.attention.own_size + attention_dim))
        shared_values = sum(width[n] for n in history.attributes)
        self.values_size = shared_values + self.values.own_size + config.embedding_dim
        self._category = _category(history, schema, config) if self.search == "category" else ""
        self.has_product = config.has_product if isinstance(config, TWINConfig) else True
        projects = isinstance(config, TWINConfig) and config.projection
        self.project_attention = Projected(shared) if projects else None
        self.project_values = Projected(shared_values) if projects else None
        if isinstance(config, TWINConfig) and self.search in ("hash", "sampling"):
            # Signs of random directions, the same ones whenever the model is built; saved with it.
            generator = torch.Generator().manual_seed(0)
            directions = torch.randn(shared, config.hash_bits, generator=generator)
            self.register_buffer("directions", directions)
            self._hash_width = config.hash_width

    @property
    def output_size(self) -> int:
        """Width of what the head takes."""
        return (3 if self.has_product else 2) * self.values_size

    def tokens(self, embedded: Embedded) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scaled query (N, S), keys (R, L, S), scores that no candidate changes (R, L), candidate (N, V), values."""
        history = embedded.histories[self.name]
        slots, attention_slots = self.slots, self.slots if self.attention_slots is None else self.attention_slots
        query_NS, own_O = self.attention.candidates(embedded, attention_slots)
        keys_RLS, own_RLO = self.attention.events(history, attention_slots)
        shared_NC, absent = self.values.candidates(embedded, slots)
        events_RLC, own_RLP = self.values.events(history, slots)
        if self.project_attention is not None:
            query_NS, keys_RLS = self.project_attention.candidate(query_NS), self.project_attention.events(keys_RLS)
        if self.project_values is not None:
            shared_NC, events_RLC = self.project_values.candidate(shared_NC), self.project_values.events(events_RLC)
        candidate_NV = torch.cat([shared_NC, absent.expand(shared_NC.shape[0], -1)], dim=1)
        values_RLV = torch.cat([events_RLC, own_RLP], dim=2)
        shared, own = self._scales
        return query_NS * shared, keys_RLS, (own_RLO @ own_O) * own, candidate_NV, values_RLV

    def scores(self, embedded: Embedded) -> Tensor:
        """Attention scores (N, L), padding too."""
        query_NS, keys_RLS, own_RL, _, _ = self.tokens(embedded)
        rows = embedded.request_of_row
        return relevance(query_NS, keys_RLS, rows) + own_RL.index_select(0, rows)

    def forward(self, embedded: Embedded) -> Tensor:
        """What the head takes, (N, output_size): candidate, pooled history, their product."""
        return self._training(embedded, with_all=False)[0]

    def with_all_events(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The same, and what it would be if the search kept every event."""
        kept, everything = self._training(embedded, with_all=True)
        assert everything is not None
        return kept, everything

    def _training(self, embedded: Embedded, *, with_all: bool) -> tuple[Tensor, Tensor | None]:
        query_NS, keys_RLS, own_RL, candidate_NV, values_RLV = self.tokens(embedded)
        rows, lengths = embedded.request_of_row, embedded.histories[self.name].lengths
        if self.search == "sampling":
            pooled_NV = self._sampled(
                query_NS,
                *(t.index_select(0, rows) for t in (keys_RLS, values_RLV, lengths)),
            )
            return self._joined(candidate_NV, pooled_NV), None
        scores_NL = relevance(query_NS, keys_RLS, rows) + own_RL.index_select(0, rows)
        search_NL = scores_NL
        if self.search == "category":
            search_NL = self._newest_of_category(embedded, rows)
        elif self.search == "hash":
            search_NL = relevance(self._signs(query_NS), self._signs(keys_RLS), rows) + _newer_wins(scores_NL)
        pooled_NV = top_k_pool(search_NL, scores_NL, values_RLV, lengths, rows, self.top_k)
        everything = attention_pool(scores_NL, values_RLV, lengths, rows) if with_all else None
        return self._joined(candidate_NV, pooled_NV), None if everything is None else self._joined(
            candidate_NV, everything
        )

    def single_request(self, embedded: Embedded) -> Tensor:
        """As :meth:`forward` where R = 1; nothing of the history is gathered to rows but the chosen events."""
        query_NS, keys_RLS, own_RL, candidate_NV, values_RLV = self.tokens(embedded)
        lengths = embedded.histories[self.name].lengths
        if self.search == "sampling":
            return self._joined(candidate_NV, self._sampled(query_NS, keys_RLS, values_RLV, lengths))
        scores_NL = relevance_single_request(query_NS, keys_RLS, own_RL, lengths)
        search_NL = scores_NL
        if self.search == "category":
            search_NL = masked(self._newest_of_category(embedded, torch.zeros_like(embedded.request_of_row)), lengths)
        elif self.search == "hash":
            newer_1L = _newer_wins(own_RL).unsqueeze(0)
            search_NL = relevance_single_request(self._signs(query_NS), self._signs(keys_RLS), newer_1L, lengths)
        pooled_NV = top_k_pool_single_request(search_NL, scores_NL, values_RLV, lengths, self.top_k)
        return self._joined(candidate_NV, pooled_NV)

    def _joined(self, candidate: Tensor, pooled: Tensor) -> Tensor:
        parts = [candidate, pooled]
        if self.has_product:
            # sum_j w_j (e_j * v) = (sum_j w_j e_j) * v: once, after pooling.
            parts.append(pooled * candidate)
        return torch.cat(parts, dim=1)

    def _newest_of_category(self, embedded: Embedded, rows: Tensor) -> Tensor:
        """Search scores (N, L): newer events first, those of the candidate's category before all others."""
        # DIFF(code): the chosen ones are weighed as in every other search. There, the place in the history is scored
        # twice, once with the scale of the whole vector, by the bound of a slice that is not set on that branch.
        events_RLD = embedded.histories[self.name].features[self._category].index_select(0, rows)
        # RECONSTRUCTION: equal categories by equal vectors, because a network is given no ids.
        is_same_NL = (events_RLD == embedded.candidate[self._category].unsqueeze(1)).all(2)
        length = events_RLD.shape[1]
        return is_same_NL.to(events_RLD.dtype) * length + torch.arange(length, device=events_RLD.device)

    def _signs(self, vectors: Tensor) -> Tensor:
        # RECONSTRUCTION: ETA's code is not public; signs of random projections, as in FuxiCTR's model_zoo/LongCTR.
        directions: Tensor = self.get_buffer("directions")
        return torch.where(vectors.detach() @ directions >= 0, 1.0, -1.0).to(vectors.dtype)

    def _sampled(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """SDIM: the sum of the events in the candidate's bucket, to length 1, averaged over groups of signs.

        Keys, values and lengths are of rows, or of the one request.
        """
        # RECONSTRUCTION: Cao et al., "Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR
        # Prediction", CIKM 2022, was not at hand, and the code of DARE's authors lacks it: number and width of the
        # groups are ours.
        agreeing_NLB = self._signs(query).unsqueeze(1) * self._signs(keys)
        width, valid_NL = self._hash_width, torch.arange(keys.shape[1], device=keys.device) < lengths.unsqueeze(1)
        is_same_NLG = (agreeing_NLB.unflatten(2, (-1, width)) > 0).all(3) & valid_NL.unsqueeze(2)
        return functional.normalize(is_same_NLG.to(values.dtype).transpose(1, 2) @ values, dim=2, eps=1e-6).mean(1)


class LongHistoryNetwork(nn.Module):
    r"""DARE, TWIN and their relatives: vectors in, one logit a task out.

    .. math:: h = \sum_{j \in \mathcal{I}} w_j\, e_j^{repr} \odot v^{repr}, \qquad
              w = \operatorname{softmax}_{j \in \mathcal{I}} s_j, \quad
              \mathcal{I} = \operatorname{top-}K_j\, s_j, \quad s_j \propto \langle e_j^{att}, v^{att} \rangle

    and a head over :math:`[v^{repr}; \sum_j w_j e_j^{repr}; h]`, batch-normalised. In training a second head sees the
    same with all events instead of the K best; it is what trains the scores of events that the search does not keep.

    Source: Feng et al., ICLR 2025, section 4, and the authors' code.

    Differs from source: several histories, each with its own search; features of the request, and those of the
    candidate that no history has, join the input of the head, not normalised; several tasks, each with its own logit;
    a slope of PReLU for each channel.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.
        roles: spaces of the vectors.
        attention_dim: width of a categorical feature's attention vector.

    Raises:
        SchemaError: there is no history, or one without a categorical attribute, or without the category of the search.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: DAREConfig | TWINConfig, schema: Schema, roles: Roles, attention_dim: int) -> None:
        super().__init__()
        if not schema.histories:
            raise SchemaError(
                f"histories must name at least one history for the model {config.kind!r}, got none",
                hint="declare views.events and a history in the schema",
            )
        self._initialisation = config.initialisation
        width = widths(schema, config.embedding_dim)
        in_history = {name for history in schema.histories for name in history.attributes}
        self._request = request_features(schema)
        candidate = candidate_features(schema)
        self._candidate = [name for name in candidate if name not in in_history]
        self.histories = nn.ModuleList(
            SearchedHistory(history, schema, config, roles, attention_dim) for history in schema.histories
        )
        size = sum(h.output_size for h in self.histories)  # type: ignore[misc]
        num_tasks = len(schema.tasks)
        self.norm = RowBatchNorm(size)
        # DIFF(code): features that no history has join in, because a schema has them; they are not normalised.
        self.mlp = JoinedMLP(
            sum(width[name] for name in self._request),
            size + sum(width[name] for name in self._candidate),
            config.hidden,
            activation=config.activation,
            dropout=config.dropout,
        )
        # DIFF(code): one logit a task, not a two-way softmax, because a sigmoid of the difference is the same.
        self.output = nn.Linear(config.hidden[-1], num_tasks)
        self._auxiliary_weight = config.auxiliary_weight
        if config.auxiliary_weight > 0:
            self.auxiliary = nn.Sequential(
                RowBatchNorm(size),
                MLP(size, config.auxiliary_hidden, activation=config.activation),
                nn.Linear(config.auxiliary_hidden[-1], num_tasks),
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear weights Xavier-uniform, slots and absent vectors N(0, 0.01), or all as in the authors' code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (Dice, PReLU, RowBatchNorm)):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.01)
            elif isinstance(module, EventTokens) and module.absent is not None:
                nn.init.normal_(module.absent, std=0.01)
        if self._initialisation == "code":
            for name, parameter in self.named_parameters():
                if "bias" not in name:
                    nn.init.normal_(parameter, std=CODE_STD)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        histories_NH = torch.cat([history(embedded) for history in self.histories], dim=1)
        return self._head(embedded, histories_NH)

    def training_forward(self, embedded: Embedded, batch: Batch) -> TrainingOutput:
        """Logits (N, T), and the loss of the head that sees all events."""
        if self._auxiliary_weight == 0:
            return TrainingOutput(self(embedded), {})
        kept, everything = zip(*(h.with_all_events(embedded) for h in self.histories), strict=True)  # type: ignore[operator]
        logits = self.auxiliary(torch.cat(everything, dim=1))
        assert batch.labels is not None
        loss = binary_cross_entropy(logits, batch.labels).total * self._auxiliary_weight
        return TrainingOutput(self._head(embedded, torch.cat(kept, dim=1)), {"auxiliary": loss})

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, ``request_of_row`` not read."""
        histories = [history.single_request(embedded) for history in self.histories]  # type: ignore[operator]
        request_RU, rows_NC = self._inputs(embedded, torch.cat(histories, dim=1))
        return self.output(self.mlp.single_request(request_RU, rows_NC))  # type: ignore[no-any-return]

    def attention_scores(self, embedded: Embedded) -> dict[str, Tensor]:
        """Scores (N, L) of each history's events, padding too: what the search ranks by."""
        return {history.name: history.scores(embedded) for history in self.histories}  # type: ignore[operator, misc]

    def _head(self, embedded: Embedded, histories: Tensor) -> Tensor:
        request_RU, rows_NC = self._inputs(embedded, histories)
        return self.output(self.mlp(request_RU, rows_NC, embedded.request_of_row))  # type: ignore[no-any-return]

    def _inputs(self, embedded: Embedded, histories: Tensor) -> tuple[Tensor, Tensor]:
        """What is the same for all rows of a request (R, U), and what is a row's own (N, C)."""
        own = [embedded.candidate[feature] for feature in self._candidate]
        rows_NC = torch.cat([self.norm(histories), *own], dim=1)
        if not self._request:
            return rows_NC.new_zeros(embedded.time.shape[0], 0), rows_NC
        return torch.cat([embedded.request[feature] for feature in self._request], dim=1), rows_NC


def _newer_wins(scores: Tensor) -> Tensor:
    """(L,) in [0, 1), growing: decides between integer scores that are equal."""
    return torch.arange(scores.shape[1], dtype=scores.dtype, device=scores.device) / scores.shape[1]


def _key(name: str, space: str) -> str:
    return f"{name}@{space}" if space else name


def spaces_of(schema: Schema, roles: Roles, attention_dim: int, embedding_dim: int) -> tuple[Space, ...]:
    """The tables of every role that is not the main one: of the histories' categorical features, on the role's side."""
    found: dict[str, tuple[int, list[Use]]] = {}
    for role, space in roles._asdict().items():
        if not space:
            continue
        uses = found.setdefault(space, (attention_dim if role.startswith("attention") else embedding_dim, []))[1]
        for history in schema.histories:
            events = event_features(history)
            side, names = (history.name, events) if role.endswith("events") else ("candidate", history.attributes)
            uses += [
                Use(side, n) for n in names if isinstance(schema.feature(n), Categorical) and Use(side, n) not in uses
            ]
    return tuple(Space(name, dim, tuple(uses)) for name, (dim, uses) in found.items())


def build_dare(config: DAREConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds DARE: attention tables and representation tables, each shared by candidates and events.

    Raises:
        SchemaError: there is no history, or one without a categorical attribute.
    """
    network = LongHistoryNetwork(config, schema, DARE_ROLES, config.attention_dim)
    spaces = spaces_of(schema, DARE_ROLES, config.attention_dim, config.embedding_dim)
    return RankingModel(_tables(config, schema, table_sizes, spaces), network)


def build_twin(config: TWINConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds TWIN or one of its variants.

    Raises:
        SchemaError: there is no history, or one without a categorical attribute.
    """
    roles = TWIN_ROLES[config.tables]
    network = LongHistoryNetwork(config, schema, roles, config.embedding_dim)
    spaces = spaces_of(schema, roles, config.embedding_dim, config.embedding_dim)
    return RankingModel(_tables(config, schema, table_sizes, spaces), network)


def _tables(
    config: _LongHistoryConfig, schema: Schema, table_sizes: Mapping[str, int], spaces: tuple[Space, ...]
) -> Lookup:
    init_std = CODE_STD if config.initialisation == "code" else None
    return Lookup(schema, table_sizes, config.embedding_dim, spaces=spaces, init_std=init_std)
