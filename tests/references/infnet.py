"""INFNet from its equations, in float64: one candidate, one query, one key at a time.

Every block updates everything, nothing is folded, gated tokens are written out, the candidate's request is computed
again for each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.references.attention import softmax
from tests.references.layers import linear, sigmoid

Array = np.ndarray
Weights = Mapping[str, Array]


class Names(NamedTuple):
    """Which features there are, in the schema's order; ``events`` by history, event features last."""

    request: Sequence[str]
    candidate: Sequence[str]
    attributes: Mapping[str, Sequence[str]]
    events: Mapping[str, Sequence[str]]


class Readings(NamedTuple):
    """How the paper is read; the literal formulas unless told otherwise."""

    num_blocks: int = 2
    gate_proxies: str = "input"
    residual: bool = False
    gate_residual: bool = False
    layer_norm: bool = False
    input_norm: bool = False
    position: str = "none"
    sequence_pooling: str = "sum"
    target_attention: bool = False
    heads_read: str = "task_token"
    projections: str = "per_call"
    variant: str = "full"


def layer_norm(row: Array, weight: Array, bias: Array) -> Array:
    """One row, its own mean and biased variance."""
    mean = math.fsum(row) / len(row)
    variance = math.fsum((x - mean) ** 2 for x in row) / len(row)
    return np.array(
        [(x - mean) / math.sqrt(variance + 1e-5) * w + b for x, w, b in zip(row, weight, bias, strict=True)]
    )


def cross_attention(queries: Array, keys: Array, query: Array, key: Array, value: Array) -> Array:
    """CA(Q, K, K), head by head: ``query`` and ``key`` (H, E, D), ``value`` (H, D / H, D). No keys: zeros."""
    out = np.zeros((len(queries), query.shape[2]))
    for i, q in enumerate(queries):
        pieces = []
        for w_q, w_k, w_v in zip(query, key, value, strict=True):
            scores = [float((w_q @ q) @ (w_k @ k)) / math.sqrt(len(w_q)) for k in keys]
            piece = np.zeros(len(w_v))
            for share, k in zip(softmax(scores), keys, strict=True):
                piece += share * (w_v @ k)
            pieces.append(piece)
        out[i] = np.concatenate(pieces)
    return out


def mlp(row: Array, weights: Weights, prefix: str, output: str) -> Array:
    """ReLU layers ``<prefix>.linears.<i>``, then the linear layer ``output``."""
    layer = 0
    while f"{prefix}.linears.{layer}.weight" in weights:
        name = f"{prefix}.linears.{layer}"
        row = np.maximum(linear(row, weights[f"{name}.weight"], weights[f"{name}.bias"]), 0.0)
        layer += 1
    return linear(row, weights[f"{output}.weight"], weights[f"{output}.bias"])


def gate(proxies: Array, weights: Weights, prefix: str) -> Array:
    """sigma(MLP(flatten(proxies)))."""
    return np.array([sigmoid(x) for x in mlp(proxies.flatten(), weights, f"{prefix}.mlp", f"{prefix}.output")])


