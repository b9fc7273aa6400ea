"""Batch normalisation is over rows, by torch's kernel and by moments alike; RMS norm is of each vector by itself."""

from __future__ import annotations

import copy

import numpy as np
import torch

from recsys.layers import RMSNorm, RowBatchNorm, masked_moments
from tests.references import interactions as reference
from tests.references import suan
from tests.references.layers import moments


def filled() -> RowBatchNorm:
    layer = RowBatchNorm(3).double()
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            tensor.copy_(torch.rand(3) + (0.5 if name == "running_var" else 0.0))
    return layer


def test_training_and_eval_equal_the_formula() -> None:
    torch.manual_seed(0)
    layer, x = filled(), torch.randn(7, 3, dtype=torch.float64) * 3 + 1
    before = {name: t.clone().numpy() for name, t in layer.state_dict().items()}
    mean, var, _ = moments(x.numpy(), [True] * 7)
    got = layer.train()(x).detach().numpy()
    for n in range(7):
        expected = reference.batch_norm(x[n].numpy(), before["weight"], before["bias"], mean, var)
        np.testing.assert_allclose(got[n], expected, rtol=1e-10)
    np.testing.assert_allclose(layer.running_mean, 0.9 * before["running_mean"] + 0.1 * mean)
    np.testing.assert_allclose(layer.running_var, 0.9 * before["running_var"] + 0.1 * var * 7 / 6)
    state = [t.numpy() for t in (layer.weight.detach(), layer.bias.detach(), layer.running_mean, layer.running_var)]
    np.testing.assert_allclose(
        layer.eval()(x[:1]).detach().numpy()[0], reference.batch_norm(x[0].numpy(), *state), rtol=1e-10
    )


def test_by_moments_it_is_the_same_gradients_included() -> None:
    torch.manual_seed(1)
    one = filled().train()
    other = copy.deepcopy(one)
    other.moments = masked_moments
    for rows in (6, 1, 4):
        x = torch.randn(rows, 3, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(i) for layer, i in zip((one, other), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.pow(3).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor)
    torch.testing.assert_close(one.weight.grad, other.weight.grad)


def test_one_row_is_normalised_by_the_moving_averages_and_leaves_them() -> None:
    layer = filled()
    x = torch.randn(1, 3, dtype=torch.float64)
    expected = layer.eval()(x)
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(layer.train()(x), expected)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_rms_norm_equals_its_formula_and_does_not_see_scale() -> None:
    norm = RMSNorm(5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(5))
    x = torch.randn(4, 5, dtype=torch.float64)
    gamma = norm.weight.detach().numpy()
    for scale in (1.0, 1e-7, 1e6):
        wanted = [suan.rms_norm(row, gamma) for row in (x * scale).numpy()]
        np.testing.assert_allclose(norm(x * scale).detach(), wanted, rtol=1e-12)
    torch.testing.assert_close(norm(x * 1e6), norm(x * 1e9), rtol=1e-10, atol=0)


def test_rms_norm_of_a_zero_vector_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    out = RMSNorm(3)(x)
    assert (out == 0).all()
    out.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
