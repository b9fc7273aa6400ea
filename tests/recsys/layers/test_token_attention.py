"""Folding keys, values and gates into queries and results changes nothing but the cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.layers.token_attention import (
    Call,
    GatedTokens,
    ProxyGate,
    QueryProjection,
    SourceProjection,
    cross_attention,
    masked_softmax,
)
from tests.references import infnet as reference


def projections(dim: int, num_heads: int, key_dim: int | None) -> tuple[QueryProjection, SourceProjection]:
    made = (
        QueryProjection(dim, num_heads=num_heads, key_dim=key_dim),
        SourceProjection(dim, num_heads=num_heads, key_dim=key_dim),
    )
    for parameter in (*made[0].parameters(), *made[1].parameters()):
        nn.init.normal_(parameter)
        parameter.data = parameter.data.double()
    return made


def written_out(call: Call, tokens: Tensor, valid: Tensor) -> Tensor:
    """The definition, tokens gated already: (N, Q, D)."""
    heads = []
    for w_q, w_k, w_v in zip(call.query.weight, call.source.key, call.source.value, strict=True):
        scores = (call.queries @ w_q.t()) @ (tokens @ w_k.t()).transpose(1, 2) / math.sqrt(len(w_k))
        weights = scores.masked_fill(~valid.unsqueeze(1), -torch.inf).softmax(2).nan_to_num(0.0)
        heads.append(weights @ (tokens @ w_v.t()))
    return torch.cat(heads, dim=2)


@pytest.mark.parametrize(("num_heads", "key_dim"), [(1, None), (2, None), (4, 3), (1, 5)])
def test_several_calls_on_gated_groups_equal_the_definition(num_heads: int, key_dim: int | None) -> None:
    torch.manual_seed(0)
    same, own = torch.randn(3, 8).double(), torch.randn(5, 4, 8).double()
    gates = [torch.rand(5, 8).double(), torch.rand(5, 8).double()]
    valid = torch.rand(5, 7) < 0.6
    valid[0] = False
    tokens = GatedTokens((same, own), valid).gated(gates[0]).gated(gates[1])
    calls = [
        Call(torch.randn(5, 2, 8).double(), *projections(8, num_heads, key_dim)),
        Call(torch.randn(1, 8).double(), *projections(8, num_heads, key_dim)),
    ]
    gated = torch.cat([same.expand(5, -1, -1), own], dim=1) * (gates[0] * gates[1]).unsqueeze(1)
    for call, got in zip(calls, cross_attention(calls, tokens), strict=True):
        everywhere = call._replace(queries=call.queries.expand(5, -1, -1))
        torch.testing.assert_close(got, written_out(everywhere, gated, valid))
        assert (got[0] == 0).all()
        assert (got[1:] != 0).all()


def test_a_cross_attention_equals_the_formula() -> None:
    torch.manual_seed(1)
    call = Call(torch.randn(2, 3, 8).double(), *projections(8, 2, 3))
    tokens, valid = torch.randn(2, 5, 8).double(), torch.tensor([[True] * 5, [False, True, True, False, False]])
    (got,) = cross_attention([call], GatedTokens((tokens,), valid))
    weights = [w.detach().numpy() for w in (call.query.weight, call.source.key, call.source.value)]
    for n in range(2):
        expected = reference.cross_attention(call.queries[n].numpy(), tokens[n][valid[n]].numpy(), *weights)
        np.testing.assert_allclose(got[n].detach(), expected, rtol=1e-10, atol=1e-12)


def test_the_gate_of_a_type_equals_the_formula() -> None:
    torch.manual_seed(2)
    gate, proxies = ProxyGate(3, 4, hidden=(5, 6), bias=0.3).double(), torch.randn(7, 3, 4).double()
    state = {f"g.{name}": tensor.numpy() for name, tensor in gate.state_dict().items()}
    expected = [reference.gate(one, state, "g") for one in proxies.numpy()]
    np.testing.assert_allclose(gate(proxies).detach(), expected, rtol=1e-12)


def test_gradients_reach_every_projection() -> None:
    torch.manual_seed(0)
    call = Call(torch.randn(2, 3, 4).double(), *projections(4, 2, None))
    tokens = torch.randn(2, 5, 4).double().requires_grad_()
    gate = torch.rand(2, 4).double().requires_grad_()
    weights = [call.query.weight, call.source.key, call.source.value]
    for weight in weights:
        weight.requires_grad_()

    def attended(tokens: Tensor, gate: Tensor, *_: Tensor) -> Tensor:
        return cross_attention([call], GatedTokens((tokens,), None, gate))[0]

    assert torch.autograd.gradcheck(attended, (tokens, gate, *weights))


def test_masked_softmax_by_hand() -> None:
    """exp(0) and exp(log 3) of two valid ones: 1/4 and 3/4; nothing valid: zeros, though scores are huge."""
    scores = torch.tensor([[[0.0, math.log(3.0), 1e30]], [[1e30, -1e30, 5.0]]])
    valid = torch.tensor([[True, True, False], [False, False, False]])
    torch.testing.assert_close(masked_softmax(scores, valid), torch.tensor([[[0.25, 0.75, 0.0]], [[0.0, 0.0, 0.0]]]))
    torch.testing.assert_close(masked_softmax(scores[:, :, :2], None)[0], torch.tensor([[0.25, 0.75]]))


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads must be a divisor of the tokens' width 8, got 3"):
        SourceProjection(8, num_heads=3)
    with pytest.raises(ConfigError, match="num_heads"):
        QueryProjection(8, num_heads=0)
