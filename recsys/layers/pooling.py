"""Pooling of histories whatever the candidate: the mean.

Shapes: R requests, N candidates (rows), L history length, D width of an event.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mean_of_events(events: Tensor, lengths: Tensor) -> Tensor:
    r"""The mean of each history's real events, 0 for an empty history.

    .. math:: v_r = \frac{1}{L_r} \sum_{l=1}^{L_r} e_{r,l}

    One product of shares with events: a CPU does it faster, backward too, than to clear the padding and add up.

    Args:
        events: (R, L, D), finite beyond a length too.
        lengths: (R,) int64 in [0, L].

    Returns:
        (R, D).

    Example:
        >>> mean_of_events(torch.tensor([[[1.0], [3.0], [100.0]]]), torch.tensor([2])).tolist()
        [[2.0]]
    """
    valid_RL = torch.arange(events.shape[1], device=events.device) < lengths.unsqueeze(1)
    share_RL = valid_RL.to(events.dtype) / lengths.clamp(min=1).unsqueeze(1).to(events.dtype)
    return (share_RL.unsqueeze(1) @ events).squeeze(1)


class MeanPooling(nn.Module):
    """The mean of a history, whatever the candidate: what target attention is compared with.

    See :func:`mean_of_events` for the maths. It is called as :class:`~recsys.layers.TargetAttention` is and does not
    read the query.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, section 4.2 (BaseModel;
    the paper pools by sum or mean).

    Shape:
        query (N, D), keys (R, L, D + E), lengths (R,), request_of_row (N,) -> (N, D + E).

    Example:
        >>> keys, lengths = torch.tensor([[[1.0], [3.0], [100.0]]]), torch.tensor([2])
        >>> MeanPooling()(torch.zeros(2, 1), keys, lengths, torch.zeros(2, dtype=torch.int64)).tolist()
        [[2.0], [2.0]]
    """

    def forward(self, query: Tensor, keys: Tensor, lengths: Tensor, request_of_row: Tensor) -> Tensor:  # noqa: ARG002
        """Pools every row's history: -> (N, D + E)."""
        return mean_of_events(keys, lengths).index_select(0, request_of_row)

    def single_request(self, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """The same where all rows are of one request: keys (1, L, D + E), lengths (1,)."""
        return mean_of_events(keys, lengths).expand(query.shape[0], -1)
