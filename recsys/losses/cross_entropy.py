"""Binary cross-entropy over tasks whose labels may be missing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class LossSums(NamedTuple):
    """A loss that is still to be divided.

    Attributes:
        total: (T,) sum over the rows that have the task's label; differentiable.
        num_labelled: (T,) how many they are, in the dtype of ``total``.
    """

    total: Tensor
    num_labelled: Tensor


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> LossSums:
    r"""Sum over labelled rows, for each task, of the negative log-likelihood in nats.

    .. math:: \ell_t = \sum_{n: y_{nt} \text{ present}}
              \max(z_{nt}, 0) - z_{nt} y_{nt} + \ln\left(1 + e^{-|z_{nt}|}\right)

    Finite, with finite gradients, wherever the logits of labelled rows are. Where a label is missing, the gradient is
    exactly 0 whatever the logit.

    Args:
        logits: (N, T).
        labels: (N, T) 0, 1, or NaN where missing; values between 0 and 1 are soft labels.

    Returns:
        Sums and counts, so that data-parallel ranks can divide by the count of all of them.

    Example:
        >>> sums = binary_cross_entropy(torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [float("nan")]]))
        >>> round(sums.total.item(), 6), sums.num_labelled.item()  # ln 2
        (0.693147, 1.0)
    """
    present = ~torch.isnan(labels)
    # The logit is replaced too: 0 times the gradient at a logit that is not finite would be NaN.
    losses = functional.binary_cross_entropy_with_logits(
        torch.where(present, logits, 0.0), torch.where(present, labels, 0.0).to(logits.dtype), reduction="none"
    )
    return LossSums(torch.where(present, losses, 0.0).sum(0), present.sum(0).to(logits.dtype))


def mean_binary_cross_entropy(
    logits: Tensor, labels: Tensor, *, normaliser: Tensor | None = None, task_weights: Tensor | None = None
) -> Tensor:
    r"""Weighted sum over tasks of each task's mean loss.

    .. math:: L = \sum_t w_t \, \ell_t / c_t

    Args:
        logits: (N, T).
        labels: (N, T) 0, 1, or NaN where missing.
        normaliser: (T,) :math:`c_t`, the labelled rows to divide by: of all ranks together when training in parallel.
            The batch's own if not given. Where it is 0 the task's loss is 0.
        task_weights: (T,) :math:`w_t`; all 1 if not given.

    Returns:
        () loss in nats.

    Example:
        >>> mean_binary_cross_entropy(torch.zeros(4, 2), torch.ones(4, 2)).item() / 2  # ln 2
        0.6931471824645996
    """
    total, num_labelled = binary_cross_entropy(logits, labels)
    means = total / (num_labelled if normaliser is None else normaliser.to(total.dtype)).clamp(min=1)
    return (means if task_weights is None else means * task_weights).sum()
