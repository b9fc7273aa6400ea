"""Dropout keeps the right share, independently, scales it, and lets gradients through exactly where it let values."""

from __future__ import annotations

import math

import pytest
import torch

from recsys.errors import ConfigError
from recsys.layers import Dropout


@pytest.mark.parametrize("p", [0.1, 0.4, 0.5, 0.9])
def test_the_share_of_zeros_is_p_and_the_rest_is_scaled(p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((501, 1001), 3.0)
    y = Dropout(p).train()(x)
    zeros = (y == 0).double()
    assert abs(zeros.mean().item() - p) < 5 * math.sqrt(p * (1 - p) / x.numel())
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 3.0 / (1 - p)), rtol=2e-4, atol=0)
    # Neighbours share a random word: they must be independent all the same.
    pairs = (zeros[:, 1:] * zeros[:, :-1]).mean().item()
    assert abs(pairs - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / x.numel()) + 2 * p * 1e-3


def test_gradients_pass_where_values_did() -> None:
    x = torch.randn(13, 7, requires_grad=True)
    y = Dropout(0.3).train()(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), y.detach())


def test_a_seed_decides_the_mask_and_calls_differ() -> None:
    layer, x = Dropout(0.5).train(), torch.ones(1000)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_eval_and_zero_return_the_input() -> None:
    x = torch.randn(4)
    assert Dropout(0.7).eval()(x) is x
    assert Dropout(0.0).train()(x) is x
    assert Dropout(0.5).train()(torch.zeros(0, 3)).shape == (0, 3)


def test_a_share_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dropout must be in \[0, 1\), got 1"):
        Dropout(1.0)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_relu_is_dropout_after_relu(p: float, training: bool) -> None:
    layer = Dropout(p).train(training)
    results = []
    for function in (lambda x: layer(torch.relu(x)), lambda x: layer.of_relu(x * 1.0)):
        x = torch.randn(257, 33, generator=torch.Generator().manual_seed(3)).requires_grad_()
        torch.manual_seed(5)
        y = function(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0])
    assert (results[0][0] != 0).any()
