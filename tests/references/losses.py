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


def contrastive(
    anchors: Sequence[Sequence[float]],
    positives: Sequence[Sequence[float]],
    groups: Sequence[int],
    *,
    cosine: bool,
    temperature: float,
    num_negatives: int | None = None,
) -> list[float]:
    """InfoNCE of each row; its negatives are the anchors of other groups, the next ones round the end."""

    def similarity(x: Sequence[float], y: Sequence[float]) -> float:
        length = math.hypot(*x) * math.hypot(*y) if cosine else 1.0
        return math.fsum(a * b for a, b in zip(x, y, strict=True)) / length / temperature

    losses = []
    for row, anchor in enumerate(anchors):
        negatives: list[Sequence[float]] = []
        for step in range(1, len(anchors)):
            other = (row + step) % len(anchors)
            if groups[other] != groups[row] and (num_negatives is None or len(negatives) < num_negatives):
                negatives.append(anchors[other])
        positive = math.exp(similarity(anchor, positives[row]))
        losses.append(-math.log(positive / (positive + math.fsum(math.exp(similarity(anchor, n)) for n in negatives))))
    return losses
