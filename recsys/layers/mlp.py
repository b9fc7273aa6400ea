"""Stacks of dense layers, also over an input that is partly the same for all rows of a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.errors import ConfigError
from recsys.layers.activations import ActivationName, ReLU, build_activation
from recsys.layers.dropout import Dropout


class _AfterLinear(nn.Module):
    """Norm, activation and dropout: what follows each linear layer of a stack."""

    def __init__(
        self, size: int, *, activation: ActivationName, dropout: float, norm: Callable[[int], nn.Module] | None
    ) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm(size)
        self.activation = build_activation(activation, size)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if isinstance(self.activation, ReLU):
            return self.dropout.of_relu(x)
        return self.dropout(self.activation(x))  # type: ignore[no-any-return]


def _check(sizes: Sequence[int], dropout: float) -> None:
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"sizes must name at least one layer, each at least 1 wide, got {tuple(sizes)}")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout must be in [0, 1), got {dropout}")


class MLP(nn.Module):
    """Linear, norm, activation, dropout, over and over.

    Args:
        input_size: width of the input.
        sizes: widths of the layers, at least one.
        activation: name of the activation after every layer.
        dropout: share of values dropped after every layer while training, in [0, 1).
        norm: builds the normalisation of a layer's output, given its width; none if not given. In eval it must treat
            every row by itself.

    Shape:
        (N, input_size) -> (N, sizes[-1]).

    Raises:
        ConfigError: an argument is outside its domain.

    Example:
        >>> import torch
        >>> MLP(3, [4, 2], activation="relu")(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        input_size: int,
        sizes: Sequence[int],
        *,
        activation: ActivationName,
        dropout: float = 0.0,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check(sizes, dropout)
        inputs = [input_size, *sizes[:-1]]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in zip(inputs, sizes, strict=True))
        self.after = nn.ModuleList(
            _AfterLinear(size, activation=activation, dropout=dropout, norm=norm) for size in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        """Runs all layers: (N, input_size) -> (N, sizes[-1])."""
        for linear, after in zip(self.linears, self.after, strict=True):
            x = after(linear(x))
        return x


class TaskTowers(nn.ModuleList):
    """An :class:`MLP` a task, each of its own weights and ending in one logit.

    Args:
        input_size: width of the input.
        sizes: widths of the hidden layers, at least one.
        num_tasks: T.
        activation: name of the activation after every hidden layer.
        dropout: share of values dropped after every hidden layer while training, in [0, 1).

    Shape:
        T inputs (N, input_size) -> (N, T).

    Raises:
        ConfigError: an argument is outside its domain.

    Example:
        >>> import torch
        >>> towers = TaskTowers(3, [4], 2, activation="relu")
        >>> towers([torch.zeros(5, 3), torch.ones(5, 3)]).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, input_size: int, sizes: Sequence[int], num_tasks: int, *, activation: ActivationName, dropout: float = 0.0
    ) -> None:
        super().__init__(
            nn.Sequential(MLP(input_size, sizes, activation=activation, dropout=dropout), nn.Linear(sizes[-1], 1))
            for _ in range(num_tasks)
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Each task's logit from its own input: -> (N, T)."""
        return torch.cat([tower(x) for tower, x in zip(self, inputs, strict=True)], dim=1)


class JoinedLinear(nn.Linear):
    r"""A linear layer over :math:`[u; x]`, where :math:`u` is the same for all rows of a request.

    .. math:: y_n = W_u u_{r(n)} + W_x x_n + b, \qquad W = [W_u, W_x]

    :math:`W_u u` is computed once a request, whatever the number of its rows. One weight matrix of the usual layout.

    Args:
        request_size: width of u; may be 0.
        row_size: width of x.
        output_size: width of y.

    Shape:
        request (R, request_size), rows (N, row_size), request_of_row (N,) -> (N, output_size).

    Example:
        >>> import torch
        >>> layer = JoinedLinear(2, 3, 1)
        >>> u, x, r = torch.rand(2, 2), torch.rand(4, 3), torch.tensor([0, 0, 1, 1])
        >>> torch.allclose(layer(u, x, r), nn.functional.linear(torch.cat([u[r], x], 1), layer.weight, layer.bias))
        True
    """

    def __init__(self, request_size: int, row_size: int, output_size: int) -> None:
        super().__init__(request_size + row_size, output_size)
        self.request_size, self.row_size = request_size, row_size

    def forward(self, request: Tensor, rows: Tensor, request_of_row: Tensor) -> Tensor:  # type: ignore[override]
        """Maps every row, each with its request: -> (N, output_size)."""
        of_request, of_rows = self._parts(request, rows)
        return of_request.index_select(0, request_of_row) + of_rows

    def single_request(self, request: Tensor, rows: Tensor) -> Tensor:
        """The same where all rows are of one request: request (1, request_size)."""
        of_request, of_rows = self._parts(request, rows)
        return of_request + of_rows

    def _parts(self, request: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        weight_u, weight_x = self.weight.split([self.request_size, self.row_size], dim=1)
        return functional.linear(request, weight_u, self.bias), functional.linear(rows, weight_x)


class JoinedMLP(nn.Module):
    """An :class:`MLP` whose first layer is a :class:`JoinedLinear`.

    Args:
        request_size: width of what is the same for all rows of a request; may be 0.
        row_size: width of what is a row's own.
        sizes: widths of the layers, at least one.
        activation: name of the activation after every layer.
        dropout: share of values dropped after every layer while training, in [0, 1).

    Shape:
        request (R, request_size), rows (N, row_size), request_of_row (N,) -> (N, sizes[-1]).

    Raises:
        ConfigError: an argument is outside its domain.
    """

    def __init__(
        self,
        request_size: int,
        row_size: int,
        sizes: Sequence[int],
        *,
        activation: ActivationName,
        dropout: float = 0.0,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check(sizes, dropout)
        self.first = JoinedLinear(request_size, row_size, sizes[0])
        self.after_first = _AfterLinear(sizes[0], activation=activation, dropout=dropout, norm=norm)
        self.rest = (
            MLP(sizes[0], sizes[1:], activation=activation, dropout=dropout, norm=norm)
            if len(sizes) > 1
            else nn.Identity()
        )

    def forward(self, request: Tensor, rows: Tensor, request_of_row: Tensor) -> Tensor:
        """Runs all layers over every row, each with its request: -> (N, sizes[-1])."""
        return self.rest(self.after_first(self.first(request, rows, request_of_row)))  # type: ignore[no-any-return]

    def single_request(self, request: Tensor, rows: Tensor) -> Tensor:
        """The same where all rows are of one request: request (1, request_size)."""
        return self.rest(self.after_first(self.first.single_request(request, rows)))  # type: ignore[no-any-return]
