r"""How a metric grows with what is spent on it: a saturating power law, fitted by least squares.

.. math:: y(x) = A - c\, x^{-\gamma}, \qquad c, \gamma > 0

:math:`A` is where the metric would end with endless :math:`x`; every tenfold of :math:`x` shrinks what is missing by
:math:`10^\gamma`.

Source: the claim that AUC follows power laws of model grade and of data is of Lai et al., "SUAN" (RecSys 2025, arXiv
2508.15326), which this project knows from summaries; form and fit are a reconstruction, the usual ones of such studies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from recsys.errors import DataError

_EXPONENTS = (1e-3, 8.0)
MIN_POINTS = 4
"""Fewer different x than this leave a curve of three parameters nothing to be wrong about."""


@dataclass(frozen=True)
class Interval:
    """A fitted value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw:
    r"""A fitted curve.

    Attributes:
        limit: :math:`A`.
        scale: :math:`c`.
        exponent: :math:`\gamma`.
        r2: share of the variance of y that the curve explains; NaN where y does not vary.
        num_points: how many it was fitted to.
        decades: orders of magnitude between the smallest and the largest x.
    """

    limit: Interval
    scale: Interval
    exponent: Interval
    r2: float
    num_points: int
    decades: float

    def predict(self, x: float) -> float:
        """The curve at ``x`` > 0."""
        return float(self.limit.value - self.scale.value * x**-self.exponent.value)

    def needed(self, target: float) -> float | None:
        """The x at which the curve reaches ``target``; None if it never does."""
        missing = self.limit.value - target
        if missing <= 0:
            return None
        return float((self.scale.value / missing) ** (1 / self.exponent.value))


def fit_power_law(x: np.ndarray, y: np.ndarray, *, num_resamples: int = 500, seed: int = 0) -> PowerLaw:
    """Fits the curve; intervals are percentiles over refits to resampled residuals.

    Args:
        x: (n,) above 0; several points may share one, such as seeds.
        y: (n,) finite.
        num_resamples: refits for the intervals.
        seed: of the resampling.

    Raises:
        DataError: there are fewer than four different x, or a value is not finite or not positive.

    Example:
        >>> x = np.array([1.0, 10.0, 100.0, 1000.0])
        >>> law = fit_power_law(x, 0.8 - 0.2 * x**-0.5, num_resamples=20)
        >>> round(law.limit.value, 4), round(law.exponent.value, 4)
        (0.8, 0.5)
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) != len(y) or not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all()):
        raise DataError("a power law must be fitted to pairs of finite numbers, x above 0, got others")
    if len(np.unique(x)) < MIN_POINTS:
        raise DataError(
            f"a power law must be fitted to at least {MIN_POINTS} different x, got {len(np.unique(x))}",
            hint="vary it over more values",
        )
    best = _fit(x, y[None])[0]
    fitted = best[0] - best[1] * x ** -best[2]
    residuals = y - fitted
    # Residuals of a fit with three free parameters are too small by this much.
    residuals = (residuals - residuals.mean()) * math.sqrt(len(x) / max(len(x) - 3, 1))
    generator = np.random.default_rng(seed)
    refits = _fit(x, fitted + generator.choice(residuals, (num_resamples, len(x))))
    low, high = np.percentile(refits, [2.5, 97.5], axis=0)
    variance = ((y - y.mean()) ** 2).sum()
    r2 = 1 - ((y - fitted) ** 2).sum() / variance if variance > 0 else math.nan
    limit, scale, exponent = (Interval(*map(float, v)) for v in zip(best, low, high, strict=True))
    return PowerLaw(limit, scale, exponent, float(r2), len(x), float(np.log10(x.max() / x.min())))


def _fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    r"""Limit, scale and exponent (m, 3) of the least squares for each row of y (m, n).

    Given the exponent, the other two are those of a straight line in :math:`-x^{-\gamma}`, with its slope at least 0:
    what is left is a search in one dimension, on ever finer grids around the best exponent so far.
    """
    low, high = np.full(len(y), math.log(_EXPONENTS[0])), np.full(len(y), math.log(_EXPONENTS[1]))
    best = np.empty((len(y), 3))
    steps = np.linspace(0.0, 1.0, 41)
    unit = x / x.min()  # the scale is put back below; powers stay in range
    centred = y - y.mean(1, keepdims=True)
    for _ in range(6):
        exponents = np.exp(low[:, None] + (high - low)[:, None] * steps)  # (m, 41)
        line = -(unit ** -exponents[:, :, None])  # (m, 41, n)
        off = line - line.mean(2, keepdims=True)
        slope = np.maximum((off * centred[:, None]).sum(2) / np.maximum((off**2).sum(2), 1e-300), 0.0)
        misfit = ((centred[:, None] - slope[:, :, None] * off) ** 2).sum(2)
        chosen = misfit.argmin(1)[:, None]
        exponent, rate = (np.take_along_axis(v, chosen, 1)[:, 0] for v in (exponents, slope))
        mean = np.take_along_axis(line.mean(2), chosen, 1)[:, 0]
        best = np.stack([y.mean(1) - rate * mean, rate * x.min() ** exponent, exponent], axis=1)
        width = (high - low) / 20
        low = np.maximum(np.log(exponent) - width, math.log(_EXPONENTS[0]))
        high = np.minimum(np.log(exponent) + width, math.log(_EXPONENTS[1]))
    return best
