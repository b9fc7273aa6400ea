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

_EIGHT = 8


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


def relevance_single_request(query: Tensor, keys: Tensor, own: Tensor, lengths: Tensor) -> Tensor:
    r"""As :func:`relevance` where R = 1, ready to be searched: :math:`\langle q_n, k_j \rangle + o_j`, padding lowest.

    What is added and what is masked goes into the product, so that no further pass over N x L numbers is made.

    Args:
        query: (N, D).
        keys: (1, L, D).
        own: (1, L) added to the scores of all candidates.
        lengths: (1,) int64 in [0, L].

    Returns:
        (N, L'), L' the multiple of 8 that :func:`best` wants; the lowest number, or minus infinity, at and beyond the
        length.
    """
    lowest = torch.finfo(own.dtype).min
    masked_1L = functional.pad(
        own.masked_fill(~_valid(own, lengths), lowest), (0, _missing(own.shape[1])), value=lowest
    )
    keys_LD = functional.pad(keys, (0, 0, 0, _missing(keys.shape[1]))).squeeze(0)
    return torch.addmm(masked_1L, query, keys_LD.t())


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
    lengths_N = lengths.index_select(0, request_of_row)
    positions_NK, weights_NK = _weighed(best(masked(search, lengths_N), top_k), scores, lengths_N)
    rows_NK = positions_NK + request_of_row.unsqueeze(1) * values.shape[1]
    return _pooled(weights_NK, values.flatten(0, 1), rows_NK)


def top_k_pool_single_request(search: Tensor, scores: Tensor, values: Tensor, lengths: Tensor, top_k: int) -> Tensor:
    """As :func:`top_k_pool` where R = 1: ``values`` (1, L, V), ``lengths`` (1,).

    ``search`` and ``scores`` are as :func:`relevance_single_request` gives them.
    """
    positions_NK, weights_NK = _weighed(best(search, top_k), scores, lengths)
    return _pooled(weights_NK, values.squeeze(0), positions_NK.clamp(max=values.shape[1] - 1))


def masked(search: Tensor, lengths: Tensor) -> Tensor:
    """Scores (N, L) as :func:`best` takes them: L' wide, the lowest number at and beyond a length."""
    lowest = torch.finfo(search.dtype).min
    return functional.pad(
        search.masked_fill(~_valid(search, lengths), lowest), (0, _missing(search.shape[1])), value=lowest
    )


def _missing(length: int) -> int:
    """From L to L'. Two eights at least: what is exported must not take the number of eights for a one."""
    return _EIGHT * ((length + _EIGHT - 1) // _EIGHT + 1) - length


def best(search: Tensor, top_k: int) -> Tensor:
    """Positions (N, K) of the events of the highest scores, in no order; without gradient.

    The highest of every eight events are found first, then the best K eights, then the best K of these: torch's
    selection takes several times as long as its maximum, and so sees L / 8 + 8 K numbers a row instead of L.

    Args:
        search: (N, L'), L' a multiple of 8, at least 16; see :func:`masked`.
        top_k: K, at least 1.

    Returns:
        int64. Where a history has fewer than K events: all of these, and positions at or beyond its length, perhaps
        beyond L' too.
    """
    # unfold rather than view: an exported program cannot prove that the length is so many eights.
    eights_NE8 = search.detach().unfold(1, _EIGHT, _EIGHT)
    num_eights, lowest = eights_NE8.shape[1], torch.finfo(search.dtype).min
    # K eights more than there are, so that there are always K to choose from.
    highest_NE = functional.pad(eights_NE8.amax(2), (0, top_k), value=lowest)
    chosen_NK = highest_NE.topk(top_k, dim=1, sorted=False).indices
    offered_NK8 = eights_NE8.gather(1, chosen_NK.clamp(max=num_eights - 1).unsqueeze(2).expand(-1, -1, _EIGHT))
    # One that is not there offers nothing: the last one must not be offered twice.
    offered_NK8 = offered_NK8.masked_fill((chosen_NK >= num_eights).unsqueeze(2), -torch.inf)
    best_NK = offered_NK8.flatten(1).topk(top_k, dim=1, sorted=False).indices
    return chosen_NK.gather(1, best_NK // _EIGHT) * _EIGHT + best_NK % _EIGHT


def attention_pool(scores: Tensor, values: Tensor, lengths: Tensor, request_of_row: Tensor) -> Tensor:
    """Pools all events of each candidate's history, weighted by a softmax of their scores: K = L.

    Arguments are those of :func:`top_k_pool`. Returns (N, V); zeros where the history is empty.
    """
    weights_NL = _softmax(scores, _valid(scores, lengths.index_select(0, request_of_row)))
    return torch.bmm(weights_NL.unsqueeze(1), values.index_select(0, request_of_row)).squeeze(1)


def _valid(scores: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device) < lengths.unsqueeze(1)


def _softmax(scores: Tensor, valid: Tensor) -> Tensor:
    # The lowest finite number rather than -inf: a row without events stays finite, and is then zeroed.
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~valid, lowest), dim=1).masked_fill(~valid, 0.0)


def _weighed(positions: Tensor, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen positions (N, K), each within the scores, and their weights (N, K): 0 where there is no event."""
    valid_NK = positions < lengths.unsqueeze(1)
    positions_NK = positions.clamp(max=scores.shape[1] - 1)
    return positions_NK, _softmax(scores.gather(1, positions_NK), valid_NK)


def _pooled(weights: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """``sum_k weights[n, k] values[rows[n, k]]``."""
    # index_select: its gradient is an index_add, several times faster on a CPU than that of indexing.
    chosen_NKV = values.index_select(0, rows.flatten()).view(*rows.shape, values.shape[1])
    return torch.bmm(weights.unsqueeze(1), chosen_NKV).squeeze(1)
