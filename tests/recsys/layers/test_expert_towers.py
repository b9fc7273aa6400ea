"""Towers run as one stack equal each by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recsys.errors import ConfigError
from recsys.layers import ExpertTowers
from tests.references.layers import linear


@pytest.mark.parametrize("hidden", [[5], [4, 6]])
def test_every_tower_is_its_layers(hidden: list[int]) -> None:
    torch.manual_seed(0)
    layer, x = ExpertTowers(3, 4, hidden=hidden, output_size=2).double(), torch.randn(6, 3, dtype=torch.float64)
    for bias in layer.biases:
        torch.nn.init.normal_(bias)
    weights, biases = ([p.detach().numpy() for p in ps] for ps in (layer.weights, layer.biases))
    for n, row in enumerate(x.numpy()):
        for k in range(4):
            h = row
            for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                h = linear(np.maximum(h, 0) if number else h, weight[k].T, bias[k])
            np.testing.assert_allclose(layer(x)[n, k].detach(), h, rtol=1e-12, atol=1e-13)


def test_each_tower_is_drawn_as_a_layer_of_its_own() -> None:
    torch.manual_seed(0)
    layer = ExpertTowers(50, 8, hidden=[70], output_size=1)
    bound = (6 / (50 + 70)) ** 0.5
    assert layer.weights[0].abs().max().item() <= bound
    assert layer.weights[0].std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not torch.allclose(layer.weights[0][0], layer.weights[0][1])
    assert all((bias == 0).all() for bias in layer.biases)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"hidden": []}, "hidden must name at least one layer"),
        ({"hidden": [3, 0]}, "each at least 1 wide"),
    ],
)
def test_a_broken_argument_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertTowers(**{"input_size": 3, "num_experts": 2, "hidden": [4], "output_size": 1, **changes})
