"""The models. To add one: write its file, import it here, add its line to ``MODELS`` and ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from recsys.config import Config
from recsys.models.base import RankingModel, TrainingOutput, split_output
from recsys.models.dcnv2 import DCNv2Config, build_dcnv2
from recsys.models.deepfm import DeepFMConfig, build_deepfm
from recsys.models.din import DINConfig, build_din
from recsys.models.dnn import DNNConfig, build_dnn
from recsys.models.finalmlp import DualMLPConfig, FinalMLPConfig, build_dualmlp, build_finalmlp
from recsys.models.fm import FMConfig, build_fm
from recsys.models.infnet import INFNetConfig, build_infnet
from recsys.models.lr import LRConfig, build_lr
from recsys.models.mmoe import MMoEConfig, build_mmoe
from recsys.models.ple import PLEConfig, build_ple
from recsys.models.suan import LightSUANConfig, SUANConfig, build_lightsuan, build_suan
from recsys.models.wide_deep import WideDeepConfig, build_wide_deep
from recsys.schema import Schema

Builder = Callable[[Any, Schema, Mapping[str, int]], RankingModel]

MODELS: dict[type[Config], Builder] = {
    LRConfig: build_lr,
    FMConfig: build_fm,
    DNNConfig: build_dnn,
    WideDeepConfig: build_wide_deep,
    DeepFMConfig: build_deepfm,
    DCNv2Config: build_dcnv2,
    DualMLPConfig: build_dualmlp,
    FinalMLPConfig: build_finalmlp,
    DINConfig: build_din,
    INFNetConfig: build_infnet,
    MMoEConfig: build_mmoe,
    PLEConfig: build_ple,
    SUANConfig: build_suan,
    LightSUANConfig: build_lightsuan,
}

ModelConfig = Annotated[
    LRConfig
    | FMConfig
    | DNNConfig
    | WideDeepConfig
    | DeepFMConfig
    | DCNv2Config
    | DualMLPConfig
    | FinalMLPConfig
    | DINConfig
    | INFNetConfig
    | MMoEConfig
    | PLEConfig
    | SUANConfig
    | LightSUANConfig,
    Field(discriminator="kind"),
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
