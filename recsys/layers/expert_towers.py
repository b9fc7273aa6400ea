"""Several networks of one shape over the same input, as one stack of batched products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from recsys.errors import ConfigError


class ExpertTowers(nn.Module):
    r"""K towers of one shape, each of its own weights: linear, ReLU, over and over, and a linear output.

    .. math:: s_k = W_k^{(n)} \operatorname{ReLU}(\cdots \operatorname{ReLU}(W_k^{(1)} x + b_k^{(1)})) + b_k^{(n)}

    All towers run as one product a layer.

    Args:
        input_size: width of x.
        num_experts: K.
        hidden: widths of a tower's hidden layers, at least one.
        output_size: width of a tower's output.
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
        if num_experts < 1:
            raise ConfigError(f"num_experts must be at least 1, got {num_experts}")
        if not hidden or min(hidden) < 1:
            raise ConfigError(f"hidden must name at least one layer, each at least 1 wide, got {tuple(hidden)}")
        sizes = [input_size, *hidden, output_size]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_experts, a, b)) for a, b in pairwise(sizes))
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_experts, b)) for b in sizes[1:])
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of each tower Xavier-uniform, biases 0."""
        for weight in self.weights:
            bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
            nn.init.uniform_(weight, -bound, bound)
        for bias in self.biases:
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Runs all towers: (N, input_size) -> (N, K, output_size)."""
        (first, *weights), (first_bias, *biases) = self.weights, self.biases
        num_experts, _, size = first.shape
        # One product for all towers: they share the input.
        hidden_NF = torch.addmm(first_bias.flatten(), x, first.transpose(0, 1).flatten(1))
        hidden_KNF = hidden_NF.view(-1, num_experts, size).transpose(0, 1)
        for weight, bias in zip(weights, biases, strict=True):
            hidden_KNF = torch.baddbmm(bias.unsqueeze(1), self.dropout(torch.relu(hidden_KNF)), weight)
        return hidden_KNF.transpose(0, 1)