class _Row:
    """All tokens of one candidate."""

    def __init__(self, inputs: Mapping[str, Any], row: int, weights: Weights, names: Names, readings: Readings) -> None:
        self.weights, self.readings = weights, readings
        r = inputs["request_of_row"][row]
        fields = [(name, inputs["request"][name][r]) for name in names.request]
        fields += [(name, inputs["candidate"][name][row]) for name in names.candidate]
        dense = iter(range(10**6))
        tokens = []
        for name, vector in fields:
            if name in inputs["dense"]:
                number = next(dense)
                vector = linear(
                    vector, weights[f"tokens.dense.{number}.weight"], weights[f"tokens.dense.{number}.bias"]
                )
            tokens.append(self.normed(vector, "tokens.field_norm", readings.input_norm))
        self.num_request = len(names.request)
        self.events = []
        for h, (history, attributes) in enumerate(names.events.items()):
            features, lengths = inputs["histories"][history]
            events = []
            for j in range(lengths[r]):
                together = np.concatenate([features[name][r][j] for name in attributes])
                token = linear(together, weights[f"tokens.event.{h}.weight"], weights[f"tokens.event.{h}.bias"])
                if readings.position == "learned":
                    token = token + weights[f"tokens.place.{h}.place"][lengths[r] - 1 - j]
                    token = token + weights[f"tokens.place.{h}.history"]
                events.append(self.normed(token, "tokens.event_norm", readings.input_norm))
            self.events.append(events)
            if readings.target_attention:
                together = np.concatenate([inputs["candidate"][name][row] for name in names.attributes[history]])
                q = linear(together, weights[f"target.candidate.{h}.weight"], weights[f"target.candidate.{h}.bias"])
                projections = (f"target.query.{h}.weight", f"target.source.{h}.key", f"target.source.{h}.value")
                tokens.append(cross_attention(q[None], np.array(events), *(weights[p] for p in projections))[0])
        self.fields = np.array(tokens)
        self.dim = self.fields.shape[1]

    def normed(self, row: Array, prefix: str, wanted: bool) -> Array:
        if not wanted:
            return row
        return layer_norm(row, self.weights[f"{prefix}.weight"], self.weights[f"{prefix}.bias"])

    def categorical_proxies(self, fields: Array, prefix: str) -> Array:
        if f"{prefix}.output.bias" not in self.weights:
            return np.zeros((1, self.dim))  # the fast model has none, for nothing reads them
        first = f"{prefix}.mlp.first"
        hidden = np.maximum(linear(fields.flatten(), self.weights[f"{first}.weight"], self.weights[f"{first}.bias"]), 0)
        return mlp(hidden, self.weights, f"{prefix}.mlp.rest", f"{prefix}.output").reshape(-1, self.dim)

    def sequence_proxies(self, events: Sequence[Sequence[Array]], prefix: str) -> Array:
        if f"{prefix}.output.bias" not in self.weights:
            return np.zeros((1, self.dim))
        proxies = []
        for tokens in events:
            total = np.zeros_like(self.weights[f"{prefix}.output.bias"])
            for token in tokens:
                total += mlp(token, self.weights, f"{prefix}.mlp", f"{prefix}.output")
            if self.readings.sequence_pooling == "mean":
                total /= max(len(tokens), 1)
            proxies += list(total.reshape(-1, self.dim))
        return np.array([self.normed(p, f"{prefix}.norm", self.readings.layer_norm) for p in proxies])

    def ca(self, block: int, stream: str, queries: Array, source: str, keys: Array) -> Array:
        own = f"{source}_by_{stream}" if self.readings.projections == "per_call" else source
        prefix = f"blocks.{block}"
        return cross_attention(
            queries,
            keys,
            self.weights[f"{prefix}.query.{stream}_to_{source}.weight"],
            self.weights[f"{prefix}.source.{own}.key"],
            self.weights[f"{prefix}.source.{own}.value"],
        )

    def updated(self, block: int, stream: str, old: Array, seen: Array) -> Array:
        rows = seen + old if self.readings.residual else seen
        return np.array([self.normed(row, f"blocks.{block}.norm.{stream}", self.readings.layer_norm) for row in rows])

    def pgu(self, tokens: Array, proxies: Array, prefix: str) -> Array:
        factor = gate(proxies, self.weights, prefix)
        out = np.array([token * factor for token in tokens]).reshape(tokens.shape)
        return out + tokens if self.readings.gate_residual else out


