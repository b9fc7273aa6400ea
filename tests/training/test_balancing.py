from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys.errors import ConfigError
from training.balancing import (
    GradNorm,
    GradNormBalancing,
    NoBalancing,
    Uncertainty,
    UncertaintyBalancing,
    build_balance,
)


def test_uncertainty_is_its_formula() -> None:
    balance = Uncertainty(2)
    with torch.no_grad():
        balance.log_variance.copy_(torch.tensor([math.log(4.0), 0.0]))
    value = balance(torch.tensor([8.0, 3.0]), torch.tensor([10.0, 5.0]))
    torch.testing.assert_close(value, torch.tensor(8 / 4 + 10 / 2 * math.log(4.0) + 3.0))
    assert balance.current.tolist() == pytest.approx([0.25, 1.0])


def test_uncertainty_comes_to_rest_at_twice_the_mean_loss_of_the_rows_that_have_the_label() -> None:
    """A task without a label does not move, however many rows there are."""
    balance = Uncertainty(3)
    optimizer = torch.optim.SGD(balance.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        balance(torch.tensor([6.0, 0.9, 0.0]), torch.tensor([10.0, 3.0, 0.0])).backward()
        optimizer.step()
    torch.testing.assert_close(balance.log_variance.exp(), torch.tensor([1.2, 0.6, 1.0]), rtol=1e-4, atol=0)


def reference(
    w: Tensor, gradients: Tensor, losses: Tensor, first: Tensor, alpha: float, state: dict[str, Any], lr: float
) -> Tensor:
    """One step from the paper's algorithm, by autograd, where every task has labels; Adam by torch."""
    weights = state.setdefault("w", nn.Parameter(w.clone()))
    adam = state.setdefault("adam", torch.optim.Adam([weights], lr))
    norms = torch.stack([(weights[t] * g).norm() for t, g in enumerate(gradients)])
    ratio = losses / first
    target = (norms.mean() * (ratio / ratio.mean()) ** alpha).detach()
    adam.zero_grad()
    (norms - target).abs().sum().backward()
    adam.step()
    with torch.no_grad():
        weights.mul_(len(w) / weights.sum())
    return weights.detach().clone()


def test_gradnorm_takes_the_steps_of_the_paper() -> None:
    torch.manual_seed(0)
    shared = nn.Parameter(torch.randn(4))
    other = torch.randn(3, 4)
    balance = GradNorm(3, [shared], alpha=1.5, lr=0.05)
    counts = torch.tensor([10.0, 20.0, 5.0])
    state: dict[str, Any] = {}
    expected, first = torch.ones(3), None
    for step in range(5):
        scale = torch.tensor([1.0, 5.0, 0.3]) * (1 + 0.2 * step)
        sums = ((other @ shared).square() + 0.5 + 0.1 * step) * scale
        before = balance.current.clone()
        torch.testing.assert_close(before, expected)
        total = balance(sums, counts)
        torch.testing.assert_close(total, (before * sums).sum())
        total.backward()  # the graph is still there, and the weights are constants in it
        again = (other @ shared).square() * scale
        gradients = torch.stack([torch.autograd.grad(s, shared, retain_graph=True)[0] for s in again])
        losses = (sums / counts).detach()
        first = losses if first is None else first
        expected = reference(expected, gradients, losses, first, 1.5, state, 0.05)
    assert balance.current.sum().item() == pytest.approx(3.0)
    assert (balance.current[2] > balance.current[1]).item(), "the task that pulls least must gain"


def test_a_task_without_labels_is_left_out_of_gradnorm() -> None:
    shared = nn.Parameter(torch.ones(1))
    two, three = GradNorm(2, [shared], alpha=1.0, lr=0.1), GradNorm(3, [shared], alpha=1.0, lr=0.1)
    for _ in range(3):
        two((shared * torch.tensor([1.0, 4.0])).flatten(), torch.tensor([2.0, 2.0]))
        three((shared * torch.tensor([1.0, 4.0, 0.0])).flatten(), torch.tensor([2.0, 2.0, 0.0]))
    a, b = two.current, three.current
    torch.testing.assert_close(a[0] / a[1], b[0] / b[1], rtol=0.05, atol=0)
    assert b.sum().item() == pytest.approx(3.0)
    assert torch.isfinite(b).all()
    assert three.first.isnan().tolist() == [False, False, True]


def test_what_is_shared_must_be_in_the_network() -> None:
    parameters = {f"network.mlp.first.{name}": nn.Parameter(torch.ones(1)) for name in ("weight", "bias")}
    with pytest.raises(ConfigError, match=r"task_balancing.shared must name layers .* got 'mlp.frist'"):
        build_balance(GradNormBalancing(shared=("mlp.frist",)), 2, parameters)
    found = build_balance(GradNormBalancing(shared=("mlp.first",)), 2, parameters)
    assert isinstance(found, GradNorm)
    assert not list(found.parameters()), "the network's parameters are not the balance's own"
    assert build_balance(NoBalancing(), 2, parameters) is None
    assert isinstance(build_balance(UncertaintyBalancing(), 2, parameters), Uncertainty)
