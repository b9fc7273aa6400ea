"""DIN from the paper, in float64, one candidate at a time: everything of a request computed again for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tests.references.attention import pool, score, softmax
from tests.references.layers import dice, linear

Array = np.ndarray
Weights = Mapping[str, Array]


class Names(NamedTuple):
    """Which features there are, in the schema's order."""

    request: Sequence[str]
    candidate: Sequence[str]
    query: Mapping[str, Sequence[str]]
    keys: Mapping[str, Sequence[str]]


def _activate(row: Array, weights: Weights, prefix: str) -> Array:
    return dice(row, *(weights[f"{prefix}.{name}"] for name in ("alpha", "running_mean", "running_var")))


def attend(query: Array, events: Array, weights: Weights, prefix: str, *, with_softmax: bool = False) -> Array:
    """One candidate's pooled history by the unit at ``prefix``, with Dice."""
    num_hidden = 1 + len([name for name in weights if name.startswith(f"{prefix}.hidden.") and name.endswith(".bias")])
    layers = ["first", *(f"hidden.{i}" for i in range(num_hidden - 1)), "output"]
    parts = [(weights[f"{prefix}.{layer}.weight"], weights[f"{prefix}.{layer}.bias"]) for layer in layers]
    scores = [
        score(query, key, parts, lambda i, row: _activate(row, weights, f"{prefix}.activations.{i}")) for key in events
    ]
    return pool(softmax([s / np.sqrt(events.shape[1]) for s in scores]) if with_softmax else scores, events)


def din(
    request: Mapping[str, Array],
    candidate: Mapping[str, Array],
    histories: Mapping[str, tuple[Mapping[str, Array], Sequence[int]]],
    request_of_row: Sequence[int],
    weights: Weights,
    names: Names,
    *,
    with_softmax: bool = False,
    with_mean: bool = False,
) -> Array:
    """Logits (N, T) with Dice everywhere.

    Args:
        request: (R, width) by feature.
        candidate: (N, width) by feature.
        histories: by name, (R, L, width) by feature and the lengths.
        weights: the network's state, in float64.
        with_softmax: attention as in the authors' code.
        with_mean: no attention; every event counts the same.
    """
    logits = []
    for row, r in enumerate(request_of_row):
        inputs = [request[name][r] for name in names.request] + [candidate[name][row] for name in names.candidate]
        for number, (history, (features, lengths)) in enumerate(histories.items()):
            query = np.concatenate([candidate[name][row] for name in names.query[history]])
            keys = np.concatenate([features[name][r][: lengths[r]] for name in names.keys[history]], axis=1)
            if with_mean:
                inputs.append(pool([1 / len(keys)] * len(keys), keys) if len(keys) else np.zeros(keys.shape[1]))
            else:
                inputs.append(attend(query, keys, weights, f"attention.{number}.unit", with_softmax=with_softmax))
        hidden = linear(np.concatenate(inputs), weights["mlp.first.weight"], weights["mlp.first.bias"])
        hidden = _activate(hidden, weights, "mlp.after_first.activation")
        layer = 0
        while f"mlp.rest.linears.{layer}.weight" in weights:
            linear_layer = f"mlp.rest.linears.{layer}"
            hidden = linear(hidden, weights[f"{linear_layer}.weight"], weights[f"{linear_layer}.bias"])
            hidden = _activate(hidden, weights, f"mlp.rest.after.{layer}.activation")
            layer += 1
        logits.append(linear(hidden, weights["output.weight"], weights["output.bias"]))
    return np.array(logits)
