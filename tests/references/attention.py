"""Target attention as the paper draws it: one pair at a time, the history copied to every candidate, nothing folded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tests.references.layers import linear

Array = np.ndarray
Layer = tuple[Array, Array]


def score(query: Array, key: Array, layers: Sequence[Layer], activation: Callable[[int, Array], Array]) -> float:
    """The activation unit on [q; k; q - k; q * k]; what only the key has takes no part in difference and product.

    ``layers`` ends with the score's own (1, H); ``activation`` gets the number of the hidden layer and its row.
    """
    shared = key[: len(query)]
    row = np.concatenate([query, key, query - shared, query * shared])
    for number, (weight, bias) in enumerate(layers[:-1]):
        row = activation(number, linear(row, weight, bias))
    return float(linear(row, *layers[-1])[0])


def pool(scores: Sequence[float], keys: Array) -> Array:
    """The sum of keys, weighted; zeros where there are none."""
    total = np.zeros(keys.shape[1])
    for weight, key in zip(scores, keys, strict=True):
        total += weight * key
    return total


def softmax(scores: Sequence[float]) -> list[float]:
    """Weights that add up to 1."""
    if not scores:
        return []
    shifted = [math.exp(s - max(scores)) for s in scores]
    return [s / math.fsum(shifted) for s in shifted]


def target_attention(
    query: Array,
    keys: Array,
    lengths: Sequence[int],
    request_of_row: Sequence[int],
    layers: Sequence[Layer],
    activation: Callable[[int, Array], Array],
    *,
    with_softmax: bool = False,
) -> Array:
    """(N, D + E), padding never looked at."""
    pooled = []
    for q, request in zip(query, request_of_row, strict=True):
        events = keys[request][: lengths[request]]
        scores = [score(q, key, layers, activation) for key in events]
        if with_softmax:
            scores = softmax([s / math.sqrt(keys.shape[2]) for s in scores])
        pooled.append(pool(scores, events))
    return np.array(pooled).reshape(len(query), keys.shape[2])
