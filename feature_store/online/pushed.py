"""What one event adds to derived values: the expressions of the schema, over a table of one row.

Columns have the types that the events view had when the store was materialised, so that an expression means the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from feature_store.expressions import missing_for_nan, row_expression
from recsys.derived import Mean, Sum, Windowed
from recsys.errors import DataError
from recsys.schema import Schema
from recsys.windows import in_units

if TYPE_CHECKING:
    from feature_store.online.pushing import Event

TYPES: dict[str, Any] = {
    str(kind): kind
    for kind in (
        pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64, pl.Float32, pl.Float64,
        pl.String, pl.Boolean, pl.Null,
    )
}  # fmt: skip
"""Types of columns that a pushed event can give."""


def counted_event(
    spec: Windowed, schema: Schema, event: Event, meta: Callable[[], dict[str, Any]]
) -> tuple[bool, int | None]:
    """Whether an event counts for a value; and of a sum and of a mean, what it adds, in units.

    Args:
        spec: a value of the events.
        schema: what the events are.
        event: as it was pushed.
        meta: what the store says about itself, asked only where expressions are to be computed.

    Raises:
        DataError: a column does not fit, or the value is infinite.
    """
    if spec.event_types is not None and event.type not in spec.event_types:
        return False, None
    texts = [text for text in (spec.where, spec.value if isinstance(spec, Sum | Mean) else None) if text is not None]
    if not texts:
        return True, None
    columns = (meta().get("derived") or {}).get("columns")
    if columns is None:
        raise DataError(
            f"derived value {spec.name!r} must know the types of the events' columns, got a store without them",
            hint="materialize before events are pushed",
        )
    view = schema.views.events
    assert view is not None
    given = {**event.values, view.user: event.user, view.item: event.item, view.time: event.time}
    if view.type is not None:
        given[view.type] = event.type

    def computed(text: str) -> Any:
        place = f"derived value {spec.name!r}"
        expression, names = row_expression(text, place)
        try:
            row = pl.DataFrame(
                [pl.Series(name, [given.get(name)], dtype=TYPES[columns[name]], strict=True) for name in names]
            )
            return missing_for_nan(row.lazy()).select(value=expression).collect()["value"][0]
        except KeyError as err:
            raise DataError(f"{place} reads a column of a type that no pushed event can give") from err
        except (PolarsError, TypeError, OverflowError) as err:
            raise DataError(f"{' and '.join(map(repr, names))} must be of the types of the events view") from err

    if spec.where is not None and not computed(spec.where):
        return False, None
    if not isinstance(spec, Sum | Mean):
        return True, None
    value = computed(spec.value)
    if value is None or value != value:
        return False, None
    try:
        return True, int(in_units(np.array([value], np.float64), spec.decimals)[0])
    except ValueError as err:
        raise DataError(f"derived value {spec.name!r}: value {err}") from err
