"""How well the true probabilities, and item popularity, rank the clicks: the ceiling and the floor of any model.

Both are counted as the log is written, in memory that does not grow with it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from feature_store.datasets.simulator.draws import Floats, Ints

_BINS = 1 << 18
_PRIOR_IMPRESSIONS = 10.0


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What the true probabilities reach.

    Attributes:
        auc: area under the ROC curve; probabilities are compared in steps of 2**-18, equal ones count half.
        logloss: mean of -ln p(outcome), in nats.
        ne: logloss divided by the entropy of the click rate.
        click_rate: clicks an impression.
        num_rows: impressions counted.
    """

    auc: float
    logloss: float
    ne: float
    click_rate: float
    num_rows: int


class CeilingCounter:
    """Counts true probabilities and clicks, block by block."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, _BINS), dtype=np.int64)
        self._loss = 0.0

    def update(self, probabilities: Floats, clicks: npt.NDArray[np.bool_]) -> None:
        """Counts rows (N,)."""
        bins = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1)
        self._counts += np.bincount(bins + _BINS * clicks, minlength=2 * _BINS).reshape(2, _BINS)
        self._loss -= float(np.log(np.where(clicks, probabilities, 1.0 - probabilities)).sum())

    def result(self) -> Ceiling:
        """Of all rows counted; NaN where it is undefined (no rows, one class only)."""
        negatives, positives = (int(c.sum()) for c in self._counts)
        rows = negatives + positives
        rate = positives / rows if rows else float("nan")
        logloss = self._loss / rows if rows else float("nan")
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)) if 0 < rate < 1 else float("nan")
        return Ceiling(auc_of_counts(self._counts[1], self._counts[0]), logloss, float(logloss / entropy), rate, rows)


class PopularityCounter:
    """AUC on later impressions of each item's smoothed click rate on earlier ones."""

    def __init__(self, num_items: int) -> None:
        self._earlier = np.zeros((2, num_items), dtype=np.int64)
        self._later = np.zeros((2, num_items), dtype=np.int64)

    def update(self, items: Ints, clicks: npt.NDArray[np.bool_], *, is_later: bool) -> None:
        """Counts rows (N,) of item positions."""
        counts = self._later if is_later else self._earlier
        num_items = counts.shape[1]
        counts += np.bincount(items + num_items * clicks, minlength=2 * num_items).reshape(2, num_items)

    def auc(self) -> float:
        """Over the later rows; NaN if they have one class only."""
        negatives, positives = self._earlier
        seen = negatives + positives
        rate = positives.sum() / max(1, seen.sum())
        scores = (positives + _PRIOR_IMPRESSIONS * rate) / (seen + _PRIOR_IMPRESSIONS)
        _, bins = np.unique(scores, return_inverse=True)
        counts = [np.bincount(bins, weights=self._later[label].astype(np.float64)) for label in (0, 1)]
        return auc_of_counts(counts[1], counts[0])


def auc_of_counts(positives: npt.ArrayLike, negatives: npt.ArrayLike) -> float:
    """Area under the ROC curve of counts by bin, bins in increasing order of score; ties count half.

    Example:
        >>> auc_of_counts([1, 3], [2, 2])  # (1 * 2/2 + 3 * (2 + 2/2)) / (4 * 4)
        0.625
    """
    clicks, others = np.asarray(positives, dtype=np.float64), np.asarray(negatives, dtype=np.float64)
    pairs = clicks.sum() * others.sum()
    if pairs == 0:
        return float("nan")
    below = np.cumsum(others) - others
    return float((clicks * (below + 0.5 * others)).sum() / pairs)
