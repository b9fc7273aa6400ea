"""What models over :class:`~recsys.models.inputs.Fields` have in common: configs, MLP, initialisation, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import nn

from recsys.config import Config
from recsys.embedded import Space, all_uses
from recsys.embeddings import Lookup
from recsys.layers import ActivationName, JoinedMLP, RowBatchNorm
from recsys.models.base import RankingModel, Width
from recsys.models.inputs import Fields
from recsys.schema import Schema

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


def deep_mlp(config: DeepConfig, fields: Fields) -> JoinedMLP:
    """The hidden layers over all fields side by side, the request's part of the first one done once a request."""
    return JoinedMLP(
        fields.request_size,
        fields.row_size,
        config.hidden,
        activation=config.activation,
        dropout=config.dropout,
        norm=RowBatchNorm if config.batch_norm else None,
    )


def xavier_normal(module: nn.Module) -> None:
    """Weights of every linear layer Xavier-normal, biases 0 (Glorot and Bengio, AISTATS 2010; BARS protocol)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def with_tables(
    network: nn.Module,
    config: FieldsConfig,
    schema: Schema,
    table_sizes: Mapping[str, int],
    *,
    spaces: Sequence[Space] = (),
) -> RankingModel:
    """The network behind a look-up of tables as wide as its fields.

    Args:
        table_sizes: rows of each embedding table, padding and unknown included.
        spaces: tables of other roles, beside the main ones.
    """
    lookup = Lookup(
        schema, table_sizes, table_width(config.embedding_dim), spaces=spaces, init_std=config.embedding_init_std
    )
    return RankingModel(lookup, network)
