"""The inputs of models that leave histories to others: features as they are, each history pooled to one vector.

Shapes: R requests, N candidates (rows), L history length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from recsys.embedded import Embedded, widths
from recsys.errors import SchemaError
from recsys.layers import TargetAttention, mean_of_events
from recsys.schema import Schema

HistoryPooling = Literal["mean", "din"]


class PooledInputs(nn.Module):
    """Features side by side: user, context, histories if averaged; item, candidate, histories if attended.

    An averaged history is its request's, an attended one (DIN's attention, 36 wide) is each row's own.

    Args:
        schema: which features and histories there are.
        embedding_dim: width of categorical features.
        pooling: of histories.

    Attributes:
        request_size, row_size: widths of the outputs.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        Embedded -> (R, request_size), (N, row_size).
    """

    def __init__(self, schema: Schema, embedding_dim: int, pooling: HistoryPooling) -> None:
        super().__init__()
        self._request = [f.name for f in (*schema.features_of("user"), *schema.features_of("context"))]
        self._rows = [f.name for f in (*schema.features_of("item"), *schema.features_of("candidate"))]
        if not self._rows:
            raise SchemaError(
                "features must have at least one of scope 'item' or 'candidate', got none",
                hint="all candidates of a request would get the same score",
            )
        width = widths(schema, embedding_dim)
        self.histories = nn.ModuleList(
            _Averaged(h.name, [*h.attributes, *(f.name for f in h.event_features)])
            if pooling == "mean"
            else _Attended(h.name, list(h.attributes), [f.name for f in h.event_features], width)
            for h in schema.histories
        )
        size = sum(width[f] for h in schema.histories for f in (*h.attributes, *(e.name for e in h.event_features)))
        self.request_size = sum(width[name] for name in self._request) + (size if pooling == "mean" else 0)
        self.row_size = sum(width[name] for name in self._rows) + (size if pooling == "din" else 0)

    def forward(self, embedded: Embedded, request_of_row: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is a request's, and what is a row's own; ``request_of_row`` is None where R = 1."""
        request = [embedded.request[name] for name in self._request]
        rows = [embedded.candidate[name] for name in self._rows]
        for history in self.histories:
            (request if isinstance(history, _Averaged) else rows).append(history(embedded, request_of_row))
        if not request:
            request = [rows[0].new_zeros(embedded.time.shape[0], 0)]
        return torch.cat(request, dim=1), torch.cat(rows, dim=1)


class _Averaged(nn.Module):
    def __init__(self, name: str, features: list[str]) -> None:
        super().__init__()
        self._name, self._features = name, features

    def forward(self, embedded: Embedded, request_of_row: Tensor | None) -> Tensor:  # noqa: ARG002 - called alike
        """The mean over a request's events (R, .), zero where there are none."""
        history = embedded.histories[self._name]
        events = torch.cat([history.features[name] for name in self._features], dim=2)
        return mean_of_events(events, history.lengths)


class _Attended(nn.Module):
    def __init__(self, name: str, attributes: list[str], event_features: list[str], width: dict[str, int]) -> None:
        super().__init__()
        self._name, self._query, self._keys = name, attributes, [*attributes, *event_features]
        self.attention = TargetAttention(
            sum(width[f] for f in self._query), sum(width[f] for f in self._keys), hidden=(36,), activation="dice"
        )

    def forward(self, embedded: Embedded, request_of_row: Tensor | None) -> Tensor:
        """What each row attends to (N, .)."""
        history = embedded.histories[self._name]
        query = torch.cat([embedded.candidate[name] for name in self._query], dim=1)
        keys = torch.cat([history.features[name] for name in self._keys], dim=2)
        if request_of_row is None:
            return self.attention.single_request(query, keys, history.lengths)
        return self.attention(query, keys, history.lengths, request_of_row)  # type: ignore[no-any-return]
