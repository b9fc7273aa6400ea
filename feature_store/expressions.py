"""SQL expressions of one row, as a schema declares them: checked to read nothing but their own row.

Polars parses them (`pl.sql_expr`). An expression that looks at other rows, such as ``SUM(x)`` or ``LAG(x) OVER ...``,
would bring the future into a value of the past, so only what is known to work row by row is let through.
"""

from __future__ import annotations

import json
import warnings
from functools import lru_cache
from typing import Any

import polars as pl
from polars import selectors
from polars.exceptions import PolarsError

from recsys.errors import SchemaError

_NODES = frozenset({"Column", "Literal", "BinaryExpr", "Cast", "Ternary", "Function", "Alias"})
_FUNCTIONS = frozenset(
    {
        "Abs",
        "Boolean",
        "Cbrt",
        "Ceil",
        "Clip",
        "Coalesce",
        "Exp",
        "FillNull",
        "Floor",
        "Log",
        "Log1p",
        "MaxHorizontal",
        "MinHorizontal",
        "Negate",
        "Pow",
        "Round",
        "Sign",
        "Sql",
        "Sqrt",
        "StringExpr",
    }
)
_OF_SEVERAL_ROWS = frozenset(
    {"Any", "All", "ConcatVertical", "IsDuplicated", "IsFirstDistinct", "IsLastDistinct", "IsUnique"}
)
_HINT = "write an expression of the columns of one row, such as is_click = 1 or CAST(price AS DOUBLE) / 100"


@lru_cache(maxsize=256)
def row_expression(text: str, reader: str) -> tuple[pl.Expr, tuple[str, ...]]:
    """Parses an expression.

    Args:
        text: SQL.
        reader: what declares it, as messages name it.

    Returns:
        The expression, and the columns that it reads.

    Raises:
        SchemaError: it is not SQL, or may look at more than its own row.
    """
    try:
        expression = pl.sql_expr(text)
        columns = tuple(sorted(set(expression.meta.root_names())))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that other versions of Polars may write it otherwise
            tree = json.loads(expression.meta.serialize(format="json"))
    except (PolarsError, ValueError) as err:
        raise SchemaError(f"{reader} must be an SQL expression: {str(err).splitlines()[0]}", hint=_HINT) from err
    found = _strange(tree)
    if found is not None:
        raise SchemaError(f"{reader} must read one row only, got {found} in {text!r}", hint=_HINT)
    if not columns:
        raise SchemaError(f"{reader} must read a column, got {text!r}", hint=_HINT)
    return expression, columns


def missing_for_nan(frame: pl.LazyFrame) -> pl.LazyFrame:
    """What expressions read: nulls where columns hold NaN, which comparisons would take for the greatest number."""
    return frame.with_columns(selectors.float().fill_nan(None))


def _strange(node: Any) -> str | None:
    """The first part of an expression that is not known to work row by row."""
    if not isinstance(node, dict) or len(node) != 1:
        return str(node)
    ((kind, content),) = node.items()
    if kind not in _NODES:
        inner = next(iter(content)) if isinstance(content, dict) and kind == "Agg" else kind
        return str(inner)
    if kind in ("Column", "Literal"):
        return None
    if kind == "Function":
        names = list(_names(content["function"]))
        if names[0] not in _FUNCTIONS or _OF_SEVERAL_ROWS & set(names):
            return str(names[-1])
        parts = content["input"]
    elif kind == "Alias":
        parts = content[:1]
    else:
        of_kind = {"BinaryExpr": ("left", "right"), "Cast": ("expr",), "Ternary": ("predicate", "truthy", "falsy")}
        parts = [content[name] for name in of_kind[kind]]
    return next((found for found in map(_strange, parts) if found is not None), None)


def _names(function: Any) -> Any:
    """The name of a function, then what it is of its kind."""
    while isinstance(function, dict) and function:
        name = next(iter(function))
        yield name
        function = function[name]
    if isinstance(function, str):
        yield function
