"""Proxies and blocks equal INFNet's equations in float64, one request, one candidate and one query at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recsys.layers.information_flow import (
    GATED_BY,
    QUERIES,
    SOURCES,
    CategoricalProxies,
    FlowBlock,
    Plan,
    SequenceProxies,
)
from recsys.layers.token_attention import GatedTokens
from tests.references import infnet as reference
from tests.references.layers import linear

D = 4
EVERYTHING = Plan(QUERIES, tuple(GATED_BY))


def drawn(layer: nn.Module) -> tuple[Any, dict[str, np.ndarray]]:
    """In float64 and at random, and its weights."""
    torch.manual_seed(0)
    for parameter in layer.double().parameters():
        nn.init.normal_(parameter)
    return layer, {name: tensor.numpy() for name, tensor in layer.state_dict().items()}


def normed(rows: np.ndarray, weights: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    if f"{prefix}.weight" not in weights:
        return rows
    return np.array([reference.layer_norm(row, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"]) for row in rows])


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("has_gate", [True, False])
def test_proxies_of_histories_are_pooled_event_by_event(pooling: Any, layer_norm: bool, has_gate: bool) -> None:
    layer, weights = drawn(SequenceProxies(D, 2, hidden=(5, 3), pooling=pooling, layer_norm=layer_norm))
    lengths = [[3, 0], [1, 2]]  # of either history
    events = [torch.randn(2, longest, D).double() for longest in (3, 4)]
    valid = [torch.arange(e.shape[1]) < torch.tensor(n).unsqueeze(1) for e, n in zip(events, lengths, strict=True)]
    gate = torch.rand(2, D).double() if has_gate else None
    got = layer(events, valid, gate).detach()
    assert got.shape == (2, 2 * 2, D)
    for r in range(2):
        rows = []
        for history, of_history in zip(events, lengths, strict=True):
            total = np.zeros(2 * D)
            for event in history[r, : of_history[r]].numpy():
                total += reference.mlp(event if gate is None else event * gate[r].numpy(), weights, "mlp", "output")
            rows += list((total / max(of_history[r], 1) if pooling == "mean" else total).reshape(2, D))
        np.testing.assert_allclose(got[r], normed(np.array(rows), weights, "norm"), rtol=1e-9, atol=1e-11)


def test_proxies_of_fields_are_an_mlp_over_all_of_them() -> None:
    layer, weights = drawn(CategoricalProxies(2 * D, 3 * D, D, 3, hidden=(6, 5)))
    request, rows, of_row = torch.randn(2, 2, D).double(), torch.randn(3, 3, D).double(), torch.tensor([0, 1, 1])
    got = layer(request, rows, of_row).detach()
    for n, r in enumerate(of_row.tolist()):
        fields = np.concatenate([request[r].flatten(), rows[n].flatten()])
        hidden = np.maximum(linear(fields, weights["mlp.first.weight"], weights["mlp.first.bias"]), 0.0)
        expected = reference.mlp(hidden, weights, "mlp.rest", "output").reshape(3, D)
        np.testing.assert_allclose(got[n], expected, rtol=1e-10, atol=1e-12)
    own = layer(request[of_row], rows, None).detach()
    torch.testing.assert_close(own, got, rtol=1e-12, atol=1e-13)


OPTIONS: dict[str, dict[str, Any]] = {
    "literal": {"layer_norm": False, "residual": False, "gate_proxies": "input", "gate_residual": False},
    "recommended": {"layer_norm": True, "residual": True, "gate_proxies": "updated", "gate_residual": False},
    "heads, shared projections": {
        "layer_norm": True,
        "residual": True,
        "gate_proxies": "updated",
        "gate_residual": True,
        "num_heads": 2,
        "key_dim": 3,
        "projections": "per_source",
    },
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("has_tasks", "is_first"), [(True, True), (True, False), (False, False)])
def test_a_block_equals_the_eight_attentions_and_three_gates(name: str, has_tasks: bool, is_first: bool) -> None:
    """In the first block, tasks are the same for all rows and ask the events once a request."""
    options = {"num_heads": 1, "key_dim": None, "projections": "per_call", **OPTIONS[name]}
    counts = {"categorical": 3, "sequence": 2, "shared": 2, "task": 2}
    asking = QUERIES if has_tasks else ("categorical", "sequence")
    plan = EVERYTHING if has_tasks else Plan(asking, ("categorical", "sequence"))
    layer, weights = drawn(
        FlowBlock(plan, counts, D, has_tasks=has_tasks, gate_hidden=(5,), gate_bias=0.0, **options)  # type: ignore[arg-type]
    )
    num_rows, of_row = 3, torch.tensor([0, 1, 1])
    streams = {stream: torch.randn(num_rows, counts[stream], D).double() for stream in asking}
    if is_first:
        streams |= {stream: streams[stream][0] for stream in ("shared", "task")}
    of_requests = GatedTokens((torch.randn(2, 4, D).double(),), torch.tensor([[False] * 4, [True, True, False, True]]))
    assert of_requests.valid is not None
    groups = torch.randn(num_rows, 2, D).double(), torch.randn(num_rows, 3, D).double()
    sources = {
        "categorical": GatedTokens(groups),
        "sequence": GatedTokens((of_requests.groups[0][of_row],), of_requests.valid[of_row]),
    }
    if has_tasks:
        sources["task"] = GatedTokens((streams["task"],))
    new, gated = layer(streams, sources, of_requests if is_first else None, lambda values: values[of_row])

    def at(values: Tensor, n: int) -> Tensor:
        return values[n] if values.dim() == 3 else values

    def written_out(tokens: GatedTokens, n: int) -> np.ndarray:
        rows = torch.cat([at(group, n) for group in tokens.groups])
        if tokens.gate is not None:
            rows = rows * tokens.gate[n]
        return np.asarray(plain(rows if tokens.valid is None else rows[tokens.valid[n]]))

    for n in range(num_rows):
        updated = {}
        for stream in asking:
            queries = plain(at(streams[stream], n))
            total = queries.copy() if options["residual"] else np.zeros_like(queries)
            for source in SOURCES[stream]:
                if source not in sources:
                    continue
                own = source if options["projections"] == "per_source" else f"{source}_by_{stream}"
                names = f"query.{stream}_to_{source}.weight", f"source.{own}.key", f"source.{own}.value"
                keys = written_out(sources[source], n)
                total += reference.cross_attention(queries, keys, *(weights[name] for name in names))
            updated[stream] = normed(total, weights, f"norm.{stream}")
        for kind in plan.gates:
            proxies = (
                updated if options["gate_proxies"] == "updated" else {s: plain(at(t, n)) for s, t in streams.items()}
            )
            factor = reference.gate(proxies[GATED_BY[kind]], weights, f"gate.{kind}") + options["gate_residual"]
            tokens = updated["task"] if kind == "task" else written_out(sources[kind], n)
            np.testing.assert_allclose(written_out(gated[kind], n), tokens * factor, rtol=1e-9, atol=1e-11)
        for stream in ("categorical", "sequence", "shared"):
            if stream in asking:
                np.testing.assert_allclose(plain(new[stream][n]), updated[stream], rtol=1e-9, atol=1e-11)


def plain(tensor: Tensor) -> np.ndarray:
    result: np.ndarray = tensor.detach().numpy()
    return result
