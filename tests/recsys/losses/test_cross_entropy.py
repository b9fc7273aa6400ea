"""Binary cross-entropy agrees with its definition, ignores missing labels, and stays finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recsys.losses import binary_cross_entropy, mean_binary_cross_entropy
from tests.references import losses as reference


def random_rows(seed: int = 0, rows: int = 20, tasks: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (rows, tasks)).astype(np.float64)
    labels[generator.random((rows, tasks)) < 0.3] = np.nan
    return torch.from_numpy(generator.normal(size=(rows, tasks)) * 3), torch.from_numpy(labels)


def test_sums_and_counts_are_their_definition() -> None:
    logits, labels = random_rows()
    got = binary_cross_entropy(logits, labels)
    for task in range(3):
        total, count = reference.binary_cross_entropy(logits[:, task].tolist(), labels[:, task].tolist())
        assert got.total[task].item() == pytest.approx(total, rel=1e-12)
        assert got.num_labelled[task].item() == count


def test_by_hand() -> None:
    got = binary_cross_entropy(torch.zeros(3, 1), torch.tensor([[1.0], [0.0], [math.nan]]))
    assert got.total.item() == pytest.approx(2 * math.log(2), abs=1e-6)
    assert got.num_labelled.item() == 2


def test_gradients() -> None:
    logits, labels = random_rows(rows=5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: binary_cross_entropy(z, labels).total, logits)
    assert torch.autograd.gradcheck(lambda z: mean_binary_cross_entropy(z, labels), logits)
    assert torch.autograd.gradgradcheck(lambda z: binary_cross_entropy(z, labels).total, logits)


def test_the_gradient_is_probability_less_label() -> None:
    logits, labels = random_rows(seed=1)
    logits.requires_grad_()
    binary_cross_entropy(logits, labels).total.sum().backward()
    expected = torch.where(labels.isnan(), 0.0, torch.sigmoid(logits.detach()) - labels)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_exact_and_their_gradients_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4], [-1e4], [1e4], [-1e4]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1.0], [0.0], [0.0], [1.0]], dtype=dtype)
    total = binary_cross_entropy(logits, labels).total
    assert total.item() == 2e4
    total.sum().backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == [0.0, 0.0, 1.0, -1.0]


def test_a_missing_label_stops_whatever_the_logit_is() -> None:
    logits = torch.tensor([[math.nan], [math.inf], [0.5]], requires_grad=True)
    labels = torch.tensor([[math.nan], [math.nan], [1.0]])
    loss = mean_binary_cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)), abs=1e-6)
    assert logits.grad is not None
    assert logits.grad[:2].flatten().tolist() == [0.0, 0.0]


def test_ranks_that_divide_by_the_rows_of_all_add_up_to_one_process() -> None:
    logits, labels = random_rows(seed=2, rows=30)
    count = binary_cross_entropy(logits, labels).num_labelled
    parts = [
        mean_binary_cross_entropy(logits[part], labels[part], normaliser=count)
        for part in (slice(0, 4), slice(4, 19), slice(19, 30))
    ]
    torch.testing.assert_close(sum(parts), mean_binary_cross_entropy(logits, labels))


def test_a_task_without_labels_costs_nothing() -> None:
    logits, labels = torch.zeros(4, 2, requires_grad=True), torch.ones(4, 2)
    labels[:, 1] = math.nan
    loss = mean_binary_cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[:, 1] == 0).all()
    assert mean_binary_cross_entropy(torch.zeros(0, 2), torch.zeros(0, 2)).item() == 0.0


def test_tasks_are_weighted() -> None:
    logits, labels = torch.zeros(4, 2), torch.ones(4, 2)
    weighted = mean_binary_cross_entropy(logits, labels, task_weights=torch.tensor([1.0, 0.5]))
    assert weighted.item() == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_soft_labels_are_mixtures() -> None:
    logits = torch.tensor([[0.7]], dtype=torch.float64)
    of = {
        y: binary_cross_entropy(logits, torch.tensor([[y]], dtype=torch.float64)).total.item() for y in (0.0, 0.3, 1.0)
    }
    assert of[0.3] == pytest.approx(0.3 * of[1.0] + 0.7 * of[0.0], abs=1e-12)
