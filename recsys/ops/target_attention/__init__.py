"""Target attention: every candidate weighs every event of its request's history, and sums.

There is one form today, :mod:`recsys.ops.target_attention.reference`, on every device. A faster form for a device is
chosen here, so that callers never know.
"""

from recsys.ops.target_attention.reference import (
    Activation,
    UnitWeights,
    softmax_target_attention,
    softmax_target_attention_single_request,
    target_attention,
    target_attention_single_request,
)

__all__ = [
    "Activation",
    "UnitWeights",
    "softmax_target_attention",
    "softmax_target_attention_single_request",
    "target_attention",
    "target_attention_single_request",
]
