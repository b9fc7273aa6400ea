"""Experts run as one stack equal each by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recsys.errors import ConfigError
from recsys.layers import Experts, ExpertsOfOwnInputs, ExpertTowers
from recsys.layers.experts import mixture
from tests.references import experts as reference
from tests.references.layers import linear


def drawn(layer: torch.nn.Module) -> torch.nn.Module:
    """In float64, biases too drawn at random."""
    torch.manual_seed(0)
    for parameter in layer.double().parameters():
        torch.nn.init.normal_(parameter)
    return layer


def block(weights: dict[str, np.ndarray], name: str, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """One expert's weight and bias out of a stack of ``count``."""
    weight, bias = (np.split(weights[f"{name}.{part}"], count)[number] for part in ("weight", "bias"))
    return weight, bias


@pytest.mark.parametrize("sizes", [[5], [4, 6, 2]])
@pytest.mark.parametrize("request_size", [0, 3])
def test_every_expert_is_its_layers(request_size: int, sizes: list[int]) -> None:
    experts = drawn(Experts(request_size, 4, 3, sizes, activation="relu"))
    request, rows = torch.randn(2, request_size, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    of_row = torch.tensor([0, 0, 1, 1, 1])
    weights = {name: tensor.numpy() for name, tensor in experts.state_dict().items()}
    got = experts(request, rows, of_row).detach()
    assert got.shape == (5, 3, sizes[-1])
    for n, k in np.ndindex(5, 3):
        x = np.concatenate([request[of_row[n]], rows[n]])
        expected = reference.expert(x, block(weights, "first", k, 3), weights, "rest", k)
        np.testing.assert_allclose(got[n, k], expected, rtol=1e-12, atol=1e-13)
    single = experts(request[:1], rows[:2], None).detach()
    torch.testing.assert_close(single, got[:2], rtol=1e-12, atol=1e-13)


def test_every_expert_of_a_group_reads_the_groups_input() -> None:
    groups = (2, 1, 3)
    experts = drawn(ExpertsOfOwnInputs(4, groups, [5, 2], activation="relu"))
    inputs = torch.randn(6, 3, 4, dtype=torch.float64)
    weights = {name: tensor.numpy() for name, tensor in experts.state_dict().items()}
    got, number = experts(inputs).detach(), 0
    for group, size in enumerate(groups):
        for own in range(size):
            for n, x in enumerate(inputs[:, group].numpy()):
                first = block(weights, f"first.{group}", own, size)
                expected = reference.expert(x, first, weights, "rest", number)
                np.testing.assert_allclose(got[n, number], expected, rtol=1e-12, atol=1e-13)
            number += 1
    assert got.shape == (6, number, 2)


def test_a_mixture_weighs_by_the_softmax_of_its_gate() -> None:
    """Shares of logits ln 1, ln 3 and ln 4 are 1/8, 3/8 and 4/8."""
    logits = torch.tensor([[[1.0, 3.0, 4.0], [1.0, 1.0, 2.0]]], dtype=torch.float64).log()
    experts = torch.tensor([[[8.0, 0.0], [0.0, 8.0], [1.0, 1.0]]], dtype=torch.float64)
    expected = torch.tensor([[[1.5, 3.5], [2.5, 2.5]]], dtype=torch.float64)
    torch.testing.assert_close(mixture(logits, experts), expected, rtol=1e-12, atol=1e-13)


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
