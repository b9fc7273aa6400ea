"""Fitted transforms of dense features: numbers in, float32 out, 0 where missing.

Missing are null, NaN and infinities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.encoding.columns import Float64s
from recsys.schema import Keep, Standardise, TransformSpec

_LARGEST = float(np.finfo(np.float32).max)


def squash(numbers: Float64s, spec: Standardise) -> Float64s:
    r""":math:`f(x)`: :math:`\log(1 + \max(x, 0))` with ``log1p``, else :math:`x`."""
    return np.log1p(np.maximum(numbers, 0.0)) if spec.log1p else numbers


class DenseTransform:
    r"""Transform of one dense feature.

    ``standardise``: :math:`\mathrm{clip}((f(x) - \mu) / \sigma)` per component, computed in float64, magnitude at most
    ``clip``. ``keep``: :math:`x`, magnitude at most the largest float32.

    Args:
        spec: which transform.
        mean: :math:`\mu`, (dim,); unused by ``keep``.
        std: :math:`\sigma > 0`, (dim,); unused by ``keep``.
    """

    def __init__(self, spec: TransformSpec, mean: Float64s, std: Float64s) -> None:
        self._spec = spec
        self._mean = mean
        self._std = std

    @property
    def state(self) -> dict[str, Any]:
        """What was fitted, as plain JSON."""
        if isinstance(self._spec, Keep):
            return {}
        return {"mean": self._mean.tolist(), "std": self._std.tolist()}

    def encode(self, vectors: Float64s) -> npt.NDArray[np.float32]:
        """Transforms vectors (n, dim) with NaN where missing.

        Returns:
            float32, (n, dim), finite.
        """
        is_given = np.isfinite(vectors)
        if isinstance(self._spec, Standardise):
            bound = self._spec.clip
            with np.errstate(invalid="ignore", over="ignore"):
                vectors = (squash(vectors, self._spec) - self._mean) / self._std
        else:
            bound = _LARGEST
        result = np.clip(vectors, -bound, bound)
        result[~is_given] = 0.0
        return result.astype(np.float32)

    def decode(self, vectors: npt.NDArray[np.float32]) -> Float64s:
        """The numbers that vectors (n, dim) came from, to about six digits.

        What was missing gives the mean (0 of ``keep``); what was clipped, or below 0 with ``log1p``, the bound.
        """
        numbers = vectors.astype(np.float64)
        if isinstance(self._spec, Keep):
            return numbers
        with np.errstate(over="ignore"):
            numbers = numbers * self._std + self._mean
            return np.expm1(numbers) if self._spec.log1p else numbers
