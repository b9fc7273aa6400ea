"""Building blocks of networks. They take flat keyword arguments, and know nothing of configs, schemas or devices.

Channels are on axis 1, as in torch's own batch normalisation: (N, C), or (N, C, L) with a mask ``valid`` (N, L).
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
from recsys.layers.mlp import MLP, JoinedLinear, JoinedMLP

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ActivationName",
    "ActivationUnit",
    "Dice",
    "JoinedLinear",
    "JoinedMLP",
    "Moments",
    "PReLU",
    "ReLU",
    "Sigmoid",
    "SoftmaxTargetAttention",
    "TargetAttention",
    "build_activation",
    "masked_moments",
]
