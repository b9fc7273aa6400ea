"""Models of feature interactions in float64, one row at a time, from the formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from tests.references.layers import linear, sigmoid

Array = np.ndarray
Weights = Mapping[str, Array]


def mean_pooled(events: Array, length: int) -> Array:
    """The mean of the first ``length`` of (L, D), zeros where that is none."""
    total = np.zeros(events.shape[1])
    for event in events[:length]:
        total = total + event
    return total / length if length else total


def batch_norm(row: Array, weight: Array, bias: Array, mean: Array, var: Array, *, eps: float = 1e-5) -> Array:
    """Batch normalisation of one row with given statistics."""
    return np.array(
        [g * (x - m) / math.sqrt(v + eps) + b for x, g, b, m, v in zip(row, weight, bias, mean, var, strict=True)]
    )


def pairs(fields: Sequence[Array]) -> Array:
    """Element-wise products of all pairs of fields, added up: (D,)."""
    total = np.zeros(len(fields[0]))
    for one, other in combinations(fields, 2):
        total = total + one * other
    return total


def cross(x0: Array, layers: Sequence[tuple[Array, Array]]) -> Array:
    """A cross network over one row; (weight, bias) a layer."""
    x = x0
    for weight, bias in layers:
        x = x0 * linear(x, weight, bias) + x
    return x


def gate(context: Array, hidden: Sequence[tuple[Array, Array]], output: tuple[Array, Array]) -> Array:
    """Twice the sigmoid of an MLP with ReLU."""
    for weight, bias in hidden:
        context = np.maximum(linear(context, weight, bias), 0.0)
    return np.array([2.0 * sigmoid(x) for x in linear(context, *output)])


def bilinear(left: Array, right: Array, w_left: Array, w_right: Array, bias: float, blocks: Array) -> float:
    """One output: b + w1.o1 + w2.o2 + the sum over heads of o1_j.W_j.o2_j; blocks (k, d1/k, d2/k)."""
    num_heads, a, c = blocks.shape
    total = bias + float(np.dot(w_left, left)) + float(np.dot(w_right, right))
    for j in range(num_heads):
        for p in range(a):
            for q in range(c):
                total += left[j * a + p] * blocks[j, p, q] * right[j * c + q]
    return total


def mlp(row: Array, weights: Weights, prefix: str) -> Array:
    """An MLP of linear, batch norm where there is one, ReLU; its first layer may be called ``first``."""
    names = [(f"{prefix}.first", f"{prefix}.after_first")] if f"{prefix}.first.weight" in weights else []
    inner = f"{prefix}.rest" if names else prefix
    number = 0
    while f"{inner}.linears.{number}.weight" in weights:
        names.append((f"{inner}.linears.{number}", f"{inner}.after.{number}"))
        number += 1
    for layer, after in names:
        row = linear(row, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        if f"{after}.norm.weight" in weights:
            statistics = ("weight", "bias", "running_mean", "running_var")
            row = batch_norm(row, *(weights[f"{after}.norm.{name}"] for name in statistics))
        row = np.maximum(row, 0.0)
    return row


def _output(row: Array, weights: Weights, prefix: str) -> Array:
    return linear(row, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])


def lr(weight_of: Sequence[Array], weights: Weights) -> Array:
    """Logits (T,) of one row from the weights (T,) of its fields."""
    result: Array = weights["bias"] + np.sum(weight_of, axis=0)
    return result


def _interaction(fields: Sequence[Array], weights: Weights, num_tasks: int) -> Array:
    by_task = weights.get("interaction.weight", np.ones((num_tasks, len(fields[0]))))
    result: Array = by_task @ pairs(fields)
    return result


def fm(weight_of: Sequence[Array], fields: Sequence[Array], weights: Weights) -> Array:
    """Logits of one row."""
    result: Array = lr(weight_of, weights) + _interaction(fields, weights, len(weights["bias"]))
    return result


def dnn(fields: Sequence[Array], weights: Weights) -> Array:
    """Logits of one row."""
    return _output(mlp(np.concatenate(fields), weights, "mlp"), weights, "output")


def wide_deep(weight_of: Sequence[Array], fields: Sequence[Array], weights: Weights) -> Array:
    """Logits of one row."""
    result: Array = dnn(fields, weights) + np.sum(weight_of, axis=0)
    return result


def deepfm(weight_of: Sequence[Array], fields: Sequence[Array], weights: Weights) -> Array:
    """Logits of one row."""
    num_tasks = len(weights["output.bias"])
    result: Array = wide_deep(weight_of, fields, weights) + _interaction(fields, weights, num_tasks)
    return result


def dcnv2(fields: Sequence[Array], weights: Weights) -> Array:
    """Logits of one row."""
    x0 = np.concatenate(fields)
    names = ["cross.first"]
    while f"cross.rest.{len(names) - 1}.weight" in weights:
        names.append(f"cross.rest.{len(names) - 1}")
    crossed = cross(x0, [(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in names])
    return _output(np.concatenate([crossed, mlp(x0, weights, "mlp")]), weights, "output")


def dualmlp(fields: Sequence[Array], weights: Weights) -> Array:
    """Logits of one row."""
    e = np.concatenate(fields)
    return sum((_output(mlp(e, weights, f"mlps.{s}"), weights, f"outputs.{s}") for s in range(2)), start=np.zeros(()))


def finalmlp(fields: Sequence[Array], contexts: Sequence[Sequence[Array]], weights: Weights) -> Array:
    """Logits of one row; of each stream, the vectors of its context, none if it is empty."""
    e = np.concatenate(fields)
    streams = []
    for s, context in enumerate(contexts):
        prefix = f"streams.{s}"
        if context:
            hidden: list[tuple[Array, Array]] = []
            while f"{prefix}.gate.mlp.linears.{len(hidden)}.weight" in weights:
                name = f"{prefix}.gate.mlp.linears.{len(hidden)}"
                hidden.append((weights[f"{name}.weight"], weights[f"{name}.bias"]))
            output = (weights[f"{prefix}.gate.output.weight"], weights[f"{prefix}.gate.output.bias"])
            g = gate(np.concatenate(context), hidden, output)
        else:  # the source's gate of a zero vector through zero biases: only the last bias is left
            g = np.array([2.0 * sigmoid(b) for b in weights[f"{prefix}.bias"]])
        streams.append(mlp(g * e, weights, f"{prefix}.mlp"))
    return np.array(
        [
            bilinear(
                streams[0],
                streams[1],
                weights["fusion.left.weight"][t],
                weights["fusion.right.weight"][t],
                weights["fusion.left.bias"][t] + weights["fusion.right.bias"][t],
                weights["fusion.blocks"][t],
            )
            for t in range(len(weights["fusion.left.bias"]))
        ]
    )
