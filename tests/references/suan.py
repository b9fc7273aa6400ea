"""SUAN and LightSUAN in float64, one candidate at a time: the whole sequence encoded again for each.

Written with loops from the formulas: a sequence of events and one candidate, a mask of pairs, heads one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tests.references.layers import dice, linear

Array = np.ndarray
Weights = Mapping[str, Array]
Mask = Callable[[int, int, int, int], bool]
"""(query, key, last position, head) -> may see; the candidate stands at the last position."""


class Options(NamedTuple):
    """What the source leaves open."""

    num_heads: int
    norm_style: str = "pre"
    pooling: str = "behaviours"


def rms_norm(x: Array, gamma: Array, eps: float = 1e-6) -> Array:
    """One vector, epsilon outside the root."""
    return gamma * x / (math.sqrt(sum(v * v for v in x) / len(x)) + eps)


def silu(x: float) -> float:
    """x times the logistic function."""
    return x / (1.0 + math.exp(-x)) if x > -700 else 0.0


def swiglu(x: Array, weights: Weights, prefix: str) -> Array:
    """One vector."""
    gate = linear(x, weights[f"{prefix}.gate.weight"], weights[f"{prefix}.gate.bias"])
    up = linear(x, weights[f"{prefix}.up.weight"], weights[f"{prefix}.up.bias"])
    hidden = np.array([silu(g) * u for g, u in zip(gate, up, strict=True)])
    return linear(hidden, weights[f"{prefix}.down.weight"], weights[f"{prefix}.down.bias"])


def bucket(microseconds: int) -> int:
    """Of a time difference."""
    return min(128, math.floor(math.log(max(1.0, abs(microseconds) / 1e6)) / 0.301))


def causal(query: int, key: int, last: int, head: int) -> bool:
    """The dense mask."""
    return key <= query


def local_or_dilated(window: int, dilation: int, *, sparse_candidate: bool = False) -> Mask:
    """The union of both patterns; the candidate sees everything, or the union too."""

    def sees(query: int, key: int, last: int, head: int) -> bool:
        if key > query:
            return False
        if query == last and not sparse_candidate:
            return True
        return query - key < window or (query - key) % dilation == 0

    return sees


def local_then_dilated(window: int, dilation: int, num_heads: int) -> Mask:
    """The first half of the heads local, the others dilated; the candidate sees everything."""

    def sees(query: int, key: int, last: int, head: int) -> bool:
        if key > query:
            return False
        if query == last:
            return True
        return query - key < window if head < num_heads // 2 else (query - key) % dilation == 0

    return sees


def attention(
    queries: Sequence[Array], keys: Sequence[Array], values: Sequence[Array], score: Callable[[int, int, float], float]
) -> list[Array]:
    """Softmax attention of one head; ``score`` adds biases to a scaled product, or gives -inf."""
    out = []
    for i, q in enumerate(queries):
        scores = [
            score(i, j, sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q))) for j, k in enumerate(keys)
        ]
        top = max(scores)
        parts = [math.exp(s - top) for s in scores]
        out.append(sum(p / sum(parts) * v for p, v in zip(parts, values, strict=True)))
    return out


def _multi_head(
    xs: Sequence[Array],
    sources: Sequence[Array],
    weights: Weights,
    prefix: str,
    num_heads: int,
    score: Callable[[int, int, int, float], float],
) -> list[Array]:
    query, key, value = (weights[f"{prefix}.{n}.weight"] for n in ("query", "key", "value"))
    width = len(query) // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        heads.append(
            attention(
                [query[part] @ x for x in xs],
                [key[part] @ s for s in sources],
                [value[part] @ s for s in sources],
                lambda i, j, product, head=head: score(head, i, j, product),  # type: ignore[misc]
            )
        )
    output = weights[f"{prefix}.output.weight"]
    return [output @ np.concatenate([h[i] for h in heads]) for i in range(len(xs))]


def align(xs: Sequence[Array], read: Sequence[Array], weights: Weights, prefix: str, pooling: str) -> list[Array]:
    """Dual alignment of a sequence and what it has read; the last position is the candidate's."""
    sums = [x + c for x, c in zip(xs, read, strict=True)]
    out = []
    for i, (x, c) in enumerate(zip(xs, read, strict=True)):
        if pooling == "behaviours":
            summary = sum(sums[:-1]) / (len(sums) - 1) if len(sums) > 1 else np.zeros(len(x))
        elif pooling == "position":
            summary = sums[i]
        else:
            summary = sum(sums[: i + 1]) / (i + 1)
        z = np.maximum(weights[f"{prefix}.squeeze.weight"] @ summary, 0.0)
        one, two = weights[f"{prefix}.first.weight"] @ z, weights[f"{prefix}.second.weight"] @ z
        alpha = np.array([1.0 / (1.0 + math.exp(b - a)) for a, b in zip(one, two, strict=True)])
        out.append(alpha * x + (1.0 - alpha) * c)
    return out


