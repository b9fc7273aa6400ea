"""The fields of a row as vectors of one width: what models of feature interactions start from.

A *field* is a feature of the request or of the candidate, or a history's attribute or event feature, mean-pooled over
the events. Categorical features are looked up; dense ones have a bias-free linear map of their own, so that a field is
the map's columns scaled by the values. Fields of the request, pooled histories included, are computed once a request.

Shapes: R requests, N candidates (rows), L history length, D width of a field.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.config import Config
from recsys.embedded import Embedded, EmbeddedHistory, Space, all_uses
from recsys.errors import SchemaError
from recsys.layers import ActivationName, mean_of_events
from recsys.schema import Dense, Schema

Width = Annotated[int, Field(ge=1, le=65536)]

FIRST_ORDER = "first_order"
"""Name of the space of first-order weights."""


class FieldsConfig(Config):
    """What the configs of models over fields have in common."""

    embedding_dim: int = Field(
        10,
        ge=1,
        le=1024,
        description="width of a field; BARS protocol: 10. Tables are rounded up to a multiple of 4, as FBGEMM wants "
        "it, and the further columns never used",
    )
    embedding_init_std: float = Field(
        1e-4, gt=0, description="of the normal initial vectors, first-order weights included; BARS protocol: 1e-4"
    )


class DeepConfig(FieldsConfig):
    """The same with an MLP over all fields."""

    hidden: tuple[Width, ...] = Field((400, 400, 400), min_length=1, description="widths; BARS protocol: three of 400")
    activation: ActivationName = Field("relu", description="after every hidden layer")
    batch_norm: bool = Field(True, description="of every hidden layer before its activation, over rows")
    dropout: float = Field(0.2, ge=0.0, lt=1.0, description="after every hidden layer")


def table_width(dim: int) -> int:
    """The smallest multiple of 4 that holds ``dim``: the width of the table of a field, of which it uses the first."""
    return -(-dim // 4) * 4


def first_order_space(schema: Schema) -> Space:
    """One weight an id and task."""
    return Space(FIRST_ORDER, table_width(len(schema.tasks)), all_uses(schema))


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
        SchemaError: without ``only``, there is no feature of candidates.

    Shape:
        Embedded -> request (R, number of its fields, D), rows (N, number of theirs, D).
    """

    def __init__(
        self, schema: Schema, dim: int, *, space: str | None = None, only: Iterable[str] | None = None
    ) -> None:
        super().__init__()
        wanted = None if only is None else set(only)
        request = [f.name for f in (*schema.features_of("user"), *schema.features_of("context"))]
        rows = [f.name for f in (*schema.features_of("item"), *schema.features_of("candidate"))]
        if wanted is None and not rows:
            raise SchemaError(
                "features must have at least one of scope 'item' or 'candidate', got none",
                hint="all candidates of a request would get the same score",
            )
        self._request = [name for name in request if wanted is None or name in wanted]
        self._rows = [name for name in rows if wanted is None or name in wanted]
        self._events = [
            (history.name, name)
            for history in (schema.histories if wanted is None else ())
            for name in (*history.attributes, *(f.name for f in history.event_features))
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


def xavier_normal(module: nn.Module) -> None:
    """Weights of every linear layer Xavier-normal, biases 0 (Glorot and Bengio, AISTATS 2010; BARS protocol)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
