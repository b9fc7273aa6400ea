"""All metrics of one task at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recsys.errors import DataError
from recsys.metrics.calibration import ece, logloss, logloss_from_logits, ratio_to_base_entropy
from recsys.metrics.checks import labelled, ordered, probabilities_of, vector
from recsys.metrics.ranking import auc, gauc


@dataclass(frozen=True)
class Metrics:
    """Metrics of one task over the rows that have its label.

    Attributes:
        auc: see :func:`recsys.metrics.auc`.
        gauc: see :func:`recsys.metrics.gauc`; NaN if there are no groups.
        gauc_users: groups (users) that the GAUC is over.
        logloss: in nats.
        ne: normalised entropy.
        ece: expected calibration error, 15 bins of equal width.
        num_rows: labelled rows.
        num_positives: rows labelled 1.
    """

    auc: float
    gauc: float
    gauc_users: int
    logloss: float
    ne: float
    ece: float
    num_rows: int
    num_positives: int


def evaluate_scores(
    labels: ArrayLike,
    *,
    logits: ArrayLike | None = None,
    probabilities: ArrayLike | None = None,
    groups: ArrayLike | None = None,
) -> Metrics:
    """Computes :class:`Metrics` from logits or from probabilities.

    Logits are better: order and logloss are then exact even where the sigmoid saturates.

    Args:
        labels: (n,) 0, 1, or NaN for a row that takes no part.
        logits: (n,) before the sigmoid; give these or ``probabilities``.
        probabilities: (n,) in [0, 1].
        groups: (n,) the user of each row, for the GAUC.

    Raises:
        DataError: both or neither of logits and probabilities are given, or an input breaks a metric's rule.

    Example:
        >>> m = evaluate_scores([1, 0, 0, 1], logits=[2.0, -1.0, 2.0, 0.0], groups=[1, 1, 2, 2])
        >>> m.auc, m.gauc, m.gauc_users, m.num_rows
        (0.625, 0.5, 2, 4)
    """
    if (logits is None) == (probabilities is None):
        raise DataError("exactly one of logits and probabilities must be given")
    positive, present = labelled(labels)
    y = positive[present].astype(np.float64)
    if logits is not None:
        scores = ordered("logits", logits, length=len(positive))[present].astype(np.float64)
        loss, p = logloss_from_logits(y, scores), sigmoid(scores)
    else:
        assert probabilities is not None
        scores = p = probabilities_of(probabilities, length=len(positive))[present]
        loss = logloss(y, p)
    num_positives = int(y.sum())
    if groups is None:
        gauc_value, gauc_users = math.nan, 0
    else:
        grouped = gauc(y, scores, vector("groups", groups, length=len(positive))[present])
        gauc_value, gauc_users = grouped.value, grouped.num_groups_used
    return Metrics(
        auc=auc(y, scores),
        gauc=gauc_value,
        gauc_users=gauc_users,
        logloss=loss,
        ne=ratio_to_base_entropy(loss, num_positives, len(y)),
        ece=ece(y, p),
        num_rows=len(y),
        num_positives=num_positives,
    )


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """``1 / (1 + exp(-logits))``, without overflow at either end."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)
