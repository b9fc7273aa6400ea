"""Users and items: one row each, joined to impressions and events by row number instead of copied into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa

from feature_store.event_shards import distinct
from feature_store.sources import Source, Use, to_arrow
from recsys.encoding import KeyIndex


@dataclass(frozen=True)
class Entities:
    """All users, or all items: those of their view and those that only the logs name, sorted by key.

    Row 0 of their table is the unknown entity, row ``i >= 1`` the key ``keys[i - 1]``. An entity without a row in the
    view has its key and nothing else.

    Attributes:
        index: key to position in ``keys``.
        source: the view; None if the schema has none.
        key_column: column of the key.
        view_row: ``(n,)`` int64, row of each entity in the view, -1 without one.
    """

    index: KeyIndex
    source: Source | None
    key_column: str
    view_row: np.ndarray

    @classmethod
    def join(
        cls,
        source: Source | None,
        key_column: str,
        in_view: tuple[pl.Series, np.ndarray] | None,
        in_logs: Sequence[pl.Series],
        *,
        order: Callable[[pl.Series], pl.Series] = pl.Series.sort,
    ) -> Self:
        """Joins the keys of the view and of the logs.

        Args:
            source: the view, if any.
            key_column: column of the key in the view, or in the impressions where there is no view.
            in_view: the view's keys, each once, and their rows.
            in_logs: keys of impressions and of events, repeated as they come.
            order: puts different keys in the order of the table.
        """
        parts = [distinct(series).rename("key") for series in in_logs]
        if in_view is not None:
            parts.append(in_view[0].rename("key"))
        keys = order(pl.concat(parts).unique())
        index = KeyIndex(to_arrow(keys))
        view_row = np.full(len(keys), -1, dtype=np.int64)
        if in_view is not None:
            view_row[index.positions(to_arrow(in_view[0]))] = in_view[1]
        return cls(index, source, key_column, view_row)

    @property
    def num_rows(self) -> int:
        """Rows of the table, the unknown entity included."""
        return len(self.index) + 1

    @property
    def num_without_attributes(self) -> int:
        """Entities that only the logs name, although there is a view."""
        return 0 if self.source is None else int(np.count_nonzero(self.view_row < 0))

    @property
    def table_keys(self) -> pa.Array[Any]:
        """Key of each row of the table; null for the unknown entity."""
        return pa.concat_arrays([pa.nulls(1, self.index.keys.type), self.index.keys])

    def rows_of(self, keys: pl.Series) -> np.ndarray:
        """``(n,)`` int64: row of each key in the table, 0 if it is not known."""
        rows = self.index.positions(to_arrow(keys))
        rows += 1
        return rows

    def column(self, use: Use) -> pa.Array[Any]:
        """Raw values of a feature for each row of the table; null where the view has no row."""
        if use.column == self.key_column:
            return self.table_keys
        assert self.source is not None
        rows = pl.Series(np.concatenate([[-1], self.view_row]))
        return to_arrow(self.source.column(use).gather(rows.replace(-1, None)))
