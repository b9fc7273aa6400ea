"""Exact equality of encoded columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recsys.encoding import Ragged


def assert_equal_columns(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, column in expected.items():
        got = found[name]
        if _is_same(got, column):
            continue
        if isinstance(column, Ragged):
            np.testing.assert_array_equal(got.offsets, column.offsets, err_msg=name)
            np.testing.assert_array_equal(got.values, column.values, err_msg=name)
            assert got.values.dtype == np.int64
        else:
            np.testing.assert_array_equal(got, column, err_msg=name, strict=True)


def _is_same(got: Any, column: Any) -> bool:
    """Whether all bits are; where they are not, numpy says how they differ, and that NaN are equal."""
    if isinstance(column, Ragged):
        same_offsets = _is_same(got.offsets, column.offsets)
        return same_offsets and got.values.dtype == np.int64 and _is_same(got.values, column.values)
    return got.dtype == column.dtype and got.shape == column.shape and got.tobytes() == column.tobytes()
