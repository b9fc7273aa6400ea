"""Metrics of probability: logloss, normalised entropy, calibration error, reliability."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recsys.metrics.checks import labelled, ordered, positive_int, probabilities_of


def logloss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    r"""Mean negative log-likelihood, in nats.

    .. math:: -\frac1n \sum_i y_i \ln p_i + (1 - y_i) \ln(1 - p_i)

    Nothing is clipped: a probability of exactly 0 or 1 that is wrong costs infinity. Use :func:`logloss_from_logits`
    where there are logits: it stays finite where the sigmoid saturates.

    Args:
        labels: (n,) 0, 1, or NaN for a row that takes no part.
        probabilities: (n,) in [0, 1].

    Returns:
        The logloss; NaN if there are no labelled rows.

    Raises:
        DataError: lengths differ, a label is not 0/1/NaN, a probability is NaN or outside [0, 1].

    Example:
        >>> round(logloss([1, 0], [0.5, 0.5]), 6)  # ln 2
        0.693147
    """
    positive, present = labelled(labels)
    p = probabilities_of(probabilities, length=len(positive))[present]
    positive = positive[present]
    if len(p) == 0:
        return float("nan")
    with np.errstate(divide="ignore"):
        losses = np.where(positive, -np.log(np.where(positive, p, 1.0)), -np.log1p(np.where(positive, 0.0, -p)))
    return float(losses.mean())


def logloss_from_logits(labels: ArrayLike, logits: ArrayLike) -> float:
    r"""Mean negative log-likelihood, in nats, from logits; finite wherever the logits are.

    .. math:: \frac1n \sum_i \max(z_i, 0) - z_i y_i + \ln\left(1 + e^{-|z_i|}\right)

    Returns:
        The logloss; NaN if there are no labelled rows.

    Raises:
        DataError: lengths differ, a label is not 0/1/NaN, a logit is NaN.

    Example:
        >>> round(logloss_from_logits([1, 0], [0.0, 1e4]), 6)  # (ln 2 + 10000) / 2
        5000.346574
    """
    positive, present = labelled(labels)
    z = ordered("logits", logits, length=len(positive))[present].astype(np.float64)
    if len(z) == 0:
        return float("nan")
    return float(np.logaddexp(0.0, np.where(positive[present], -z, z)).mean())


def normalised_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    r"""Logloss divided by the entropy of the labels' own base rate: 1 is no better than a constant, less is better.

    .. math:: \mathrm{NE} = \frac{\mathrm{logloss}}{-\left( q \ln q + (1 - q) \ln(1 - q) \right)}, \qquad q = \bar y

    Source: He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014, equation 3.

    Returns:
        The NE; NaN if there is one class only.

    Raises:
        DataError: as :func:`logloss`.

    Example:
        >>> normalised_entropy([1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25])
        1.0
    """
    return ratio_to_base_entropy(logloss(labels, probabilities), *_counts(labels))


def ratio_to_base_entropy(loss: float, num_positives: int, num_rows: int) -> float:
    """Divides a logloss by the entropy of ``num_positives / num_rows``, in nats; NaN if there is one class only."""
    if num_positives in (0, num_rows):
        return float("nan")
    q = num_positives / num_rows
    return float(loss / -(q * np.log(q) + (1 - q) * np.log1p(-q)))


def _counts(labels: ArrayLike) -> tuple[int, int]:
    positive, present = labelled(labels)
    return int(positive.sum()), int(present.sum())


@dataclass(frozen=True)
class Reliability:
    """Bins of predicted probability against what happened; every array is (num_bins,).

    Attributes:
        lower: lower edge of the bin.
        upper: upper edge of the bin.
        count: labelled rows in the bin.
        mean_probability: mean prediction in the bin; NaN if empty.
        mean_label: share of positives in the bin; NaN if empty.
    """

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    count: NDArray[np.int64]
    mean_probability: NDArray[np.float64]
    mean_label: NDArray[np.float64]


def reliability(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15) -> Reliability:
    """Sorts rows into bins of equal *width*: row ``i`` is in bin ``min(floor(p_i * num_bins), num_bins - 1)``.

    Each bin holds its lower edge and not its upper one, but for the last, which holds 1.

    Raises:
        DataError: as :func:`logloss`, or ``num_bins`` is less than 1.

    Example:
        >>> reliability([0, 1, 1], [0.1, 0.6, 0.9], num_bins=2).mean_label.tolist()
        [0.0, 1.0]
    """
    num_bins = positive_int("num_bins", num_bins)
    positive, p = _labelled_probabilities(labels, probabilities)
    edges = np.arange(num_bins + 1) / num_bins
    return _binned(positive, p, np.minimum((p * num_bins).astype(np.int64), num_bins - 1), edges)


def reliability_by_quantile(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15) -> Reliability:
    """Sorts rows into bins of about equal *count*: for click rates of a few percent, which leave equal widths empty.

    Edges are quantiles of the predictions. Equal predictions are never split, so there may be fewer bins than asked
    for, and none without labelled rows.

    Raises:
        DataError: as :func:`logloss`, or ``num_bins`` is less than 1.

    Example:
        >>> reliability_by_quantile([0, 0, 1, 1], [0.01, 0.02, 0.03, 0.04], num_bins=2).count.tolist()
        [2, 2]
    """
    num_bins = positive_int("num_bins", num_bins)
    positive, p = _labelled_probabilities(labels, probabilities)
    if len(p) == 0:
        return _binned(positive, p, np.zeros(0, np.int64), np.zeros(1))
    ascending = np.sort(p)
    inner = np.unique(ascending[np.arange(1, num_bins) * len(p) // num_bins])
    inner = inner[inner > ascending[0]]
    edges = np.concatenate([ascending[:1], inner, ascending[-1:]])
    return _binned(positive, p, np.searchsorted(inner, p, side="right"), edges)


def _labelled_probabilities(
    labels: ArrayLike, probabilities: ArrayLike
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    positive, present = labelled(labels)
    return positive[present], probabilities_of(probabilities, length=len(positive))[present]


def _binned(
    positive: NDArray[np.bool_], p: NDArray[np.float64], bins: NDArray[np.int64], edges: NDArray[np.float64]
) -> Reliability:
    num_bins = len(edges) - 1
    count = np.bincount(bins, minlength=num_bins).astype(np.int64)
    with np.errstate(invalid="ignore"):
        return Reliability(
            lower=edges[:-1],
            upper=edges[1:],
            count=count,
            mean_probability=np.bincount(bins, weights=p, minlength=num_bins) / count,
            mean_label=np.bincount(bins, weights=positive, minlength=num_bins) / count,
        )


def ece(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15) -> float:
    r"""Expected calibration error over bins of equal width (see :func:`reliability`).

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \left| \bar p_b - \bar y_b \right|

    Source: Naeini et al., AAAI 2015; 15 bins after Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    Differs from source: bins over the probability of the positive class, as usual for click rates, not over the
    confidence of the winning class.

    Returns:
        The ECE; NaN if there are no labelled rows.

    Raises:
        DataError: as :func:`reliability`.

    Example:
        >>> round(ece([0, 1, 1, 1], [0.25, 0.25, 0.75, 0.75], num_bins=2), 12)  # |.25 - .5| / 2 + |.75 - 1| / 2
        0.25
    """
    table = reliability(labels, probabilities, num_bins)
    total = table.count.sum()
    if total == 0:
        return float("nan")
    gaps = np.abs(table.mean_probability - table.mean_label)
    return float((table.count * np.where(table.count > 0, gaps, 0.0)).sum() / total)
