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
from recsys.layers.attention import ActivationUnit, SoftmaxTargetAttention, TargetAttention
from recsys.layers.attention_patterns import CausalPattern, LocalDilatedPattern
from recsys.layers.dropout import Dropout
from recsys.layers.experts import Experts, ExpertsOfOwnInputs, ExpertTowers
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
from recsys.layers.mlp import MLP, JoinedLinear, JoinedMLP, TaskTowers
from recsys.layers.normalisation import RMSNorm, RowBatchNorm
from recsys.layers.pooling import MeanPooling, mean_of_events
from recsys.layers.rows import FlatRows, ManyRequests, OneRequest, Rows, rows_of
from recsys.layers.unified_attention import (
    AlignmentPooling,
    NormStyle,
    SwiGLU,
    variance_scaling_,
)
from recsys.layers.unified_encoder import UnifiedAttentionEncoder

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ActivationName",
    "ActivationUnit",
    "AlignmentPooling",
    "BilinearFusion",
    "CausalPattern",
    "CrossNetwork",
    "Dice",
    "Distinct",
    "Dropout",
    "ExpertTowers",
    "Experts",
    "ExpertsOfOwnInputs",
    "FeatureGate",
    "FlatRows",
    "JoinedLinear",
    "JoinedMLP",
    "LocalDilatedPattern",
    "ManyRequests",
    "MeanPooling",
    "Moments",
    "NormStyle",
    "OneRequest",
    "PReLU",
    "PairwiseInteraction",
    "RMSNorm",
    "ReLU",
    "RequestGatedMLP",
    "RowBatchNorm",
    "RowGatedMLP",
    "Rows",
    "Sigmoid",
    "SoftmaxTargetAttention",
    "StaticGatedMLP",
    "SwiGLU",
    "TargetAttention",
    "TaskTowers",
    "UnifiedAttentionEncoder",
    "build_activation",
    "masked_moments",
    "mean_of_events",
    "rows_of",
    "variance_scaling_",
]
