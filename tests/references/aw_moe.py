"""AW-MoE from the dossier's reconstruction, in float64, one candidate and one event at a time, nothing folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tests.references.attention import pool, score
from tests.references.layers import linear

Array = np.ndarray
Weights = Mapping[str, Array]


class Names(NamedTuple):
    """Which features there are, in the schema's order; ``query`` is empty where the anchor is the candidate."""

    query: Sequence[str]
    request: Sequence[str]
    candidate: Sequence[str]
    shared: Mapping[str, Sequence[str]]
    own: Mapping[str, Sequence[str]]


class Variant(NamedTuple):
    """The relatives."""

    pooling: str = "attention"
    gate: str = "attention"
    has_gate_unit: bool = True
    has_activation_unit: bool = True
    gate_norm: str = "none"
    gate_inputs: str = "own"


def _relu(row: Array) -> Array:
    return np.array([max(x, 0.0) for x in row])


def _dense(row: Array, weights: Weights, name: str) -> Array:
    return linear(row, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _mlp(row: Array, weights: Weights, prefix: str) -> Array:
    """ReLU after every layer."""
    layer = 0
    while f"{prefix}.linears.{layer}.weight" in weights:
        row = _relu(_dense(row, weights, f"{prefix}.linears.{layer}"))
        layer += 1
    return row


def _joined_mlp(row: Array, weights: Weights, prefix: str) -> Array:
    return _mlp(_relu(_dense(row, weights, f"{prefix}.first")), weights, f"{prefix}.rest")


def _unit(row: Array, weights: Weights, prefix: str) -> Array:
    """ReLU between layers, the last one linear."""
    row, layer = _dense(row, weights, f"{prefix}.first"), 0
    while f"{prefix}.rest.{layer}.weight" in weights:
        row = _dense(_relu(row), weights, f"{prefix}.rest.{layer}")
        layer += 1
    return row


def _expert(row: Array, weights: Weights, k: int) -> Array:
    layer = 0
    while f"experts.weights.{layer}" in weights:
        row = _relu(row) if layer else row
        row = linear(row, weights[f"experts.weights.{layer}"][k].T, weights[f"experts.biases.{layer}"][k])
        layer += 1
    return row


def _event(features: Mapping[str, Array], r: int, j: int, names: Sequence[str]) -> Array:
    return np.concatenate([features[name][r, j] for name in names])


def _target(candidate: Mapping[str, Array], row: int, names: Sequence[str], weights: Weights, prefix: str) -> Array:
    parts = [candidate[name][row] for name in names]
    if f"{prefix}.absent" in weights:
        parts.append(weights[f"{prefix}.absent"])
    return np.concatenate(parts)


def _history_gate(events: Sequence[Array], anchor: Array, weights: Weights, prefix: str, variant: Variant) -> Array:
    if variant.gate == "anchor":
        return _dense(_mlp(anchor, weights, f"{prefix}.output.0"), weights, f"{prefix}.output.1")
    events = [weights[f"{prefix}.default"], *events]
    if variant.gate == "mean":
        row = np.concatenate([sum(events) / len(events), anchor])
        return _dense(_mlp(row, weights, f"{prefix}.output.0"), weights, f"{prefix}.output.1")
    total: Array = np.zeros(1)
    for h in events:
        vote = h
        if variant.has_gate_unit:
            vote = _unit(np.concatenate([h, anchor, h * anchor]), weights, f"{prefix}.gate_unit")
        share = 1 / len(events)
        if variant.has_activation_unit:
            share = _unit(np.concatenate([h, anchor, h - anchor, h * anchor]), weights, f"{prefix}.activation_unit")[0]
        total = total + share * vote
    if variant.gate_norm == "mean":
        total = total / len(events)
    return total if variant.has_gate_unit else _dense(total, weights, f"{prefix}.output")


def aw_moe(
    request: Mapping[str, Array],
    candidate: Mapping[str, Array],
    histories: Mapping[str, tuple[Mapping[str, Array], Sequence[int]]],
    request_of_row: Sequence[int],
    weights: Weights,
    names: Names,
    variant: Variant,
    kept: Mapping[str, Array] | None = None,
) -> tuple[Array, Array]:
    """Logits (N, T) and gates (N, K).

    Args:
        request: (R, width) by feature.
        candidate: (N, width) by feature.
        histories: by name, (R, L, width) by feature and the lengths.
        weights: the network's state, in float64.
        kept: (R, L) by history: events that the gate sees; all if not given.
    """
    num_experts = weights["experts.biases.0"].shape[0]
    logits, gates = [], []
    for row, r in enumerate(request_of_row):
        inputs, gate = [], np.zeros(num_experts)
        for number, (history, (features, lengths)) in enumerate(histories.items()):
            event_names = [*names.shared[history], *names.own[history]]
            raw = [_event(features, r, j, event_names) for j in range(lengths[r])]
            prefix = f"behaviours.{number}"
            events = [_mlp(event, weights, f"{prefix}.mlp") for event in raw]
            target = _mlp(_target(candidate, row, names.shared[history], weights, prefix), weights, f"{prefix}.mlp")
            if variant.pooling == "attention":
                unit = f"attention.{number}.unit"
                layers = [(weights[f"{unit}.{n}.weight"], weights[f"{unit}.{n}.bias"]) for n in ("first", "output")]
                scores = [score(target, h, layers, lambda _, x: _relu(x)) for h in events]
                pooled = pool(scores, np.array(events).reshape(len(events), len(target)))
            else:
                pooled = np.sum(events, axis=0) / len(events) if events else np.zeros(len(target))
            inputs += [pooled, target]
            if variant.gate == "none":
                continue
            if variant.gate_inputs == "own":
                prefix = f"gate_behaviours.{number}"
            if names.query:
                query_prefix = "gate_query" if variant.gate_inputs == "own" else "query"
                anchor = _mlp(np.concatenate([request[n][r] for n in names.query]), weights, query_prefix)
            else:
                anchor = _mlp(_target(candidate, row, names.shared[history], weights, prefix), weights, f"{prefix}.mlp")
            seen = [] if variant.gate == "anchor" else [_mlp(event, weights, f"{prefix}.mlp") for event in raw]
            if kept is not None:
                seen = [h for j, h in enumerate(seen) if kept[history][r, j]]
            gate = gate + _history_gate(seen, anchor, weights, f"gates.{number}", variant)
        if names.query:
            inputs.append(_mlp(np.concatenate([request[n][r] for n in names.query]), weights, "query"))
        others = [request[n][r] for n in names.request] + [candidate[n][row] for n in names.candidate]
        inputs.append(_joined_mlp(np.concatenate(others), weights, "other"))
        if variant.gate == "none":
            gate = np.ones(1)
        elif variant.gate_norm == "softmax":
            gate = np.exp(gate - gate.max()) / np.exp(gate - gate.max()).sum()
        impression = np.concatenate(inputs)
        logits.append(sum(gate[k] * _expert(impression, weights, k) for k in range(num_experts)))
        gates.append(gate)
    return np.array(logits), np.array(gates)
