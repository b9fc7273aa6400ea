r"""DeepFM: a factorization machine and an MLP over the same vectors.

.. math:: \hat y = \sigma(y_{FM} + y_{DNN}), \qquad
          y_{FM} = \sum_i w_i + \sum_{i < j} \langle v_i, v_j \rangle

Guo, Tang, Ye, Li, He: "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", IJCAI 2017, arXiv
1703.04247. Equation numbers refer to it. Defaults, initialisation and protocol as in BARS (Zhu et al., SIGIR 2022).

Shapes: R requests, N candidates (rows), F fields, D width of a field, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from recsys.embedded import Embedded
from recsys.layers import OneRequest, PairwiseInteraction, Rows, rows_of
from recsys.models.base import RankingModel
from recsys.models.fields import FIRST_ORDER, DeepConfig, deep_mlp, first_order_space, with_tables, xavier_normal
from recsys.models.inputs import Fields
from recsys.schema import Schema


class DeepFMConfig(DeepConfig):
    """Config of :class:`DeepFM`."""

    kind: Literal["deepfm"] = "deepfm"


class DeepFM(nn.Module):
    """First-order weights, pairwise products, and an MLP over the same vectors.

    Differs from source: with several tasks, each weighs the components of the interaction, by weights that start at 1;
    histories and sets of ids enter as means.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: DeepFMConfig, schema: Schema) -> None:
        super().__init__()
        self.first_order = Fields(schema, len(schema.tasks), space=FIRST_ORDER)
        self.fields = Fields(schema, config.embedding_dim)
        self.interaction = PairwiseInteraction(config.embedding_dim, len(schema.tasks))
        self.mlp = deep_mlp(config, self.fields)
        self.output = nn.Linear(config.hidden[-1], len(schema.tasks))
        xavier_normal(self)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        return self._logits(embedded, rows_of(embedded.request_of_row, embedded.time.shape[0]))

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows, ``request_of_row`` not read."""
        return self._logits(embedded, OneRequest())

    def _logits(self, embedded: Embedded, which: Rows) -> Tensor:
        request_RFT, rows_NFT = self.first_order(embedded)
        linear_NT = which.spread(request_RFT.sum(1)) + rows_NFT.sum(1)
        request_RFD, rows_NFD = self.fields(embedded)
        fm_NT = linear_NT + self.interaction(request_RFD, rows_NFD, which)  # equation 2
        hidden_NH = which.mlp(self.mlp, request_RFD.flatten(1), rows_NFD.flatten(1))  # equations 3, 4
        return fm_NT + self.output(hidden_NH)  # type: ignore[no-any-return]  # equation 1


def build_deepfm(config: DeepFMConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds DeepFM with its tables.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no feature of candidates.
    """
    return with_tables(DeepFM(config, schema), config, schema, table_sizes, spaces=(first_order_space(schema),))
