"""Mixtures of experts, all experts of a layer as one stack of matrices.

Shapes: R requests, N rows, K experts, H width of an expert's output, G gates, F width of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.layers.activations import ActivationName, Dice, PReLU, build_activation
from recsys.layers.mlp import JoinedLinear


class Experts(nn.Module):
    r"""K networks of the same shape over one input, or over one input each.

    .. math:: e_k = a(W_{k,J} \cdots a(W_{k,1} x_k + b_{k,1}) \cdots + b_{k,J})

    The first layer over one input is a single product for all experts, and what of the input is a request's own is
    multiplied once a request.

    Args:
        request_size: width of what is the same for all rows of a request; may be 0.
        row_size: width of what is a row's own.
        num_experts: K.
        sizes: widths of an expert's layers, at least one.
        activation: name of the activation after every layer.
        dropout: share of values dropped after every layer while training, in [0, 1).

    Raises:
        ConfigError: an argument is outside its domain.

    Shape:
        request (R, request_size), rows (N, row_size), request_of_row (N,) -> (N, K, sizes[-1]).
    """

    def __init__(
        self,
        request_size: int,
        row_size: int,
        num_experts: int,
        sizes: Sequence[int],
        *,
        activation: ActivationName,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(num_experts, sizes, dropout)
        self.first = JoinedLinear(request_size, row_size, num_experts * sizes[0])
        self.rest = ExpertLayers(num_experts, sizes, activation=activation, dropout=dropout)

    def forward(self, request: Tensor, rows: Tensor, request_of_row: Tensor | None) -> Tensor:
        """Every expert of every row; ``request_of_row`` is None where all rows are of one request."""
        return self.rest(joined_linear(self.first, request, rows, request_of_row))  # type: ignore[no-any-return]


class ExpertsOfOwnInputs(nn.Module):
    """As :class:`Experts`, where experts of a group share an input, and each group has its own.

    Args:
        input_size: width of an input.
        group_sizes: number of experts of each group, one or more.
        sizes: widths of an expert's layers, at least one.
        activation: name of the activation after every layer.
        dropout: share of values dropped after every layer while training, in [0, 1).

    Raises:
        ConfigError: an argument is outside its domain.

    Shape:
        (N, groups, input_size) -> (N, K, sizes[-1]), a group's experts after another's.
    """

    def __init__(
        self,
        input_size: int,
        group_sizes: Sequence[int],
        sizes: Sequence[int],
        *,
        activation: ActivationName,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(sum(group_sizes), sizes, dropout)
        self.group_sizes = tuple(group_sizes)
        self.first = nn.ModuleList(nn.Linear(input_size, size * sizes[0]) for size in group_sizes)
        self.rest = ExpertLayers(sum(group_sizes), sizes, activation=activation, dropout=dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """Every expert of every row."""
        first = [linear(x) for linear, x in zip(self.first, inputs.unbind(1), strict=True)]
        return self.rest(torch.cat(first, dim=1))  # type: ignore[no-any-return]


class ExpertLayers(nn.Module):
    """What follows the experts' first linear layer: (N, K * sizes[0]) -> (N, K, sizes[-1])."""

    def __init__(self, num_experts: int, sizes: Sequence[int], *, activation: ActivationName, dropout: float) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.activations = nn.ModuleList(build_activation(activation, num_experts * size) for size in sizes)
        self.weights = nn.ParameterList(torch.empty(num_experts, b, a) for a, b in pairwise(sizes))
        self.biases = nn.ParameterList(torch.empty(num_experts, 1, b) for b in sizes[1:])
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert's weights Xavier-uniform, biases 0."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            for expert in weight.detach():
                nn.init.xavier_uniform_(expert)
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Activates and goes on."""
        x = self.dropout(self.activations[0](x))
        for weight, bias, activation in zip(self.weights, self.biases, self.activations[1:], strict=True):
            x_KNA = x.unflatten(1, (self.num_experts, weight.shape[2])).transpose(0, 1)
            x_KNB = torch.baddbmm(bias, x_KNA, weight.transpose(1, 2))
            x = self.dropout(activation(x_KNB.transpose(0, 1).flatten(1)))
        return x.unflatten(1, (self.num_experts, x.shape[1] // self.num_experts))  # type: ignore[no-any-return]


class ExpertTowers(nn.Module):
    r"""K networks of one shape over one input, from it to an output without activation: ReLU in between.

    .. math:: s_k = W_k^{(n)} \operatorname{ReLU}(\cdots \operatorname{ReLU}(W_k^{(1)} x + b_k^{(1)})) + b_k^{(n)}

    What :class:`Experts` leaves to a tower behind the mixture is in each expert here, and the whole input is a row's.

    Args:
        input_size: width of x.
        num_experts: K.
        hidden: widths of an expert's hidden layers, at least one.
        output_size: width of an expert's output.
        dropout: share of values dropped after every hidden layer while training, in [0, 1).

    Attributes:
        weights: (K, in, out) a layer.
        biases: (K, out) a layer.

    Shape:
        (N, input_size) -> (N, K, output_size).

    Raises:
        ConfigError: an argument is outside its domain.

    Example:
        >>> ExpertTowers(3, 4, hidden=[8], output_size=2)(torch.zeros(5, 3)).shape
        torch.Size([5, 4, 2])
    """

    def __init__(
        self, input_size: int, num_experts: int, *, hidden: Sequence[int], output_size: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        _check(num_experts, hidden, dropout, name="hidden")
        sizes = [input_size, *hidden, output_size]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_experts, a, b)) for a, b in pairwise(sizes))
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_experts, b)) for b in sizes[1:])
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert's weights Xavier-uniform, biases 0."""
        for weight in self.weights:
            bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
            nn.init.uniform_(weight, -bound, bound)
        for bias in self.biases:
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Every expert of every row: (N, input_size) -> (N, K, output_size)."""
        (first, *weights), (first_bias, *biases) = self.weights, self.biases
        num_experts, _, size = first.shape
        # One product for all experts: they share the input.
        hidden_NF = torch.addmm(first_bias.flatten(), x, first.transpose(0, 1).flatten(1))
        hidden_KNF = hidden_NF.view(-1, num_experts, size).transpose(0, 1)
        for weight, bias in zip(weights, biases, strict=True):
            hidden_KNF = torch.baddbmm(bias.unsqueeze(1), self.dropout(torch.relu(hidden_KNF)), weight)
        return hidden_KNF.transpose(0, 1)


def joined_linear(layer: JoinedLinear, request: Tensor, rows: Tensor, request_of_row: Tensor | None) -> Tensor:
    """A :class:`JoinedLinear`; ``request_of_row`` is None where all rows are of one request."""
    if request_of_row is None:
        return layer.single_request(request, rows)
    return layer(request, rows, request_of_row)  # type: ignore[no-any-return]


def mixture(logits: Tensor, experts: Tensor) -> Tensor:
    """Softmax-weighted sums: gates' logits (N, G, K) and experts (N, K, H) -> (N, G, H)."""
    mixed: Tensor = logits.softmax(-1) @ experts
    return mixed


def reset_linears(network: nn.Module) -> None:
    """Weights of every linear layer Xavier-uniform, expert by expert, biases 0; activations as they say themselves."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, (Dice, PReLU, ExpertLayers)):
            module.reset_parameters()
        elif isinstance(module, Experts):
            for expert in module.first.weight.detach().chunk(module.rest.num_experts):
                nn.init.xavier_uniform_(expert)
        elif isinstance(module, ExpertsOfOwnInputs):
            for linear, size in zip(module.first, module.group_sizes, strict=True):
                for expert in cast("Tensor", linear.weight).detach().chunk(size):
                    nn.init.xavier_uniform_(expert)


def _check(num_experts: int, sizes: Sequence[int], dropout: float, *, name: str = "sizes") -> None:
    if num_experts < 1:
        raise ConfigError(f"num_experts must be at least 1, got {num_experts}")
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"{name} must name at least one layer, each at least 1 wide, got {tuple(sizes)}")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout must be in [0, 1), got {dropout}")
