"""Building blocks of networks. They take flat keyword arguments, and know nothing of configs, schemas or devices.

Activations take (N, C) and a mask ``valid`` (N,), True where the position is real.
"""

from recsys.layers.activations import (
    ACTIVATIONS,
    ActivationName,
    Dice,
    Moments,
    PReLU,
    ReLU,
    Sigmoid,
    build_activation,
    masked_moments,
)
from recsys.layers.attention import ActivationUnit, MeanPooling, SoftmaxTargetAttention, TargetAttention
from recsys.layers.dropout import Dropout
from recsys.layers.interactions import (
    BilinearFusion,
    CrossNetwork,
    Distinct,
    FeatureGate,
    PairwiseInteraction,
    RequestGatedMLP,
    RowGatedMLP,
    StaticGatedMLP,
)
from recsys.layers.mlp import MLP, JoinedLinear, JoinedMLP
from recsys.layers.normalisation import RowBatchNorm
from recsys.layers.rows import FlatRows, ManyRequests, OneRequest, Rows, rows_of

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ActivationName",
    "ActivationUnit",
    "BilinearFusion",
    "CrossNetwork",
    "Dice",
    "Distinct",
    "Dropout",
    "FeatureGate",
    "FlatRows",
    "JoinedLinear",
    "JoinedMLP",
    "ManyRequests",
    "MeanPooling",
    "Moments",
    "OneRequest",
    "PReLU",
    "PairwiseInteraction",
    "ReLU",
    "RequestGatedMLP",
    "RowBatchNorm",
    "RowGatedMLP",
    "Rows",
    "Sigmoid",
    "SoftmaxTargetAttention",
    "StaticGatedMLP",
    "TargetAttention",
    "build_activation",
    "masked_moments",
    "rows_of",
]
