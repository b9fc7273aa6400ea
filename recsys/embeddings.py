"""From ids to vectors: the look-up half of every model.

Tables live in TorchRec :class:`EmbeddingBagCollection` modules, so that a trainer can fuse the optimizer into their
backward pass (FBGEMM) or shard them over ranks (``DistributedModelParallel``) without the model knowing. All ids that
a batch looks up in one table, of candidates, requests and histories alike, go through **one** call as bags of one id
(or of several, for a multi-valued feature): a table then gets one gradient a step, and FBGEMM's pooled kernels are
several times faster on CPU than its unpooled ones.

KeyedJaggedTensors stop here. What leaves is :class:`~recsys.embedded.Embedded`, plain tensors that ``torch.export``
takes.

Shapes: R requests, N candidates, S events of all requests, L longest history of the batch, D ``embedding_dim``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.batch import Bags, Batch, Column
from recsys.embedded import (
    Embedded,
    EmbeddedHistory,
    Space,
    Use,
    all_uses,
    assemble,
    columns_of_side,
    uses_of_features,
    uses_of_tables,
    widths,
)
from recsys.schema import MultiCategorical, Schema

__all__ = [
    "Embedded",
    "EmbeddedHistory",
    "Lookup",
    "Space",
    "Use",
    "all_uses",
    "assemble",
    "columns_of_side",
    "ids_of",
    "size_of",
    "uses_of_features",
    "uses_of_tables",
    "widths",
]


def ids_of(column: Column) -> tuple[Tensor, Tensor]:
    """Ids ``(total,)`` and bag sizes ``(n,)`` of a categorical column."""
    if isinstance(column, Bags):
        return column.values, column.offsets.diff()
    return column, torch.ones_like(column)


def size_of(column: Column) -> int:
    """Rows of a column."""
    return column.offsets.shape[0] - 1 if isinstance(column, Bags) else column.shape[0]


class Lookup(nn.Module):
    """Embeds the categorical features of a batch.

    Tables with the same pattern of uses share one :class:`EmbeddingBagCollection`; the number of bags of such a group
    is the same for each of its tables, as TorchRec requires. A set of ids is averaged; an empty set is zero.

    Initialisation: uniform in ``+-sqrt(1 / rows)``, bounded by ``init_bound``. The bound matters: TorchRec's own
    default, ``+-sqrt(1 / rows)`` unbounded, starts a table of ten rows at 0.3.

    Args:
        schema: what the data is.
        table_sizes: rows of each table, padding and unknown included.
        embedding_dim: D, of every table of the main space.
        spaces: further tables; one that several uses share in the main space is shared in these too.
        init_bound: largest initial magnitude.
        init_std: initial values are normal with this deviation instead, where it is given.
    """

    def __init__(
        self,
        schema: Schema,
        table_sizes: Mapping[str, int],
        embedding_dim: int,
        *,
        spaces: Sequence[Space] = (),
        init_bound: float = 0.01,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.embedding_dim = embedding_dim
        self.spaces = tuple(spaces)
        self.init_bound = init_bound
        self.init_std = init_std
        uses = uses_of_tables(schema)
        size = {table: table_sizes[table] for table in uses}
        dim = dict.fromkeys(uses, embedding_dim)
        self._space: dict[str, Space | None] = dict.fromkeys(uses)
        for space in self.spaces:
            for table, places in uses_of_tables(schema).items():
                covered = [use for use in places if use in space.uses]
                if covered:
                    name = space.key(table)
                    uses[name], size[name], dim[name] = covered, table_sizes[table], space.dim
                    self._space[name] = space
        self._groups: list[list[str]] = []  # tables of each collection
        # Tables of sets go apart: TorchRec's fused collection returns wrong vectors where one holds two kinds of
        # pooling.
        patterns: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
        for table, places in uses.items():
            if places:
                pattern = (self._has_sets(places), tuple(u.side for u in places))
                patterns.setdefault(pattern, []).append(table)
        self._uses = uses
        groups = []
        for tables in patterns.values():
            self._groups.append(tables)
            groups.append(
                EmbeddingBagCollection(
                    tables=[
                        EmbeddingBagConfig(
                            name=table,
                            embedding_dim=dim[table],
                            num_embeddings=size[table],
                            feature_names=[table],
                            pooling=PoolingType.MEAN if self._has_sets(uses[table]) else PoolingType.SUM,
                            init_fn=self._initialise,
                        )
                        for table in tables
                    ],
                    device=torch.device("cpu"),
                )
            )
        self.groups = nn.ModuleList(groups)

    @property
    def uses(self) -> Mapping[str, Sequence[Use]]:
        """What is looked up in each table."""
        return self._uses

    def _has_sets(self, uses: list[Use]) -> bool:
        return any(isinstance(self.schema.feature(u.feature), MultiCategorical) for u in uses)

    def _initialise(self, weight: Tensor) -> Tensor:
        if self.init_std is not None:
            return nn.init.normal_(weight, std=self.init_std)
        bound = min(weight.shape[0] ** -0.5, self.init_bound)
        return nn.init.uniform_(weight, -bound, bound)

    def reset_parameters(self) -> None:
        """Initialises every table again."""
        for parameter in self.parameters():
            self._initialise(parameter.data)

    def forward(self, batch: Batch) -> Embedded:
        """Looks up every id of the batch.

        Shape:
            ``batch`` of R requests and N candidates -> :class:`Embedded`.
        """
        vectors: dict[tuple[Use, Space | None], Tensor] = {}
        sides = {side: columns_of_side(batch, side) for side in ("request", "candidate", *batch.histories)}
        for tables, collection in zip(self._groups, self.groups, strict=True):
            values, lengths = [], []
            sizes: list[int] = []
            for table in tables:
                columns = [sides[u.side][u.feature] for u in self._uses[table]]
                sizes = [size_of(c) for c in columns]
                for column in columns:
                    ids, bag_sizes = ids_of(column)
                    values.append(ids)
                    lengths.append(bag_sizes)
                if sum(sizes) == 0:  # TorchRec wants a bag, and ranks must go through the look-up together
                    lengths.append(lengths[-1].new_zeros(1))
            keyed = KeyedJaggedTensor(keys=tables, values=torch.cat(values), lengths=torch.cat(lengths))
            pooled = collection(keyed).to_dict()
            for table in tables:
                parts = pooled[table][: sum(sizes)].split(sizes)
                vectors.update({(u, self._space[table]): p for u, p in zip(self._uses[table], parts, strict=True)})
        return assemble(batch, lambda use, _, space: vectors[use, space], self.spaces)
