"""Activations that know which positions are real: ``(x (N, C), valid (N,) or None) -> (N, C)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.errors import ConfigError

ActivationName = Literal["dice", "prelu", "sigmoid", "relu"]


class Moments(NamedTuple):
    """Statistics of each channel over the valid positions.

    Attributes:
        mean: (C,).
        var: (C,) biased: divided by ``num_positions``.
        num_positions: () int64 positions that were averaged; where it is 0, mean and var are 0.
    """

    mean: Tensor
    var: Tensor
    num_positions: Tensor


def masked_moments(x: Tensor, valid: Tensor | None) -> Moments:
    """Mean and variance of each channel over valid positions, in two passes.

    Args:
        x: (N, C), finite at positions that are not valid too.
        valid: (N,), True = counts; None = all count.
    """
    weight = x.new_ones(x.shape[0]) if valid is None else valid.to(x.dtype)
    num_positions = torch.tensor(x.shape[0], device=x.device) if valid is None else valid.sum()
    weight = weight / num_positions.clamp(min=1)
    mean = weight @ x
    return Moments(mean, weight @ (x - mean).square(), num_positions)


class Dice(nn.Module):
    r"""PReLU whose step is where the data is: a soft gate at each channel's own mean, as wide as its deviation.

    .. math:: f(s) = p(s)\, s + (1 - p(s))\, \alpha s, \qquad
              p(s) = \sigma\!\left( \frac{s - E[s]}{\sqrt{Var[s] + \epsilon}} \right)

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, equations 8 and 9:
    statistics of the batch in training, moving averages in eval. ``alpha`` starts at 0 as in the authors' code (the
    paper is silent); the moving averages follow torch's batch normalisation (momentum 0.1, unbiased variance).

    Differs from source: statistics are over valid positions only, so that padding moves nothing.

    In eval a row's result does not depend on the other rows.

    Args:
        channels: C.
        eps: added to the variance; the paper's value.
        momentum: weight of the newest batch in the moving averages, in (0, 1].

    Attributes:
        moments: what computes a batch's statistics, ``(x, valid) -> Moments``; :func:`masked_moments` unless replaced.
            Data parallel training puts a function here that reduces over all ranks, and may let gradients through it.

    Shape:
        x (N, C), finite everywhere; valid (N,), or None: all are -> (N, C).

    Example:
        >>> import torch
        >>> layer = Dice(2).eval()  # mean 0, variance 1, alpha 0: s * sigmoid(s)
        >>> layer(torch.tensor([[0.0, 1.0]])).round(decimals=3).tolist()
        [[0.0, 0.7310000061988831]]
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-8, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.moments: Callable[[Tensor, Tensor | None], Moments] = masked_moments
        self.alpha = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets alpha to 0 (the authors' code) and the moving averages to mean 0, variance 1 (torch's batch norm)."""
        nn.init.zeros_(self.alpha)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Activates ``x``; in training, also moves the moving averages."""
        mean, var = self._batch_statistics(x, valid) if self.training else (self.running_mean, self.running_var)
        scale = torch.rsqrt(var + self.eps)
        # Difference first: where a channel hardly varies, its large scale would magnify the rounding of a product.
        p = torch.sigmoid((x - mean) * scale)
        return torch.addcmul(self.alpha, p, 1.0 - self.alpha) * x

    def _batch_statistics(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        # DIFF(paper): valid positions only, because a padded position is not data and would shift every channel.
        mean, var, num_positions = self.moments(x, valid)
        with torch.no_grad():
            # A batch without two valid positions, and so without a variance, leaves the moving averages as they are.
            step = self.momentum * (num_positions > 1).to(x.dtype)
            unbiased = var * num_positions.to(x.dtype) / (num_positions - 1).clamp(min=1)
            self.running_mean.lerp_(mean.detach(), step)
            self.running_var.lerp_(unbiased.detach(), step)
        return mean, var

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"{self.alpha.numel()}, eps={self.eps}, momentum={self.momentum}"


class PReLU(nn.Module):
    r"""Identity above 0, one learnt slope a channel below.

    .. math:: f(s) = \max(s, 0) + \alpha \min(s, 0)

    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, equation 1; ``alpha`` starts at 0.25 as there.

    Args:
        channels: C.

    Shape:
        (N, C) -> (N, C); ``valid`` is not used.

    Example:
        >>> import torch
        >>> PReLU(1)(torch.tensor([[-2.0], [3.0]])).tolist()
        [[-0.5], [3.0]]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets alpha to 0.25 (the source)."""
        nn.init.constant_(self.alpha, 0.25)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:  # noqa: ARG002 - called alike
        """Activates ``x`` (N, C)."""
        return functional.prelu(x, self.alpha)

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return str(self.alpha.numel())


class Sigmoid(nn.Module):
    """The logistic function; ``channels`` and ``valid`` are not used."""

    def __init__(self, channels: int) -> None:  # noqa: ARG002 - built alike
        super().__init__()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:  # noqa: ARG002 - called alike
        """Activates ``x`` (N, C)."""
        return torch.sigmoid(x)


class ReLU(nn.Module):
    """Identity above 0, 0 below; ``channels`` and ``valid`` are not used."""

    def __init__(self, channels: int) -> None:  # noqa: ARG002 - built alike
        super().__init__()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:  # noqa: ARG002 - called alike
        """Activates ``x`` (N, C)."""
        return torch.relu(x)


ACTIVATIONS: Mapping[ActivationName, Callable[[int], nn.Module]] = {
    "dice": Dice,
    "prelu": PReLU,
    "sigmoid": Sigmoid,
    "relu": ReLU,
}
"""Builders of activations by name, given the number of channels."""


def build_activation(name: ActivationName, channels: int) -> nn.Module:
    """Builds the activation called ``name``.

    Raises:
        ConfigError: there is no such activation.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name](channels)
