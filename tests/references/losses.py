"""Losses by their definitions, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence


def binary_cross_entropy(logits: Sequence[float], labels: Sequence[float]) -> tuple[float, int]:
    """Sum over labelled rows of -y ln p - (1 - y) ln(1 - p), and how many there are; logits of a moderate size."""
    losses = []
    for z, y in zip(logits, labels, strict=True):
        if not math.isnan(y):
            p = 1.0 / (1.0 + math.exp(-z))
            losses.append(-y * math.log(p) - (1 - y) * math.log(1 - p))
    return math.fsum(losses), len(losses)
