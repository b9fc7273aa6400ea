r"""Attention of a history to its own past, and of candidates to a history: in plain torch.

A sequence is a request's events, oldest first, then one candidate. The mask is causal, so no event sees the candidate,
and the candidates of a request do not see one another. Both together mean that the events are encoded once a request,
whatever the number of its candidates, and that a candidate is one more query against keys and values that are there.

Because histories are padded on the right, an event never sees padding either: its keys stand before it. Only a
candidate's row needs a mask of lengths; what is computed at padded positions is finite and read by nobody.

Three forms of the events' own attention:

- :func:`causal_attention`: every pair, :math:`O(L^2)`.
- :func:`local_dilated_attention`: the pairs with :math:`0 \le i - j < k` (local) or :math:`(i - j) \bmod r = 0`
  (dilated), one softmax over the union. Local pairs are blocks of k queries against 2k keys, dilated pairs are r dense
  problems of L / r events each, so that what is not allowed is (but for the blocks' corners) not computed:
  :math:`O(L (2k + L / r))` products and memory, and no L x L matrix.
- :func:`split_attention`: the same two patterns, each in half of the heads with a softmax of its own.

Source: SUAN, Lai et al., RecSys 2025, arXiv 2508.15326, for causal mask and bias. # RECONSTRUCTION: the formulas of the
two patterns, after read-throughs of the paper. The block forms are ours; they are equal in exact arithmetic.

Shapes: R requests, N candidates (rows), H heads, L events, d width of a head, W block = k, B blocks, C residue classes
= r, A events of a class. A bias is added to the scores; it is ``-inf`` where a pair is not allowed, has 1 or H heads,
and allows at least one key of every query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def causal_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    r"""Every event attends to itself and what was before.

    .. math:: o_i = \sum_{j} \operatorname{softmax}_j\!\Big(\frac{q_i \cdot k_j}{\sqrt d} + b_{ij}\Big) v_j

    Args:
        query, key, value: (R, H, L, d).
        bias: (R or 1, H or 1, L, L), ``-inf`` where j > i.

    Returns:
        (R, H, L, d).
    """
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def dense_offsets(length: int, device: torch.device | None = None) -> Tensor:
    """``i - j`` of every pair: (L, L) int64."""
    position = torch.arange(length, device=device)
    return position.unsqueeze(1) - position


class Sparsity(NamedTuple):
    """Which pairs :func:`local_dilated_attention` sees, and for how long a history it makes blocks and classes.

    Attributes:
        window: k, at least 1.
        dilation: r, at least 1.
        length: at least L. In a program that is exported for any L it is the longest history: B and A are constants
            then, and nothing has to be proven of what L can be divided by.
    """

    window: int
    dilation: int
    length: int

    @property
    def num_blocks(self) -> int:
        """B."""
        return (self.length + self.window - 1) // self.window

    @property
    def class_size(self) -> int:
        """A."""
        return (self.length + self.dilation - 1) // self.dilation

    def blocks(self, x: Tensor) -> Tensor:
        """Positions in blocks of k: (R, L, ...) -> (R, B, W, ...). Beyond the last, the last again."""
        number, size = self.num_blocks, self.window
        return _gathered(x, torch.arange(number * size, device=x.device), number, size)

    def blocks_with_previous(self, x: Tensor) -> Tensor:
        """Each block behind the one before it: (R, L, ...) -> (R, B, 2 W, ...). Before the first, the first again."""
        number, size = self.num_blocks, self.window
        place = torch.arange(number * 2 * size, device=x.device)
        return _gathered(x, place // (2 * size) * size + place % (2 * size) - size, number, 2 * size)

    def classes(self, x: Tensor) -> Tensor:
        """Positions by their remainder, in order: (R, L, ...) -> (R, C, A, ...). Beyond the last, the last again."""
        number, size = self.dilation, self.class_size
        place = torch.arange(number * size, device=x.device)
        return _gathered(x, place % size * number + place // size, number, size)

    def of_blocks(self, by_block: Tensor, length: int) -> Tensor:
        """The inverse of :meth:`blocks`: (R, B, W, ...) -> (R, L, ...)."""
        position = torch.arange(length, device=by_block.device).clamp(max=self.length - 1)
        return by_block.flatten(1, 2).index_select(1, position)

    def of_classes(self, by_class: Tensor, length: int) -> Tensor:
        """The inverse of :meth:`classes`: (R, C, A, ...) -> (R, L, ...)."""
        position = torch.arange(length, device=by_class.device).clamp(max=self.length - 1)
        at = position % self.dilation * self.class_size + position // self.dilation
        return by_class.flatten(1, 2).index_select(1, at)


def _gathered(x: Tensor, positions: Tensor, outer: int, inner: int) -> Tensor:
    """``x`` (R, L, ...) at ``positions`` (outer * inner,), those outside cut to the ends, where nobody reads."""
    taken = x.index_select(1, positions.clamp(0, x.shape[1] - 1))
    return taken.view(x.shape[0], outer, inner, *x.shape[2:])


def local_offsets(sparsity: Sparsity, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Offsets ``i - j`` of local pairs, (1, W, 2 W), and whether each is allowed, (B, W, 2 W)."""
    window = sparsity.window
    here = torch.arange(window, device=device)
    there = torch.arange(2 * window, device=device) - window
    offsets = (here.unsqueeze(1) - there).unsqueeze(0)
    begins = torch.arange(sparsity.num_blocks, device=device).view(-1, 1, 1) * window
    return offsets, (offsets >= 0) & (offsets < window) & (begins + there >= 0)


