"""Dice and PReLU agree with their formulas; Dice counts real positions only and treats rows alone in eval."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.layers import ACTIVATIONS, Dice, Moments, PReLU, build_activation, masked_moments
from tests.references import layers as reference


def random_dice(channels: int) -> Dice:
    layer = Dice(channels).double()
    with torch.no_grad():
        layer.alpha.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return layer


def test_dice_in_eval_is_the_formula() -> None:
    torch.manual_seed(0)
    layer, x = random_dice(4).eval(), torch.randn(20, 4, dtype=torch.float64)
    parameters = [t.detach().numpy() for t in (layer.alpha, layer.running_mean, layer.running_var)]
    expected = np.stack([reference.dice(row, *parameters) for row in x.numpy()])
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-12, atol=1e-12)


def test_dice_in_training_uses_the_statistics_of_valid_rows() -> None:
    torch.manual_seed(1)
    layer, x = random_dice(3), torch.randn(30, 3, dtype=torch.float64)
    valid = torch.rand(30) < 0.4
    mean, var, count = reference.moments(x.numpy(), valid.tolist())
    before = copy.deepcopy(layer)
    expected = np.stack([reference.dice(row, layer.alpha.detach().numpy(), mean, var) for row in x.numpy()])
    np.testing.assert_allclose(layer(x, valid).detach(), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(layer.running_mean, 0.9 * before.running_mean.numpy() + 0.1 * mean, rtol=1e-12)
    unbiased = var * count / (count - 1)
    np.testing.assert_allclose(layer.running_var, 0.9 * before.running_var.numpy() + 0.1 * unbiased, rtol=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_dice_learns_no_moving_averages_from_what_has_no_variance(count: int) -> None:
    layer, x = random_dice(3), torch.randn(5, 3, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    assert layer(x, torch.arange(5) < count).isfinite().all()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_dice_keeps_the_moving_averages_of_batch_normalisation() -> None:
    torch.manual_seed(2)
    layer, norm = Dice(3, momentum=0.3), nn.BatchNorm1d(3, eps=1e-8, momentum=0.3, affine=False)
    for _ in range(5):
        x = torch.randn(16, 3) * 4 + 2
        p = torch.sigmoid(norm(x))
        torch.testing.assert_close(layer(x), p * x, rtol=1e-5, atol=1e-5)  # alpha is 0
    torch.testing.assert_close(layer.running_mean, norm.running_mean)
    torch.testing.assert_close(layer.running_var, norm.running_var)


def test_dice_with_alpha_one_is_the_identity() -> None:
    layer, x = random_dice(5), torch.randn(12, 5, dtype=torch.float64)
    nn.init.ones_(layer.alpha)
    torch.testing.assert_close(layer(x), x)
    torch.testing.assert_close(layer.eval()(x), x)


def test_dice_of_a_narrow_distribution_around_zero_is_prelu() -> None:
    """As E = 0 and Var -> 0, the gate becomes a step: inputs a thousand deviations away are on one side of it."""
    dice, prelu = Dice(4).double().eval(), PReLU(4).double()
    with torch.no_grad():
        dice.running_var.fill_(1e-6)
        dice.alpha.copy_(torch.tensor([0.0, 0.25, -0.5, 1.5]))
        prelu.alpha.copy_(dice.alpha)
    x = torch.randn(50, 4, dtype=torch.float64)
    x = torch.where(x.abs() < 0.1, torch.sign(x), x)
    torch.testing.assert_close(dice(x), prelu(x), rtol=1e-12, atol=1e-12)


def test_prelu_is_the_formula() -> None:
    layer, x = PReLU(3).double(), torch.randn(20, 3, dtype=torch.float64)
    assert layer.alpha.tolist() == [0.25] * 3
    nn.init.normal_(layer.alpha)
    expected = np.stack([reference.prelu(row, layer.alpha.detach().numpy()) for row in x.numpy()])
    np.testing.assert_allclose(layer(x).detach(), expected)


def test_dice_by_hand() -> None:
    """Rows 1 and 3: mean 2, variance 1; p(3) = sigmoid(1), so f(3) = 3 (sigmoid(1) + 0.5 (1 - sigmoid(1)))."""
    layer = Dice(1, eps=0.0)
    nn.init.constant_(layer.alpha, 0.5)
    p = 1 / (1 + math.exp(-1))
    got = layer(torch.tensor([[1.0], [3.0], [100.0]]), torch.tensor([True, True, False]))
    assert got[1].item() == pytest.approx(3 * (p + 0.5 * (1 - p)), abs=1e-6)
    assert layer.running_mean.item() == pytest.approx(0.1 * 2)
    assert layer.running_var.item() == pytest.approx(0.9 + 0.1 * 2)  # unbiased: (1 + 1) / (2 - 1)


def test_padding_moves_nothing() -> None:
    torch.manual_seed(3)
    x, valid = torch.randn(10, 2), torch.tensor([True] * 6 + [False] * 4)
    garbage = torch.where(valid.unsqueeze(1), x, 1e6)
    one, other = Dice(2), Dice(2)
    out = one(x, valid)[:6]
    torch.testing.assert_close(other(garbage, valid)[:6], out)
    torch.testing.assert_close(Dice(2)(x[:6]), out)
    torch.testing.assert_close(one.running_mean, other.running_mean)
    torch.testing.assert_close(one.running_var, other.running_var)


def test_without_a_valid_position_nothing_is_learnt() -> None:
    layer, x = random_dice(3), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(x, torch.zeros(4, dtype=torch.bool)).sum().backward()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_one_position_has_no_variance_and_stays_finite() -> None:
    layer, x = Dice(3), torch.randn(1, 3, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, 0.5 * x)
    out.sum().backward()
    assert all(torch.isfinite(t).all() for t in (x.grad, layer.running_mean, layer.running_var))


def test_in_eval_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(4)
    layer, x = random_dice(6).eval(), torch.randn(9, 6, dtype=torch.float64)
    before = layer.running_mean.clone()
    torch.testing.assert_close(torch.cat([layer(row.unsqueeze(0)) for row in x]), layer(x), rtol=1e-14, atol=1e-15)
    assert torch.equal(layer.running_mean, before)


def test_moments_of_several_ranks_can_be_put_in() -> None:
    """Halves of a batch whose statistics are put together give the whole batch's output and moving averages."""
    torch.manual_seed(5)
    x, valid = torch.randn(20, 3, dtype=torch.float64), torch.rand(20) < 0.6
    whole, half = random_dice(3), Dice(3).double()
    half.load_state_dict(whole.state_dict())
    together = masked_moments(x, valid)
    seen: list[tuple[Tensor, Tensor | None]] = []

    def moments(part: Tensor, part_valid: Tensor | None) -> Moments:
        seen.append((part, part_valid))
        return together

    half.moments = moments
    torch.testing.assert_close(half(x[:10], valid[:10]), whole(x, valid)[:10])
    torch.testing.assert_close(half.running_mean, whole.running_mean)
    torch.testing.assert_close(half.running_var, whole.running_var)
    assert torch.equal(seen[0][0], x[:10])


