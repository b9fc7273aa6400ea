"""Pooling of histories by the candidate: DIN's activation unit, without and with softmax."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.layers.activations import ActivationName, build_activation
from recsys.ops.target_attention import (
    UnitWeights,
    softmax_target_attention,
    softmax_target_attention_single_request,
    target_attention,
    target_attention_single_request,
)


class ActivationUnit(nn.Module):
    r"""Weights of a small network :math:`a([q; k; q - k; q \odot k]) \to \mathbb{R}`, in its unfolded layout.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, section 4.3; the four
    parts and their order as in the authors' code (the paper leaves the interaction open).

    Differs from source: keys may be wider than queries, by what only events have. Difference and product are over the
    width that both have.

    Args:
        query_size: D, at least 1.
        key_size: D + E, at least D.
        hidden: widths of the hidden layers, at least one.
        activation: name of the activation after every hidden layer.

    Attributes:
        first: (D + (D + E) + D + D) -> hidden[0].
        hidden: the further layers.
        output: hidden[-1] -> 1.
        activations: one a hidden layer.

    Raises:
        ConfigError: an argument is outside its domain.
    """

    def __init__(
        self, query_size: int, key_size: int, *, hidden: Sequence[int], activation: ActivationName = "dice"
    ) -> None:
        super().__init__()
        if query_size < 1 or key_size < query_size:
            raise ConfigError(f"key_size must be at least query_size (at least 1), got {key_size} and {query_size}")
        if not hidden or min(hidden) < 1:
            raise ConfigError(f"hidden must name at least one layer, each at least 1 wide, got {tuple(hidden)}")
        self.query_size, self.key_size = query_size, key_size
        # DIFF(paper): keys may be wider than queries, because only events have some features.
        self.first = nn.Linear(3 * query_size + key_size, hidden[0])
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(hidden))
        self.output = nn.Linear(hidden[-1], 1)
        self.activations = nn.ModuleList(build_activation(activation, size) for size in hidden)

    def folded(self) -> UnitWeights:
        """Weights as :mod:`recsys.ops.target_attention` takes them; gradients flow back to this module's own."""
        d = self.query_size
        query, key, difference, product = self.first.weight.split([d, self.key_size, d, d], dim=1)
        return UnitWeights(
            query=query + difference,
            key=key - nn.functional.pad(difference, (0, self.key_size - d)),
            product=product,
            bias=self.first.bias,
            hidden=tuple((cast("Tensor", layer.weight), cast("Tensor", layer.bias)) for layer in self.hidden),
            output=self.output.weight.squeeze(0),
            output_bias=self.output.bias.squeeze(0),
        )


class TargetAttention(nn.Module):
    """DIN's pooling: the weighted sum of a history, the weights not normalised.

    See :func:`recsys.ops.target_attention.target_attention` for the maths. Arguments are :class:`ActivationUnit`'s.

    Shape:
        query (N, D), keys (R, L, D + E), lengths (R,), request_of_row (N,) -> (N, D + E).
    """

    def __init__(
        self, query_size: int, key_size: int, *, hidden: Sequence[int], activation: ActivationName = "dice"
    ) -> None:
        super().__init__()
        self.unit = ActivationUnit(query_size, key_size, hidden=hidden, activation=activation)

    def forward(self, query: Tensor, keys: Tensor, lengths: Tensor, request_of_row: Tensor) -> Tensor:
        """Pools every row's history: -> (N, D + E)."""
        unit = self.unit
        return target_attention(query, keys, lengths, request_of_row, unit.folded(), list(unit.activations))

    def single_request(self, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """The same where all rows are of one request: keys (1, L, D + E), lengths (1,)."""
        unit = self.unit
        return target_attention_single_request(query, keys, lengths, unit.folded(), list(unit.activations))


class SoftmaxTargetAttention(nn.Module):
    """The pooling of the DIN authors' code: the weights normalised by a softmax over the history.

    See :func:`recsys.ops.target_attention.softmax_target_attention` for the maths. Arguments are
    :class:`ActivationUnit`'s.

    Shape:
        query (N, D), keys (R, L, D + E), lengths (R,), request_of_row (N,) -> (N, D + E).
    """

    def __init__(
        self, query_size: int, key_size: int, *, hidden: Sequence[int], activation: ActivationName = "dice"
    ) -> None:
        super().__init__()
        self.unit = ActivationUnit(query_size, key_size, hidden=hidden, activation=activation)

    def forward(self, query: Tensor, keys: Tensor, lengths: Tensor, request_of_row: Tensor) -> Tensor:
        """Pools every row's history: -> (N, D + E)."""
        unit = self.unit
        return softmax_target_attention(query, keys, lengths, request_of_row, unit.folded(), list(unit.activations))

    def single_request(self, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """The same where all rows are of one request: keys (1, L, D + E), lengths (1,)."""
        unit = self.unit
        return softmax_target_attention_single_request(query, keys, lengths, unit.folded(), list(unit.activations))
