"""Operations that decide the speed of a ranking model.

Each has a folder: ``reference.py`` is the definition in plain torch, differentiable and exportable; faster forms, where
there are any, are chosen in ``__init__.py`` and held to the reference by tests.
"""

from recsys.ops.target_attention import (
    UnitWeights,
    softmax_target_attention,
    softmax_target_attention_single_request,
    target_attention,
    target_attention_single_request,
)

__all__ = [
    "UnitWeights",
    "softmax_target_attention",
    "softmax_target_attention_single_request",
    "target_attention",
    "target_attention_single_request",
]
