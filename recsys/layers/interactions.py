"""Explicit interactions of features: pairwise products, crosses, gates, bilinear fusion.

Layers over fields take what is the same for all rows of a request apart from what is a row's own, and do the request's
part once a request; ``which`` says how rows stand to requests.

Shapes: R requests, N rows, U width of what is a request's, C of what is a row's own, F = U + C, D width of a field,
T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.layers.mlp import MLP, JoinedLinear, JoinedMLP
from recsys.layers.rows import Rows


class PairwiseInteraction(nn.Module):
    r"""The sum of the inner products of all pairs of fields, in time linear in the number of fields.

    .. math:: \sum_{i < j} \langle v_i, v_j \rangle
              = \frac{1}{2} \sum_d \left( \Big(\sum_i v_{id}\Big)^2 - \sum_i v_{id}^2 \right)

    Source: Rendle, "Factorization Machines", ICDM 2010, lemma 3.1.

    Differs from source: with several tasks, each weighs the terms of the outer sum, by weights that start at 1.

    Args:
        dim: D.
        num_tasks: T.

    Shape:
        request (R, number of its fields, D), rows (N, number of theirs, D), which -> (N, T).

    Example:
        >>> import torch
        >>> from recsys.layers import OneRequest
        >>> u, x = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0]], [[0.0]]])
        >>> PairwiseInteraction(1, 1)(u, x, OneRequest()).tolist()  # 1*2 + 1*3 + 2*3, and 1*2
        [[11.0], [2.0]]
    """

    weight: Tensor

    def __init__(self, dim: int, num_tasks: int) -> None:
        super().__init__()
        if num_tasks == 1:
            self.register_buffer("weight", torch.ones(1, dim), persistent=False)
        else:  # DIFF(paper): one interaction for all tasks would rank alike for all.
            self.weight = nn.Parameter(torch.ones(num_tasks, dim))

    def forward(self, request: Tensor, rows: Tensor, which: Rows) -> Tensor:
        """Interacts all fields of every row: -> (N, T)."""
        total_ND = which.spread(request.sum(1)) + rows.sum(1)
        squares_ND = which.spread(request.square().sum(1)) + rows.square().sum(1)
        return 0.5 * (total_ND.square() - squares_ND) @ self.weight.T


class CrossNetwork(nn.Module):
    r"""Crosses of bounded degree: each layer multiplies the input once more into a linear map of the last layer.

    .. math:: x_{l+1} = x_0 \odot (W_l x_l + b_l) + x_l

    Source: Wang et al., "DCN V2", WWW 2021, equation 1.

    Args:
        request_size: U, may be 0.
        row_size: C.
        num_layers: crosses, at least one; the degree of the result is one more.

    Shape:
        request (R, U), rows (N, C), which -> (N, U + C).

    Raises:
        ConfigError: there is no layer.
    """

    def __init__(self, request_size: int, row_size: int, num_layers: int) -> None:
        super().__init__()
        if num_layers < 1:
            raise ConfigError(f"num_layers must be at least 1, got {num_layers}")
        size = request_size + row_size
        self.first = JoinedLinear(request_size, row_size, size)
        self.rest = nn.ModuleList(nn.Linear(size, size) for _ in range(num_layers - 1))

    def forward(self, request: Tensor, rows: Tensor, which: Rows) -> Tensor:
        """Crosses every row with its request: -> (N, U + C)."""
        x0 = which.join(request, rows)
        x = torch.addcmul(x0, x0, which.linear(self.first, request, rows))
        for layer in self.rest:
            x = torch.addcmul(x, x0, layer(x))
        return x


class Distinct(NamedTuple):
    """Which of n inputs are the same.

    Attributes:
        example: (number of distinct ones,) int64, a position of each.
        number: (n,) int64, which of the distinct ones each input is.
    """

    example: Tensor
    number: Tensor

    @classmethod
    def of(cls, ids: Tensor) -> Distinct:
        """Of inputs that are looked up by ``ids`` (n,)."""
        values, number = torch.unique(ids, return_inverse=True)
        example = torch.empty_like(values).scatter_(0, number, torch.arange(len(ids), device=ids.device))
        return cls(example, number)


class FeatureGate(nn.Module):
    r"""A weight in (0, 2) for each dimension of the input, computed from a context.

    .. math:: 2\,\sigma(W_2 \max(W_1 c + b_1, 0) + b_2)

    The factor 2 makes the neutral gate 1. There is no normalisation in it.

    Source: Mao et al., "FinalMLP", AAAI 2023, and the authors' code.

    Args:
        context_size: width of the context, at least 1.
        hidden: widths of the hidden layers, at least one.
        size: number of weights.

    Shape:
        (n, context_size) -> (n, size).
    """

    def __init__(self, context_size: int, hidden: Sequence[int], size: int) -> None:
        super().__init__()
        if context_size < 1:
            raise ConfigError(f"context_size must be at least 1, got {context_size}")
        self.mlp = MLP(context_size, hidden, activation="relu")
        self.output = nn.Linear(hidden[-1], size)

    def forward(self, context: Tensor, distinct: Distinct | None = None) -> Tensor:
        """Weights of every context; those that are the same are computed once where ``distinct`` says which."""
        if distinct is not None:
            return self.forward(context.index_select(0, distinct.example)).index_select(0, distinct.number)
        return 2.0 * torch.sigmoid(self.output(self.mlp(context)))


class RequestGatedMLP(nn.Module):
    """A stream whose gate depends on the request only: gate, gated request and its part of the MLP, once a request.

    Args:
        context_size: width of the context.
        gate_hidden: of the gate.
        request_size: U, may be 0.
        row_size: C.
        mlp: over the gated input; its first layer must be of sizes U and C.

    Shape:
        request_context (R, context_size), row_context (N, 0), request (R, U), rows (N, C), which
        -> (N, out).
    """

    def __init__(
        self, context_size: int, gate_hidden: Sequence[int], request_size: int, row_size: int, mlp: JoinedMLP
    ) -> None:
        super().__init__()
        self.sizes = [request_size, row_size]
        self.gate = FeatureGate(context_size, gate_hidden, request_size + row_size)
        self.mlp = mlp

    def forward(
        self,
        request_context: Tensor,
        row_context: Tensor,  # noqa: ARG002 - called alike
        request: Tensor,
        rows: Tensor,
        which: Rows,
        distinct: Distinct | None = None,
    ) -> Tensor:
        """Gates and runs the MLP over every row; ``distinct`` is of the requests' contexts."""
        of_request, of_rows = self.gate(request_context, distinct).split(self.sizes, dim=1)
        return which.mlp(self.mlp, of_request * request, which.spread(of_rows) * rows)


