"""Normalisation: of a batch over its rows, of a vector by its root mean square."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.layers.activations import Moments


class RowBatchNorm(nn.Module):
    r"""Batch normalisation whose statistics are over the rows of the batch, whatever requests these are of.

    .. math:: y = \gamma \frac{x - E[x]}{\sqrt{Var[x] + \epsilon}} + \beta

    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithms 1 and 2: statistics of the batch in training
    (the variance divided by N), moving averages in eval (of the variance divided by N - 1).

    In a request-major batch the input must be *rows* (N, C), never values of requests (R, C): a request of fifty
    candidates counts fifty times, as it does where each row repeats its request. So the statistics, and with them the
    trained weights, do not depend on how rows were grouped into requests.

    Differs from source: a batch of one row has no variance. It is normalised by the moving averages, and leaves them as
    they are.

    In eval a row's result does not depend on the other rows.

    Args:
        channels: C.
        eps: added to the variance.
        momentum: weight of the newest batch in the moving averages, in (0, 1].

    Attributes:
        moments: what computes a batch's statistics, ``(x, valid) -> Moments``; None for torch's own kernel, over the
            rows at hand. Data parallel training puts a function here that reduces over all ranks.

    Shape:
        (N, C) -> (N, C).

    Example:
        >>> import torch
        >>> RowBatchNorm(1).train()(torch.tensor([[1.0], [3.0]])).round(decimals=3).tolist()
        [[-1.0], [1.0]]
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.moments: Callable[[Tensor, Tensor | None], Moments] | None = None
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, shift 0, moving averages of mean 0 and variance 1."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``x`` (N, C); in training, also moves the moving averages."""
        if self.training and self.moments is not None:
            return self._by_moments(x, self.moments)
        return functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training and x.shape[0] > 1,  # DIFF(paper): one row has no variance
            momentum=self.momentum,
            eps=self.eps,
        )

    def _by_moments(self, x: Tensor, moments: Callable[[Tensor, Tensor | None], Moments]) -> Tensor:
        mean, var, num_rows = moments(x, None)
        several = num_rows > 1
        with torch.no_grad():
            step = self.momentum * several.to(x.dtype)
            unbiased = var * num_rows.to(x.dtype) / (num_rows - 1).clamp(min=1)
            old_mean, old_var = self.running_mean.clone(), self.running_var.clone()
            self.running_mean.lerp_(mean.detach(), step)
            self.running_var.lerp_(unbiased.detach(), step)
        mean, var = torch.where(several, mean, old_mean), torch.where(several, var, old_var)
        return (x - mean) * (torch.rsqrt(var + self.eps) * self.weight) + self.bias

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"{self.weight.numel()}, eps={self.eps}, momentum={self.momentum}"


class RMSNorm(nn.Module):
    r"""Divides by the root mean square.

    .. math:: f(x) = \gamma \odot \frac{x}{\sqrt{\operatorname{mean}(x^2)} + \epsilon}

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, equation 4; epsilon outside the
    root as in SUAN's code (``torch.nn.RMSNorm`` has it inside, which differs for nearly zero vectors alone).

    Args:
        width: of a vector.
        eps: added to the root mean square.

    Shape:
        (..., width) -> (..., width).

    Example:
        >>> import torch
        >>> [round(x, 3) for x in RMSNorm(2)(torch.tensor([3.0, 4.0])).tolist()]
        [0.849, 1.131]
    """

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets gamma to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over the last dimension."""
        # vector_norm, because the gradient of a root at 0 is not finite, and a vector may be 0.
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x / (root + self.eps) * self.weight  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"{self.weight.numel()}, eps={self.eps}"
