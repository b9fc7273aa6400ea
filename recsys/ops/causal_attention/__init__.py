"""Attention of a history to its own past, and of candidates to a history.

There is one form today, :mod:`recsys.ops.causal_attention.reference`, on every device. A faster form for a device is
chosen here, so that callers never know.
"""

from recsys.ops.causal_attention.reference import (
    Sparsity,
    candidate_attention,
    causal_attention,
    dense_offsets,
    dilated_offsets,
    local_dilated_attention,
    local_offsets,
    split_attention,
    token_attention,
)

__all__ = [
    "Sparsity",
    "candidate_attention",
    "causal_attention",
    "dense_offsets",
    "dilated_offsets",
    "local_dilated_attention",
    "local_offsets",
    "split_attention",
    "token_attention",
]
