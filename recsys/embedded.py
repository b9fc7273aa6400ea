"""What a network takes: the vectors of a batch, and how they are put together.

The trainer looks vectors up in TorchRec modules (:mod:`recsys.embeddings`), the scorer in memory-mapped tables; both
build :class:`Embedded` here. TorchRec takes seconds to import and is not imported here, so that a service starts fast.

Shapes: R requests, N candidates, S events of all requests, L longest history of the batch, D ``embedding_dim``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recsys.batch import Bags, Batch, Column
from recsys.schema import Categorical, Schema


class EmbeddedHistory(NamedTuple):
    """The events of R requests as vectors, oldest first, padded on the right to the batch's longest.

    Attributes:
        features: ``(R, L, D)`` each (dense features ``(R, L, dim)``), zero where padded.
        lengths: ``(R,)`` int64.
        times: ``(R, L)`` int64 UTC microseconds, zero where padded.
    """

    features: dict[str, Tensor]
    lengths: Tensor
    times: Tensor


class Embedded(NamedTuple):
    """What a network takes: a pytree of plain tensors.

    Attributes:
        request: user, then context features; ``(R, D)``, dense ones ``(R, dim)``.
        candidate: item, then candidate features; ``(N, D)``, dense ones ``(N, dim)``.
        histories: by name.
        request_of_row: ``(N,)`` int64, non-decreasing.
        time: ``(R,)`` int64 UTC microseconds, when each request was made.

    A feature that a :class:`Space` covers is there twice: under its name, and as ``<feature>@<space>``, of the space's
    width. Those of the spaces come after all others.
    """

    request: dict[str, Tensor]
    candidate: dict[str, Tensor]
    histories: dict[str, EmbeddedHistory]
    request_of_row: Tensor
    time: Tensor


@dataclass(frozen=True)
class Use:
    """One place of a batch whose ids are looked up in a table.

    Attributes:
        side: ``request``, ``candidate``, or the name of a history.
        feature: name of the feature.
    """

    side: str
    feature: str


@dataclass(frozen=True)
class Space:
    """Embedding tables of a role of their own, beside the main ones: the same ids, other vectors.

    DARE scores relevance with other vectors than those that it pools; FinalMLP's gates have vectors of their own; a
    first-order term has one weight an id. Each is a space.

    Attributes:
        name: of the space; its copy of the table ``item`` is ``item@<name>``.
        dim: width of its vectors, a multiple of 4, as FBGEMM wants it.
        uses: what is looked up in it.
    """

    name: str
    dim: int
    uses: tuple[Use, ...]

    def __post_init__(self) -> None:
        assert self.dim % 4 == 0, f"the width of the space {self.name!r} must be a multiple of 4, got {self.dim}"

    def key(self, name: str) -> str:
        """What a feature or a table is called in this space."""
        return f"{name}@{self.name}"

    def of_side(self, side: str) -> list[str]:
        """Features of a side that it covers."""
        return [use.feature for use in self.uses if use.side == side]

    def to_json(self) -> dict[str, object]:
        """For a manifest; the inverse of :meth:`from_json`."""
        return {"name": self.name, "dim": self.dim, "uses": [[use.side, use.feature] for use in self.uses]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Space:
        """What :meth:`to_json` gave."""
        return cls(str(value["name"]), int(value["dim"]), tuple(Use(side, feature) for side, feature in value["uses"]))


def all_uses(schema: Schema) -> tuple[Use, ...]:
    """Every place whose ids are looked up."""
    return tuple(use for uses in uses_of_tables(schema).values() for use in uses)


def uses_of_features(schema: Schema, names: Iterable[str]) -> tuple[Use, ...]:
    """The places of some features, candidates and histories alike; dense ones have none."""
    wanted = set(names)
    return tuple(use for use in all_uses(schema) if use.feature in wanted)


def uses_of_tables(schema: Schema) -> dict[str, list[Use]]:
    """Every place that looks ids up, by table, in schema order.

    Example: an item id that is also a history's attribute has the uses ``candidate`` and the history's name.
    """
    uses: dict[str, list[Use]] = {table: [] for table in schema.table_encoders}
    for scope, side in (("user", "request"), ("context", "request"), ("item", "candidate"), ("candidate", "candidate")):
        for feature in schema.features_of(scope):  # type: ignore[arg-type]
            if isinstance(feature, Categorical):
                uses[feature.table_name].append(Use(side, feature.name))
    for history in schema.histories:
        for name in (*history.attributes, *(f.name for f in history.event_features)):
            feature = schema.feature(name)
            if isinstance(feature, Categorical):
                uses[feature.table_name].append(Use(history.name, name))
    return uses


def columns_of_side(batch: Batch, side: str) -> Mapping[str, Column]:
    """The columns of a side, in the order that :class:`Embedded` has them."""
    if side == "request":
        return {**batch.user, **batch.context}
    if side == "candidate":
        return {**batch.item, **batch.candidate}
    return batch.histories[side].features


def assemble(
    batch: Batch, vectors: Callable[[Use, Column, Space | None], Tensor], spaces: Sequence[Space] = ()
) -> Embedded:
    """Builds :class:`Embedded` from looked-up vectors; dense features pass through.

    The trainer's tables and the scorer's memory-mapped ones both come through here.

    Args:
        vectors: gives the ``(n, D)`` vectors of one use of a table, in a space, or in the main one for None.
        spaces: besides the main one.
    """

    def side(name: str) -> Iterator[tuple[str, Tensor]]:
        columns = columns_of_side(batch, name)
        for feature, column in columns.items():
            is_dense = not isinstance(column, Bags) and column.is_floating_point()
            yield feature, column if is_dense else vectors(Use(name, feature), column, None)  # type: ignore[misc]
        for space in spaces:
            for feature in space.of_side(name):
                yield space.key(feature), vectors(Use(name, feature), columns[feature], space)

    histories = {}
    for name, history in batch.histories.items():
        lengths = history.lengths
        longest = max(int(lengths.max()), 1) if len(lengths) else 1
        shape = (len(lengths), longest)
        place = None if len(history.times) == len(lengths) * longest else _places(history.offsets, lengths, longest)
        histories[name] = EmbeddedHistory(
            {feature: _padded(values, place, shape) for feature, values in side(name)},
            lengths,
            _padded(history.times, place, shape),
        )
    return Embedded(dict(side("request")), dict(side("candidate")), histories, batch.request_of_row, batch.time)


def _places(offsets: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """``(S,)`` int64: where each event stands in R x L."""
    position = torch.arange(int(lengths.sum()), device=lengths.device)
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    return row * longest + position - offsets[row]


def _padded(values: Tensor, place: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Events ``(S, ...)`` to ``(R, L, ...)``, zeros elsewhere; a view where every history has length L."""
    num_requests, longest = shape
    if place is None:
        return values.view(num_requests, longest, *values.shape[1:])
    flat = values.new_zeros(num_requests * longest, *values.shape[1:])
    return flat.index_copy(0, place, values).view(num_requests, longest, *values.shape[1:])


def widths(schema: Schema, embedding_dim: int, spaces: Iterable[Space] = ()) -> dict[str, int]:
    """Width of each feature's vector: D for the categorical, ``dim`` for the dense, a space's own in that space."""
    main = {f.name: embedding_dim if isinstance(f, Categorical) else f.dim for f in schema.all_features}
    return main | {space.key(use.feature): space.dim for space in spaces for use in space.uses}