class RowGatedMLP(nn.Module):
    """A stream whose gate depends on the candidate: everything of it is a row's own.

    Arguments and shapes as in :class:`RequestGatedMLP`, with a context of requests (R, may be 0) and rows (N, any), and
    an ordinary ``mlp`` over U + C.
    """

    def __init__(
        self, context_size: int, gate_hidden: Sequence[int], request_size: int, row_size: int, mlp: MLP
    ) -> None:
        super().__init__()
        self.gate = FeatureGate(context_size, gate_hidden, request_size + row_size)
        self.mlp = mlp

    def forward(
        self,
        request_context: Tensor,
        row_context: Tensor,
        request: Tensor,
        rows: Tensor,
        which: Rows,
        distinct: Distinct | None = None,
    ) -> Tensor:
        """Gates and runs the MLP over every row; ``distinct`` is of the rows' contexts."""
        gate = self.gate(which.join(request_context, row_context), distinct)
        return self.mlp(gate * which.join(request, rows))  # type: ignore[no-any-return]


class StaticGatedMLP(nn.Module):
    r"""A stream whose gate depends on nothing: one learnt weight :math:`2\,\sigma(b)` a dimension, 1 at the start.

    This is what a :class:`FeatureGate` is whose context is a learnt vector that starts at zero, with biases that start
    at zero: its hidden layer is 0 and has no gradient there, so neither the vector nor the weights ever move, and only
    the last bias learns. Here only that bias exists.

    Shape:
        As :class:`RequestGatedMLP`, with contexts of width 0.
    """

    def __init__(self, request_size: int, row_size: int, mlp: JoinedMLP) -> None:
        super().__init__()
        self.sizes = [request_size, row_size]
        self.bias = nn.Parameter(torch.zeros(request_size + row_size))
        self.mlp = mlp

    def forward(
        self,
        request_context: Tensor,  # noqa: ARG002 - called alike
        row_context: Tensor,  # noqa: ARG002 - called alike
        request: Tensor,
        rows: Tensor,
        which: Rows,
        distinct: Distinct | None = None,  # noqa: ARG002 - called alike
    ) -> Tensor:
        """Gates and runs the MLP over every row."""
        of_request, of_rows = (2.0 * torch.sigmoid(self.bias)).split(self.sizes)
        return which.mlp(self.mlp, of_request * request, of_rows * rows)