def dilated_offsets(
    sparsity: Sparsity, *, at_least: int = 0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Offsets ``i - j`` of pairs of one residue class, and whether each is allowed: both (1, A, A).

    Args:
        at_least: smallest offset allowed; the window, where the local pairs are counted elsewhere.
    """
    offsets = (dense_offsets(sparsity.class_size, device) * sparsity.dilation).unsqueeze(0)
    return offsets, offsets >= at_least


def local_dilated_attention(
    query: Tensor, key: Tensor, value: Tensor, local_bias: Tensor, dilated_bias: Tensor, sparsity: Sparsity
) -> Tensor:
    r"""As :func:`causal_attention` over the union of local and dilated pairs, each pair counted once.

    Source: LightSUAN; the formulas are a reconstruction (see the module).

    Args:
        query, key, value: (R, H, L, d).
        local_bias: (R or 1, H or 1, B, W, 2 W).
        dilated_bias: (R or 1, H or 1, C or 1, A, A); ``-inf`` where the local part has the pair.
        sparsity: the pairs.

    Returns:
        (R, H, L, d).
    """
    length, heads = query.shape[2], query.shape[1]
    local_BW = _local_scores(query, key, sparsity) + local_bias
    dilated_CA = _dilated_scores(query, key, sparsity) + dilated_bias
    # Per query, in the order of the sequence: its 2 W local scores, then its A dilated ones.
    local_L = sparsity.of_blocks(local_BW.flatten(0, 1), length)
    dilated_L = sparsity.of_classes(dilated_CA.flatten(0, 1), length)
    weights = torch.softmax(torch.cat([local_L, dilated_L], dim=2), dim=2)
    local_weights, dilated_weights = weights.split([local_L.shape[2], dilated_L.shape[2]], dim=2)
    local = _local_sum(sparsity.blocks(local_weights), value, sparsity)
    dilated = _dilated_sum(sparsity.classes(dilated_weights), value, sparsity)
    return (local + dilated).unflatten(0, (-1, heads))  # type: ignore[no-any-return]


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, local_bias: Tensor, dilated_bias: Tensor, sparsity: Sparsity
) -> Tensor:
    """As :func:`local_dilated_attention`, the first H // 2 heads local and the others dilated, each with its softmax.

    Args:
        local_bias: (R or 1, H // 2 or 1, B, W, 2 W).
        dilated_bias: (R or 1, H - H // 2 or 1, C or 1, A, A), every causal pair of a class allowed.
    """
    heads = query.shape[1]
    half = heads // 2
    local = torch.softmax(_local_scores(query[:, :half], key[:, :half], sparsity) + local_bias, dim=4)
    dilated = torch.softmax(_dilated_scores(query[:, half:], key[:, half:], sparsity) + dilated_bias, dim=4)
    near = _local_sum(local.flatten(0, 1), value[:, :half], sparsity).unflatten(0, (-1, half))
    far = _dilated_sum(dilated.flatten(0, 1), value[:, half:], sparsity).unflatten(0, (-1, heads - half))
    return torch.cat([near, far], dim=1)


def _local_scores(query: Tensor, key: Tensor, sparsity: Sparsity) -> Tensor:
    """(R, H, B, W, 2 W)."""
    query_BWd = sparsity.blocks(query.flatten(0, 1) * query.shape[3] ** -0.5)
    scores = query_BWd @ sparsity.blocks_with_previous(key.flatten(0, 1)).transpose(2, 3)
    return scores.unflatten(0, (-1, query.shape[1]))  # type: ignore[no-any-return]


def _dilated_scores(query: Tensor, key: Tensor, sparsity: Sparsity) -> Tensor:
    """(R, H, C, A, A)."""
    query_CAd = sparsity.classes(query.flatten(0, 1) * query.shape[3] ** -0.5)
    scores = query_CAd @ sparsity.classes(key.flatten(0, 1)).transpose(2, 3)
    return scores.unflatten(0, (-1, query.shape[1]))  # type: ignore[no-any-return]


def _local_sum(weights: Tensor, value: Tensor, sparsity: Sparsity) -> Tensor:
    """Weights (R H, B, W, 2 W), value (R, H, L, d) -> (R H, L, d)."""
    return sparsity.of_blocks(weights @ sparsity.blocks_with_previous(value.flatten(0, 1)), value.shape[2])


def _dilated_sum(weights: Tensor, value: Tensor, sparsity: Sparsity) -> Tensor:
    """Weights (R H, C, A, A), value (R, H, L, d) -> (R H, L, d)."""
    return sparsity.of_classes(weights @ sparsity.classes(value.flatten(0, 1)), value.shape[2])


def candidate_attention(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    own_bias: Tensor,
    request_of_row: Tensor | None,
) -> Tensor:
    r"""Every candidate attends to the events of its request and to itself.

    .. math:: o_n = \sum_{j \le L} \operatorname{softmax}_j(\cdot)\, v_j + \operatorname{softmax}_n(\cdot)\, v_n

    with one softmax over the events and the candidate.

    Args:
        query, own_key, own_value: (N, H, d).
        key, value: (R, H, L, d).
        bias: (R, H or 1, L), ``-inf`` where an event is not there.
        own_bias: (H or 1,), of a candidate with itself.
        request_of_row: (N,) int64 in [0, R); None where R = 1: nothing is then gathered to rows.

    Returns:
        (N, H, d).
    """
    scale = query.shape[2] ** -0.5
    own_NH1 = (query * own_key).sum(2, keepdim=True) * scale + own_bias.view(1, -1, 1)
    scores_NHL = _scores_of_rows(query * scale, key, request_of_row) + _of_rows(bias, request_of_row)
    weights = torch.softmax(torch.cat([scores_NHL, own_NH1], dim=2), dim=2)
    events_NHL, own_NH1 = weights.split([scores_NHL.shape[2], 1], dim=2)
    return _sums_of_rows(events_NHL, value, request_of_row) + own_NH1 * own_value  # type: ignore[no-any-return]


def token_attention(query: Tensor, key: Tensor, value: Tensor, request_of_row: Tensor | None) -> Tensor:
    """Every candidate attends to the tokens of its request, all of which are there.

    Args:
        query: (N, H, d).
        key, value: (R, H, U, d), U tokens.
        request_of_row: as in :func:`candidate_attention`.

    Returns:
        (N, H, d).
    """
    weights = torch.softmax(_scores_of_rows(query * query.shape[2] ** -0.5, key, request_of_row), dim=2)
    return _sums_of_rows(weights, value, request_of_row)


def _of_rows(x: Tensor, request_of_row: Tensor | None) -> Tensor:
    # index_select: its gradient is an index_add, several times faster on a CPU than that of indexing.
    return x if request_of_row is None else x.index_select(0, request_of_row)


def _scores_of_rows(query: Tensor, key: Tensor, request_of_row: Tensor | None) -> Tensor:
    """(N, H, L)."""
    if request_of_row is None:
        return (query.transpose(0, 1) @ key.squeeze(0).transpose(1, 2)).transpose(0, 1)
    rows_NHLd = key.index_select(0, request_of_row)
    return (rows_NHLd @ query.unsqueeze(3)).squeeze(3)


def _sums_of_rows(weights: Tensor, value: Tensor, request_of_row: Tensor | None) -> Tensor:
    """(N, H, d)."""
    if request_of_row is None:
        return (weights.transpose(0, 1) @ value.squeeze(0)).transpose(0, 1)
    return (weights.unsqueeze(2) @ value.index_select(0, request_of_row)).squeeze(2)
