r"""FM: factorization machine of degree 2.

.. math:: \hat y = \sigma\Big(b + \sum_i w_i + \sum_{i < j} \langle v_i, v_j \rangle\Big)

Rendle: "Factorization Machines", ICDM 2010. Equation numbers refer to it. Initialisation and protocol as in BARS (Zhu
et al., SIGIR 2022).

Shapes: R requests, N candidates (rows), F fields, D width of a field, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from recsys.embedded import Embedded
from recsys.layers import OneRequest, PairwiseInteraction, Rows, rows_of
from recsys.models.base import RankingModel
from recsys.models.fields import FIRST_ORDER, FieldsConfig, first_order_space, with_tables, xavier_normal
from recsys.models.inputs import Fields
from recsys.schema import Schema


class FMConfig(FieldsConfig):
    """Config of :class:`FM`."""

    kind: Literal["fm"] = "fm"


class FM(nn.Module):
    """First-order weights and pairwise products of vectors.

    Differs from source: with several tasks, each has first-order weights of its own and weighs the D components of the
    interaction, which all share; those weights start at 1, and with one task they are 1. Histories and sets of ids
    enter as means.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: FMConfig, schema: Schema) -> None:
        super().__init__()
        num_tasks = len(schema.tasks)
        # DIFF(paper): each task has first-order weights of its own, because there may be several.
        self.first_order = Fields(schema, num_tasks, space=FIRST_ORDER)
        self.fields = Fields(schema, config.embedding_dim)
        self.interaction = PairwiseInteraction(config.embedding_dim, num_tasks)
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        xavier_normal(self)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        return self._logits(embedded, rows_of(embedded.request_of_row, embedded.time.shape[0]))

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows, ``request_of_row`` not read."""
        return self._logits(embedded, OneRequest())

    def _logits(self, embedded: Embedded, which: Rows) -> Tensor:
        request_RFT, rows_NFT = self.first_order(embedded)
        linear_NT = which.spread(request_RFT.sum(1) + self.bias) + rows_NFT.sum(1)
        pairs_NT = self.interaction(*self.fields(embedded), which)
        return linear_NT + pairs_NT  # type: ignore[no-any-return]  # equation 1


def build_fm(config: FMConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds FM with its tables.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no feature of candidates.
    """
    return with_tables(FM(config, schema), config, schema, table_sizes, spaces=(first_order_space(schema),))
