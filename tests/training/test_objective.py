from __future__ import annotations

import math

import torch

from recsys.models import TrainingOutput
from tests.synthetic import schema
from training.objective import Objective


def test_loss_is_weighted_cross_entropy_per_row_of_the_global_batch() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0], [math.nan, 1.0]])
    loss = Objective(schema(), {"like": 0.5})(logits, labels, 8)
    click = math.log(2)  # the second click is missing
    like = math.log(1 + math.e) + math.log(1 + math.e)
    torch.testing.assert_close(loss.item(), (click + 0.5 * like) / 8, rtol=1e-6, atol=0)


def test_the_parts_of_a_batch_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 2, generator=generator, dtype=torch.float64)
    labels = (torch.rand(10, 2, generator=generator) < 0.4).double()
    objective = Objective(schema(), {})
    parts = objective(logits[:3], labels[:3], 10) + objective(logits[3:], labels[3:], 10)
    torch.testing.assert_close(parts, objective(logits, labels, 10), rtol=1e-12, atol=0)


def test_a_batch_without_labels_has_loss_and_gradient_zero() -> None:
    logits = torch.tensor([[3.0, -4.0]], requires_grad=True)
    loss = Objective(schema(), {})(logits, torch.full((1, 2), math.nan), 5)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(1, 2))


def test_a_networks_own_losses_are_added() -> None:
    """By task they are weighted as the tasks are; a scalar is taken as it is; both are sums over rows."""
    objective = Objective(schema(), {"like": 3.0})
    logits, labels = torch.zeros(4, 2), torch.tensor([[1.0, 0.0]] * 4)
    plain = objective(logits, labels, 8).item()
    output = TrainingOutput(logits, {"by_task": torch.tensor([1.0, 2.0]), "scalar": torch.tensor(4.0)})
    assert math.isclose(objective(output, labels, 8).item(), plain + (1.0 + 3.0 * 2.0 + 4.0) / 8, rel_tol=1e-6)
