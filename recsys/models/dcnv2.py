r"""DCN-V2: a cross network beside an MLP, over the same vectors.

.. math:: \hat y = \sigma(w^\top [x_{L_c}; h_{L_d}] + b), \qquad x_{l+1} = x_0 \odot (W_l x_l + b_l) + x_l

Wang, Shivanna, Cheng, Jain, Lin, Hong, Chi: "DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale
Learning to Rank Systems", WWW 2021, arXiv 2008.13535. Equation numbers refer to it. This is its parallel structure with
full-rank cross weights. Defaults, initialisation and protocol as in BARS (Zhu et al., SIGIR 2022).

Shapes: R requests, N candidates (rows), F fields times D width of a field, H last hidden width, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.embedded import Embedded
from recsys.layers import CrossNetwork, OneRequest, Rows, rows_of
from recsys.models.base import RankingModel
from recsys.models.fields import DeepConfig, deep_mlp, with_tables, xavier_normal
from recsys.models.inputs import Fields
from recsys.schema import Schema


class DCNv2Config(DeepConfig):
    """Config of :class:`DCNv2`."""

    kind: Literal["dcnv2"] = "dcnv2"
    num_cross_layers: int = Field(4, ge=1, le=64, description="BARS's winning config on Frappe: 4")


class DCNv2(nn.Module):
    """Crosses and an MLP side by side, into one linear layer.

    Differs from source: histories and sets of ids enter as means; one logit a task.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: DCNv2Config, schema: Schema) -> None:
        super().__init__()
        self.fields = Fields(schema, config.embedding_dim)
        request_size, row_size = self.fields.request_size, self.fields.row_size
        self.cross = CrossNetwork(request_size, row_size, config.num_cross_layers)
        self.mlp = deep_mlp(config, self.fields)
        # DIFF(paper): one logit a task, because there may be several.
        self.output = nn.Linear(request_size + row_size + config.hidden[-1], len(schema.tasks))
        xavier_normal(self)

    def forward(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) of any number of requests."""
        return self._logits(embedded, rows_of(embedded.request_of_row, embedded.time.shape[0]))

    def single_request(self, embedded: Embedded) -> Tensor:
        """Logits (N, T) where R = 1: the same function, nothing gathered to rows, ``request_of_row`` not read."""
        return self._logits(embedded, OneRequest())

    def _logits(self, embedded: Embedded, which: Rows) -> Tensor:
        request_RU, rows_NC = (fields.flatten(1) for fields in self.fields(embedded))
        crossed_NF = self.cross(request_RU, rows_NC, which)  # equation 1
        hidden_NH = which.mlp(self.mlp, request_RU, rows_NC)  # equation 2
        return self.output(torch.cat([crossed_NF, hidden_NH], dim=1))  # type: ignore[no-any-return]  # section 3.4


def build_dcnv2(config: DCNv2Config, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds DCN-V2 with its tables.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no feature of candidates.
    """
    return with_tables(DCNv2(config, schema), config, schema, table_sizes)
