"""Metrics by their definitions: double loops over pairs and sorted lists."""

from __future__ import annotations

import math
from collections.abc import Sequence


def auc(labels: Sequence[float], scores: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Every positive against every negative."""
    weights = [1.0] * len(labels) if weights is None else weights
    won = total = 0.0
    for yi, si, wi in zip(labels, scores, weights, strict=True):
        for yj, sj, wj in zip(labels, scores, weights, strict=True):
            if yi == 1 and yj == 0:
                total += wi * wj
                won += wi * wj * (1.0 if si > sj else 0.5 if si == sj else 0.0)
    return won / total if total else math.nan


def gauc(labels: Sequence[float], scores: Sequence[float], groups: Sequence[object]) -> float:
    """AUC of each group by itself, averaged with its rows as weight."""
    weighted = rows = 0.0
    for group in set(groups):
        y = [a for a, g in zip(labels, groups, strict=True) if g == group and a in (0, 1)]
        s = [b for a, b, g in zip(labels, scores, groups, strict=True) if g == group and a in (0, 1)]
        value = auc(y, s)
        if not math.isnan(value):
            weighted, rows = weighted + len(y) * value, rows + len(y)
    return weighted / rows if rows else math.nan


def ndcg_of_list(labels_in_order: Sequence[float], k: int) -> float:
    """NDCG of one list without ties, given its labels from best to worst score."""
    dcg = sum(y / math.log2(rank + 1) for rank, y in enumerate(labels_in_order[:k], start=1))
    best = sum(y / math.log2(rank + 1) for rank, y in enumerate(sorted(labels_in_order, reverse=True)[:k], start=1))
    return dcg / best if best else math.nan


def reciprocal_rank(labels: Sequence[float], scores: Sequence[float]) -> float:
    """1 / rank of the first positive, behind every negative that scores the same."""
    ranked = sorted(zip(scores, labels, strict=True), key=lambda pair: (-pair[0], pair[1]))
    for rank, (_, label) in enumerate(ranked, start=1):
        if label == 1:
            return 1.0 / rank
    return math.nan


def logloss(labels: Sequence[float], probabilities: Sequence[float]) -> float:
    """The mean of -ln(probability of what happened)."""
    losses = [-math.log(p if y == 1 else 1 - p) for y, p in zip(labels, probabilities, strict=True) if y in (0, 1)]
    return math.fsum(losses) / len(losses)


def ece(labels: Sequence[float], probabilities: Sequence[float], num_bins: int) -> float:
    """Rows of each bin collected by comparing with its edges."""
    total, gap = len(labels), 0.0
    for b in range(num_bins):
        lower, upper = b / num_bins, (b + 1) / num_bins
        rows = [
            (y, p)
            for y, p in zip(labels, probabilities, strict=True)
            if lower <= p < upper or (b == num_bins - 1 and p == 1.0)
        ]
        if rows:
            gap += abs(sum(p for _, p in rows) - sum(y for y, _ in rows))
    return gap / total
