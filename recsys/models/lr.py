r"""LR: logistic regression over one-hot features.

.. math:: \hat y = \sigma\Big(b + \sum_i w_i\Big)

with one learnt weight :math:`w_i` an id. As a click model: Richardson, Dominowska, Ragno, "Predicting Clicks:
Estimating the Click-Through Rate for New Ads", WWW 2007. Initialisation and protocol as in BARS (Zhu et al., "BARS:
Towards Open Benchmarking for Recommender Systems", SIGIR 2022).

Shapes: R requests, N candidates (rows), T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.config import Config
from recsys.embedded import Embedded
from recsys.embeddings import Lookup
from recsys.layers import OneRequest, Rows, rows_of
from recsys.models.base import RankingModel
from recsys.models.fields import table_width, xavier_normal
from recsys.models.inputs import Fields
from recsys.schema import Schema


class LRConfig(Config):
    """Config of :class:`LR`."""

    kind: Literal["lr"] = "lr"
    embedding_init_std: float = Field(1e-4, gt=0, description="of the normal initial weights; BARS protocol: 1e-4")


class LR(nn.Module):
    """Sums of weights and one bias a task.

    Differs from source: tasks have weights of their own, columns of one table, whose further columns are never used; a
    history adds the mean weight of its events; sets of ids add their mean.

    Args:
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.fields = Fields(schema, len(schema.tasks))
        self.bias = nn.Parameter(torch.zeros(len(schema.tasks)))
        xavier_normal(self)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        return self._logits(embedded, rows_of(embedded.request_of_row, embedded.time.shape[0]))

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows, ``request_of_row`` not read."""
        return self._logits(embedded, OneRequest())

    def _logits(self, embedded: Embedded, which: Rows) -> Tensor:
        request_RFT, rows_NFT = self.fields(embedded)
        return which.spread(request_RFT.sum(1) + self.bias) + rows_NFT.sum(1)  # type: ignore[no-any-return]


def build_lr(config: LRConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds LR with its weights.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no feature of candidates.
    """
    network = LR(schema)
    width = table_width(len(schema.tasks))
    return RankingModel(Lookup(schema, table_sizes, width, init_std=config.embedding_init_std), network)