def _flow(row: _Row, num_tasks: int) -> list[Array]:
    """What each head reads, after all blocks of the full model or of one that keeps the heterogeneous flow."""
    weights, readings = row.weights, row.readings
    has_tasks = readings.variant != "without_task_tokens"
    c, s = row.fields, np.array([e for events in row.events for e in events]).reshape(-1, row.dim)
    c_p = row.categorical_proxies(c, "proxies.categorical")
    s_p = row.sequence_proxies(row.events, "proxies.sequence")
    t = weights["task_tokens.task"] if has_tasks else np.zeros((0, row.dim))
    t_p = weights.get("task_tokens.shared", np.zeros((1, row.dim)))
    for b in range(readings.num_blocks):
        new = {}
        for stream, queries, others in (
            ("categorical", c_p, (("sequence", s), ("task", t))),
            ("sequence", s_p, (("categorical", c), ("task", t))),
            ("shared", t_p, (("categorical", c), ("sequence", s))),
            ("task", t, (("categorical", c), ("sequence", s))),
        ):
            if stream in ("shared", "task") and not has_tasks:
                continue
            if f"blocks.{b}.query.{stream}_to_{others[0][0]}.weight" not in weights:
                new[stream] = queries  # the fast model does not have it, for nothing reads it
                continue
            seen = sum(
                (row.ca(b, stream, queries, n, k) for n, k in others if has_tasks or n != "task"),
                np.zeros_like(queries),
            )
            new[stream] = row.updated(b, stream, queries, seen)
        gating = new if readings.gate_proxies == "updated" else {"categorical": c_p, "sequence": s_p, "shared": t_p}
        if readings.variant != "without_gates":
            if f"blocks.{b}.gate.categorical.output.weight" in weights:
                c = row.pgu(c, gating["categorical"], f"blocks.{b}.gate.categorical")
                s = row.pgu(s, gating["sequence"], f"blocks.{b}.gate.sequence")
            if has_tasks:
                new["task"] = row.pgu(new["task"], gating["shared"], f"blocks.{b}.gate.task")
        c_p, s_p = new["categorical"], new["sequence"]
        if has_tasks:
            t, t_p = new["task"], new["shared"]
    if not has_tasks:
        return [np.concatenate([c_p.flatten(), s_p.flatten()])] * num_tasks
    shared = [t_p.flatten()] if readings.heads_read == "task_and_shared_tokens" else []
    return [np.concatenate([token, *shared]) for token in t]


def _without_flow(row: _Row, num_tasks: int) -> list[Array]:
    weights = row.weights
    c, events, t = row.fields, row.events, weights["task"]
    c_p = row.categorical_proxies(c, "categorical_proxies")
    s_p = row.sequence_proxies(events, "sequence_proxies")
    for b in range(row.readings.num_blocks):
        c = row.pgu(c, c_p, f"gates.{b}.categorical")
        events = [list(row.pgu(np.array(e).reshape(-1, row.dim), s_p, f"gates.{b}.sequence")) for e in events]
        t = row.pgu(t, weights["shared"], f"gates.{b}.task")
    c_p = row.categorical_proxies(c, "categorical_proxies")
    s_p = row.sequence_proxies(events, "sequence_proxies")
    return [np.concatenate([t[task], c_p.flatten(), s_p.flatten()]) for task in range(num_tasks)]


def infnet(inputs: Mapping[str, Any], weights: Weights, names: Names, readings: Readings, num_tasks: int) -> Array:
    """Logits (N, T) with ReLU heads.

    Args:
        inputs: ``request`` (R, width) and ``candidate`` (N, width) by feature; ``histories`` by name, (R, L, width) by
            feature and the lengths; ``request_of_row``; ``dense``, names of features that are not looked up.
        weights: the network's state, in float64.
    """
    logits = []
    for n in range(len(inputs["request_of_row"])):
        row = _Row(inputs, n, weights, names, readings)
        read = (_without_flow if readings.variant == "without_flow" else _flow)(row, num_tasks)
        logits.append([mlp(x, weights, f"heads.{i}.0", f"heads.{i}.1")[0] for i, x in enumerate(read)])
    return np.array(logits)