class BilinearFusion(nn.Module):
    r"""Fuses two vectors by linear terms and a bilinear form that is block-diagonal: one block a head.

    .. math:: y_t = b_t + w_{t1}^\top a + w_{t2}^\top c + \sum_{j=1}^{k} a_j^\top W_{tj}\, c_j

    where :math:`a_j` and :math:`c_j` are the j-th of k equal chunks. With one head it is the full bilinear form; k
    heads have k times fewer parameters in it.

    Source: Mao et al., "FinalMLP", AAAI 2023, section on fusion; the authors' code.

    Differs from source: one output a task. As in the authors' code, each linear term has a bias, which add up to b.

    Initialisation: as in the authors' code, where the blocks are one column of all their weights: Xavier-normal on
    that column, so a deviation of :math:`\sqrt{2 / (1 + d_1 d_2 / k)}`; linear terms Xavier-normal, biases 0.

    Args:
        left_size: width of a, a multiple of num_heads.
        right_size: width of c, a multiple of num_heads.
        num_heads: k.
        num_tasks: T.

    Shape:
        (N, left_size), (N, right_size) -> (N, T).

    Raises:
        ConfigError: a width is not a multiple of the number of heads.
    """

    def __init__(self, left_size: int, right_size: int, *, num_heads: int, num_tasks: int) -> None:
        super().__init__()
        for name, size in (("left_size", left_size), ("right_size", right_size)):
            if num_heads < 1 or size % num_heads:
                raise ConfigError(f"{name} must be a multiple of num_heads, got {size} and {num_heads}")
        self.num_heads, self.num_tasks = num_heads, num_tasks
        self.left = nn.Linear(left_size, num_tasks)
        self.right = nn.Linear(right_size, num_tasks)
        # DIFF(paper): one output a task, because there may be several.
        self.blocks = nn.Parameter(torch.empty(num_tasks, num_heads, left_size // num_heads, right_size // num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as the class says."""
        for linear in (self.left, self.right):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.blocks, std=math.sqrt(2.0 / (1.0 + self.blocks[0].numel())))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Fuses every row: -> (N, T)."""
        left_KNA = left.unflatten(1, (self.num_heads, -1)).transpose(0, 1)
        right_NTKB = right.unflatten(1, (self.num_heads, -1)).unsqueeze(1)
        # The linear terms ride along, so that nobody goes over the wide inputs for them: that of a is one more column
        # of the blocks, to be multiplied by 1, and w2' c = sum_j w2_j' c_j is added to what c_j is multiplied by.
        left_TKA1 = self.left.weight.view(self.num_tasks, *left_KNA.shape[::2], 1)
        right_TKB = self.right.weight.view(self.num_tasks, self.num_heads, -1)
        columns_KAX = torch.cat([self.blocks, left_TKA1], dim=3).permute(1, 2, 0, 3).flatten(2)
        mapped_KNTB1 = (left_KNA @ columns_KAX).unflatten(2, (self.num_tasks, -1))  # one product of all tasks
        mapped_NTKB1 = mapped_KNTB1.permute(1, 2, 0, 3)
        mapped_NTKB, linear_NTK1 = mapped_NTKB1.split([right_TKB.shape[2], 1], dim=3)
        # DIFF(paper): both linear terms have a bias, as in the authors' code; the equation has one for all.
        bias_T = self.left.bias + self.right.bias
        return ((mapped_NTKB + right_TKB) * right_NTKB).sum((2, 3)) + linear_NTK1.sum((2, 3)) + bias_T  # type: ignore[no-any-return]
