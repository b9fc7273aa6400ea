r"""Wide & Deep: a linear model that memorises, beside an MLP that generalises.

.. math:: \hat y = \sigma\Big(\sum_i w_i + w^\top a + b\Big), \qquad a = \mathrm{MLP}([v_1; \dots; v_F])

Cheng et al.: "Wide & Deep Learning for Recommender Systems", DLRS 2016, arXiv 1606.07792. Equation numbers refer to it.
Defaults, initialisation and protocol as in BARS (Zhu et al., SIGIR 2022).

Shapes: R requests, N candidates (rows), F fields, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from recsys.embedded import Embedded
from recsys.layers import OneRequest, Rows, rows_of
from recsys.models.base import RankingModel
from recsys.models.fields import FIRST_ORDER, DeepConfig, deep_mlp, first_order_space, with_tables, xavier_normal
from recsys.models.inputs import Fields
from recsys.schema import Schema


class WideDeepConfig(DeepConfig):
    """Config of :class:`WideDeep`."""

    kind: Literal["wide_deep"] = "wide_deep"


class WideDeep(nn.Module):
    """First-order weights beside an MLP.

    Differs from source: the wide part has no crossed features but those that the schema declares; both parts share one
    optimizer rule a kind of parameter (the paper: FTRL for the wide part, AdaGrad for the deep one); histories and sets
    of ids enter as means; one logit a task.

    Args:
        config: sizes.
        schema: which features, histories and tasks there are.

    Raises:
        SchemaError: there is no feature of candidates.

    Shape:
        :class:`~recsys.embedded.Embedded` -> (N, T) float32.
    """

    def __init__(self, config: WideDeepConfig, schema: Schema) -> None:
        super().__init__()
        self.first_order = Fields(schema, len(schema.tasks), space=FIRST_ORDER)
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
        request_RFT, rows_NFT = self.first_order(embedded)
        wide_NT = which.spread(request_RFT.sum(1)) + rows_NFT.sum(1)
        request_RFD, rows_NFD = self.fields(embedded)
        hidden_NH = which.mlp(self.mlp, request_RFD.flatten(1), rows_NFD.flatten(1))  # equation 2
        return wide_NT + self.output(hidden_NH)  # type: ignore[no-any-return]  # equation 3


def build_wide_deep(config: WideDeepConfig, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds Wide & Deep with its tables.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.

    Raises:
        SchemaError: there is no feature of candidates.
    """
    return with_tables(WideDeep(config, schema), config, schema, table_sizes, spaces=(first_order_space(schema),))
