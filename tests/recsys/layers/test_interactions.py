"""Layers of explicit interactions agree with slow float64 versions, for many requests and for one."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from recsys.errors import ConfigError
from recsys.layers import (
    MLP,
    BilinearFusion,
    CrossNetwork,
    Distinct,
    FeatureGate,
    JoinedMLP,
    ManyRequests,
    OneRequest,
    PairwiseInteraction,
    RequestGatedMLP,
    RowGatedMLP,
    StaticGatedMLP,
)
from tests.references import interactions as reference

REQUEST_OF_ROW = torch.tensor([0, 0, 2, 2, 2])


def array(tensor: torch.Tensor) -> np.ndarray:
    result: np.ndarray = tensor.detach().numpy()
    return result


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def scrambled(module: ModuleT) -> ModuleT:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.uniform_(parameter, -0.7, 0.7, generator=generator)
    return module


def inputs(seed: int, *sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = (3, 5)
    return [torch.randn(rows[i % 2], size, generator=generator, dtype=torch.float64) for i, size in enumerate(sizes)]


def test_pairs_equal_a_loop_over_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    request = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    rows = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    got = PairwiseInteraction(4, 1).double()(request, rows, ManyRequests(REQUEST_OF_ROW))
    weighted = scrambled(PairwiseInteraction(4, 2))
    for n, r in enumerate(REQUEST_OF_ROW.tolist()):
        pairs = reference.pairs([*array(request[r]), *array(rows[n])])
        assert got[n].item() == pytest.approx(pairs.sum(), rel=1e-12)
        np.testing.assert_allclose(
            array(weighted(request, rows, ManyRequests(REQUEST_OF_ROW))[n]), array(weighted.weight) @ pairs, rtol=1e-12
        )
    one = PairwiseInteraction(4, 1).double()(request[2:], rows[2:], OneRequest())
    torch.testing.assert_close(one, got[2:])


def test_crosses_equal_the_formula() -> None:
    layer = scrambled(CrossNetwork(2, 3, 3))
    request, rows = inputs(2, 2, 3)
    got = layer(request, rows, ManyRequests(REQUEST_OF_ROW))
    linears = [(array(m.weight), array(m.bias)) for m in (layer.first, *layer.rest)]
    for n, r in enumerate(REQUEST_OF_ROW.tolist()):
        expected = reference.cross(np.concatenate([array(request[r]), array(rows[n])]), linears)
        np.testing.assert_allclose(array(got[n]), expected, rtol=1e-10)
    torch.testing.assert_close(layer(request[2:], rows[2:], OneRequest()), got[2:])


def test_a_gate_by_hand() -> None:
    """c = 1, W1 = 2, W2 = (1, -1): 2 sigma(2) and 2 sigma(-2), which add up to 2."""
    gate = FeatureGate(1, [1], 2)
    with torch.no_grad():
        gate.mlp.linears[0].weight.fill_(2.0)  # type: ignore[operator]
        gate.mlp.linears[0].bias.zero_()  # type: ignore[operator]
        gate.output.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        gate.output.bias.zero_()
    weights = gate(torch.tensor([[1.0], [-3.0]]))
    expected = 2 / (1 + np.exp(-2.0))
    torch.testing.assert_close(weights, torch.tensor([[expected, 2 - expected], [1.0, 1.0]], dtype=torch.float32))


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_fusion_equals_a_triple_loop(heads: int) -> None:
    layer = scrambled(BilinearFusion(6, 12, num_heads=heads, num_tasks=2))
    assert layer.blocks.shape == (2, heads, 6 // heads, 12 // heads)
    left, right = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    got = layer(left, right)
    for n in range(4):
        for t in range(2):
            expected = reference.bilinear(
                array(left[n]),
                array(right[n]),
                array(layer.left.weight[t]),
                array(layer.right.weight[t]),
                (layer.left.bias[t] + layer.right.bias[t]).item(),
                array(layer.blocks[t]),
            )
            assert got[n, t].item() == pytest.approx(expected, rel=1e-10)


def test_heads_are_a_block_diagonal_form_of_one_head() -> None:
    many, one = (scrambled(BilinearFusion(6, 4, num_heads=k, num_tasks=1)) for k in (2, 1))
    one.load_state_dict(many.state_dict() | {"blocks": torch.block_diag(*many.blocks[0])[None, None]})
    left, right = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(one(left, right), many(left, right))


def test_gates_and_gated_streams_equal_the_formula() -> None:
    """2 sigma(MLP(c)) times the input, through the MLP: by request, by row, and of no context."""
    by_request = scrambled(RequestGatedMLP(4, [5, 3], 2, 3, JoinedMLP(2, 3, [6, 7], activation="relu")))
    by_row = scrambled(RowGatedMLP(4, [5, 3], 2, 3, MLP(5, [6, 7], activation="relu")))
    static = scrambled(StaticGatedMLP(2, 3, JoinedMLP(2, 3, [6, 7], activation="relu")))
    of_request, none, some, more = (*inputs(5, 4, 0), *inputs(6, 1, 3))
    request, rows = inputs(7, 2, 3)

    def gate(layer: nn.Module, context: np.ndarray) -> np.ndarray:
        state = {name: array(tensor) for name, tensor in layer.state_dict().items()}
        linears = [f"gate.mlp.linears.{i}" for i in range(2)]
        hidden = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in linears]
        return reference.gate(context, hidden, (state["gate.output.weight"], state["gate.output.bias"]))

    which = ManyRequests(REQUEST_OF_ROW)
    got = [
        by_request(of_request, none, request, rows, which),
        by_row(some, more, request, rows, which),
        static(none[:3, :0], none, request, rows, which),
    ]
    for n, r in enumerate(REQUEST_OF_ROW.tolist()):
        x = np.concatenate([array(request[r]), array(rows[n])])
        gates = [
            gate(by_request, array(of_request[r])),
            gate(by_row, np.concatenate([array(some[r]), array(more[n])])),
            2 / (1 + np.exp(-array(static.bias))),
        ]
        for layer, out, weights in zip((by_request, by_row, static), got, gates, strict=True):
            state = {name: array(tensor) for name, tensor in layer.state_dict().items()}
            np.testing.assert_allclose(array(out[n]), reference.mlp(weights * x, state, "mlp"), rtol=1e-10, atol=1e-13)


def test_a_gate_of_ids_that_repeat_is_computed_once_each() -> None:
    gate, context = scrambled(FeatureGate(3, [4], 2)), torch.randn(3, 3, dtype=torch.float64)
    ids = torch.tensor([7, 2, 7, 9, 2])
    repeated = context[torch.tensor([1, 0, 1, 2, 0])]
    distinct = Distinct.of(ids)
    assert sorted(ids[distinct.example].tolist()) == [2, 7, 9]
    torch.testing.assert_close(gate(repeated, distinct), gate(repeated), rtol=1e-12, atol=1e-13)


def test_a_gate_of_the_request_is_the_same_gate_for_each_of_its_rows() -> None:
    """The three streams, on the same weights: the gate once a request, once a row, and without a context."""
    by_request = scrambled(RequestGatedMLP(4, [5], 2, 3, JoinedMLP(2, 3, [6, 7], activation="relu"))).eval()
    state = by_request.state_dict()
    renamed = {k.replace("mlp.first.", "mlp.linears.0."): t for k, t in state.items()}
    renamed = {k.replace("mlp.rest.linears.0.", "mlp.linears.1."): t for k, t in renamed.items()}
    by_row = RowGatedMLP(4, [5], 2, 3, MLP(5, [6, 7], activation="relu")).double()
    by_row.load_state_dict(renamed)
    context, no_context, request, rows = (*inputs(3, 4, 0), *inputs(4, 2, 3))
    got = by_request(context, no_context, request, rows, ManyRequests(REQUEST_OF_ROW))
    assert got.shape == (5, 7)
    torch.testing.assert_close(by_row(context, no_context, request, rows, ManyRequests(REQUEST_OF_ROW)), got)
    for layer in (by_request, by_row):
        torch.testing.assert_close(layer(context[2:], no_context[2:], request[2:], rows[2:], OneRequest()), got[2:])
    static = StaticGatedMLP(2, 3, by_request.mlp).double()
    constant = by_request.gate(context[2:]).squeeze(0)
    with torch.no_grad():
        static.bias.copy_(torch.logit(constant / 2))
    torch.testing.assert_close(static(context, no_context, request, rows, ManyRequests(REQUEST_OF_ROW))[2:], got[2:])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BilinearFusion(6, 8, num_heads=3, num_tasks=1), "right_size must be a multiple of num_heads, got 8"),
        (lambda: CrossNetwork(1, 1, 0), "num_layers must be at least 1"),
        (lambda: FeatureGate(0, [3], 2), "context_size must be at least 1"),
    ],
)
def test_arguments_outside_their_domain_are_named(build: type, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
