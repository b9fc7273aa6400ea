from __future__ import annotations

import math

import pytest
import torch

from training.schedule import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LearningRates,
    PlateauSchedule,
    after_epoch,
    factor,
)


def test_warm_up_rises_to_one_and_multiplies_what_follows() -> None:
    assert [factor(ConstantSchedule(warmup_steps=4), s, total_steps=9) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    decay = ExponentialSchedule(rate=0.5, every_steps=1, warmup_steps=2)
    assert [factor(decay, s, total_steps=9) for s in range(3)] == [0.5, 0.5, 0.25]


def test_cosine_goes_from_one_to_its_final_value_and_stays() -> None:
    config = CosineSchedule(final=0.2)
    values = [factor(config, s, total_steps=8) for s in (0, 2, 4, 8, 100)]
    expected = [1.0, 0.2 + 0.4 * (1 + math.cos(math.pi / 4)), 0.6, 0.2, 0.2]
    assert values == pytest.approx(expected)
    assert factor(CosineSchedule(steps=4), 2, total_steps=8) == pytest.approx(0.5)


def test_exponential_decay_with_and_without_steps() -> None:
    smooth, stairs = (ExponentialSchedule(rate=0.1, every_steps=10, staircase=b) for b in (False, True))
    assert factor(smooth, 5, total_steps=1) == pytest.approx(10**-0.5)
    assert [factor(stairs, s, total_steps=1) for s in (0, 9, 10, 20)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_a_plateau_lowers_the_factor_after_its_patience_and_counts_again() -> None:
    config = PlateauSchedule(rate=0.5, patience=2, smallest=0.2)
    state, seen = (1.0, 0), []
    for is_best in [True, False, False, False, True, False, False, False, False]:
        state = after_epoch(config, is_best=is_best, plateau=state[0], stalled_epochs=state[1])
        seen.append(state[0])
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2]
    assert factor(config, 5, total_steps=1, plateau=0.25) == 0.25


def test_the_default_plateau_is_a_tenth_at_every_stall() -> None:
    state = (1.0, 0)
    for _ in range(2):
        state = after_epoch(PlateauSchedule(), is_best=False, plateau=state[0], stalled_epochs=state[1])
    assert state == (pytest.approx(0.01), 0)


def test_other_schedules_do_not_look_at_epochs() -> None:
    assert after_epoch(ConstantSchedule(), is_best=False, plateau=1.0, stalled_epochs=0) == (1.0, 0)


def test_learning_rates_are_factors_of_what_was_built() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 0.4}, {"params": [torch.zeros(1)], "lr": 3.0}])
    rates = LearningRates(optimizer.param_groups)
    rates.set(0.5)
    rates.set(0.25)  # of what was built, not of what was set
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.75])
