"""Search attention agrees with loops in float64, whatever the lengths, and its gradient goes to the chosen alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.ops.search_attention import (
    attention_pool,
    best,
    masked,
    relevance,
    relevance_single_request,
    top_k_pool,
    top_k_pool_single_request,
)
from tests.references import dare as reference
from tests.references.attention import pool, softmax

LENGTHS = torch.tensor([9, 0, 1, 23, 5, 8])
ROWS = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 4, 8, 30])
def test_pooling_equals_loops(top_k: int) -> None:
    search, scores, values = drawn(9, 23), drawn(9, 23, seed=1), drawn(6, 23, 3, seed=2)
    got = top_k_pool(search, scores, values, LENGTHS, ROWS, top_k)
    everything = attention_pool(scores, values, LENGTHS, ROWS)
    for n, r in enumerate(ROWS.tolist()):
        length = int(LENGTHS[r])
        row_search, row_scores = search[n, :length].tolist(), scores[n, :length].tolist()
        expected = reference.top_k_pool(row_search, row_scores, values[r, :length].numpy(), top_k)
        np.testing.assert_allclose(got[n], expected, rtol=1e-12, atol=1e-13)
        all_events = pool(softmax(row_scores), values[r, :length].numpy())
        np.testing.assert_allclose(everything[n], all_events, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 40])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_single_request_is_one_of_many(length: int, padding: int) -> None:
    size = max(length, 1) + padding
    query, keys, own, values = drawn(5, 4), drawn(1, size, 4, seed=1), drawn(1, size, seed=2), drawn(1, size, 3, seed=3)
    lengths, rows = torch.tensor([length]), torch.zeros(5, dtype=torch.int64)
    scores = relevance(query, keys, rows) + own
    for n in range(5):
        expected = [sum(query[n] * key) + o for key, o in zip(keys[0], own[0], strict=True)]
        torch.testing.assert_close(scores[n], torch.stack(expected))
    alone = relevance_single_request(query, keys, own, lengths)
    torch.testing.assert_close(alone[:, :length], scores[:, :length])
    torch.testing.assert_close(
        top_k_pool_single_request(alone, alone, values, lengths, 6),
        top_k_pool(scores, scores, values, lengths, rows, 6),
    )


@pytest.mark.parametrize("top_k", [1, 3, 20])
@pytest.mark.parametrize("length", [1, 8, 17, 100, 1000])
def test_the_best_are_the_best(length: int, top_k: int) -> None:
    search = drawn(7, length)
    lengths = torch.tensor([length, 0, 1, min(5, length), length, length // 2, length])
    positions = best(masked(search, lengths), top_k)
    assert positions.shape == (7, top_k)
    for row in range(7):
        real = [p for p in positions[row].tolist() if p < lengths[row]]
        assert sorted(real) == reference.best(search[row, : lengths[row]].tolist(), top_k)


def test_equal_scores_are_all_offered() -> None:
    positions = best(masked(torch.zeros(1, 50), torch.tensor([50])), 20)
    assert len(set(positions[0].tolist())) == 20
    assert positions.max().item() < 50


def test_enough_to_keep_is_full_attention() -> None:
    scores, values = drawn(9, 23, seed=1), drawn(6, 23, 3, seed=2)
    for top_k in (23, 24, 60):
        torch.testing.assert_close(
            top_k_pool(scores, scores, values, LENGTHS, ROWS, top_k), attention_pool(scores, values, LENGTHS, ROWS)
        )


def test_gradients_reach_the_chosen_alone() -> None:
    scores, values = drawn(9, 23, seed=1).requires_grad_(), drawn(6, 23, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, v: top_k_pool(s, s, v, LENGTHS, ROWS, 4), (scores, values))
    assert torch.autograd.gradcheck(lambda s, v: attention_pool(s, v, LENGTHS, ROWS), (scores, values))
    top_k_pool(scores, scores, values, LENGTHS, ROWS, 4).sum().backward()
    assert scores.grad is not None
    for n, r in enumerate(ROWS.tolist()):
        chosen = reference.best(scores[n, : LENGTHS[r]].tolist(), 4)
        others = [j for j in range(23) if j not in chosen]
        assert (scores.grad[n, others] == 0).all()
        assert len(chosen) < 2 or (scores.grad[n, chosen] != 0).all()


def test_what_stands_in_padding_is_never_read() -> None:
    scores, values = drawn(9, 23, seed=1), drawn(6, 23, 3, seed=2)
    dirty_scores, dirty_values = scores.clone(), values.clone()
    for n, r in enumerate(ROWS.tolist()):
        dirty_scores[n, LENGTHS[r] :] = 1e30
        dirty_values[r, LENGTHS[r] :] = 1e30
    for top_k in (4, 30):
        torch.testing.assert_close(
            top_k_pool(dirty_scores, dirty_scores, dirty_values, LENGTHS, ROWS, top_k),
            top_k_pool(scores, scores, values, LENGTHS, ROWS, top_k),
        )


def test_the_product_may_be_taken_after_pooling() -> None:
    scores, values, target = drawn(9, 23, seed=1), drawn(6, 23, 3, seed=2), drawn(9, 3, seed=3)
    pooled = top_k_pool(scores, scores, values, LENGTHS, ROWS, 4)
    for n, r in enumerate(ROWS.tolist()):
        products = (values[r] * target[n]).unsqueeze(0)
        once = top_k_pool(scores[n : n + 1], scores[n : n + 1], products, LENGTHS[r : r + 1], torch.tensor([0]), 4)
        torch.testing.assert_close(once[0], pooled[n] * target[n])
