"""Search attention: of a long history, each candidate attends only to the events that a cheap score ranks highest.

There is one form today, :mod:`recsys.ops.search_attention.reference`, on every device. A faster form for a device is
chosen here, so that callers never know.
"""

from recsys.ops.search_attention.reference import (
    attention_pool,
    best,
    masked,
    relevance,
    relevance_single_request,
    top_k_pool,
    top_k_pool_single_request,
)

__all__ = [
    "attention_pool",
    "best",
    "masked",
    "relevance",
    "relevance_single_request",
    "top_k_pool",
    "top_k_pool_single_request",
]
