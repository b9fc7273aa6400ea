"""Drift measures as plain loops over the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence


def shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) + 0.5 * len(counts)
    return [(count + 0.5) / total for count in counts]


def psi(reference: Sequence[int], current: Sequence[int]) -> float:
    return sum((q - p) * math.log(q / p) for p, q in zip(shares(reference), shares(current), strict=True))


def js_distance(reference: Sequence[int], current: Sequence[int]) -> float:
    total = 0.0
    for p, q in zip(shares(reference), shares(current), strict=True):
        m = (p + q) / 2
        total += 0.5 * p * math.log2(p / m) + 0.5 * q * math.log2(q / m)
    return math.sqrt(max(total, 0.0))
