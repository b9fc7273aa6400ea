"""MMoE and PLE from their equations, in float64: one row, one expert, one gate at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tests.references.attention import softmax
from tests.references.layers import linear

Array = np.ndarray
Weights = Mapping[str, Array]


def pooled_inputs(
    request: Sequence[Array], histories: Sequence[tuple[Sequence[Array], int]], candidate: Sequence[Array]
) -> Array:
    """One row: the request's vectors, each history's mean of its attributes side by side, the candidate's vectors.

    Args:
        histories: attributes (L, width) each, and the length.
    """
    parts = list(request)
    for attributes, length in histories:
        events = np.concatenate(attributes, axis=1)
        mean = np.zeros(events.shape[1])
        for event in events[:length]:
            mean += event / length
        parts.append(mean)
    return np.concatenate([*parts, *candidate])


def expert(x: Array, first: tuple[Array, Array], weights: Weights, rest: str, number: int) -> Array:
    """One expert with ReLU."""
    x = np.maximum(linear(x, *first), 0.0)
    layer = 0
    while f"{rest}.weights.{layer}" in weights:
        x = np.maximum(
            linear(x, weights[f"{rest}.weights.{layer}"][number], weights[f"{rest}.biases.{layer}"][number, 0]), 0
        )
        layer += 1
    return x


def _block(weight: Array, number: int, count: int) -> Array:
    size = len(weight) // count
    return weight[number * size : (number + 1) * size]


def _mix(logits: Array, experts: Sequence[Array]) -> Array:
    total = np.zeros_like(experts[0])
    for share, output in zip(softmax(list(logits)), experts, strict=True):
        total += share * output
    return total


def _tower(x: Array, weights: Weights, task: int) -> float:
    layer = 0
    while f"towers.{task}.0.linears.{layer}.weight" in weights:
        prefix = f"towers.{task}.0.linears.{layer}"
        x = np.maximum(linear(x, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"]), 0.0)
        layer += 1
    return float(linear(x, weights[f"towers.{task}.1.weight"], weights[f"towers.{task}.1.bias"])[0])


def mmoe(x: Array, weights: Weights, num_experts: int, num_tasks: int) -> list[float]:
    """Logits of one row."""
    first = weights["experts.first.weight"], weights["experts.first.bias"]
    outputs = [
        expert(x, (_block(first[0], k, num_experts), _block(first[1], k, num_experts)), weights, "experts.rest", k)
        for k in range(num_experts)
    ]
    logits = []
    for task in range(num_tasks):
        gate = linear(
            x, _block(weights["gates.weight"], task, num_tasks), _block(weights["gates.bias"], task, num_tasks)
        )
        logits.append(_tower(_mix(gate, outputs), weights, task))
    return logits


def ple(x: Array, weights: Weights, num_levels: int, num_own: int, num_shared: int, num_tasks: int) -> list[float]:
    """Logits of one row."""
    inputs = [x] * (num_tasks + 1)  # of each task's experts, and of the shared ones
    total = num_tasks * num_own + num_shared
    for level in range(num_levels):
        prefix = "first" if level == 0 else f"further.{level - 1}"
        outputs: list[list[Array]] = []
        number = 0
        for group, count in enumerate([num_own] * num_tasks + [num_shared]):
            outputs.append([])
            for own_number in range(count):
                if level == 0:
                    first = [_block(weights[f"{prefix}.experts.first.{n}"], number, total) for n in ("weight", "bias")]
                else:
                    first = [
                        _block(weights[f"{prefix}.experts.first.{group}.{n}"], own_number, count)
                        for n in ("weight", "bias")
                    ]
                outputs[-1].append(
                    expert(inputs[group], (first[0], first[1]), weights, f"{prefix}.experts.rest", number)
                )
                number += 1
        read = [[*outputs[task], *outputs[-1]] for task in range(num_tasks)]
        if level < num_levels - 1:
            read.append([output for group_outputs in outputs for output in group_outputs])
        mixed, start = [], 0
        for gate, experts in enumerate(read):
            if level == 0:
                rows = slice(start, start + len(experts))
                logits = linear(x, weights[f"{prefix}.gates.weight"][rows], weights[f"{prefix}.gates.bias"][rows])
                start += len(experts)
            else:
                names = f"{prefix}.gates.{gate}.weight", f"{prefix}.gates.{gate}.bias"
                logits = linear(inputs[gate], weights[names[0]], weights[names[1]])
            mixed.append(_mix(logits, experts))
        inputs = mixed
    return [_tower(inputs[task], weights, task) for task in range(num_tasks)]
