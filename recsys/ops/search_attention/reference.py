r"""Search attention in plain torch: the definition, the training path, and what is exported.

Two stages over a history of L events, for a candidate with query :math:`q`:

.. math:: s_j = \langle q, k_j \rangle \quad (j < L), \qquad
          \mathcal{I} = \operatorname{top-}K_j\, u_j, \qquad
          h = \sum_{j \in \mathcal{I}} \operatorname{softmax}_{j \in \mathcal{I}}(s_j)\, v_j

The *search* scores :math:`u` choose the events, the *attention* scores :math:`s` weigh them; TWIN and DARE use the same
ones for both. Only chosen events are read from the values: the search costs L times the width of a key, the rest K
times the width of a value.

Shapes: R requests, N candidates (rows), L events, K events to choose, D width of a key, V width of a value.

Each function has two forms that can be exported whole: any number of requests, and a single one, for which nothing of
the history is gathered to rows but the chosen events.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def relevance(query: Tensor, keys: Tensor, request_of_row: Tensor) -> Tensor:
    r"""Inner product of every candidate with every event of its request, :math:`\langle q_n, k_j \rangle`.

    Args:
        query: (N, D).
        keys: (R, L, D).
        request_of_row: (N,) int64 in [0, R).

    Returns:
        (N, L), padding too.
    """
    return torch.bmm(keys.index_select(0, request_of_row), query.unsqueeze(2)).squeeze(2)


def relevance_single_request(query: Tensor, keys: Tensor) -> Tensor:
    """As :func:`relevance` where R = 1: ``keys`` (1, L, D)."""
    return query @ keys.squeeze(0).t()


def top_k_pool(
    search: Tensor, scores: Tensor, values: Tensor, lengths: Tensor, request_of_row: Tensor, top_k: int
) -> Tensor:
    """Pools the values of each candidate's K best events, weighted by a softmax of their scores.

    A history shorter than K is pooled whole; an empty one gives zeros. Which of two events of equal search score is
    chosen is not specified. The choice has no gradient.

    Args:
        search: (N, L) what the events are chosen by; may be ``scores`` itself.
        scores: (N, L) what they are weighed by.
        values: (R, L, V); what lies at and beyond a length has no effect.
        lengths: (R,) int64 in [0, L].
        request_of_row: (N,) int64 in [0, R).
        top_k: K, at least 1.

    Returns:
        (N, V).
    """
    positions_NK, weights_NK = _chosen(search, scores, lengths.index_select(0, request_of_row), top_k)
    rows_NK = positions_NK + request_of_row.unsqueeze(1) * values.shape[1]
    return _pooled(weights_NK, values.flatten(0, 1), rows_NK)


def top_k_pool_single_request(search: Tensor, scores: Tensor, values: Tensor, lengths: Tensor, top_k: int) -> Tensor:
    """As :func:`top_k_pool` where R = 1: ``values`` (1, L, V), ``lengths`` (1,)."""
    positions_NK, weights_NK = _chosen(search, scores, lengths, top_k)
    return _pooled(weights_NK, values.squeeze(0), positions_NK)


def attention_pool(scores: Tensor, values: Tensor, lengths: Tensor, request_of_row: Tensor) -> Tensor:
    """Pools all events of each candidate's history, weighted by a softmax of their scores: K = L.

    Arguments are those of :func:`top_k_pool`. Returns (N, V); zeros where the history is empty.
    """
    weights_NL = _softmax(scores, _valid(scores, lengths.index_select(0, request_of_row)))
    return torch.bmm(weights_NL.unsqueeze(1), values.index_select(0, request_of_row)).squeeze(1)


def attention_pool_single_request(scores: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """As :func:`attention_pool` where R = 1: ``values`` (1, L, V), ``lengths`` (1,)."""
    return _softmax(scores, _valid(scores, lengths)) @ values.squeeze(0)


def _valid(scores: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device) < lengths.unsqueeze(1)


def _softmax(scores: Tensor, valid: Tensor) -> Tensor:
    # The lowest finite number rather than -inf: a row without events stays finite, and is then zeroed.
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~valid, lowest), dim=1).masked_fill(~valid, 0.0)


def _chosen(search: Tensor, scores: Tensor, lengths: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Positions (N, K) of the best events and their weights (N, K), 0 where there are fewer than K."""
    lowest = torch.finfo(search.dtype).min
    # K places more than the history has, so that there are always K to choose from.
    masked_NL = functional.pad(search.detach().masked_fill(~_valid(search, lengths), lowest), (0, top_k), value=lowest)
    positions_NK = masked_NL.topk(top_k, dim=1, sorted=False).indices
    valid_NK = positions_NK < lengths.unsqueeze(1)
    positions_NK = positions_NK.clamp(max=search.shape[1] - 1)
    return positions_NK, _softmax(scores.gather(1, positions_NK), valid_NK)


def _pooled(weights: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """``sum_k weights[n, k] values[rows[n, k]]``."""
    # index_select: its gradient is an index_add, several times faster on a CPU than that of indexing.
    chosen_NKV = values.index_select(0, rows.flatten()).view(*rows.shape, values.shape[1])
    return torch.bmm(weights.unsqueeze(1), chosen_NKV).squeeze(1)
