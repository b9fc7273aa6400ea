"""Layers in float64, one number or one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def sigmoid(x: float) -> float:
    """The logistic function."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def dice(row: Array, alpha: Array, mean: Array, var: Array, eps: float = 1e-8) -> Array:
    """Dice of one row (C,), as the paper writes it."""
    out = np.zeros(len(row))
    for c, s in enumerate(row):
        p = sigmoid((s - mean[c]) / math.sqrt(var[c] + eps))
        out[c] = p * s + (1 - p) * alpha[c] * s
    return out


def prelu(row: Array, alpha: Array) -> Array:
    """PReLU of one row (C,), as the paper writes it: a step between two slopes."""
    return np.array([s if s > 0 else a * s for s, a in zip(row, alpha, strict=True)])


def moments(rows: Array, valid: Sequence[bool]) -> tuple[Array, Array, int]:
    """Mean and biased variance of each channel over the valid rows of (N, C)."""
    kept = [row for row, keep in zip(rows, valid, strict=True) if keep]
    if not kept:
        return np.zeros(rows.shape[1]), np.zeros(rows.shape[1]), 0
    mean = sum(kept) / len(kept)
    return mean, sum((row - mean) ** 2 for row in kept) / len(kept), len(kept)


def linear(row: Array, weight: Array, bias: Array) -> Array:
    """One row through one dense layer, weight (out, in)."""
    return np.array([sum(w * x for w, x in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)])
