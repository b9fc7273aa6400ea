r"""AW-MoE: a mixture of experts whose gate is an attention over the user's past events.

The history does two things at once: it is a feature of the experts, and it votes, event by event, on how much each
expert counts. So users of different habits are scored by different mixtures. A contrastive loss makes the gate of a
thinned history resemble that of the whole one, for the sake of users of whom little is known.

Gong, Chen, Ma, Xiao, Wang, Tang, Liu, Xu, Long, Jiang: "Attention Weighted Mixture of Experts with Contrastive Learning
for Personalized Ranking in E-commerce", ICDE 2023, arXiv 2306.05011.

**This is a reconstruction.** Neither the full text nor code was at hand: the abstract says that the history enters the
experts and the gate, that the gate has a gate unit and an activation unit, that histories are masked at random and a
contrastive loss is put on the gate's output. All else (shapes, how the units combine, similarity, every size) is a
choice of ours, tagged ``RECONSTRUCTION`` where it is made. No figure of the paper can be expected of it.

Shapes: R requests, N candidates (rows), A anchors (R where the anchor is the query, N where it is the candidate), L
history length, H common width of all groups of features, K experts, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from recsys.batch import Batch
from recsys.config import Config, InconsistentError
from recsys.embedded import Embedded, EmbeddedHistory, widths
from recsys.embeddings import Lookup
from recsys.errors import SchemaError
from recsys.layers import MLP, ExpertTowers, JoinedMLP, TargetAttention, mean_of_events
from recsys.losses import Similarity, contrastive_loss
from recsys.models.base import RankingModel, TrainingOutput, Width
from recsys.models.inputs import candidate_features
from recsys.schema import History, Schema

Spread = Callable[[Tensor], Tensor]
"""Values of requests (R, ...) to rows (N, ...)."""


class AWMoEConfig(Config):
    """Config of :class:`AWMoE`. No value is the paper's: it was not at hand.

    The relatives that it is compared with: DNN is ``gate: none, pooling: mean, num_experts: 1``; DIN the same with
    ``pooling: attention``; Category-MoE (arXiv 2007.12349, without its constraints on the gate) is ``gate: anchor``
    with ``anchor: query``; MoE-mean is ``gate: mean``; "w/o gate unit" and "w/o activation unit" are their switches;
    AW-MoE is ``contrastive_weight: 0``, AW-MoE & CL above 0.
    """

    kind: Literal["aw_moe"] = "aw_moe"
    embedding_dim: int = Field(16, ge=4, le=1024, multiple_of=4, description="width of every table; reconstruction")
    anchor: Literal["query", "candidate"] = Field(
        "candidate",
        description="what the gate relates events to: 'query' (search) the features of the request's context, so that "
        "the gate is computed once a request; 'candidate' (recommendation) the candidate",
    )
    num_experts: int = Field(4, ge=1, le=1024, description="K; reconstruction")
    group_hidden: tuple[Width, ...] = Field(
        (64,), min_length=1, description="widths of each feature group's network, the last is H; reconstruction"
    )
    attention_hidden: tuple[Width, ...] = Field(
        (36,), min_length=1, description="widths of the unit that pools events for the experts; reconstruction"
    )
    expert_hidden: tuple[Width, ...] = Field(
        (256, 128), min_length=1, description="widths of an expert; reconstruction, its predecessor: 512, 256"
    )
    gate_hidden: tuple[Width, ...] = Field((64, 32), min_length=1, description="of the gate unit; reconstruction")
    activation_hidden: tuple[Width, ...] = Field(
        (32, 16), min_length=1, description="of the activation unit; reconstruction"
    )
    pooling: Literal["attention", "mean"] = Field("attention", description="of events, for the experts")
    gate: Literal["attention", "mean", "anchor", "none"] = Field(
        "attention",
        description="'mean': from the average event; 'anchor': no events; 'none': one expert, weight 1",
    )
    has_gate_unit: bool = Field(True, description="false: a linear map of the weighted sum of events instead of votes")
    has_activation_unit: bool = Field(True, description="false: every event's vote counts the same")
    gate_norm: Literal["none", "mean", "softmax"] = Field(
        "none",
        description="'mean': divided by the number of events, the default one included; 'softmax': over experts; "
        "reconstruction",
    )
    gate_inputs: Literal["own", "shared"] = Field(
        "own", description="'own': the contrastive loss does not reach the experts' input network; reconstruction"
    )
    contrastive_weight: float = Field(0.0, ge=0, description="lambda; reconstruction: 0.05 where it is used")
    mask_probability: float = Field(0.1, ge=0, lt=1, description="of dropping an event; reconstruction")
    similarity: Similarity = Field("cosine", description="of two gates; 'dot' grows with their length; reconstruction")
    temperature: float = Field(0.1, gt=0, le=100, description="divides the similarity; reconstruction")
    num_negatives: int | None = Field(
        None, ge=1, description="at most, by row; null: every row of another user in the batch; reconstruction"
    )
    has_stop_gradient: bool = Field(False, description="true: the thinned history's gate is a constant; reconstruction")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="after each hidden layer of an expert; reconstruction")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        problems = []
        if self.gate == "none" and self.num_experts != 1:
            problems.append(f"num_experts must be 1 where gate is 'none', got {self.num_experts}")
        if self.gate in ("none", "anchor") and self.contrastive_weight > 0:
            problems.append(
                f"contrastive_weight must be 0 where gate is {self.gate!r}, which reads no history, "
                f"got {self.contrastive_weight}"
            )
        if self.gate != "attention" and not (self.has_gate_unit and self.has_activation_unit):
            problems.append(f"has_gate_unit and has_activation_unit must be true where gate is {self.gate!r}")
        if self.gate == "none" and self.gate_norm != "none":
            problems.append(f"gate_norm must be 'none' where gate is 'none', got {self.gate_norm!r}")
        elif self.gate_norm == "mean" and not (self.gate == "attention" and self.has_activation_unit):
            problems.append("gate_norm must be 'none' or 'softmax' where the gate averages events already, got 'mean'")
        if problems:
            raise InconsistentError(problems)
        return self


class PairUnit(nn.Module):
    r"""A small network over an event and an anchor: ``[h; c; h * c]``, or ``[h; c; h - c; h * c]``; ReLU.

    Its first layer is folded as that of :mod:`recsys.ops.target_attention`, equal in exact arithmetic.

    Args:
        size: H.
        hidden: widths of the hidden layers.
        output_size: width of the output, which is linear.
        has_difference: the four parts rather than the three.

    Shape:
        events (A, L, H), anchor (A, H) -> (A, L, output_size).
    """

    def __init__(self, size: int, hidden: Sequence[int], output_size: int, *, has_difference: bool) -> None:
        super().__init__()
        self.size, self.has_difference = size, has_difference
        self.first = nn.Linear((4 if has_difference else 3) * size, hidden[0])
        self.rest = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((*hidden, output_size)))

    def forward(self, events: Tensor, anchor: Tensor) -> Tensor:
        """Every event with its anchor."""
        of_event, of_anchor, *_, of_product = self.first.weight.split(self.size, dim=1)
        if self.has_difference:
            of_difference = self.first.weight[:, 2 * self.size : 3 * self.size]
            of_event, of_anchor = of_event + of_difference, of_anchor - of_difference
        folded_AFH = torch.addcmul(of_event, of_product, anchor.unsqueeze(1))
        bias_AF = functional.linear(anchor, of_anchor, self.first.bias)
        x_ALF = torch.baddbmm(bias_AF.unsqueeze(1), events, folded_AFH.transpose(1, 2))
        for linear in self.rest:
            x_ALF = linear(torch.relu(x_ALF))
        return x_ALF


class Behaviours(nn.Module):
    """One network for the events of a history and for the candidate: to the common width H.

    Args:
        history: of the schema.
        width: of each feature's vector.
        hidden: widths of the network, the last is H.
        has_candidates: whether :meth:`candidates` is called.
    """

    def __init__(
        self, history: History, width: Mapping[str, int], hidden: Sequence[int], *, has_candidates: bool = True
    ) -> None:
        super().__init__()
        self.name = history.name
        self._shared = list(history.attributes)
        self._own = [f.name for f in history.event_features]
        own = sum(width[name] for name in self._own)
        # DIFF(paper): what only events have, such as how long a video was watched, is learnt for the candidate.
        self.absent = nn.Parameter(torch.empty(own)) if own and has_candidates else None
        self.mlp = MLP(sum(width[name] for name in self._shared) + own, hidden, activation="relu")

    def events(self, history: EmbeddedHistory) -> Tensor:
        """(R, L, H), padding too."""
        return self.mlp(torch.cat([history.features[name] for name in (*self._shared, *self._own)], dim=2))  # type: ignore[no-any-return]

    def candidates(self, embedded: Embedded) -> Tensor:
        """(N, H)."""
        parts = [embedded.candidate[name] for name in self._shared]
        if self.absent is not None:
            parts.append(self.absent.expand(parts[0].shape[0], -1))
        return self.mlp(torch.cat(parts, dim=1))  # type: ignore[no-any-return]


class Votes(NamedTuple):
    """What a history says of the gate, before it is summed over events.

    Attributes:
        events: (A, 1 + L, V): the default event's first, then each event's, weighted.
        valid: (A, 1 + L) True where there is an event.
        anchor: (A, H).
    """

    events: Tensor
    valid: Tensor
    anchor: Tensor


class HistoryGate(nn.Module):
    r"""The gate that one history gives: a weight for each expert, from the votes of its events.

    .. math:: g = \sum_j m_j\, a_j\, g_j, \qquad g_j = \mathrm{GU}(h_j, c) \in \mathbb{R}^K, \quad
              a_j = \mathrm{AU}(h_j, c) \in \mathbb{R}

    Event 0 is a learnt one that every user has: an empty history has a gate too, one that knows the anchor.

    Args:
        config: sizes and variant.
    """

    def __init__(self, config: AWMoEConfig) -> None:
        super().__init__()
        size, num_experts = config.group_hidden[-1], config.num_experts
        self._variant, self._norm = config.gate, config.gate_norm
        self.default = self.gate_unit = self.activation_unit = None
        self.output: nn.Module | None = None
        # RECONSTRUCTION: without a default event, a user without history would get the logit 0 for every candidate.
        if config.gate != "anchor":
            self.default = nn.Parameter(torch.empty(size))
        # RECONSTRUCTION: the units' inputs and sizes, linear outputs, and a weighted sum without any softmax: an event
        # may vote against an expert.
        if config.gate == "attention":
            if config.has_gate_unit:
                self.gate_unit = PairUnit(size, config.gate_hidden, num_experts, has_difference=False)
            else:
                self.output = nn.Linear(size, num_experts)
            if config.has_activation_unit:
                self.activation_unit = PairUnit(size, config.activation_hidden, 1, has_difference=True)
        else:
            inputs = size if config.gate == "anchor" else 2 * size
            self.output = nn.Sequential(
                MLP(inputs, config.gate_hidden, activation="relu"), nn.Linear(config.gate_hidden[-1], num_experts)
            )

    def votes(self, events: Tensor, lengths: Tensor, anchor: Tensor) -> Votes:
        """Votes of all events, whatever of them a mask will keep: events (A, L, H), lengths (A,), anchor (A, H)."""
        valid_AL = torch.arange(events.shape[1], device=events.device) < lengths.unsqueeze(1)
        if self.default is not None:
            events = torch.cat([self.default.expand(events.shape[0], 1, -1), events], dim=1)
            valid_AL = functional.pad(valid_AL, (1, 0), value=True)
        weighted = events if self.gate_unit is None else self.gate_unit(events, anchor)
        if self.activation_unit is not None:
            weighted = weighted * self.activation_unit(events, anchor)
        return Votes(weighted, valid_AL, anchor)

    def combined(self, votes: Votes, kept: Tensor | None = None) -> Tensor:
        """The gate (A, K) of all events, or of those ``kept`` (A, L)."""
        if self._variant == "anchor":
            return self.output(votes.anchor)  # type: ignore[misc, no-any-return]
        valid = votes.valid if kept is None else votes.valid & functional.pad(kept, (1, 0), value=True)
        weights_A1L = valid.unsqueeze(1).to(votes.events.dtype)
        # masked_fill as well: what stands in padding need not be finite after two units.
        summed = torch.bmm(weights_A1L, votes.events.masked_fill(~valid.unsqueeze(2), 0.0)).squeeze(1)
        if self._variant == "mean" or self._norm == "mean" or self.activation_unit is None:
            summed = summed / weights_A1L.sum(2)
        if self._variant == "mean":
            summed = torch.cat([summed, votes.anchor], dim=1)
        return summed if self.output is None else self.output(summed)


class AWMoE(nn.Module):
    r"""The network of AW-MoE: vectors in, one logit a task out.

    .. math:: z = \sum_k g_k\, s_k(v), \qquad v = [v_u; h_t; h_q; h_o], \qquad v_u = \sum_j m_j\, w(h_j, h_t)\, h_j

    with the gate :math:`g` of :class:`HistoryGate`, and :math:`h` each group of features (event, candidate, query,
    others) through a network of its own to the common width H.

    Source: Gong et al., ICDE 2023, as far as its abstract goes; the rest is reconstructed (see the module).

    Differs from source: several histories, each with its own pooling and its own part of the gate, which are added;
    several tasks, each with its own output of every expert, and one gate for all.

    Args:
        config: sizes and variant.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no history, or no feature of the context where the anchor is the query.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: AWMoEConfig, schema: Schema) -> None:
        super().__init__()
        if not schema.histories:
            raise SchemaError(
                "histories must name at least one history for the model 'aw_moe', got none",
                hint="declare views.events and a history in the schema",
            )
        self.config = config
        context = [f.name for f in schema.features_of("context")]
        if config.anchor == "query" and not context:
            raise SchemaError(
                "features must name at least one of scope context where the anchor is 'query', got none",
                hint="set model.anchor to candidate, or declare what the request asks for, of scope context",
            )
        width, hidden, size = widths(schema, config.embedding_dim), config.group_hidden, config.group_hidden[-1]
        in_history = {name for history in schema.histories for name in history.attributes}
        items = candidate_features(schema)
        self._query = context if config.anchor == "query" else []
        self._request = [f.name for f in schema.features_of("user")] + ([] if self._query else context)
        self._candidate = [name for name in items if name not in in_history]
        sizes = [sum(width[n] for n in names) for names in (self._query, self._request, self._candidate)]

        # RECONSTRUCTION: one network a group, one for events and candidate alike.
        self.behaviours = nn.ModuleList(Behaviours(h, width, hidden) for h in schema.histories)
        self.attention = None
        if config.pooling == "attention":
            self.attention = nn.ModuleList(
                TargetAttention(size, size, hidden=config.attention_hidden, activation="relu") for _ in schema.histories
            )
        self.query = MLP(sizes[0], hidden, activation="relu") if self._query else None
        self.other = JoinedMLP(sizes[1], sizes[2], hidden, activation="relu") if sizes[1] + sizes[2] else None
        groups = 2 * len(schema.histories) + (self.query is not None) + (self.other is not None)
        # DIFF(paper): every expert has an output a task, because there may be several; one gate serves all.
        self.experts = ExpertTowers(
            groups * size,
            config.num_experts,
            hidden=config.expert_hidden,
            output_size=len(schema.tasks),
            dropout=config.dropout,
        )
        self.gates = self.gate_behaviours = self.gate_query = None
        if config.gate != "none":
            self.gates = nn.ModuleList(HistoryGate(config) for _ in schema.histories)
            # RECONSTRUCTION: networks of the gate's own over the shared tables.
            if config.gate_inputs == "own" and (config.gate != "anchor" or config.anchor == "candidate"):
                self.gate_behaviours = nn.ModuleList(
                    Behaviours(h, width, hidden, has_candidates=not self._query) for h in schema.histories
                )
            if config.gate_inputs == "own" and self._query:
                self.gate_query = MLP(sizes[0], hidden, activation="relu")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights Xavier-uniform, biases 0, learnt vectors N(0, 0.01) but the gate's default event, N(0, 1)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, ExpertTowers):
                module.reset_parameters()
            elif isinstance(module, Behaviours) and module.absent is not None:
                nn.init.normal_(module.absent, std=0.01)
            elif isinstance(module, HistoryGate) and module.default is not None:
                # Its vote must not vanish: for a new user it is the only one.
                nn.init.normal_(module.default)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        spread = _by_row(embedded)
        return self._mixed(self._impressions(embedded, is_single=False), self._spread_gate(embedded, spread))

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, ``request_of_row`` not read."""
        spread = _to_all(embedded)
        return self._mixed(self._impressions(embedded, is_single=True), self._spread_gate(embedded, spread))

    def training_forward(self, embedded: Embedded, batch: Batch) -> TrainingOutput:
        """Logits (N, T) of the whole histories; and the contrastive loss of the gate, if it has a weight."""
        config = self.config
        if config.contrastive_weight == 0:
            return TrainingOutput(self(embedded), {})
        spread = _by_row(embedded)
        of_anchor = spread if config.anchor == "candidate" else _as_is
        votes = self._votes(embedded, spread)
        gate_AK = self._combined(votes)
        # Only the gate sees fewer events: experts that did would be trained on other inputs than they will meet.
        histories, probability = self._histories(embedded), config.mask_probability
        kept = [of_anchor(thinned(h.lengths, h.times.shape[1], probability)) for h in histories]
        positive_AK = self._combined(votes, kept)
        rows = embedded.request_of_row
        users_R = _users(batch)
        # A history of one event cannot be thinned: its positive would be itself.
        several_R = torch.stack([h.lengths > 1 for h in histories]).any(0)
        loss = contrastive_loss(
            gate_AK,
            positive_AK.detach() if config.has_stop_gradient else positive_AK,  # RECONSTRUCTION: through both
            of_anchor(users_R),
            similarity=config.similarity,
            temperature=config.temperature,
            num_negatives=config.num_negatives,
            # The query's gate is one for all rows of a request: each counts, as if it had been computed for each.
            counts=None if config.anchor == "candidate" else torch.bincount(rows, minlength=len(users_R)),
            takes_part=of_anchor(several_R),
        )
        gate_NK = gate_AK if config.anchor == "candidate" else spread(gate_AK)
        logits = self._mixed(self._impressions(embedded, is_single=False), gate_NK)
        return TrainingOutput(logits, {"contrastive": loss * config.contrastive_weight})

    def gate(self, embedded: Embedded) -> Tensor:
        """Weights of the experts: (R, K) where the anchor is the query, (N, K) where it is the candidate.

        Ones where the config has no gate.
        """
        if self.gates is None:
            return torch.ones(len(embedded.request_of_row), 1, dtype=_dtype(embedded), device=embedded.time.device)
        return self._combined(self._votes(embedded, _by_row(embedded)))

    def _spread_gate(self, embedded: Embedded, spread: Spread) -> Tensor | None:
        """(N, K), or None without a gate."""
        if self.gates is None:
            return None
        gate_AK = self._combined(self._votes(embedded, spread))
        return spread(gate_AK) if self.config.anchor == "query" else gate_AK

    def _mixed(self, impressions: Tensor, gate: Tensor | None) -> Tensor:
        """Experts (N, K, T), weighted: (N, T)."""
        experts_NKT = self.experts(impressions)
        if gate is None:
            return experts_NKT.squeeze(1)  # type: ignore[no-any-return]
        return torch.bmm(gate.unsqueeze(1), experts_NKT).squeeze(1)

    def _histories(self, embedded: Embedded) -> list[EmbeddedHistory]:
        return [embedded.histories[behaviours.name] for behaviours in self.behaviours]  # type: ignore[index]

    def _impressions(self, embedded: Embedded, *, is_single: bool) -> Tensor:
        """What all experts see (N, groups * H)."""
        rows, parts = embedded.request_of_row, []
        spread = _to_all(embedded) if is_single else _by_row(embedded)
        for number, (behaviours, history) in enumerate(zip(self.behaviours, self._histories(embedded), strict=True)):
            target_NH, events_RLH = behaviours.candidates(embedded), behaviours.events(history)  # type: ignore[operator]
            if self.attention is None:
                pooled_NH = spread(mean_of_events(events_RLH, history.lengths))
            elif is_single:
                pooled_NH = self.attention[number].single_request(target_NH, events_RLH, history.lengths)  # type: ignore[operator]
            else:
                pooled_NH = self.attention[number](target_NH, events_RLH, history.lengths, rows)
            parts += [pooled_NH, target_NH]
        if self.query is not None:
            parts.append(spread(self.query(self._joined(embedded.request, self._query))))
        if self.other is not None:
            rows_NC = torch.cat([parts[0][:, :0], *(embedded.candidate[name] for name in self._candidate)], dim=1)
            request_RU = self._request_inputs(embedded)
            parts.append(
                self.other.single_request(request_RU, rows_NC) if is_single else self.other(request_RU, rows_NC, rows)
            )
        return torch.cat(parts, dim=1)

    def _request_inputs(self, embedded: Embedded) -> Tensor:
        if not self._request:
            return torch.zeros(embedded.time.shape[0], 0, dtype=_dtype(embedded), device=embedded.time.device)
        return self._joined(embedded.request, self._request)

    @staticmethod
    def _joined(features: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        return torch.cat([features[name] for name in names], dim=1)

    def _votes(self, embedded: Embedded, spread: Spread) -> list[Votes]:
        """Of each history. Of requests where the anchor is the query, whatever candidates these have."""
        assert self.gates is not None
        networks = self.behaviours if self.gate_behaviours is None else self.gate_behaviours
        query_RH = None
        if self._query:
            network = self.query if self.gate_query is None else self.gate_query
            assert network is not None
            query_RH = network(self._joined(embedded.request, self._query))
        votes = []
        for gate, behaviours, history in zip(self.gates, networks, self._histories(embedded), strict=True):
            # An anchor alone needs no events.
            if self.config.gate == "anchor":
                events_RLH = history.times.new_zeros(history.times.shape[0], 0, 1, dtype=_dtype(embedded))
            else:
                events_RLH = behaviours.events(history)  # type: ignore[operator]
            if query_RH is not None:
                votes.append(gate.votes(events_RLH, history.lengths, query_RH))  # type: ignore[operator]
            else:
                target_NH = behaviours.candidates(embedded)  # type: ignore[operator]
                votes.append(gate.votes(spread(events_RLH), spread(history.lengths), target_NH))  # type: ignore[operator]
        return votes

    def _combined(self, votes: Sequence[Votes], kept: Sequence[Tensor] | None = None) -> Tensor:
        """The gate (A, K): the histories' parts, added."""
        assert self.gates is not None
        masks = [None] * len(votes) if kept is None else kept
        parts = [gate.combined(v, k) for gate, v, k in zip(self.gates, votes, masks, strict=True)]  # type: ignore[operator]
        total: Tensor = torch.stack(parts).sum(0)
        return torch.softmax(total, dim=1) if self.config.gate_norm == "softmax" else total