@pytest.mark.parametrize("with_mask", [False, True])
def test_masked_moments_are_their_definition(with_mask: bool) -> None:
    torch.manual_seed(6)
    x, valid = torch.randn(25, 4, dtype=torch.float64) * 3 + 100, torch.rand(25) < 0.5
    mean, var, count = reference.moments(x.numpy(), valid.tolist() if with_mask else [True] * 25)
    got = masked_moments(x, valid if with_mask else None)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(got.var, var, rtol=1e-10)
    assert int(got.num_positions) == count


def test_variance_survives_a_large_mean_in_single_precision() -> None:
    torch.manual_seed(7)
    x = torch.randn(4096, 1) + 1000
    assert masked_moments(x, None).var.item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-3)


def test_gradients_pass_through_the_statistics() -> None:
    torch.manual_seed(8)
    layer, x = random_dice(2), torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([True, True, False, True, True, False, True])
    assert torch.autograd.gradcheck(lambda x, alpha: _with_alpha(layer, alpha, x, valid), (x, layer.alpha))


def _with_alpha(layer: Dice, alpha: Tensor, x: Tensor, valid: Tensor) -> Tensor:
    return torch.func.functional_call(layer, {"alpha": alpha}, (x, valid))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_activation_is_built_by_name(name: str) -> None:
    x = torch.randn(6, 3)
    assert build_activation(name, 3)(x, torch.ones(6, dtype=torch.bool)).shape == (6, 3)  # type: ignore[arg-type]


def test_plain_activations() -> None:
    x = torch.tensor([[-1.0, 0.0, 2.0]])
    assert build_activation("relu", 3)(x).tolist() == [[0.0, 0.0, 2.0]]
    x = x.double()
    torch.testing.assert_close(build_activation("sigmoid", 3)(x), 1 / (1 + torch.exp(-x)), rtol=1e-12, atol=0)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ConfigError, match="activation must be one of dice, prelu, sigmoid, relu, got 'gelu'"):
        build_activation("gelu", 3)  # type: ignore[arg-type]
