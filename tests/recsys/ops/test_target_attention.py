"""The folded op equals the unit as the paper draws it, in both code forms, with gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from recsys.layers import ActivationUnit
from recsys.ops import (
    softmax_target_attention,
    softmax_target_attention_single_request,
    target_attention,
    target_attention_single_request,
)
from tests.references import attention as reference
from tests.references import layers as reference_layers

Op = Callable[..., Tensor]
OPS = {False: target_attention, True: softmax_target_attention}
SINGLE = {False: target_attention_single_request, True: softmax_target_attention_single_request}


def unit_and_inputs(
    *, hidden: tuple[int, ...] = (5,), event_size: int = 0, activation: str = "dice", requests: int = 3, seed: int = 0
) -> tuple[ActivationUnit, Tensor, Tensor, Tensor, Tensor]:
    """A unit in eval with every number drawn at random, and inputs whose padding is drawn at random too."""
    torch.manual_seed(seed)
    unit = ActivationUnit(4, 4 + event_size, hidden=hidden, activation=activation).double().eval()  # type: ignore[arg-type]
    for name, tensor in unit.state_dict().items():
        tensor.copy_(torch.rand_like(tensor) + 0.5 if name.endswith("var") else torch.randn_like(tensor))
    request_of_row = torch.arange(requests).repeat_interleave(torch.arange(requests) + 2)
    query = torch.randn(len(request_of_row), 4, dtype=torch.float64)
    keys = torch.randn(requests, 6, 4 + event_size, dtype=torch.float64)
    lengths = torch.tensor([6, 0, 3, 1, 5])[:requests]
    return unit, query, keys, lengths, request_of_row


def expected(
    unit: ActivationUnit, query: Tensor, keys: Tensor, lengths: Tensor, request_of_row: Tensor, softmax: bool
) -> np.ndarray:
    state = {name: tensor.numpy() for name, tensor in unit.state_dict().items()}
    names = ["first", *(f"hidden.{i}" for i in range(len(unit.hidden))), "output"]

    def activation(number: int, row: np.ndarray) -> np.ndarray:
        prefix = f"activations.{number}"
        if f"{prefix}.running_mean" in state:
            parameters = [state[f"{prefix}.{name}"] for name in ("alpha", "running_mean", "running_var")]
            return reference_layers.dice(row, *parameters)
        if f"{prefix}.alpha" in state:
            return reference_layers.prelu(row, state[f"{prefix}.alpha"])
        return np.array([reference_layers.sigmoid(x) for x in row])

    return reference.target_attention(
        query.numpy(),
        keys.numpy(),
        lengths.tolist(),
        request_of_row.tolist(),
        [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names],
        activation,
        with_softmax=softmax,
    )


@pytest.mark.parametrize(
    ("activation", "hidden", "event_size", "softmax"),
    [*itertools.product(["dice", "prelu", "sigmoid"], [(5,), (5, 3, 2)], [0, 2], [False, True])],
)
def test_folded_equals_the_papers_form(
    activation: str, hidden: tuple[int, ...], event_size: int, softmax: bool
) -> None:
    unit, *inputs = unit_and_inputs(activation=activation, hidden=hidden, event_size=event_size, requests=4)
    got = OPS[softmax](*inputs, unit.folded(), list(unit.activations))
    np.testing.assert_allclose(got.detach(), expected(unit, *inputs, softmax=softmax), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("length", "softmax"), [*itertools.product([0, 1, 6], [False, True])])
def test_the_form_of_one_request_equals_that_of_many(length: int, softmax: bool) -> None:
    unit, query, keys, _, _ = unit_and_inputs(hidden=(5, 3), event_size=2)
    lengths, of_row = torch.tensor([length]), torch.zeros(len(query), dtype=torch.int64)
    one = SINGLE[softmax](query, keys[:1], lengths, unit.folded(), list(unit.activations))
    many = OPS[softmax](query, keys[:1], lengths, of_row, unit.folded(), list(unit.activations))
    torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        one.detach(), expected(unit, query, keys[:1], lengths, of_row, softmax), rtol=1e-10, atol=1e-11
    )


def test_by_hand_a_unit_that_multiplies() -> None:
    """A unit that outputs relu(q . k), as w1 = [0; 0; 0; 1 1] on the product part."""
    unit = ActivationUnit(2, 2, hidden=(1,), activation="relu").eval()
    with torch.no_grad():
        unit.first.weight.copy_(torch.tensor([[0.0, 0, 0, 0, 0, 0, 1, 1]]))
        unit.output.weight.fill_(1.0)
        unit.first.bias.zero_()
        unit.output.bias.zero_()
    query = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    keys = torch.tensor([[[3.0, 1.0], [1.0, 0.0], [9.0, 9.0]]])
    got = target_attention(query, keys, torch.tensor([2]), torch.tensor([0, 0]), unit.folded(), list(unit.activations))
    # q1: weights 5 and 1, so 5 (3, 1) + 1 (1, 0); q2: both products are negative.
    assert got.tolist() == [[16.0, 5.0], [0.0, 0.0]]


@pytest.mark.parametrize("softmax", [False, True])
def test_an_empty_history_gives_zeros_and_finite_gradients(softmax: bool) -> None:
    unit, query, keys, _, of_row = unit_and_inputs()
    query.requires_grad_()
    got = OPS[softmax](query, keys, torch.zeros(3, dtype=torch.int64), of_row, unit.folded(), list(unit.activations))
    assert (got == 0).all()
    got.sum().backward()
    assert query.grad is not None
    assert (query.grad == 0).all()


@pytest.mark.parametrize("softmax", [False, True])
def test_what_is_padding_has_no_effect(softmax: bool) -> None:
    unit, query, keys, lengths, of_row = unit_and_inputs(event_size=2)
    run = lambda k: OPS[softmax](query, k, lengths, of_row, unit.folded(), list(unit.activations))  # noqa: E731
    other = keys.clone()
    for request, length in enumerate(lengths.tolist()):
        other[request, length:] = 1e6
    longer = torch.cat([other, torch.full((3, 7, 6), -1e6, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(run(other), run(keys), rtol=0, atol=0)
    torch.testing.assert_close(run(longer), run(keys), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softmax", [False, True])
def test_the_order_of_events_has_no_effect(softmax: bool) -> None:
    unit, query, keys, _, of_row = unit_and_inputs()
    full = torch.full((3,), 6)
    run = lambda k: OPS[softmax](query, k, full, of_row, unit.folded(), list(unit.activations))  # noqa: E731
    torch.testing.assert_close(run(keys[:, torch.tensor([3, 0, 5, 1, 4, 2])]), run(keys), rtol=1e-12, atol=1e-12)


def test_an_event_twice_counts_twice_and_a_softmax_forgets_how_often() -> None:
    unit, query, keys, _, of_row = unit_and_inputs()
    once, twice = keys[:, :1], keys[:, :1].repeat(1, 2, 1)
    one, two = torch.ones(3, dtype=torch.int64), torch.full((3,), 2)

    def run(op: Op, k: Tensor, n: Tensor) -> Tensor:
        return op(query, k, n, of_row, unit.folded(), list(unit.activations))

    torch.testing.assert_close(run(target_attention, twice, two), 2 * run(target_attention, once, one))
    torch.testing.assert_close(run(softmax_target_attention, twice, two), run(softmax_target_attention, once, one))
    assert (run(target_attention, once, one).abs().sum(1) > 0).all()


@pytest.mark.parametrize("softmax", [False, True])
def test_gradients(softmax: bool) -> None:
    unit, query, keys, lengths, of_row = unit_and_inputs(hidden=(3, 2), event_size=1, requests=2)
    names = [name for name, _ in unit.named_parameters()]

    def run(q: Tensor, k: Tensor, *parameters: Tensor) -> Tensor:
        changed = dict(zip(names, parameters, strict=True))
        weights = torch.func.functional_call(_Folded(unit), {f"unit.{n}": p for n, p in changed.items()}, ())
        return OPS[softmax](q, k, lengths, of_row, weights, list(unit.activations))

    leaves = [t.detach().clone().requires_grad_() for t in (query, keys, *unit.parameters())]
    # A softmax does not see a constant added to every score.
    assert torch.autograd.gradcheck(run, leaves)


class _Folded(nn.Module):
    def __init__(self, unit: ActivationUnit) -> None:
        super().__init__()
        self.unit = unit

    def forward(self) -> object:
        return self.unit.folded()


@pytest.mark.parametrize("softmax", [False, True])
def test_folded_gradients_equal_those_of_the_unfolded_form(softmax: bool) -> None:
    unit, query, keys, lengths, of_row = unit_and_inputs(hidden=(5, 3))
    unit.train()
    leaves = [query.requires_grad_(), keys.requires_grad_(), *unit.parameters()]
    seed = torch.randn(len(query), keys.shape[2], dtype=torch.float64)
    valid = torch.arange(6) < lengths[of_row].unsqueeze(1)

    def naive() -> Tensor:
        k = keys[of_row]
        q = query.unsqueeze(1).expand_as(k)
        hidden = unit.first(torch.cat([q, k, q - k, q * k], dim=2)).flatten(0, 1)
        for layer, activation in itertools.zip_longest(unit.hidden, list(unit.activations)):
            hidden = activation(hidden, valid.flatten())
            hidden = hidden if layer is None else layer(hidden)
        scores = unit.output(hidden).view(valid.shape)
        if softmax:
            weights = (scores / k.shape[2] ** 0.5).masked_fill(~valid, -1e30).softmax(1) * valid
        else:
            weights = scores * valid
        return (weights.unsqueeze(2) * k).sum(1)

    def folded() -> Tensor:
        return OPS[softmax](query, keys, lengths, of_row, unit.folded(), list(unit.activations))

    torch.testing.assert_close(folded(), naive(), rtol=1e-9, atol=1e-11)
    # Both are run in training mode: Dice's statistics are of real pairs only, and gradients pass through them.
    for ours, theirs in zip(
        torch.autograd.grad(folded(), leaves, seed), torch.autograd.grad(naive(), leaves, seed), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_nothing_as_large_as_pairs_times_four_widths_is_ever_made() -> None:
    """N = 64, L = 32, D = 16, H = 4: the unfolded input alone would be N x L x 4D numbers."""
    unit = ActivationUnit(16, 16, hidden=(4,), activation="prelu").eval()
    query, keys = torch.randn(64, 16), torch.randn(1, 32, 16)
    largest = _LargestTensor()
    with largest, torch.no_grad():
        target_attention_single_request(query, keys, torch.tensor([32]), unit.folded(), list(unit.activations))
    assert largest.numel == 64 * 32 * 4  # the hidden layer, and no copy of the history
    with largest, torch.no_grad():
        of_row = torch.zeros(64, dtype=torch.int64)
        target_attention(query, keys, torch.tensor([32]), of_row, unit.folded(), list(unit.activations))
    assert largest.numel == 64 * 32 * 16  # keys gathered to rows


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


class _Op(nn.Module):
    def __init__(self, unit: ActivationUnit, op: Op) -> None:
        super().__init__()
        self.unit, self.op = unit, op

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.op(*tensors, self.unit.folded(), list(self.unit.activations))


@pytest.mark.parametrize("softmax", [False, True])
def test_both_forms_export_whole_with_any_sizes(softmax: bool) -> None:
    unit, query, keys, lengths, of_row = unit_and_inputs(hidden=(5, 3), event_size=2)
    n, r, length = Dim("n"), Dim("r"), Dim("length")
    with torch.no_grad():
        many = export(
            _Op(unit, OPS[softmax]),
            (query, keys, lengths, of_row),
            dynamic_shapes={"tensors": ({0: n}, {0: r, 1: length}, {0: r}, {0: n})},
        ).module()
        single = export(
            _Op(unit, SINGLE[softmax]),
            (query, keys[:1], lengths[:1]),
            dynamic_shapes={"tensors": ({0: n}, {1: length}, {})},
        ).module()
        for requests, rows, events in ((1, 1, 1), (1, 5, 2), (4, 9, 3)):
            q = torch.randn(rows, 4, dtype=torch.float64)
            k = torch.randn(requests, events, 6, dtype=torch.float64)
            lens, of = torch.randint(0, events + 1, (requests,)), torch.randint(0, requests, (rows,)).sort().values
            eager = OPS[softmax](q, k, lens, of, unit.folded(), list(unit.activations))
            torch.testing.assert_close(many(q, k, lens, of), eager, rtol=1e-12, atol=1e-12)
            if requests == 1:
                torch.testing.assert_close(single(q, k, lens), eager, rtol=1e-12, atol=1e-12)


def test_single_precision_is_as_exact_as_the_plain_form() -> None:
    unit, *inputs = unit_and_inputs(hidden=(16, 8), requests=5)
    exact = expected(unit, *inputs, softmax=False)
    query, keys, lengths, of_row = inputs
    single = unit.float()
    ours = target_attention(query.float(), keys.float(), lengths, of_row, single.folded(), list(single.activations))
    assert np.abs(ours.detach().numpy() - exact).max() <= 2e-6 * np.abs(exact).max()
