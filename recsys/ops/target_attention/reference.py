r"""Target attention in plain torch: the definition, the training path, and what is exported.

The activation unit of DIN scores a candidate (query) :math:`q` against an event (key) :math:`k` by a small network on
:math:`[q; k; q - k; q \odot k]`. Written that way, its input alone is N x L x 4D numbers, the history copied to every
candidate. The first layer, however, is linear, so that with :math:`W = [W_q, W_k, W_d, W_p]`

.. math:: W [q; k; q - k; q \odot k] + b
          = \underbrace{\big( W_p \operatorname{diag}(q) + W_k - W_d \big)}_{W_m\text{, one a candidate}} k
          + \underbrace{(W_q + W_d) q + b}_{\text{one a candidate}}

and the whole first layer is one product of small matrices with the keys as they are: no difference, no product and no
copy of the history for each pair. The arithmetic is about a quarter, the memory N x L x H instead of N x L x 4D.

Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, section 4.3 (the unit).
Differs from source: the algebra above; equal in exact arithmetic.

Shapes: R requests, N candidates (rows), L events, D width of a query, E width of what only keys have, H hidden width. A
key is ``[what the query also has (D); what only events have (E)]``; difference and product are over the first D.

There are two code forms, each of which can be exported whole: any number of requests (keys gathered to rows), and a
single request (one product ``[L, D + E] x [D + E, N * H]``, nothing gathered).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor, Tensor], Tensor]
"""``(x (P, H), valid (P,)) -> (P, H)`` over P pairs of a candidate and an event, ``valid`` where the event is real."""


class UnitWeights(NamedTuple):
    """Weights of an activation unit, the first layer folded.

    Attributes:
        query: (H, D), :math:`W_q + W_d`.
        key: (H, D + E), :math:`W_k`, less :math:`W_d` in its first D columns.
        product: (H, D), :math:`W_p`.
        bias: (H,).
        hidden: further dense layers, each ``(weight (H_next, H), bias (H_next,))``.
        output: (H_last,) weights of the score.
        output_bias: () bias of the score.
    """

    query: Tensor
    key: Tensor
    product: Tensor
    bias: Tensor
    hidden: tuple[tuple[Tensor, Tensor], ...]
    output: Tensor
    output_bias: Tensor


def target_attention(
    query: Tensor,
    keys: Tensor,
    lengths: Tensor,
    request_of_row: Tensor,
    weights: UnitWeights,
    activations: Sequence[Activation],
) -> Tensor:
    r"""Sums each candidate's history, every event weighted by the activation unit; weights are *not* normalised.

    .. math:: v_n = \sum_{j < \mathrm{length}} a(q_n, k_j)\, k_j

    Source: Zhou et al., KDD 2018, equation 3: no softmax, so that the magnitude carries the intensity of the interest.

    Args:
        query: (N, D) candidates.
        keys: (R, L, D + E) histories; what lies at and beyond a length is finite, and has no effect.
        lengths: (R,) int64 in [0, L].
        request_of_row: (N,) int64 in [0, R).
        weights: of the activation unit.
        activations: one after the first layer, and one after each further layer.

    Returns:
        (N, D + E); zeros where the history is empty.
    """
    scores_NL, rows_NLD, valid_NL = _scores_of_rows(query, keys, lengths, request_of_row, weights, activations)
    return _pool_rows(_masked(scores_NL, valid_NL), rows_NLD)


def softmax_target_attention(
    query: Tensor,
    keys: Tensor,
    lengths: Tensor,
    request_of_row: Tensor,
    weights: UnitWeights,
    activations: Sequence[Activation],
) -> Tensor:
    r"""As :func:`target_attention`, the weights normalised over the history.

    .. math:: v_n = \sum_{j < \mathrm{length}} \operatorname{softmax}_j\!\big(a(q_n, k_j) / \sqrt{D + E}\big)\, k_j

    Source: the authors' code (zhougr1993/DeepInterestNetwork, din/model.py), which divides by the root of the keys'
    width. Differs from source: an empty history gives zeros; there, it would average the padding.
    """
    scores_NL, rows_NLD, valid_NL = _scores_of_rows(query, keys, lengths, request_of_row, weights, activations)
    return _pool_rows(_softmax(scores_NL, valid_NL, keys.shape[2]), rows_NLD)


def target_attention_single_request(
    query: Tensor, keys: Tensor, lengths: Tensor, weights: UnitWeights, activations: Sequence[Activation]
) -> Tensor:
    """As :func:`target_attention` where R = 1: ``keys`` (1, L, D + E), ``lengths`` (1,)."""
    scores_NL, keys_LD, valid_L = _scores_of_request(query, keys, lengths, weights, activations)
    return _masked(scores_NL, valid_L) @ keys_LD


def softmax_target_attention_single_request(
    query: Tensor, keys: Tensor, lengths: Tensor, weights: UnitWeights, activations: Sequence[Activation]
) -> Tensor:
    """As :func:`softmax_target_attention` where R = 1: ``keys`` (1, L, D + E), ``lengths`` (1,)."""
    scores_NL, keys_LD, valid_L = _scores_of_request(query, keys, lengths, weights, activations)
    return _softmax(scores_NL, valid_L, keys.shape[2]) @ keys_LD


def _scores_of_rows(
    query: Tensor,
    keys: Tensor,
    lengths: Tensor,
    request_of_row: Tensor,
    weights: UnitWeights,
    activations: Sequence[Activation],
) -> tuple[Tensor, Tensor, Tensor]:
    valid_RL = _valid(keys, lengths)
    # index_select: its gradient is an index_add, several times faster on a CPU than that of indexing.
    rows_NLD = keys.index_select(0, request_of_row)
    valid_NL = valid_RL.index_select(0, request_of_row)
    folded_NHD, bias_NH = _fold(query, weights)
    hidden_NLH = torch.baddbmm(bias_NH.unsqueeze(1), rows_NLD, folded_NHD.transpose(1, 2))
    scores = _rest_of_unit(hidden_NLH.flatten(0, 1), valid_NL.flatten(), weights, activations)
    return scores.view(valid_NL.shape), rows_NLD, valid_NL


def _scores_of_request(
    query: Tensor, keys: Tensor, lengths: Tensor, weights: UnitWeights, activations: Sequence[Activation]
) -> tuple[Tensor, Tensor, Tensor]:
    valid_L = _valid(keys, lengths).squeeze(0)
    keys_LD = keys.squeeze(0)
    folded_NHD, bias_NH = _fold(query, weights)
    hidden_LNH = torch.addmm(bias_NH.flatten(), keys_LD, folded_NHD.flatten(0, 1).t()).view(-1, bias_NH.shape[1])
    valid_LN = valid_L.unsqueeze(1).expand(-1, query.shape[0])
    scores = _rest_of_unit(hidden_LNH, valid_LN.flatten(), weights, activations)
    return scores.view(valid_LN.shape).t(), keys_LD, valid_L


def _valid(keys: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(keys.shape[1], device=keys.device) < lengths.unsqueeze(1)


def _fold(query: Tensor, weights: UnitWeights) -> tuple[Tensor, Tensor]:
    """Each candidate's own first layer: weight (N, H, D + E) and bias (N, H)."""
    width = query.shape[1]
    shared_HD, only_keys_HE = weights.key[:, :width], weights.key[:, width:]
    folded = torch.addcmul(shared_HD, weights.product, query.unsqueeze(1))
    if only_keys_HE.shape[1] > 0:
        folded = torch.cat([folded, only_keys_HE.expand(query.shape[0], -1, -1)], dim=2)
    return folded, torch.addmm(weights.bias, query, weights.query.t())


def _rest_of_unit(hidden: Tensor, valid: Tensor, weights: UnitWeights, activations: Sequence[Activation]) -> Tensor:
    """From the first layer of every pair (pairs, H), of padding too, to its score (pairs,)."""
    hidden = activations[0](hidden, valid)
    for (weight, bias), activation in zip(weights.hidden, activations[1:], strict=True):
        hidden = activation(functional.linear(hidden, weight, bias), valid)
    return torch.mv(hidden, weights.output) + weights.output_bias


def _masked(scores: Tensor, valid: Tensor) -> Tensor:
    return scores.masked_fill(~valid, 0.0)


def _softmax(scores: Tensor, valid: Tensor, width: int) -> Tensor:
    # DIFF(code): an empty history gives zeros, because an average of padding means nothing.
    # The lowest finite number rather than -inf: a row without events stays finite, and is then zeroed.
    lowest = torch.finfo(scores.dtype).min
    return _masked(torch.softmax((scores / math.sqrt(width)).masked_fill(~valid, lowest), dim=1), valid)


def _pool_rows(weights: Tensor, rows: Tensor) -> Tensor:
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
