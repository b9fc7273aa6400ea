"""The models. To add one: write its file, import it here, add its line to ``MODELS`` and ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from recsys.config import Config
from recsys.models.base import RankingModel, TrainingOutput, split_output
from recsys.models.din import DINConfig, build_din
from recsys.models.infnet import INFNetConfig, build_infnet
from recsys.models.mmoe import MMoEConfig, build_mmoe
from recsys.models.ple import PLEConfig, build_ple
from recsys.models.suan import LightSUANConfig, SUANConfig, build_lightsuan, build_suan
from recsys.schema import Schema

Builder = Callable[[Any, Schema, Mapping[str, int]], RankingModel]

MODELS: dict[type[Config], Builder] = {
    DINConfig: build_din,
    INFNetConfig: build_infnet,
    MMoEConfig: build_mmoe,
    PLEConfig: build_ple,
    SUANConfig: build_suan,
    LightSUANConfig: build_lightsuan,
}

ModelConfig = Annotated[
    DINConfig | INFNetConfig | MMoEConfig | PLEConfig | SUANConfig | LightSUANConfig, Field(discriminator="kind")
]


def build_model(config: Config, schema: Schema, table_sizes: Mapping[str, int]) -> RankingModel:
    """Builds the model that a config describes.

    Args:
        config: one of the keys of ``MODELS``.
        schema: what the data is.
        table_sizes: rows of each embedding table, padding and unknown included (``Encoder.table_sizes``).

    Raises:
        SchemaError: the schema lacks what the model needs.
    """
    return MODELS[type(config)](config, schema, table_sizes)


__all__ = ["MODELS", "ModelConfig", "RankingModel", "TrainingOutput", "build_model", "split_output"]
