"""Recomputes derived values of a few impressions from the views: for each, all rows are looked through.

Nothing of the build is used but the reading of columns and expressions: no groups, no sorted log, no running total.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from feature_store.appended import Appends
from feature_store.sources import to_arrow
from feature_store.views import Views, version_view
from recsys.derived import AsOf, Count, Derived, Mean, Ratio, Recency, Sum, Windowed, duration_us
from recsys.schema import Feature


class DerivedTruth:
    """What the views say about derived values of some impressions.

    Args:
        views: opened.
        valid_rows: gives the rows of a view that are not set aside.
        users: ``n`` keys, of each impression.
        items: ``n`` keys, likewise.
        times: ``n`` times, of each impression's request.
        appends: of the training set; rows of later ones than an impression's own count for nothing.
        generations: ``n`` generations, of each impression.
    """

    def __init__(
        self,
        views: Views,
        valid_rows: Callable[[str], np.ndarray],
        users: list[Any],
        items: list[Any],
        times: list[int],
        appends: Appends,
        generations: list[int],
    ) -> None:
        self.views = views
        self.schema = views.schema
        self._valid_rows = valid_rows
        self._asked = {
            "user": pl.Series(users, dtype=views.keys("impressions", "user").dtype),
            "item": pl.Series(items, dtype=views.keys("impressions", "item").dtype),
        }
        self._times = times
        self._appends = appends
        self._generations = generations

    def raw(self, feature: Feature, derived: Derived) -> pa.Array[Any]:
        """The raw values of a feature that reads a derived value, one an impression."""
        if isinstance(derived, AsOf):
            rows = pl.Series(self._versions(derived), dtype=pl.Int64)
            return to_arrow(self.views.version_values(feature, derived).gather(rows))
        numbers: pa.Array[Any] = pa.array(np.array(self._numbers(derived), np.float64), from_pandas=True)
        return numbers

    def _numbers(self, derived: Windowed | Ratio) -> list[float | None]:
        if not isinstance(derived, Ratio):
            return self._windowed(derived)
        parts = {d.name: d for d in self.schema.derived if not isinstance(d, Ratio | AsOf)}
        pairs = [self._windowed(parts[name]) for name in (derived.numerator, derived.denominator)]
        return [_ratio(derived, a, b) for a, b in zip(*pairs, strict=True)]

    @cached_property
    def _shown(self) -> np.ndarray:
        """Valid impressions, but for those that came too late, and of requests that contradict themselves."""
        rows: np.ndarray = self._valid_rows("impressions")
        generations = self._appends.generations("impressions", rows)
        begin = np.array([self._appends.begin(g) for g in range(len(self._appends.entries) + 1)])
        is_in_time = self.views.time("impressions")[rows] >= begin[generations]
        rows, generations = rows[is_in_time], generations[is_in_time]
        keys = self.views.request_keys()
        if keys is None:
            return rows
        columns = {"@user": self.views.keys("impressions", "user"), **dict(self.views.context_columns())}
        frame = pl.DataFrame(
            {
                "@generation": generations,
                "@request": keys.gather(rows),
                **{name: column.gather(rows) for name, column in columns.items()},
            }
        )
        request = ["@generation", "@request"]
        agrees = pl.all_horizontal(pl.col(name).n_unique().over(request) == 1 for name in columns)
        kept: np.ndarray = rows[frame.select(agrees).to_series().to_numpy()]
        return kept

    def _windowed(self, spec: Windowed) -> list[float | None]:
        views = self.views
        rows = self._shown if spec.source == "impressions" else self._valid_rows("events")
        time = views.time(spec.source)[rows]
        known = time + (0 if spec.known_after is None else duration_us(spec.known_after))
        if spec.created is not None:
            known = np.maximum(known, views.created(spec.source, spec.created, rows))
        is_counted = np.ones(len(rows), np.bool_)
        place = f"derived value {spec.name!r}"
        if spec.event_types is not None:
            types = views.event_types()
            assert types is not None
            is_counted &= types.gather(rows).is_in(list(spec.event_types)).fill_null(False).to_numpy()
        if spec.where is not None:
            where = views.computed(spec.source, spec.where, f"{place}: where").gather(rows)
            is_counted &= where.cast(pl.Boolean).fill_null(False).to_numpy()
        values = np.zeros(len(rows))
        if isinstance(spec, Sum | Mean):
            found = views.computed(spec.source, spec.value, f"{place}: value").gather(rows).cast(pl.Float64)
            values = found.fill_null(np.nan).to_numpy()
            is_counted &= ~np.isnan(values)
        groups = [(self._of_rows(spec.source, name, rows), self._of_asked(name)) for name in spec.by]
        generations = self._appends.generations(spec.source, rows)
        answers: list[float | None] = []
        for number, moment in enumerate(self._times):
            mine = [asked[number] for _, asked in groups]
            if None in mine:
                answers.append(None)
                continue
            is_found = is_counted & (known < moment) & (generations <= self._generations[number])
            if spec.window is not None:
                is_found &= time >= moment - duration_us(spec.window)
            for (of_rows, _), value in zip(groups, mine, strict=True):
                is_found &= (of_rows == value).fill_null(False).to_numpy()
            answers.append(_answer(spec, moment, time[is_found], values[is_found]))
        return answers

    def _of_rows(self, view: str, name: str, rows: np.ndarray) -> pl.Series:
        """What rows of a log are grouped by: keys, or an attribute of their user or item."""
        scope = name if name in ("user", "item") else self.schema.feature(name).scope
        keys = self.views.keys(view, scope).gather(rows)
        return keys if name in ("user", "item") else self._attribute(name, keys)

    def _of_asked(self, name: str) -> pl.Series:
        if name in ("user", "item"):
            return self._asked[name]
        return self._attribute(name, self._asked[self.schema.feature(name).scope])

    def _attribute(self, name: str, keys: pl.Series) -> pl.Series:
        """An attribute of each key's entity: that of the first valid row of its view."""
        feature = self.schema.feature(name)
        view = f"{feature.scope}s"
        key_column = self.views.key_column(view if view in self.views.sources else "impressions", feature.scope)
        if feature.source_column == key_column:
            return keys
        rows = self._valid_rows(view)
        given = pl.DataFrame(
            {"key": self.views.keys(view, feature.scope).gather(rows), "value": self.views.values(feature).gather(rows)}
        ).unique("key", keep="first", maintain_order=True)
        joined = pl.DataFrame({"key": keys}).join(given, on="key", how="left", maintain_order="left")["value"]
        return joined.fill_nan(None) if joined.dtype.is_float() else joined

    def _versions(self, spec: AsOf) -> list[int | None]:
        """The row of the latest version of each impression's user or item."""
        views, view = self.views, version_view(self.schema, spec.view)
        assert view is not None
        rows = self._valid_rows(spec.view)
        time = views.version_times(spec.view, rows)
        created = time if view.created is None else views.created(spec.view, view.created, rows)
        keys = views.keys(spec.view, view.of).gather(rows)
        columns = views.version_columns(spec.view)[rows]
        ordered = columns.with_columns(
            pl.Series("@time", time), pl.Series("@created", created), pl.Series("@row", rows, dtype=pl.Int64)
        )
        found: list[int | None] = []
        for key, moment in zip(self._asked[view.of], self._times, strict=True):
            is_known = (keys == key).to_numpy() & (time < moment) & (created < moment)
            last = ordered.filter(is_known).sort("@time", "@created", *columns.columns).tail(1)
            is_old = spec.max_age is not None and len(last) and moment - last["@time"][0] > duration_us(spec.max_age)
            found.append(int(last["@row"][0]) if len(last) and not is_old else None)
        return found


def _answer(spec: Windowed, moment: int, time: np.ndarray, values: np.ndarray) -> float | None:
    """A value of the rows that count."""
    if isinstance(spec, Count):
        return float(len(time))
    if isinstance(spec, Recency):
        return (moment - int(time.max())) / 1e6 if len(time) else None
    total: float = sum(round(value * 10**spec.decimals) for value in values.tolist()) / 10**spec.decimals
    if isinstance(spec, Sum):
        return total
    divisor = len(values) + spec.prior_count
    return (total + spec.prior * spec.prior_count) / divisor if divisor else None


def _ratio(spec: Ratio, numerator: float | None, denominator: float | None) -> float | None:
    if numerator is None or denominator is None or denominator + spec.add_to_denominator == 0:
        return None
    return (numerator + spec.add_to_numerator) / (denominator + spec.add_to_denominator)
