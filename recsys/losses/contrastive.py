"""Contrastive losses over the rows of a batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from recsys.errors import ConfigError

Similarity = Literal["dot", "cosine"]


def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    groups: Tensor,
    *,
    similarity: Similarity = "cosine",
    temperature: float = 0.1,
    num_negatives: int | None = None,
    counts: Tensor | None = None,
    takes_part: Tensor | None = None,
) -> Tensor:
    r"""InfoNCE whose negatives are the anchors of other groups, summed over rows, in nats.

    .. math:: L = -\sum_i c_i \ln \frac{e^{s(g_i, g_i^+)}}
              {e^{s(g_i, g_i^+)} + \sum_{n: u_n \ne u_i} c_n\, e^{s(g_i, g_n)}}, \qquad
              s(x, y) = \frac{x^\top y}{\tau} \ \text{or}\ \frac{x^\top y}{\tau\, \lVert x \rVert\, \lVert y \rVert}

    A row is never pushed away from another of its own group, such as the same user's other request. A row without any
    negative has the loss 0.

    Source: van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018,
    arXiv 1807.03748, equation 4; in-batch negatives and cosine over a temperature as in Chen et al., "A Simple
    Framework for Contrastive Learning of Visual Representations", ICML 2020, equation 1.

    Differs from source: negatives of the own group are left out; there, the batch holds no two rows of a group.

    Args:
        anchors: (B, K) one vector a row; also the negatives of the other rows.
        positives: (B, K) another view of each row.
        groups: (B,) int64 :math:`u`; rows of one group are not each other's negatives.
        similarity: ``dot`` can be raised by mere length, ``cosine`` cannot.
        temperature: :math:`\tau`, above 0.
        num_negatives: how many each row has at most, the first of other groups that follow it in the batch, round the
            end; all if not given. Of shuffled rows that is a random choice; of rows that lie by request, all may be of
            one group.
        counts: (B,) int64 :math:`c`, how many equal rows each stands for; 1 if not given.
        takes_part: (B,) False: no anchor of its own, a negative of others all the same; all True if not given.

    Returns:
        () sum over rows.

    Raises:
        ConfigError: an argument is outside its domain.

    Example:
        >>> g = torch.eye(4)  # four users, orthogonal, the positive equal to the anchor: ln(1 + 3 / e) each
        >>> round(contrastive_loss(g, g, torch.arange(4), temperature=1.0).item() / 4, 4)
        0.7437
    """
    if temperature <= 0:
        raise ConfigError(f"temperature must be above 0, got {temperature}")
    if num_negatives is not None and num_negatives < 1:
        raise ConfigError(f"num_negatives must be at least 1, got {num_negatives}")
    if similarity not in ("dot", "cosine"):
        raise ConfigError(f"similarity must be 'dot' or 'cosine', got {similarity!r}")
    if similarity == "cosine":
        # The bound on the length keeps the gradient of a vector of zeros finite.
        anchors, positives = (functional.normalize(x, dim=1, eps=1e-6) for x in (anchors, positives))
    if counts is None:
        counts = torch.ones_like(groups)
    positive_B = (anchors * positives).sum(1) / temperature
    negatives_BB = anchors @ anchors.t() / temperature
    # n equal rows are one whose exponential counts n times: ln n on its exponent.
    share_BB = _shares(groups, counts, num_negatives).to(positive_B.dtype)
    is_negative_BB = share_BB > 0
    exponents_BB = torch.where(is_negative_BB, negatives_BB + share_BB.clamp(min=1).log(), -torch.inf)
    losses_B = torch.logsumexp(torch.cat([positive_B.unsqueeze(1), exponents_BB], dim=1), dim=1) - positive_B
    weights_B = counts if takes_part is None else counts * takes_part
    return (losses_B * weights_B.to(losses_B.dtype)).sum()


def _shares(groups: Tensor, counts: Tensor, num_negatives: int | None) -> Tensor:
    """(B, B) int64: how often row n is a negative of row i."""
    others_BB = torch.where(groups.unsqueeze(1) != groups, counts, 0)
    if num_negatives is None:
        return others_BB
    position = torch.arange(len(groups), device=groups.device)
    rolled_BB = (position.unsqueeze(1) + position) % len(groups)  # the row itself, then those after it
    offered_BB = others_BB.gather(1, rolled_BB)
    before_BB = offered_BB.cumsum(1) - offered_BB
    taken_BB = torch.minimum(offered_BB, (num_negatives - before_BB).clamp(min=0))
    return torch.zeros_like(others_BB).scatter(1, rolled_BB, taken_BB)
