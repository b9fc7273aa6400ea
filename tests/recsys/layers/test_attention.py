"""The attention layers equal the paper's form, hold its layout of the weights, and both code forms agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recsys.errors import ConfigError
from recsys.layers import ActivationUnit, SoftmaxTargetAttention, TargetAttention
from recsys.ops import softmax_target_attention, target_attention
from tests.references import attention as reference
from tests.references.layers import prelu

LAYERS = [(TargetAttention, target_attention), (SoftmaxTargetAttention, softmax_target_attention)]


@pytest.mark.parametrize(("layer", "op"), LAYERS)
def test_a_layer_is_its_op_with_its_weights(layer, op) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    attention = layer(3, 5, hidden=(4, 2), activation="prelu")
    query, keys, lengths = torch.randn(6, 3), torch.randn(2, 7, 5), torch.tensor([7, 2])
    of_row = torch.tensor([0, 0, 0, 1, 1, 1])
    unit = attention.unit
    expected = op(query, keys, lengths, of_row, unit.folded(), list(unit.activations))
    torch.testing.assert_close(attention(query, keys, lengths, of_row), expected)
    one = attention.single_request(query[3:], keys[1:], lengths[1:])
    torch.testing.assert_close(one, expected[3:])


@pytest.mark.parametrize("layer", [TargetAttention, SoftmaxTargetAttention])
@pytest.mark.parametrize("hidden", [(4,), (5, 3)])
def test_a_layer_equals_the_papers_form_in_float64(layer, hidden: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(2)
    attention = layer(3, 5, hidden=hidden, activation="prelu").double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    query, keys = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 6, 5, dtype=torch.float64)
    lengths, of_row = torch.tensor([6, 0, 3]), torch.tensor([0, 0, 1, 2, 2])
    state = {name: tensor.numpy() for name, tensor in attention.unit.state_dict().items()}
    names = ["first", *(f"hidden.{i}" for i in range(len(hidden) - 1)), "output"]
    expected = reference.target_attention(
        query.numpy(),
        keys.numpy(),
        lengths.tolist(),
        of_row.tolist(),
        [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names],
        lambda number, row: prelu(row, state[f"activations.{number}.alpha"]),
        with_softmax=layer is SoftmaxTargetAttention,
    )
    got = attention(query, keys, lengths, of_row).detach()
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    one = attention.single_request(query[3:], keys[2:], lengths[2:]).detach()
    np.testing.assert_allclose(one, expected[3:], rtol=1e-10, atol=1e-12)


def test_the_two_poolings_differ() -> None:
    torch.manual_seed(1)
    plain, soft = TargetAttention(3, 3, hidden=(4,)), SoftmaxTargetAttention(3, 3, hidden=(4,))
    soft.load_state_dict(plain.state_dict())
    inputs = torch.randn(2, 3), torch.randn(1, 5, 3), torch.tensor([5]), torch.tensor([0, 0])
    assert not torch.allclose(plain.eval()(*inputs), soft.eval()(*inputs))


def test_folding_by_hand() -> None:
    """D = 1, E = 1, H = 1 with w = [q: 2, k: 3, only the key's: 5, q - k: 7, q * k: 11]."""
    unit = ActivationUnit(1, 2, hidden=(1,))
    with torch.no_grad():
        unit.first.weight.copy_(torch.tensor([[2.0, 3.0, 5.0, 7.0, 11.0]]))
    folded = unit.folded()
    assert folded.query.tolist() == [[2 + 7]]
    assert folded.key.tolist() == [[3 - 7, 5]]
    assert folded.product.tolist() == [[11]]


@pytest.mark.parametrize(
    ("sizes", "hidden", "message"),
    [
        ((4, 3), (2,), "key_size must be at least query_size .* got 3 and 4"),
        ((0, 3), (2,), "key_size must be at least query_size"),
        ((4, 4), (), "hidden must name at least one layer"),
        ((4, 4), (3, 0), "hidden must name at least one layer, each at least 1 wide"),
    ],
)
def test_domains_are_checked(sizes: tuple[int, int], hidden: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActivationUnit(*sizes, hidden=hidden)
