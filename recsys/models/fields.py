"""What models over :class:`~recsys.models.inputs.Fields` have in common: configs, tables, initialisation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from recsys.config import Config
from recsys.embedded import Space, all_uses
from recsys.layers import ActivationName
from recsys.schema import Schema

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


def xavier_normal(module: nn.Module) -> None:
    """Weights of every linear layer Xavier-normal, biases 0 (Glorot and Bengio, AISTATS 2010; BARS protocol)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
