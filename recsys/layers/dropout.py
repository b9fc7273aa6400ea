"""Dropout whose masks are cheap on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.errors import ConfigError

_LEVELS = 1 << 16


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
        dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        if not x.is_cpu or dropped == 0:
            return functional.dropout(x, self.p)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = (bits >= dropped - _LEVELS // 2).to(x.dtype)
        return x * kept.mul_(_LEVELS / (_LEVELS - dropped))

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"p={self.p}"
