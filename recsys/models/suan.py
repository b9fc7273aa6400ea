r"""SUAN and LightSUAN: a user's events and the candidate as one sequence, in a stack of unified attention blocks.

The candidate stands last in the sequence, at the time of the request. What comes out at its position goes into an MLP
beside the features. SUAN's events attend to all that was before them; LightSUAN's to the last few and to every r-th
before, which is what makes long histories affordable. Both score all candidates of a request in one pass: no event sees
a candidate and no candidate sees another, so the events are encoded once.

Lai, Jin, Zhang, Zheng, Dong, Cheng, Lei, Wang: "Exploring Scaling Laws of CTR Model for Online Performance
Improvement" (SUAN), RecSys 2025, doi 10.1145/3705328.3748046, arXiv 2508.15326.
The blocks are the released code's (laiweijiang/SUAN), which holds SUAN alone and cannot run as it is; LightSUAN, the
distillation (:mod:`training.distill`) and what the paper says where the code differs are known from read-throughs.
No equation numbers are known. The paper's ablations name an "AFNet" that nothing at hand describes; there is none here.

Shapes: R requests, N candidates (rows), L history length, D width of an event, U profile tokens, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.config import Config
from recsys.embedded import Embedded, EmbeddedHistory, widths
from recsys.embeddings import Lookup
from recsys.errors import SchemaError
from recsys.layers import (
    ActivationName,
    AlignmentPooling,
    CausalPattern,
    Dice,
    JoinedMLP,
    LocalDilatedPattern,
    NormStyle,
    PReLU,
    UnifiedAttentionEncoder,
    variance_scaling_,
)
from recsys.models.base import RankingModel, Width
from recsys.models.inputs import candidate_features, event_features
from recsys.schema import Categorical, Schema

CandidateMapping = Literal["projection", "slots"]


class UnifiedAttentionConfig(Config):
    """What SUAN and LightSUAN share. Defaults are those of the released configs; no others are known."""

    embedding_dim: int = Field(8, ge=4, le=1024, multiple_of=4, description="width of every table; code: 8")
    width: int | None = Field(
        None,
        ge=4,
        le=4096,
        description="D, of an event; not given: its features side by side, as in the code (5 x 8); given: a linear map",
    )
    num_layers: int = Field(2, ge=1, le=64, description="blocks; code: 2")
    num_heads: int = Field(2, ge=1, le=64, description="heads; code: 2")
    hidden_factor: int = Field(3, ge=1, le=16, description="width of the SwiGLU over D; code: 3")
    norm_style: NormStyle = Field(
        "pre", description="pre: x + f(norm x), as the paper is said to have it; code: norm x + f(norm x)"
    )
    alignment_pooling: AlignmentPooling = Field(
        "behaviours",
        description="what dual alignment sums up: the events, a position alone, or what was before it; code: all "
        "positions, the candidate too, which would not let candidates be scored side by side",
    )
    bias_per_head: bool = Field(False, description="relative biases of each head; code: shared")
    bias_per_layer: bool = Field(False, description="relative biases of each layer; code: shared")
    candidate_mapping: CandidateMapping = Field(
        "projection",
        description="projection: all features of the candidate through one layer (code, Ele.me); slots: the attributes "
        "that events have too in their own places, zeros elsewhere (code, industrial data)",
    )
    hidden: tuple[Width, ...] = Field(
        (1024, 512, 256), min_length=1, description="widths of the MLP; code: 1024, 512, 256"
    )
    activation: ActivationName = Field("dice", description="of the MLP; code: Dice")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="after each layer of the MLP; code: 0")


class SUANConfig(UnifiedAttentionConfig):
    """Config of SUAN."""

    kind: Literal["suan"] = "suan"


class LightSUANConfig(UnifiedAttentionConfig):
    """Config of LightSUAN. Window and dilation are not known from any source: choose them by validation."""

    kind: Literal["lightsuan"] = "lightsuan"
    window: int = Field(16, ge=1, le=4096, description="k: events see the last k, themselves included; paper: unknown")
    dilation: int = Field(8, ge=1, le=4096, description="r: and every r-th before those; paper: unknown")
    pattern: Literal["union", "split"] = Field(
        "union", description="both patterns in every head, or one in each half of the heads; paper: unknown"
    )
    candidate_attention: Literal["dense", "sparse"] = Field(
        "dense", description="events that a candidate sees: all, or the pattern's; paper: unknown"
    )

    @model_validator(mode="after")
    def _check(self) -> LightSUANConfig:
        if self.pattern == "split" and self.num_heads < 2:
            raise ValueError(f"num_heads must be at least 2 where pattern is 'split', got {self.num_heads}")
        if self.pattern == "split" and self.candidate_attention == "sparse":
            raise ValueError("candidate_attention must be 'dense' where pattern is 'split', got 'sparse'")
        return self


class SUAN(nn.Module):
    """The network of SUAN and of LightSUAN: vectors in, one logit a task out.

    Source: see the module; the blocks are :class:`~recsys.layers.unified_encoder.UnifiedAttentionEncoder`.

    Differs from source: several histories, each with an encoder of its own; several tasks, each with its own logit;
    dense features of user and context are tokens of the profile too, each through a layer of its own; no batch
    normalisation in the head, where Dice normalises by itself, and none of the logit, which would make a score
    depend on its batch.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.
        pattern: builds what events see, given the longest history.

    Raises:
        SchemaError: there is no history, no feature of user or context, or a width that heads cannot share.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(
        self,
        config: UnifiedAttentionConfig,
        schema: Schema,
        pattern: Callable[[int], CausalPattern | LocalDilatedPattern],
    ) -> None:
        super().__init__()
        request = [*schema.features_of("user"), *schema.features_of("context")]
        _check(config, schema, has_profile=bool(request))
        width = widths(schema, config.embedding_dim)
        self._request = [f.name for f in request]
        self._dense = [f.name for f in request if not isinstance(f, Categorical)]
        self._candidate = candidate_features(schema)
        self._histories = [h.name for h in schema.histories]
        self._attributes = [list(h.attributes) for h in schema.histories]
        self._events = [event_features(h) for h in schema.histories]
        self._is_in_slots = config.candidate_mapping == "slots"

        candidate_width = sum(width[n] for n in self._candidate)
        event_widths = [sum(width[n] for n in names) for names in self._events]
        encoder_widths = [config.width or size for size in event_widths]
        # DIFF(paper): features of the context and dense ones are tokens as well, because a profile of one vector would
        # leave nothing to attend to.
        self.tokens = nn.ModuleList(nn.Linear(width[n], config.embedding_dim) for n in self._dense)
        self.to_width = nn.ModuleList(
            nn.Identity() if config.width is None else nn.Linear(size, config.width) for size in event_widths
        )
        self.to_event = nn.ModuleList(
            nn.Identity() if self._is_in_slots else nn.Linear(candidate_width, size) for size in encoder_widths
        )
        self.encoders = nn.ModuleList(
            UnifiedAttentionEncoder(
                size,
                config.embedding_dim,
                max_length=history.max_length,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                hidden=config.hidden_factor * size,
                pattern=pattern(history.max_length),
                norm_style=config.norm_style,
                alignment_pooling=config.alignment_pooling,
                is_bias_per_head=config.bias_per_head,
                is_bias_per_layer=config.bias_per_layer,
            )
            for size, history in zip(encoder_widths, schema.histories, strict=True)
        )
        # DIFF(code): no batch norm in the head, because Dice normalises by itself.
        self.mlp = JoinedMLP(
            sum(width[n] for n in self._request),
            candidate_width + sum(encoder_widths),
            config.hidden,
            activation=config.activation,
            dropout=config.dropout,
        )
        self.output = nn.Linear(config.hidden[-1], len(schema.tasks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights truncated normal of variance 1 / inputs, biases 0; see the encoder for its own (the code)."""
        for part in (self.tokens, self.to_width, self.to_event, self.mlp, self.output):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    variance_scaling_(module.weight)
                    nn.init.zeros_(module.bias)
                elif isinstance(module, (Dice, PReLU)):
                    module.reset_parameters()
        for encoder in self.encoders:
            encoder.reset_parameters()  # type: ignore[operator]

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        request_RU, rows_NC = self._head_inputs(embedded, embedded.request_of_row)
        return self.output(self.mlp(request_RU, rows_NC, embedded.request_of_row))  # type: ignore[no-any-return]

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows, ``request_of_row`` not read."""
        request_RU, rows_NC = self._head_inputs(embedded, None)
        return self.output(self.mlp.single_request(request_RU, rows_NC))  # type: ignore[no-any-return]

    def _head_inputs(self, embedded: Embedded, request_of_row: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is the same for all rows of a request (R, ...), and what is a row's own (N, ...)."""
        candidate_NC = torch.cat([embedded.candidate[n] for n in self._candidate], dim=1)
        profile_RUd = self._profile(embedded)
        encoded = [
            encoder(events_RLD, history.times, history.lengths, profile_RUd, embedded.time, own_ND, request_of_row)
            for encoder, (history, events_RLD, own_ND) in zip(
                self.encoders, self._sequences(embedded, candidate_NC), strict=True
            )
        ]
        request_RU = torch.cat([embedded.request[n] for n in self._request], dim=1)
        return request_RU, torch.cat([candidate_NC, *encoded], dim=1)

    def _profile(self, embedded: Embedded) -> Tensor:
        """Tokens (R, U, d) of user and context, in the schema's order."""
        of_dense = dict(zip(self._dense, self.tokens, strict=True))
        tokens = [of_dense[n](embedded.request[n]) if n in of_dense else embedded.request[n] for n in self._request]
        return torch.stack(tokens, dim=1)

    def _sequences(self, embedded: Embedded, candidate: Tensor) -> Iterator[tuple[EmbeddedHistory, Tensor, Tensor]]:
        """Each history, its events (R, L, D), and the candidates as it sees them (N, D)."""
        for number, name in enumerate(self._histories):
            history = embedded.histories[name]
            attributes = self._attributes[number]
            events = torch.cat([history.features[n] for n in self._events[number]], dim=2)
            own = (
                self._in_slots(embedded, attributes, events) if self._is_in_slots else self.to_event[number](candidate)
            )
            events = self.to_width[number](events)
            yield history, events, self.to_width[number](own) if self._is_in_slots else own

    @staticmethod
    def _in_slots(embedded: Embedded, attributes: list[str], events: Tensor) -> Tensor:
        """The candidate's attributes as an event has them, zeros for what only events have."""
        own = torch.cat([embedded.candidate[n] for n in attributes], dim=1)
        return nn.functional.pad(own, (0, events.shape[2] - own.shape[1]))


def _check(config: UnifiedAttentionConfig, schema: Schema, *, has_profile: bool) -> None:
    if not schema.histories:
        raise SchemaError(
            "histories must name at least one history for the models 'suan' and 'lightsuan', got none",
            hint="declare views.events and a history in the schema",
        )
    if not has_profile:
        raise SchemaError(
            "features must have at least one of scope user or context for the models 'suan' and 'lightsuan', got none",
            hint="events attend to the user's profile; add a feature such as the user's id or the hour of the request",
        )
    width = widths(schema, config.embedding_dim)
    for history in schema.histories:
        size = config.width or sum(width[n] for n in event_features(history))
        if size % config.num_heads:
            raise SchemaError(
                f"the width of an event of the history {history.name!r} must be a multiple of "
                f"num_heads={config.num_heads}, got {size}",
                hint="set the model's width, or another num_heads",
            )


def build_suan(config: SUANConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds SUAN with its tables; a history's items and the candidates share theirs.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: the schema lacks what the model needs.
    """
    network = SUAN(config, schema, lambda _: CausalPattern())
    return RankingModel(Lookup(schema, table_sizes, config.embedding_dim), network)


def build_lightsuan(config: LightSUANConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds LightSUAN with its tables.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: the schema lacks what the model needs.
    """

    def pattern(max_length: int) -> LocalDilatedPattern:
        return LocalDilatedPattern(
            config.window,
            config.dilation,
            max_length=max_length,
            is_split=config.pattern == "split",
            is_candidate_sparse=config.candidate_attention == "sparse",
        )

    return RankingModel(Lookup(schema, table_sizes, config.embedding_dim), SUAN(config, schema, pattern))
