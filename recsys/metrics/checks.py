"""What every metric checks about its inputs before it counts anything."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recsys.errors import DataError


def vector(name: str, given: ArrayLike, *, length: int | None = None) -> NDArray[np.generic]:
    """Reads one (n,) array.

    Raises:
        DataError: it has another number of axes, or another length than the labels.
    """
    array = np.asarray(given)
    if array.ndim != 1:
        raise DataError(
            f"{name} must have one axis, got shape {array.shape}",
            hint="metrics are of one task: pass one column at a time",
        )
    if length is not None and len(array) != length:
        raise DataError(f"{name} must have one value a label ({length}), got {len(array)}")
    return array


def labelled(labels: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Splits labels into ``(positive, present)``, both (n,) bool over all rows.

    Raises:
        DataError: a label is not 0, 1 or NaN (missing).
    """
    array = vector("labels", labels)
    if array.dtype == np.bool_:
        return array.astype(np.bool_), np.ones(len(array), np.bool_)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise DataError(f"labels must be numbers or booleans, got {array.dtype}")
    positive = array == 1
    present = positive | (array == 0)
    strange = ~present
    if np.issubdtype(array.dtype, np.floating):
        strange &= ~np.isnan(array)
    if strange.any():
        raise DataError(
            f"labels must be 0, 1 or NaN (missing), got another value at position {int(np.argmax(strange))}",
            hint="set the task's at_least in the schema to turn a count or a rating into 0/1",
        )
    return positive, present


def ordered(name: str, given: ArrayLike, *, length: int) -> NDArray[np.generic]:
    """Reads one (n,) array of numbers that can be put in order: not NaN, infinities allowed.

    Raises:
        DataError: a value is NaN or not a number.
    """
    array = vector(name, given, length=length)
    if array.dtype == np.bool_ or not (
        np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
    ):
        raise DataError(f"{name} must be numbers, got {array.dtype}")
    missing = np.isnan(array) if np.issubdtype(array.dtype, np.floating) else np.zeros(0, np.bool_)
    if missing.any():
        raise DataError(f"{name} must not be NaN, got NaN at position {int(np.argmax(missing))}")
    return array


def probabilities_of(given: ArrayLike, *, length: int) -> NDArray[np.float64]:
    """Reads one (n,) array of probabilities as float64.

    Raises:
        DataError: a value is NaN or outside [0, 1].
    """
    array = ordered("probabilities", given, length=length).astype(np.float64)
    outside = (array < 0) | (array > 1)
    if outside.any():
        raise DataError(
            f"probabilities must be in [0, 1], got {array[np.argmax(outside)]:g} at position {int(np.argmax(outside))}",
            hint="pass logits to the functions that take logits",
        )
    return array


def positive_int(name: str, value: int) -> int:
    """Reads a whole number of at least 1.

    Raises:
        DataError: it is less.
    """
    if value < 1:
        raise DataError(f"{name} must be at least 1, got {value}")
    return int(value)
