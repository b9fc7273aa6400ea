"""Biases of pairs, and which pairs there are."""

from __future__ import annotations

import itertools

import torch

from recsys.layers.attention_patterns import LocalDilatedPattern, RelativeBias, time_buckets
from tests.references import suan as reference


def test_buckets_of_time_are_a_third_wider_each() -> None:
    differences = [0, 1, 999_999, 1_000_000, 1_350_000, 1_352_000, 10**9, -(10**9), 10**15, 9 * 10**18]
    assert time_buckets(torch.tensor(differences)).tolist() == [reference.bucket(d) for d in differences]
    assert time_buckets(torch.tensor([10**6, 1_352_000])).tolist() == [0, 1]  # e^.301 = 1.3512
    assert time_buckets(torch.tensor([9 * 10**18])).tolist() == [99]


def test_the_bias_of_time_is_symmetric_and_that_of_place_toeplitz() -> None:
    bias = RelativeBias(7, num_layers=2, num_heads=3)
    times = torch.randint(0, 10**12, (2, 6))
    differences = times.unsqueeze(2) - times.unsqueeze(1)
    offsets = torch.arange(6).unsqueeze(1) - torch.arange(6)
    everywhere = torch.ones(1, 6, 6, dtype=torch.bool)
    with torch.no_grad():
        bias.position.zero_()
        of_time = bias(offsets.unsqueeze(0), differences, everywhere)
        assert of_time.shape == (2, 2, 3, 6, 6)
        torch.testing.assert_close(of_time, of_time.transpose(3, 4), rtol=0, atol=0)
        bias.time.zero_()
        bias.position.normal_()
        of_place = bias(offsets.unsqueeze(0), differences, (offsets >= 0).unsqueeze(0))
    for i, j in itertools.product(range(6), range(6)):
        wanted = bias.position[i - j].detach() if i >= j else torch.full((2, 3), -torch.inf)
        torch.testing.assert_close(of_place[:, 0, :, i, j], wanted)


def test_a_candidate_behind_a_window_wider_than_the_history_sees_all_of_it() -> None:
    """The oldest event of a full history is as many places before the candidate as the history is long."""
    offsets = torch.arange(9)
    seen = {
        window: LocalDilatedPattern(window, 5, max_length=8, is_candidate_sparse=True).is_seen(offsets).tolist()
        for window in (8, 9, 50)
    }
    assert seen[8] == [False, *[True] * 7, False]
    assert seen[9] == seen[50] == [False, *[True] * 8]
