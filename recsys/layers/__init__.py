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
from recsys.layers.mlp import MLP, JoinedLinear, JoinedMLP
from recsys.layers.unified_attention import (
    AlignmentPooling,
    CausalPattern,
    LocalDilatedPattern,
    NormStyle,
    RMSNorm,
    SwiGLU,
    UnifiedAttentionEncoder,
    variance_scaling_,
)

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ActivationName",
    "ActivationUnit",
    "AlignmentPooling",
    "CausalPattern",
    "Dice",
    "JoinedLinear",
    "JoinedMLP",
    "LocalDilatedPattern",
    "MeanPooling",
    "Moments",
    "NormStyle",
    "PReLU",
    "RMSNorm",
    "ReLU",
    "Sigmoid",
    "SoftmaxTargetAttention",
    "SwiGLU",
    "TargetAttention",
    "UnifiedAttentionEncoder",
    "build_activation",
    "masked_moments",
    "variance_scaling_",
]