def thinned(lengths: Tensor, longest: int, probability: float) -> Tensor:
    """Which events are kept (R, L), each dropped with a probability; one at least, drawn by chance, where there is one.

    Draws from torch's global generator.

    Args:
        lengths: (R,) int64 in [0, L].
        longest: L.
        probability: of dropping an event, in [0, 1).

    Returns:
        True = kept. False at and beyond a length.
    """
    drawn_RL = torch.rand(len(lengths), longest, device=lengths.device)
    valid_RL = torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)
    drawn_RL = drawn_RL.masked_fill(~valid_RL, -1.0)
    # The highest draw is kept anyhow: it changes nothing unless all were to go, and then it is any of them alike.
    is_last_RL = drawn_RL == drawn_RL.amax(1, keepdim=True)
    return valid_RL & ((drawn_RL >= probability) | is_last_RL)


def _users(batch: Batch) -> Tensor:
    """(R,) int64, equal for requests of one user; a request whose user is not known is its own."""
    requests = torch.arange(batch.num_requests, device=batch.time.device)
    if batch.user_row is None:
        return -1 - requests
    return torch.where(batch.user_row > 0, batch.user_row, -1 - requests)


def _by_row(embedded: Embedded) -> Spread:
    return lambda values: values.index_select(0, embedded.request_of_row)


def _to_all(embedded: Embedded) -> Spread:
    num_rows = next(iter(embedded.candidate.values())).shape[0]
    return lambda values: values.expand(num_rows, *values.shape[1:])


def _as_is(values: Tensor) -> Tensor:
    return values


def _dtype(embedded: Embedded) -> torch.dtype:
    return next(iter(embedded.candidate.values())).dtype


def build_aw_moe(config: AWMoEConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds AW-MoE or one of its relatives; a history's items and the candidates share their tables.

    Raises:
        SchemaError: there is no history, or no feature of the context where the anchor is the query.
    """
    return RankingModel(Lookup(schema, table_sizes, config.embedding_dim), AWMoE(config, schema))
