"""What networks read of :class:`~recsys.embedded.Embedded`: what is a request's, and what is a row's own.

Two layers, for two kinds of networks. Both take the features of the request and of the candidate, and of every history
its attributes and event features; what is the request's is computed once a request.

- :class:`Fields`: vectors of one width, for models of feature interactions. A *field* is a feature, or a history's
  attribute or event feature, mean-pooled over the events. Categorical features are looked up; dense ones have a
  bias-free linear map of their own, so that a field is the map's columns scaled by the values.
- :class:`PooledInputs`: one vector of all of them side by side, dense ones as they are, for models that leave
  histories to others.

Shapes: R requests, N candidates (rows), L history length, D width of a field.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from recsys.embedded import Embedded, EmbeddedHistory, widths
from recsys.errors import SchemaError
from recsys.layers import TargetAttention, mean_of_events
from recsys.schema import Dense, History, Schema

HistoryPooling = Literal["mean", "din"]


def request_features(schema: Schema) -> list[str]:
    """Names of the features of a request, in order: the user's, the context's."""
    return [f.name for f in (*schema.features_of("user"), *schema.features_of("context"))]


def candidate_features(schema: Schema) -> list[str]:
    """Names of the features of a candidate, in order: the item's, the candidate's own.

    Raises:
        SchemaError: there is none.
    """
    names = [f.name for f in (*schema.features_of("item"), *schema.features_of("candidate"))]
    if not names:
        raise SchemaError(
            "features must have at least one of scope 'item' or 'candidate', got none",
            hint="all candidates of a request would get the same score",
        )
    return names


def event_features(history: History) -> list[str]:
    """Names of the features of an event, in order: the history's attributes, what only events have."""
    return [*history.attributes, *(f.name for f in history.event_features)]


class Fields(nn.Module):
    """Takes fields out of :class:`~recsys.embedded.Embedded`, all of one width.

    Args:
        schema: which features and histories there are.
        dim: D; the first columns of wider vectors are taken.
        space: where categorical features are looked up; the main space if not given.
        only: names of features of requests and candidates; histories are then left out. All fields if not given.

    Attributes:
        request_names: in order: user, context, then ``<history>.<feature>``.
        row_names: in order: item, candidate.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        Embedded -> request (R, number of its fields, D), rows (N, number of theirs, D).
    """

    def __init__(
        self, schema: Schema, dim: int, *, space: str | None = None, only: Iterable[str] | None = None
    ) -> None:
        super().__init__()
        wanted = None if only is None else set(only)
        self._request = [name for name in request_features(schema) if wanted is None or name in wanted]
        self._rows = [name for name in candidate_features(schema) if wanted is None or name in wanted]
        self._events = [
            (history.name, name)
            for history in (schema.histories if wanted is None else ())
            for name in event_features(history)
        ]
        self.request_names = (*self._request, *(f"{history}.{name}" for history, name in self._events))
        self.row_names = tuple(self._rows)
        self.dim = dim
        used = {*self._request, *self._rows, *(name for _, name in self._events)}
        dense = [f for f in schema.all_features if isinstance(f, Dense) and f.name in used]
        self._dense = {f.name: position for position, f in enumerate(dense)}
        self._suffix = "" if space is None else f"@{space}"
        self.dense = nn.ModuleList(nn.Linear(f.dim, dim, bias=False) for f in dense)

    @property
    def request_size(self) -> int:
        """Width of the request's fields side by side."""
        return len(self.request_names) * self.dim

    @property
    def row_size(self) -> int:
        """Width of a row's own fields side by side."""
        return len(self.row_names) * self.dim

    def forward(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The fields of every request, and of every row."""
        request = [self._vector(name, embedded.request) for name in self._request]
        # DIFF(paper): the models of single-valued fields know no histories: one enters as the mean of its events.
        request += [self._pooled(name, embedded.histories[history]) for history, name in self._events]
        rows = [self._vector(name, embedded.candidate) for name in self._rows]
        some = next(iter(embedded.candidate.values()))
        return (
            torch.stack(request, dim=1) if request else some.new_zeros(embedded.time.shape[0], 0, self.dim),
            torch.stack(rows, dim=1) if rows else some.new_zeros(some.shape[0], 0, self.dim),
        )

    def _vector(self, name: str, vectors: dict[str, Tensor]) -> Tensor:
        """(n, D) of a feature; (R, L, D) where it is of events."""
        if name in self._dense:
            return self.dense[self._dense[name]](vectors[name])  # type: ignore[no-any-return]
        return vectors[name + self._suffix][..., : self.dim]

    def _pooled(self, name: str, history: EmbeddedHistory) -> Tensor:
        """(R, D): the mean over a request's events, zero where there are none."""
        return mean_of_events(self._vector(name, history.features), history.lengths)


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
        self._request = request_features(schema)
        self._rows = candidate_features(schema)
        width = widths(schema, embedding_dim)
        self.histories = nn.ModuleList(
            _Averaged(history) if pooling == "mean" else _Attended(history, width) for history in schema.histories
        )
        size = sum(width[name] for history in schema.histories for name in event_features(history))
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
    def __init__(self, history: History) -> None:
        super().__init__()
        self._name, self._features = history.name, event_features(history)

    def forward(self, embedded: Embedded, request_of_row: Tensor | None) -> Tensor:  # noqa: ARG002 - called alike
        """The mean over a request's events (R, .), zero where there are none."""
        history = embedded.histories[self._name]
        return mean_of_events(torch.cat([history.features[name] for name in self._features], dim=2), history.lengths)


class _Attended(nn.Module):
    def __init__(self, history: History, width: dict[str, int]) -> None:
        super().__init__()
        self._name, self._query, self._keys = history.name, list(history.attributes), event_features(history)
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