def encode(
    events: Array,
    event_times: Sequence[int],
    candidate: Array,
    time: int,
    profile: Sequence[Array],
    weights: Weights,
    prefix: str,
    mask: Mask,
    options: Options,
) -> Array:
    """The last position of the last block, (D,)."""
    xs = [*events, candidate]
    times = [*event_times, time]
    last = len(events)
    hours = weights[f"{prefix}hours"]
    for i, t in enumerate(times):
        of_hour = linear(
            hours[t // 3_600_000_000 % 24], weights[f"{prefix}of_hour.weight"], weights[f"{prefix}of_hour.bias"]
        )
        xs[i] = xs[i] + of_hour + weights[f"{prefix}positions"][last - i]
    of_place, of_time = weights[f"{prefix}bias.position"], weights[f"{prefix}bias.time"]
    layer = 0
    while f"{prefix}blocks.{layer}.norms.0.weight" in weights:
        block = f"{prefix}blocks.{layer}"

        def own_score(head: int, i: int, j: int, product: float, layer: int = layer) -> float:
            if not mask(i, j, last, head):
                return -math.inf
            y, h = min(layer, of_place.shape[1] - 1), min(head, of_place.shape[2] - 1)
            return float(product + of_place[i - j, y, h] + of_time[bucket(times[i] - times[j]), y, h])

        def plain_score(head: int, i: int, j: int, product: float) -> float:
            return product

        norm = lambda number, vectors, block=block: [  # noqa: E731
            rms_norm(v, weights[f"{block}.norms.{number}.weight"]) for v in vectors
        ]
        is_code = options.norm_style == "code"
        normal = norm(0, xs)
        read = _multi_head(normal, normal, weights, f"{block}.self_attention", options.num_heads, own_score)
        xs = [(n if is_code else x) + r for x, n, r in zip(xs, normal, read, strict=True)]
        normal = norm(1, xs)
        read = _multi_head(normal, profile, weights, f"{block}.profile_attention", options.num_heads, plain_score)
        merged = align(normal, read, weights, f"{block}.alignment", options.pooling)
        xs = [(n if is_code else x) + m for x, n, m in zip(xs, normal, merged, strict=True)]
        normal = norm(2, xs)
        xs = [
            (n if is_code else x) + swiglu(n, weights, f"{block}.feed_forward") for x, n in zip(xs, normal, strict=True)
        ]
        layer += 1
    return xs[-1]


class History(NamedTuple):
    """One history of R requests, and which of its columns are a candidate's too."""

    features: Mapping[str, Array]
    lengths: Sequence[int]
    times: Array
    attributes: Sequence[str]
    event_features: Sequence[str]


def suan(
    request: Mapping[str, Array],
    candidate: Mapping[str, Array],
    histories: Sequence[History],
    request_of_row: Sequence[int],
    time: Sequence[int],
    weights: Weights,
    options: Options,
    mask: Mask = causal,
    *,
    dense: Sequence[str] = (),
    candidate_mapping: str = "projection",
    is_projected: bool = False,
) -> Array:
    """Logits (N, T) with Dice in the head.

    Args:
        request: (R, width) by feature, in the schema's order.
        candidate: (N, width) by feature, in the schema's order.
        weights: the network's state, in float64.
        dense: the request's features that a layer of their own makes tokens of, in order.
        is_projected: events go through a layer to the encoder's width.
    """
    logits = []
    for row, r in enumerate(request_of_row):
        profile = []
        for name, values in request.items():
            if name in dense:
                number = list(dense).index(name)
                profile.append(linear(values[r], weights[f"tokens.{number}.weight"], weights[f"tokens.{number}.bias"]))
            else:
                profile.append(values[r])
        own = np.concatenate([values[row] for values in candidate.values()])
        inputs = [np.concatenate([values[r] for values in request.values()]), own]
        for number, history in enumerate(histories):
            names = [*history.attributes, *history.event_features]
            length = history.lengths[r]
            events = np.concatenate([history.features[n][r][:length] for n in names], axis=1)
            if candidate_mapping == "projection":
                x = linear(own, weights[f"to_event.{number}.weight"], weights[f"to_event.{number}.bias"])
            else:
                zeros = [np.zeros(history.features[n].shape[2]) for n in history.event_features]
                x = np.concatenate([*(candidate[n][row] for n in history.attributes), *zeros])
            if is_projected:
                weight, bias = weights[f"to_width.{number}.weight"], weights[f"to_width.{number}.bias"]
                events = np.array([linear(e, weight, bias) for e in events]).reshape(length, len(bias))
                x = x if candidate_mapping == "projection" else linear(x, weight, bias)
            times = [int(t) for t in history.times[r][:length]]
            prefix = f"encoders.{number}."
            inputs.append(encode(events, times, x, int(time[r]), profile, weights, prefix, mask, options))
        hidden = _activate(
            linear(np.concatenate(inputs), weights["mlp.first.weight"], weights["mlp.first.bias"]),
            weights,
            "mlp.after_first.activation",
        )
        layer = 0
        while f"mlp.rest.linears.{layer}.weight" in weights:
            name = f"mlp.rest.linears.{layer}"
            hidden = linear(hidden, weights[f"{name}.weight"], weights[f"{name}.bias"])
            hidden = _activate(hidden, weights, f"mlp.rest.after.{layer}.activation")
            layer += 1
        logits.append(linear(hidden, weights["output.weight"], weights["output.bias"]))
    return np.array(logits)


def _activate(row: Array, weights: Weights, prefix: str) -> Array:
    return dice(row, *(weights[f"{prefix}.{name}"] for name in ("alpha", "running_mean", "running_var")))
