r"""DIN: Deep Interest Network.

Each past event of a user is weighed by its relevance to the candidate, and the weighted sum is the user's interest *in
this candidate*, next to the usual concatenation of features into an MLP.

Zhou, Zhu, Song, Fan, Zhu, Ma, Yan, Jin, Li, Gai: "Deep Interest Network for Click-Through Rate Prediction", KDD 2018,
arXiv 1706.06978. Equation numbers refer to it.

Shapes: R requests, N candidates (rows), L history length, D width of a candidate's item vector (the attributes of a
history), E width of the event features, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.config import Config
from recsys.embedded import Embedded, widths
from recsys.embeddings import Lookup
from recsys.errors import SchemaError
from recsys.layers import ActivationName, Dice, JoinedMLP, MeanPooling, PReLU, SoftmaxTargetAttention, TargetAttention
from recsys.models.base import RankingModel, Width
from recsys.models.inputs import candidate_features, event_features, request_features
from recsys.schema import Schema


class DINConfig(Config):
    """Config of :class:`DIN`. Defaults are the paper's where it gives them, but for the width of tables."""

    kind: Literal["din"] = "din"
    embedding_dim: int = Field(
        16, ge=4, le=1024, multiple_of=4, description="width of every table; paper: 12 on its own data (section 6.1)"
    )
    pooling: Literal["attention", "mean"] = Field(
        "attention", description="of a history; `mean`: the paper's BaseModel (section 4.2), which reads no attention_*"
    )
    attention_hidden: tuple[Width, ...] = Field(
        (36,), min_length=1, description="widths of the activation unit; paper: not given; DARE's DIN: 36"
    )
    attention_activation: ActivationName = Field("dice", description="paper: PReLU or Dice (figure 2)")
    attention_softmax: bool = Field(
        False, description="normalise the weights of a history; paper: no (section 4.3); the authors' code: yes"
    )
    hidden: tuple[Width, ...] = Field(
        (200, 80), min_length=1, description="widths of the MLP; paper: 200, 80 (section 6.1)"
    )
    activation: ActivationName = Field("dice", description="of the MLP; paper: PReLU or Dice (figure 2)")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="after each layer of the MLP; paper: none there")


class DIN(nn.Module):
    """The network of DIN: vectors in, one logit a task out.

    Source: Zhou et al., KDD 2018, figure 2 (right).

    Differs from source: several histories, each with its own activation unit; several tasks, each with its own logit;
    what only events have (such as how long a video was watched) is part of the keys, and so of the pooled vector;
    statistics of Dice are over real events only.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.

    Attributes:
        feature_order: inputs of the MLP in the order of its first layer's columns: features of the request, features of
            the candidate, pooled histories.

    Raises:
        SchemaError: there is no history.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: DINConfig, schema: Schema) -> None:
        super().__init__()
        if not schema.histories:
            raise SchemaError(
                "histories must name at least one history for the model 'din', got none",
                hint="declare views.events and a history in the schema",
            )
        width = widths(schema, config.embedding_dim)
        self._request = request_features(schema)
        self._candidate = candidate_features(schema)
        self._history_names = [h.name for h in schema.histories]
        # The candidate's own vectors stand beside each event's: same features, same tables, same order.
        self._query = [list(h.attributes) for h in schema.histories]
        # DIFF(paper): event features join the keys only, because a candidate has not happened yet and has none.
        self._keys = [event_features(h) for h in schema.histories]
        self.feature_order = (*self._request, *self._candidate, *self._history_names)

        query_sizes = [sum(width[name] for name in names) for names in self._query]
        key_sizes = [sum(width[name] for name in names) for names in self._keys]
        # DIFF(paper): an activation unit a history, because kinds of behaviour weigh differently.
        self.attention = nn.ModuleList(_pooling(config, q, k) for q, k in zip(query_sizes, key_sizes, strict=True))
        self.mlp = JoinedMLP(
            sum(width[name] for name in self._request),
            sum(width[name] for name in self._candidate) + sum(key_sizes),
            config.hidden,
            activation=config.activation,
            dropout=config.dropout,
        )
        # DIFF(paper): one logit a task, not a two-way softmax, because a sigmoid of the difference is the same.
        self.output = nn.Linear(config.hidden[-1], len(schema.tasks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights Xavier-uniform, biases 0, as in the authors' code (the paper is silent)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (Dice, PReLU)):
                module.reset_parameters()

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        pooled_NK = [
            attention(query_ND, keys_RLK, lengths_R, embedded.request_of_row)  # equation 3
            for attention, (query_ND, keys_RLK, lengths_R) in zip(
                self.attention, self._histories(embedded), strict=True
            )
        ]
        request_RU, rows_NC = self._mlp_inputs(embedded, pooled_NK)
        return self.output(self.mlp(request_RU, rows_NC, embedded.request_of_row))  # type: ignore[no-any-return]

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows, ``request_of_row`` not read."""
        pooled_NK = [
            attention.single_request(query_ND, keys_RLK, lengths_R)  # type: ignore[operator]
            for attention, (query_ND, keys_RLK, lengths_R) in zip(
                self.attention, self._histories(embedded), strict=True
            )
        ]
        request_RU, rows_NC = self._mlp_inputs(embedded, pooled_NK)
        return self.output(self.mlp.single_request(request_RU, rows_NC))  # type: ignore[no-any-return]

    def _histories(self, embedded: Embedded) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Query (N, D), keys (R, L, D + E) and lengths (R,) of each history."""
        for name, query, keys in zip(self._history_names, self._query, self._keys, strict=True):
            history = embedded.histories[name]
            query_ND = torch.cat([embedded.candidate[feature] for feature in query], dim=1)
            yield query_ND, torch.cat([history.features[feature] for feature in keys], dim=2), history.lengths

    def _mlp_inputs(self, embedded: Embedded, pooled: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What is the same for all rows of a request (R, U), and what is a row's own (N, C)."""
        rows_NC = torch.cat([*(embedded.candidate[feature] for feature in self._candidate), *pooled], dim=1)
        if not self._request:
            num_requests = embedded.histories[self._history_names[0]].lengths.shape[0]
            return rows_NC.new_zeros(num_requests, 0), rows_NC
        return torch.cat([embedded.request[feature] for feature in self._request], dim=1), rows_NC


def _pooling(config: DINConfig, query_size: int, key_size: int) -> nn.Module:
    if config.pooling == "mean":
        return MeanPooling()
    attention = SoftmaxTargetAttention if config.attention_softmax else TargetAttention
    return attention(query_size, key_size, hidden=config.attention_hidden, activation=config.attention_activation)


def build_din(config: DINConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds DIN with its tables; a history's items and the candidates share theirs.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no history.
    """
    network = DIN(config, schema)
    return RankingModel(Lookup(schema, table_sizes, config.embedding_dim), network)
