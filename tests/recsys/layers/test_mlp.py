"""Stacks equal their rows one by one; what a request shares is computed once and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recsys.errors import ConfigError
from recsys.layers import MLP, JoinedLinear, JoinedMLP, TaskTowers
from tests.references import layers as reference


def test_an_mlp_is_its_layers() -> None:
    torch.manual_seed(0)
    mlp, x = MLP(3, [5, 2], activation="prelu").double().eval(), torch.randn(6, 3, dtype=torch.float64)
    state = {name: tensor.numpy() for name, tensor in mlp.state_dict().items()}
    expected = []
    for row in x.numpy():
        for layer in range(2):
            row = reference.linear(row, state[f"linears.{layer}.weight"], state[f"linears.{layer}.bias"])
            row = reference.prelu(row, state[f"after.{layer}.activation.alpha"])
        expected.append(row)
    np.testing.assert_allclose(mlp(x).detach(), np.stack(expected), rtol=1e-12, atol=1e-13)


def test_every_task_has_a_tower_of_its_own() -> None:
    torch.manual_seed(2)
    towers = TaskTowers(3, [5, 4], 2, activation="relu").double()
    inputs = torch.randn(2, 6, 3, dtype=torch.float64)
    state = {name: tensor.numpy() for name, tensor in towers.state_dict().items()}
    got = towers(inputs.unbind(0)).detach()
    for task in range(2):
        for n, row in enumerate(inputs[task].numpy()):
            for layer in ("0.linears.0", "0.linears.1"):
                row = reference.linear(row, state[f"{task}.{layer}.weight"], state[f"{task}.{layer}.bias"])
                row = np.maximum(row, 0.0)
            (expected,) = reference.linear(row, state[f"{task}.1.weight"], state[f"{task}.1.bias"])
            assert got[n, task].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("request_size", "sizes"), [(3, [5]), (3, [5, 2]), (0, [5, 2])])
def test_a_joined_mlp_is_an_mlp_on_the_joined_input(request_size: int, sizes: list[int]) -> None:
    torch.manual_seed(1)
    joined = JoinedMLP(request_size, 4, sizes, activation="dice").double().eval()
    plain = MLP(request_size + 4, sizes, activation="dice").double().eval()
    with torch.no_grad():
        plain.linears[0].weight.copy_(joined.first.weight)
        plain.linears[0].bias.copy_(joined.first.bias)
        for mine, theirs in zip(plain.linears[1:], getattr(joined.rest, "linears", []), strict=True):
            mine.load_state_dict(theirs.state_dict())
    request, rows = torch.randn(2, request_size, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    of_row = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    expected = plain(torch.cat([request[of_row], rows], dim=1))
    torch.testing.assert_close(joined(request, rows, of_row), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joined.single_request(request[:1], rows[:3]), expected[:3], rtol=1e-12, atol=1e-12)


def test_the_requests_part_is_multiplied_once_a_request() -> None:
    layer = JoinedLinear(64, 2, 3)
    request, rows, of_row = torch.randn(2, 64), torch.randn(500, 2), torch.arange(500) // 250
    with FlopCounterMode(display=False) as counter:
        layer(request, rows, of_row)
    assert counter.get_total_flops() == 2 * 3 * (2 * 64 + 500 * 2)


def test_dropout_is_off_in_eval_and_scales_in_training() -> None:
    torch.manual_seed(2)
    mlp, x = MLP(4, [1000], activation="relu", dropout=0.25), torch.rand(1, 4)
    full = mlp.eval()(x)
    dropped = mlp.train()(x)
    kept = (dropped != 0) | (full == 0)
    torch.testing.assert_close(dropped[kept], full[kept] / 0.75)
    active = full[0] > 0
    assert (dropped[0][active] == 0).float().mean().item() == pytest.approx(0.25, abs=0.06)


def test_a_norm_stands_between_the_linear_layer_and_its_activation() -> None:
    mlp = MLP(4, [8], activation="relu", norm=nn.LayerNorm).eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(mlp(x), torch.relu(nn.functional.layer_norm(mlp.linears[0](x), [8])))


@pytest.mark.parametrize("build", [lambda **k: MLP(3, **k), lambda **k: JoinedMLP(3, 3, **k)])
def test_domains_are_checked(build) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=r"sizes must name at least one layer, each at least 1 wide, got \(\)"):
        build(sizes=[], activation="relu")
    with pytest.raises(ConfigError, match=r"dropout must be in \[0, 1\), got 1.0"):
        build(sizes=[3], activation="relu", dropout=1.0)
