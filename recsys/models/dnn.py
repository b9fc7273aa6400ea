"""DNN: an MLP over the concatenated vectors of all fields, one logit a task.

The deep part of Wide & Deep alone, and the usual first baseline: Covington, Adams, Sargin, "Deep Neural Networks for
YouTube Recommendations", RecSys 2016, ranking network. Defaults, initialisation and protocol as in BARS (Zhu et al.,
"BARS: Towards Open Benchmarking for Recommender Systems", SIGIR 2022).

Shapes: R requests, N candidates (rows), U and C widths of the request's and a row's own fields, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from recsys.embedded import Embedded
from recsys.layers import OneRequest, Rows, rows_of
from recsys.models.base import RankingModel
from recsys.models.fields import DeepConfig, deep_mlp, with_tables, xavier_normal
from recsys.models.inputs import Fields
from recsys.schema import Schema


class DNNConfig(DeepConfig):
    """Config of :class:`DNN`."""

    kind: Literal["dnn"] = "dnn"


class DNN(nn.Module):
    """An MLP whose first layer does the request's part once a request.

    Differs from source: histories and sets of ids enter as means; one logit a task.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: DNNConfig, schema: Schema) -> None:
        super().__init__()
        self.fields = Fields(schema, config.embedding_dim)
        self.mlp = deep_mlp(config, self.fields)
        # DIFF(paper): one logit a task, because there may be several.
        self.output = nn.Linear(config.hidden[-1], len(schema.tasks))
        xavier_normal(self)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        return self._logits(embedded, rows_of(embedded.request_of_row, embedded.time.shape[0]))

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows, ``request_of_row`` not read."""
        return self._logits(embedded, OneRequest())

    def _logits(self, embedded: Embedded, which: Rows) -> Tensor:
        request_RFD, rows_NFD = self.fields(embedded)
        hidden_NH = which.mlp(self.mlp, request_RFD.flatten(1), rows_NFD.flatten(1))
        return self.output(hidden_NH)  # type: ignore[no-any-return]


def build_dnn(config: DNNConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds DNN with its tables.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no feature of candidates.
    """
    return with_tables(DNN(config, schema), config, schema, table_sizes)
