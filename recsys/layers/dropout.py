"""Dropout whose masks are cheap on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from recsys.errors import ConfigError

_LEVELS = 1 << 16


def _dropped_levels(p: float) -> int:
    """How many of the levels that sixteen bits can have are dropped."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def _scale(dropped: int) -> float:
    return _LEVELS / (_LEVELS - dropped)


def _kept(x: Tensor, dropped: int) -> Tensor:
    """Draws which values of ``x`` are kept: bool."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return bits >= dropped - _LEVELS // 2


class _DropoutOfReLU(torch.autograd.Function):
    """In place. The gradient passes, scaled, where the result is above zero: that tells both masks."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, dropped: int) -> Tensor:
        kept = _kept(x, dropped)
        x.relu_().mul_(_scale(dropped)).mul_(kept)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.dropped = dropped  # type: ignore[attr-defined]
        return x

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors  # type: ignore[attr-defined]
        passed = torch.ops.aten.threshold_backward(gradients[0], y, 0.0)
        return passed.mul_(_scale(ctx.dropped)), None  # type: ignore[attr-defined]


class Dropout(nn.Module):
    r"""Zeroes each value with probability p while training and scales the others, so that the mean stays.

    .. math:: y = \frac{m \odot x}{1 - p}, \qquad m \sim \text{Bernoulli}(1 - p)

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014, scaled in
    training instead of in inference.

    Differs from source: on a CPU, p is rounded to a multiple of 2^-16, as is the scale. A mask then takes sixteen
    random bits a value where torch's dropout draws a double each, which costs as much as the matrix product before it.

    Args:
        p: in [0, 1).

    Raises:
        ConfigError: p is outside its domain.

    Shape:
        Any, kept.

    Example:
        >>> import torch
        >>> layer = Dropout(0.5)
        >>> sorted(set(layer.train()(torch.ones(100)).tolist())), layer.eval()(torch.ones(2)).tolist()
        ([0.0, 2.0], [1.0, 1.0])
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ConfigError(f"dropout must be in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drops out, or returns x as it is in eval."""
        if not self.training or self.p == 0.0:
            return x
        dropped = _dropped_levels(self.p)
        if not x.is_cpu or dropped == 0:
            return functional.dropout(x, self.p)
        return x * _kept(x, dropped).to(x.dtype).mul_(_scale(dropped))

    def of_relu(self, x: Tensor) -> Tensor:
        """Drops out of ``relu(x)``, in the memory of ``x``, whose values nobody may need any more.

        The two together read and write the values half as often as one after the other, and a layer's values are more
        than a cache holds.
        """
        dropped = _dropped_levels(self.p)
        if not self.training or not x.is_cpu or dropped == 0:
            return self.forward(torch.relu(x))
        return _DropoutOfReLU.apply(x, dropped)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"p={self.p}"
