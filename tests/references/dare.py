"""DARE, TWIN and its variants from the dossier, in float64, one candidate and one event at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tests.references.attention import pool, softmax
from tests.references.layers import linear, prelu

Array = np.ndarray
Weights = Mapping[str, Array]


def best(search: Sequence[float], top_k: int) -> list[int]:
    """Positions of the highest scores, in the order of the history."""
    ranked = sorted(range(len(search)), key=lambda j: -search[j])
    return sorted(ranked[:top_k])


def top_k_pool(search: Sequence[float], scores: Sequence[float], values: Array, top_k: int) -> Array:
    """The best events' values, weighted by a softmax over these alone; zeros of none."""
    chosen = best(search, top_k)
    return pool(softmax([scores[j] for j in chosen]), values[chosen])


class Names(NamedTuple):
    """What there is, in the schema's order: by history, what events and candidates share and what only events have."""

    request: Sequence[str]
    candidate: Sequence[str]
    shared: Mapping[str, Sequence[str]]
    own: Mapping[str, Sequence[str]]
    is_categorical: Callable[[str], bool]


class Variant(NamedTuple):
    """Roles in the order attention of events, of candidates, values of events, of candidates; and the switches."""

    roles: tuple[str, str, str, str]
    top_k: int
    num_slots: int
    search: str = "attention"
    has_product: bool = True
    hash_width: int = 1
    category: str | None = None


def _key(name: str, space: str) -> str:
    return f"{name}@{space}" if space else name


def _signs(vector: Array, directions: Array) -> list[int]:
    return [1 if sum(v * d for v, d in zip(vector, column, strict=True)) >= 0 else -1 for column in directions.T]


def _of_history(
    number: int,
    history: str,
    row: int,
    r: int,
    candidate: Mapping[str, Array],
    features: Mapping[str, Array],
    length: int,
    weights: Weights,
    names: Names,
    variant: Variant,
) -> tuple[Array, Array]:
    """What the heads take of one history: with the K best events, and with all."""
    prefix = f"histories.{number}"
    slots = weights[f"{prefix}.slots.weight"]
    attention_slots = weights.get(f"{prefix}.attention_slots.weight", slots)
    scored = [name for name in names.shared[history] if names.is_categorical(name)]
    scored_own = [n for n in names.own[history] if names.is_categorical(n) and variant.search != "sampling"]

    def vectors(role: int, wanted: Sequence[str], source: Mapping[str, Array], *at: int) -> Array:
        parts = [source[_key(name, variant.roles[role])][at] for name in wanted]
        return np.concatenate(parts) if parts else np.zeros(0)

    def projected(vector: Array, role: str, side: str) -> Array:
        name = f"{prefix}.project_{role}.{side}.weight"
        return linear(vector, weights[name], np.zeros(len(vector))) if name in weights else vector

    def absent(role: str) -> Array:
        return weights.get(f"{prefix}.{role}.absent", np.zeros(0))

    query = projected(vectors(1, scored, candidate, row), "attention", "candidate")
    query_own = np.concatenate([absent("attention"), attention_slots[0]])
    target = np.concatenate(
        [
            projected(vectors(3, names.shared[history], candidate, row), "values", "candidate"),
            absent("values"),
            slots[0],
        ]
    )
    scores, values, category, signs = [], [], [], []
    for j in range(length):
        slot = min(length - j, variant.num_slots)
        key = projected(vectors(0, scored, features, r, j), "attention", "events")
        key_own = np.concatenate([vectors(0, scored_own, features, r, j), attention_slots[slot]])
        semantic = sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query))
        own = sum(a * b for a, b in zip(query_own, key_own, strict=True)) / math.sqrt(len(query_own))
        scores.append(semantic + own)
        shared = projected(vectors(2, names.shared[history], features, r, j), "values", "events")
        values.append(np.concatenate([shared, vectors(2, names.own[history], features, r, j), slots[slot]]))
        if variant.category is not None:
            category.append(bool((features[variant.category][r, j] == candidate[variant.category][row]).all()))
        if f"{prefix}.directions" in weights:
            signs.append(_signs(key, weights[f"{prefix}.directions"]))
    rows = np.array(values).reshape(length, len(target))
    if variant.search == "sampling":
        mine, groups = _signs(query, weights[f"{prefix}.directions"]), []
        for first in range(0, len(mine), variant.hash_width):
            bucket = slice(first, first + variant.hash_width)
            total = sum((rows[j] for j in range(length) if signs[j][bucket] == mine[bucket]), np.zeros(len(target)))
            groups.append(total / max(math.hypot(*total), 1e-6))
        pooled = [sum(groups) / len(groups)] * 2
    else:
        search = scores
        if variant.search == "category":
            search = [j + length * is_same for j, is_same in enumerate(category)]
        elif variant.search == "hash":
            mine = _signs(query, weights[f"{prefix}.directions"])
            search = [sum(a == b for a, b in zip(mine, bits, strict=True)) + j / length for j, bits in enumerate(signs)]
        pooled = [top_k_pool(search, scores, rows, variant.top_k), pool(softmax(scores), rows)]
    kept, everything = (
        np.concatenate([target, h, sum_of_products(h, target)] if variant.has_product else [target, h]) for h in pooled
    )
    return kept, everything


def sum_of_products(pooled: Array, target: Array) -> Array:
    """``(sum w e) * v``."""
    return np.array([a * b for a, b in zip(pooled, target, strict=True)])


def _norm(row: Array, weights: Weights, prefix: str) -> Array:
    mean, var = weights[f"{prefix}.running_mean"], weights[f"{prefix}.running_var"]
    return (row - mean) / np.sqrt(var + 1e-5) * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]


def _dense(row: Array, weights: Weights, name: str) -> Array:
    return linear(row, weights[f"{name}.weight"], weights[f"{name}.bias"])


def dare(
    request: Mapping[str, Array],
    candidate: Mapping[str, Array],
    histories: Mapping[str, tuple[Mapping[str, Array], Sequence[int]]],
    request_of_row: Sequence[int],
    weights: Weights,
    names: Names,
    variant: Variant,
) -> tuple[Array, Array]:
    """Logits (N, T), and those of the head that sees all events (zeros without one); batch norm by moving averages."""
    logits, auxiliary = [], []
    for row, r in enumerate(request_of_row):
        parts = [
            _of_history(number, history, row, r, candidate, features, lengths[r], weights, names, variant)
            for number, (history, (features, lengths)) in enumerate(histories.items())
        ]
        kept, everything = (np.concatenate(side) for side in zip(*parts, strict=True))
        inputs = [request[name][r] for name in names.request]
        inputs += [_norm(kept, weights, "norm"), *(candidate[name][row] for name in names.candidate)]
        hidden = prelu(
            _dense(np.concatenate(inputs), weights, "mlp.first"), weights["mlp.after_first.activation.alpha"]
        )
        layer = 0
        while f"mlp.rest.linears.{layer}.weight" in weights:
            hidden = _dense(hidden, weights, f"mlp.rest.linears.{layer}")
            hidden = prelu(hidden, weights[f"mlp.rest.after.{layer}.activation.alpha"])
            layer += 1
        logits.append(_dense(hidden, weights, "output"))
        if "auxiliary.2.weight" in weights:
            hidden = _dense(_norm(everything, weights, "auxiliary.0"), weights, "auxiliary.1.linears.0")
            hidden = prelu(hidden, weights["auxiliary.1.after.0.activation.alpha"])
            auxiliary.append(_dense(hidden, weights, "auxiliary.2"))
    return np.array(logits), np.array(auxiliary)
