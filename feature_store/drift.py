r"""How far the distribution of a column moved between two periods.

Values are counted in bins that the reference period decides. With shares :math:`p_b` of the reference and :math:`q_b`
of the current period, each smoothed by half a row a bin so that an empty one stays finite:

.. math::

    \mathrm{PSI} = \sum_b (q_b - p_b) \ln \frac{q_b}{p_b}, \qquad
    \mathrm{JS} = \sqrt{\tfrac12 \sum_b p_b \log_2 \frac{p_b}{m_b} + \tfrac12 \sum_b q_b \log_2 \frac{q_b}{m_b}},
    \qquad m_b = \tfrac12 (p_b + q_b)

PSI is at least 0 and has no bound, JS lies between 0 and 1. Of two samples of one distribution, with :math:`B` bins and
:math:`n` and :math:`m` rows, PSI is about :math:`(B - 1)(1/n + 1/m)`: its *noise*, which the rules take off.

Source: Siddiqi, "Credit Risk Scorecards", 2006 (PSI); Yurdakul, "Statistical Properties of Population Stability Index",
2018 (its noise); Lin, "Divergence Measures Based on the Shannon Entropy", IEEE Trans. Information Theory 1991;
Endres, Schindelin, "A New Metric for Probability Distributions", IEEE Trans. Information Theory 2003 (its root).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

MAX_VALUES = 40
"""Values of the reference period with a bin of their own, the most frequent; the rest share one."""

NUM_QUANTILES = 20
MISSING, REST = "missing", "all others"


def psi(reference: np.ndarray, current: np.ndarray) -> float:
    """Population stability index of two histograms.

    Args:
        reference: ``(B,)`` counts.
        current: ``(B,)`` counts, of the same bins.

    Example:
        >>> psi(np.array([10, 10]), np.array([10, 10]))
        0.0
    """
    p, q = _shares(reference), _shares(current)
    return float(np.sum((q - p) * np.log(q / p)))


def psi_noise(reference: np.ndarray, current: np.ndarray) -> float:
    """What :func:`psi` of two samples of one distribution is on average, over the bins that hold anything."""
    bins = int(np.count_nonzero(reference + current))
    n, m = int(reference.sum()), int(current.sum())
    return 0.0 if n == 0 or m == 0 else (bins - 1) * (1.0 / n + 1.0 / m)


def js_distance(reference: np.ndarray, current: np.ndarray) -> float:
    """Jensen-Shannon distance of two histograms, base 2.

    Args:
        reference: ``(B,)`` counts.
        current: ``(B,)`` counts, of the same bins.

    Example:
        >>> js_distance(np.array([5, 5]), np.array([5, 5]))
        0.0
    """
    p, q = _shares(reference), _shares(current)
    middle = (p + q) / 2.0
    divergence = np.sum(p * np.log2(p / middle)) / 2.0 + np.sum(q * np.log2(q / middle)) / 2.0
    return float(np.sqrt(max(divergence, 0.0)))


def _shares(counts: np.ndarray) -> np.ndarray:
    smoothed = counts.astype(np.float64) + 0.5
    shares: np.ndarray = smoothed / smoothed.sum()
    return shares


@dataclass(frozen=True)
class Histogram:
    """Two periods of one column in the same bins.

    Attributes:
        labels: of the bins, in words.
        reference: ``(B,)`` counts.
        current: ``(B,)`` counts.
        unseen: share of the current values that the reference period does not hold; None of numbers.
    """

    labels: tuple[str, ...]
    reference: np.ndarray
    current: np.ndarray
    unseen: float | None


def histogram(reference: pl.Series, current: pl.Series) -> Histogram:
    """Counts two periods of a column: numbers between quantiles of the reference, other values by themselves.

    Args:
        reference: values of the reference period; lists count with every element.
        current: values of the current period, of the same type.
    """
    if isinstance(reference.dtype, (pl.List, pl.Array)):
        reference, current = (s.explode().drop_nulls() for s in (reference, current))
    if reference.dtype.is_float():
        return _numbers(reference.fill_nan(None), current.fill_nan(None))
    return _values(reference, current)


def _numbers(reference: pl.Series, current: pl.Series) -> Histogram:
    known = reference.drop_nulls().to_numpy()
    edges = np.unique(np.quantile(known, np.arange(1, NUM_QUANTILES) / NUM_QUANTILES)) if len(known) else np.empty(0)
    if len(edges) and edges[0] == known.min():
        edges = edges[1:] if len(edges) > 1 else edges
    counts = []
    for series in (reference, current):
        places = np.searchsorted(edges, series.drop_nulls().to_numpy(), side="left")
        counted = np.bincount(places, minlength=len(edges) + 1)
        counts.append(np.append(counted, series.null_count()))
    ends = [f"{edge:.4g}" for edge in edges]
    labels = [f"up to {end}" for end in ends] + [f"above {ends[-1]}" if ends else "any number", MISSING]
    return Histogram(tuple(labels), counts[0], counts[1], None)


def _values(reference: pl.Series, current: pl.Series) -> Histogram:
    known = reference.drop_nulls().rename("value").value_counts(sort=True)
    top = known["value"].head(MAX_VALUES)
    counts = []
    for series in (reference, current):
        held = series.drop_nulls().rename("value").value_counts()
        by_value = dict(zip(held["value"].to_list(), held["count"].to_list(), strict=True))
        own = [by_value.get(value, 0) for value in top.to_list()]
        counts.append(np.array([*own, len(series) - series.null_count() - sum(own), series.null_count()], np.int64))
    seen = current.drop_nulls()
    unseen = float(np.mean(~seen.is_in(known["value"].implode()).to_numpy())) if len(seen) else 0.0
    labels = (*(str(value) for value in top.to_list()), REST, MISSING)
    return Histogram(labels, counts[0], counts[1], unseen)
