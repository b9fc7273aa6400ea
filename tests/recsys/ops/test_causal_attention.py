"""Blocks and classes give what a mask over all pairs gives, gradients included."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.ops.causal_attention import (
    Sparsity,
    candidate_attention,
    causal_attention,
    dense_offsets,
    dilated_offsets,
    local_dilated_attention,
    local_offsets,
    split_attention,
    token_attention,
)
from tests.references import suan as reference


def inputs(length: int, *, requests: int = 2, heads: int = 2, width: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (requests, heads, length, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def of_place(length: int, seed: int = 5) -> Tensor:
    """A bias of each offset."""
    return torch.randn(length + 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def biased(offsets: Tensor, allowed: Tensor, bias: Tensor) -> Tensor:
    return torch.where(allowed, bias[offsets.clamp(min=0)], -math.inf)


def sparse(query: Tensor, key: Tensor, value: Tensor, sparsity: Sparsity, *, is_split: bool = False) -> Tensor:
    bias = of_place(sparsity.length * 4)
    local, local_allowed = local_offsets(sparsity)
    dilated, dilated_allowed = dilated_offsets(sparsity, at_least=0 if is_split else sparsity.window)
    attend = split_attention if is_split else local_dilated_attention
    return attend(
        query,
        key,
        value,
        biased(local, local_allowed, bias)[None, None],
        biased(dilated, dilated_allowed, bias)[None, None],
        sparsity,
    )


def masked(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor) -> Tensor:
    """Every pair, those not allowed masked."""
    length = query.shape[2]
    return causal_attention(query, key, value, biased(dense_offsets(length), allowed, bias)[None, None])


@pytest.mark.parametrize(
    ("length", "window", "dilation"),
    [
        (1, 1, 1),
        (1, 4, 3),
        (2, 1, 2),
        (7, 2, 3),
        (12, 4, 3),
        (13, 5, 2),
        (13, 3, 20),
        (9, 1, 4),
        (10, 10, 1),
        (20, 6, 6),
    ],
)
@pytest.mark.parametrize("is_split", [False, True])
def test_blocks_and_classes_equal_a_mask(length: int, window: int, dilation: int, is_split: bool) -> None:
    one, other = inputs(length), inputs(length)
    offsets = dense_offsets(length)
    near = (offsets >= 0) & (offsets < window)
    far = (offsets >= 0) & (offsets % dilation == 0)
    sparsity = Sparsity(window, dilation, length)
    bias = of_place(length * 4)
    got = sparse(*one, sparsity, is_split=is_split)
    if is_split:
        halves = [masked(*(x[:, h : h + 1] for x in other), mask, bias) for h, mask in enumerate((near, far))]
        wanted = torch.cat(halves, dim=1)
    else:
        wanted = masked(*other, near | far, bias)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)
    weights = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), one),
        torch.autograd.grad((wanted * weights).sum(), other),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("is_split", [False, True])
def test_the_blocks_of_a_longer_history_change_nothing(is_split: bool) -> None:
    """What an exported program does: constant blocks, whatever the length."""
    query = inputs(7)
    exact = sparse(*query, Sparsity(3, 4, 7), is_split=is_split)
    bias_of = Sparsity(3, 4, 7)
    for length in (8, 12, 30):
        longer = Sparsity(3, 4, length)
        bias = of_place(bias_of.length * 4)
        local, local_allowed = local_offsets(longer)
        dilated, dilated_allowed = dilated_offsets(longer, at_least=0 if is_split else 3)
        attend = split_attention if is_split else local_dilated_attention
        got = attend(
            *query,
            biased(local, local_allowed, bias)[None, None],
            biased(dilated, dilated_allowed, bias)[None, None],
            longer,
        )
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_no_matrix_of_all_pairs_is_made() -> None:
    """The largest tensor on the way is far smaller than L x L."""
    length, sizes = 600, []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out

    tensors = [x.detach() for x in inputs(length, requests=1, heads=1)]
    with Sizes():
        sparse(*tensors, Sparsity(16, 32, length))
    assert max(sizes) < length * length / 5


@pytest.mark.parametrize("is_single", [False, True])
def test_candidates_equal_a_loop(is_single: bool) -> None:
    requests = 1 if is_single else 3
    request_of_row = torch.zeros(4, dtype=torch.int64) if is_single else torch.tensor([0, 0, 1, 2, 2])
    _, key, value = (x.detach() for x in inputs(4, requests=requests, seed=1))
    rows = len(request_of_row)
    query, own_key, own_value = (torch.randn(rows, 2, 3, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([4, 0, 2])[:requests]
    bias = torch.randn(requests, 1, 4, dtype=torch.float64)
    bias = torch.where(torch.arange(4) < lengths.view(-1, 1, 1), bias, -math.inf)
    own_bias = torch.tensor([0.3], dtype=torch.float64)
    got = candidate_attention(
        query, own_key, own_value, key, value, bias, own_bias, None if is_single else request_of_row
    )
    tokens = token_attention(query, key, value, None if is_single else request_of_row)
    for row, r in enumerate(request_of_row.tolist()):
        for head in range(2):
            length = int(lengths[r])
            keys = [*key[r, head, :length].numpy(), own_key[row, head].numpy()]
            values = [*value[r, head, :length].numpy(), own_value[row, head].numpy()]
            biases = [*bias[r, 0, :length].tolist(), 0.3]
            wanted = reference.attention(
                [query[row, head].numpy()], keys, values, lambda i, j, product, b=biases: product + b[j]
            )
            np.testing.assert_allclose(got[row, head], wanted[0], rtol=1e-10)
            every = reference.attention(
                [query[row, head].numpy()], list(key[r, head].numpy()), list(value[r, head].numpy()), lambda i, j, p: p
            )
            np.testing.assert_allclose(tokens[row, head], every[0], rtol=1e-10)


def test_by_hand_two_events() -> None:
    """Scores 0 and ln 3: weights 1/4 and 3/4."""
    query = torch.tensor([[[[0.0], [1.0]]]])
    key = torch.tensor([[[[0.0], [math.log(3.0)]]]])
    value = torch.tensor([[[[8.0], [4.0]]]])
    bias = torch.tensor([[[[0.0, -math.inf], [0.0, 0.0]]]])
    assert causal_attention(query, key, value, bias).flatten().tolist() == pytest.approx([8.0, 5.0])
    sparsity = Sparsity(2, 1, 2)
    offsets, allowed = local_offsets(sparsity)
    local = torch.where(allowed, 0.0, -math.inf)[None, None]
    dilated = torch.where(dilated_offsets(sparsity, at_least=2)[1], 0.0, -math.inf)[None, None]
    got = local_dilated_attention(query, key, value, local, dilated, sparsity)
    assert got.flatten().tolist() == pytest.approx([8.0, 5.0])
    assert offsets[0].tolist() == [[2, 1, 0, -1], [3, 2, 1, 0]]
