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

Source: Lai et al., "SUAN" (RecSys 2025, arXiv 2508.15326) for masks, bias and the two patterns. The block forms are
ours; they are equal in exact arithmetic.

Shapes: R requests, N candidates (rows), H heads, L events, d width of a head, W block = k, B blocks, C residue classes
= r, A events of a class. A bias is added to the scores; it is ``-inf`` where a pair is not allowed, has 1 or H heads,
and allows at least one key of every query.
"""

from __future__ import annotations

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


def blocks(x: Tensor, size: int) -> Tensor:
    """Positions in blocks of ``size``, zeros after the last: (R, L, ...) -> (R, B, W, ...)."""
    padded, number = _padded(x, size)
    return padded.view(x.shape[0], number, size, *x.shape[2:])


def blocks_with_previous(x: Tensor, size: int) -> Tensor:
    """Each block behind the one before it (zeros before the first): (R, L, ...) -> (R, B, 2 W, ...)."""
    block = blocks(x, size)
    previous = torch.cat([torch.zeros_like(block[:, :1]), block[:, :-1]], dim=1)
    return torch.cat([previous, block], dim=2)


def classes(x: Tensor, number: int) -> Tensor:
    """Positions by their remainder, in order, zeros after the last: (R, L, ...) -> (R, C, A, ...)."""
    padded, size = _padded(x, number)
    return padded.view(x.shape[0], size, number, *x.shape[2:]).transpose(1, 2)


def _padded(x: Tensor, multiple: int) -> tuple[Tensor, int]:
    """Zeros appended to dimension 1 up to a multiple, and how many times it goes."""
    length = x.shape[1]
    number = (length + multiple - 1) // multiple
    # A block of zeros, then a cut: an exported program need not prove that a padding is not negative.
    zeros = x.new_zeros(x.shape[0], multiple, *x.shape[2:])
    return torch.cat([x, zeros], dim=1).narrow(1, 0, number * multiple), number


def local_offsets(window: int, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Offsets ``i - j`` of local pairs, (1, W, 2 W), and whether each is allowed, (B, W, 2 W)."""
    here = torch.arange(window, device=device)
    there = torch.arange(2 * window, device=device) - window
    offsets = (here.unsqueeze(1) - there).unsqueeze(0)
    number = (length + window - 1) // window
    begins = torch.arange(number, device=device).view(-1, 1, 1) * window
    return offsets, (offsets >= 0) & (offsets < window) & (begins + there >= 0)


def dilated_offsets(
    dilation: int, length: int, *, at_least: int = 0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Offsets ``i - j`` of pairs of one residue class, and whether each is allowed: both (1, A, A).

    Args:
        at_least: smallest offset allowed; the window, where the local pairs are counted elsewhere.
    """
    offsets = (dense_offsets((length + dilation - 1) // dilation, device) * dilation).unsqueeze(0)
    return offsets, offsets >= at_least


def local_dilated_attention(
    query: Tensor, key: Tensor, value: Tensor, local_bias: Tensor, dilated_bias: Tensor, *, window: int, dilation: int
) -> Tensor:
    r"""As :func:`causal_attention` over the union of local and dilated pairs, each pair counted once.

    Source: LightSUAN (section 4 of its read-throughs; the formulas are a reconstruction, see the model).

    Args:
        query, key, value: (R, H, L, d).
        local_bias: (R or 1, H or 1, B, W, 2 W), W = ``window``.
        dilated_bias: (R or 1, H or 1, C, A, A), C = ``dilation``; ``-inf`` where the local part has the pair.
        window: k, at least 1.
        dilation: r, at least 1.

    Returns:
        (R, H, L, d).
    """
    length = query.shape[2]
    local_BW = _local_scores(query, key, window) + local_bias
    dilated_CA = _dilated_scores(query, key, dilation) + dilated_bias
    # Per query, in the order of the sequence: its 2 W local scores, then its A dilated ones.
    local_L = local_BW.flatten(2, 3).narrow(2, 0, length)
    dilated_L = dilated_CA.transpose(2, 3).flatten(2, 3).narrow(2, 0, length)
    weights = torch.softmax(torch.cat([local_L, dilated_L], dim=3), dim=3)
    local_weights, dilated_weights = weights.split([local_L.shape[3], dilated_L.shape[3]], dim=3)
    return _local_sum(local_weights, value, window) + _dilated_sum(dilated_weights, value, dilation)


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, local_bias: Tensor, dilated_bias: Tensor, *, window: int, dilation: int
) -> Tensor:
    """As :func:`local_dilated_attention`, the first H // 2 heads local and the others dilated, each with its softmax.

    Args:
        local_bias: (R or 1, H // 2 or 1, B, W, 2 W).
        dilated_bias: (R or 1, H - H // 2 or 1, C, A, A), every causal pair of a class allowed.
    """
    length, half = query.shape[2], query.shape[1] // 2
    local = torch.softmax(_local_scores(query[:, :half], key[:, :half], window) + local_bias, dim=4)
    dilated = torch.softmax(_dilated_scores(query[:, half:], key[:, half:], dilation) + dilated_bias, dim=4)
    near = _local_sum(local.flatten(2, 3).narrow(2, 0, length), value[:, :half], window)
    far = _dilated_sum(dilated.transpose(2, 3).flatten(2, 3).narrow(2, 0, length), value[:, half:], dilation)
    return torch.cat([near, far], dim=1)


def _by_head(x: Tensor, form: Tensor) -> Tensor:
    """(R H, ...) -> (R, H, ...) of the tensor ``x`` (R, H, L, d)."""
    return form.view(x.shape[0], x.shape[1], *form.shape[1:])


def _local_scores(query: Tensor, key: Tensor, window: int) -> Tensor:
    """(R, H, B, W, 2 W)."""
    query_BWd = blocks(query.flatten(0, 1) * query.shape[3] ** -0.5, window)
    return _by_head(query, query_BWd @ blocks_with_previous(key.flatten(0, 1), window).transpose(2, 3))


def _dilated_scores(query: Tensor, key: Tensor, dilation: int) -> Tensor:
    """(R, H, C, A, A)."""
    query_CAd = classes(query.flatten(0, 1) * query.shape[3] ** -0.5, dilation)
    return _by_head(query, query_CAd @ classes(key.flatten(0, 1), dilation).transpose(2, 3))


def _local_sum(weights: Tensor, value: Tensor, window: int) -> Tensor:
    """Weights (R, H, L, 2 W) -> (R, H, L, d)."""
    summed = blocks(weights.flatten(0, 1), window) @ blocks_with_previous(value.flatten(0, 1), window)
    return _by_head(value, summed.flatten(1, 2)).narrow(2, 0, value.shape[2])


def _dilated_sum(weights: Tensor, value: Tensor, dilation: int) -> Tensor:
    """Weights (R, H, L, A) -> (R, H, L, d)."""
    summed = classes(weights.flatten(0, 1), dilation) @ classes(value.flatten(0, 1), dilation)
    return _by_head(value, summed.transpose(1, 2).flatten(1, 2)).narrow(2, 0, value.shape[2])


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
    return _sums_of_rows(events_NHL, value, request_of_row) + own_NH1 * own_value


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
