"""Learning rates over time: one factor, of the tables' and the network's learning rate alike.

Every schedule can begin with a linear warm-up, and is what it is from there: warm-up multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from recsys.config import Config


class _Schedule(Config):
    warmup_steps: int = Field(0, ge=0, description="the factor rises to 1 over so many steps; 1/n in the first")


class ConstantSchedule(_Schedule):
    """The factor stays 1."""

    kind: Literal["constant"] = "constant"


class CosineSchedule(_Schedule):
    """Half a cosine from 1 to ``final``, then ``final`` (Loshchilov and Hutter, ICLR 2017, without restarts)."""

    kind: Literal["cosine"] = "cosine"
    steps: int | None = Field(
        None, ge=1, description="until `final`; if not given, all epochs: rows x epochs / batch_size"
    )
    final: float = Field(0.0, ge=0, le=1)


class ExponentialSchedule(_Schedule):
    """``rate ** (step / every_steps)``; with ``staircase`` the exponent is rounded down."""

    kind: Literal["exponential"] = "exponential"
    rate: float = Field(gt=0, le=1)
    every_steps: int = Field(ge=1)
    staircase: bool = False


class PlateauSchedule(_Schedule):
    """Times ``rate`` after every ``patience`` epochs in a row without a better validation metric.

    The metric is the one of ``training.selection``. The defaults are FuxiCTR's: a tenth at every stall.
    """

    kind: Literal["plateau"] = "plateau"
    rate: float = Field(0.1, gt=0, lt=1)
    patience: int = Field(1, ge=1, description="epochs")
    smallest: float = Field(1e-3, gt=0, le=1, description="the factor goes no lower")


ScheduleConfig = Annotated[
    ConstantSchedule | CosineSchedule | ExponentialSchedule | PlateauSchedule, Field(discriminator="kind")
]


def factor(config: ScheduleConfig, step: int, *, total_steps: int, plateau: float = 1.0) -> float:
    r"""What learning rates are multiplied by in a step.

    .. math:: \min\left(1, \frac{s + 1}{s_\text{warm-up}}\right) \cdot
              \begin{cases} 1 & \text{constant} \\
              f + \frac{1 - f}{2} \left(1 + \cos \pi \min(1, s / S)\right) & \text{cosine} \\
              \gamma^{s / k} & \text{exponential} \end{cases}

    Args:
        step: s, steps done before this one.
        total_steps: S of a cosine that names none.
        plateau: state of a plateau schedule, from :func:`after_epoch`.
    """
    warmth = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    match config:
        case ConstantSchedule():
            return warmth
        case CosineSchedule():
            done = min(1.0, step / (config.steps or total_steps))
            return warmth * (config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * done)))
        case ExponentialSchedule():
            exponent = step // config.every_steps if config.staircase else step / config.every_steps
            return float(warmth * config.rate**exponent)
        case PlateauSchedule():
            return warmth * plateau


def after_epoch(config: ScheduleConfig, *, is_best: bool, plateau: float, stalled_epochs: int) -> tuple[float, int]:
    """State of a plateau schedule after an evaluation: the factor, and the epochs that it has waited for a better one.

    Of any other schedule, what was given.
    """
    if not isinstance(config, PlateauSchedule):
        return plateau, stalled_epochs
    if is_best:
        return plateau, 0
    if stalled_epochs + 1 < config.patience:
        return plateau, stalled_epochs + 1
    return max(plateau * config.rate, config.smallest), 0


class LearningRates:
    """The learning rates of an optimizer's groups, as a factor times what they were built with.

    Must be set before ``zero_grad``: that is when fused optimizers take theirs.

    Args:
        groups: ``param_groups`` of the optimizers; changed in place.
    """

    def __init__(self, groups: Iterable[Any]) -> None:
        self._groups = [(group, float(group["lr"])) for group in groups]

    def set(self, factor: float) -> None:
        """Multiplies."""
        for group, lr in self._groups:
            group["lr"] = lr * factor
