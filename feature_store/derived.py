"""Computes derived values for every request and impression; what each is, :mod:`recsys.derived` says.

Rows of a log are sorted once for all values of the same groups; each value is two binary searches a look-up
(:mod:`recsys.windows`), chunk by chunk, into a file of the staging folder. So memory holds the log and the value at
work, not all values of all impressions. It grows with the rows of the log, and of the views of versions, unlike that of
a schema without derived values, whose events are looked at shard by shard (:mod:`feature_store.event_shards`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from feature_store.sources import feature_use, to_arrow
from feature_store.views import Views, windowed
from recsys.derived import AsOf, Derived, Mean, Ratio, Sum, Windowed, duration_us
from recsys.errors import SourceError
from recsys.schema import Feature, VersionedView
from recsys.windows import GroupedRows, LatestVersion, WindowedValue, in_units, ratio

if TYPE_CHECKING:
    from feature_store.joined import Joined

CHUNK = 1 << 20
"""Look-ups at once."""


def compute_derived(joined: Joined) -> Mapping[str, np.ndarray]:
    """Every derived value of a schema.

    Args:
        joined: everything but the derived values.

    Returns:
        By name: ``(R,)`` or ``(N,)`` by its scope; float64 with NaN where missing, of versions int64 rows of their view
        with -1 where there is none.

    Raises:
        QuarantineError: too many versions are broken.
        SourceError: an expression does not fit its columns, or does not give what it must.
    """
    return Computation(joined).run()


@dataclass(frozen=True)
class Asked:
    """Requests and impressions that values are wanted of.

    Attributes:
        user_row: ``(R,)`` int64, row of the users table; 0 for a user that it does not hold.
        time: ``(R,)`` int64, UTC microseconds.
        item_row: ``(N,)`` int64, row of the items table of each impression; 0 for one that it does not hold.
        row_start: ``(R,)`` int64, the first impression of each request.
    """

    user_row: np.ndarray
    time: np.ndarray
    item_row: np.ndarray
    row_start: np.ndarray

    def requests_of(self, rows: slice) -> np.ndarray:
        """``(n,)``: the request of each impression."""
        return np.searchsorted(self.row_start, np.arange(rows.start, rows.stop), side="right") - 1


Lookup = Callable[[Asked, slice], np.ndarray]
"""A value of some of the requests, or of some of the impressions, by its scope."""


class Log:
    """Valid rows of a log.

    Attributes:
        source: the view.
        source_row: ``(E,)`` int64, rows of the view.
        user_row: ``(E,)`` int64.
        item_row: ``(E,)`` int64.
        time: ``(E,)`` int64.
    """

    def __init__(
        self, source: str, source_row: np.ndarray, user_row: np.ndarray, item_row: np.ndarray, time: np.ndarray
    ) -> None:
        self.source = source
        self.source_row = source_row
        self.user_row = user_row
        self.item_row = item_row
        self.time = time


class Computation:
    """Reads the rows of logs and versions, and computes from them.

    Args:
        joined: everything but the derived values.
    """

    def __init__(self, joined: Joined) -> None:
        self.joined = joined
        self.views: Views = joined.views
        self.schema = joined.schema
        self._codes: dict[str, tuple[np.ndarray, int]] = {}
        self._folder = self.views.staging / "derived"
        self._folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, np.ndarray]:
        """Every value of every request, or of every impression."""
        joined = self.joined
        asked = Asked(joined.user_row, joined.requests.time, joined.item_row, joined.requests.row_start)
        found: dict[str, np.ndarray] = {}
        for value, lookup in self.lookups():
            found[value.name] = self._filled(value, asked, partial(lookup, asked))
        for derived in self.schema.derived:
            if isinstance(derived, Ratio):
                found[derived.name] = self._filled(derived, asked, partial(self.ratio, derived, found, asked))
        return {derived.name: found[derived.name] for derived in self.schema.derived}

    def lookups(self) -> Iterator[tuple[Windowed | AsOf, Lookup]]:
        """Every value but ratios, each ready to be looked up; one after the other, so that none need be kept."""
        logs: dict[str, Log] = {}
        for (source, by, created), specs in self._alike().items():
            if source not in logs:
                logs = {source: self.log(source)}
            for spec, value in self.values(specs, logs[source], by, created):
                yield spec, partial(self._at, value)
        for view in self.schema.views.versions:
            yield from self._versions(view)

    def values(
        self, specs: Sequence[Windowed], log: Log, by: Sequence[str], created: str | None
    ) -> Iterator[tuple[Windowed, WindowedValue]]:
        """Values of the same groups of a log's rows, ready to be looked up."""
        key, is_grouped = self.keys(by, log.user_row, log.item_row)
        known = None if created is None else self.views.created(log.source, created)[log.source_row][is_grouped]
        rows = GroupedRows(key[is_grouped], log.time[is_grouped], known)
        for spec in specs:
            yield spec, WindowedValue.build(spec, rows, *self.counted(spec, log.source_row[is_grouped]))

    def _alike(self) -> dict[tuple[str, tuple[str, ...], str | None], list[Windowed]]:
        """Values of the same rows in the same groups, log by log."""
        alike: dict[tuple[str, tuple[str, ...], str | None], list[Windowed]] = {}
        for spec in sorted(windowed(self.schema), key=lambda spec: spec.source):
            alike.setdefault((spec.source, spec.by, spec.created), []).append(spec)
        return alike

    def log(self, source: str) -> Log:
        """The valid rows of ``"events"`` or ``"impressions"``."""
        views, joined = self.views, self.joined
        if source == "impressions":
            user_row = np.repeat(joined.user_row, joined.requests.row_counts)
            time = views.time("impressions")[joined.source_row]
            return Log(source, joined.source_row, user_row, joined.item_row, time)
        rows = joined.happened
        assert rows is not None
        user_row = joined.users.rows_of(views.keys("events", "user").gather(rows))
        item_row = joined.items.rows_of(views.keys("events", "item").gather(rows))
        return Log(source, rows, user_row, item_row, views.time("events")[rows])

    def keys(self, by: Sequence[str], user_row: np.ndarray, item_row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The group of each row, and whether it has one: a row whose attribute is missing belongs to none."""
        key = np.zeros(len(user_row), np.int64)
        is_grouped = np.ones(len(user_row), np.bool_)
        for name in by:
            codes, size, scope = self.coded(name)
            row = user_row if scope == "user" else item_row
            code = row if codes is None else codes[row]
            is_grouped &= code >= 0
            key *= size
            key += code
        key[~is_grouped] = -1
        return key, is_grouped

    def coded(self, name: str) -> tuple[np.ndarray | None, int, str]:
        """The number of each entity's group, -1 where its attribute is missing; how many; and whose it is."""
        joined = self.joined
        if name in ("user", "item"):
            return None, (joined.users if name == "user" else joined.items).num_rows, name
        feature = self.schema.feature(name)
        if name not in self._codes:
            entities = joined.users if feature.scope == "user" else joined.items
            values = pl.from_arrow(entities.column(feature_use(self.schema, feature)))
            assert isinstance(values, pl.Series)
            if values.dtype.is_float():
                values = values.fill_nan(None)
            elif values.dtype == pl.Null or values.dtype == pl.Boolean:
                values = values.cast(pl.Int8)
            codes = (values.rank("dense").cast(pl.Int64) - 1).fill_null(-1).to_numpy()
            self._codes[name] = codes, int(codes.max(initial=0)) + 1
        return *self._codes[name], feature.scope

    def _group(self, by: Sequence[str], asked: Asked, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """The group and the time of some requests, or of some impressions."""
        if self._scope_of(by) == "context":
            user_row = asked.user_row[part]
            return self.keys(by, user_row, user_row)[0], asked.time[part]
        request = asked.requests_of(part)
        return self.keys(by, asked.user_row[request], asked.item_row[part])[0], asked.time[request]

    def _at(self, value: WindowedValue, asked: Asked, part: slice) -> np.ndarray:
        return value.at(*self._group(value.spec.by, asked, part))

    def _scope_of(self, by: Sequence[str]) -> str:
        return "context" if all(self.coded(name)[2] == "user" for name in by) else "candidate"

    def counted(self, spec: Windowed, source_row: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What some rows of a log add to a value.

        Args:
            spec: the value.
            source_row: ``(E,)`` int64, rows of the view.

        Returns:
            ``(E,)`` bool, whether each counts; and of a sum and of a mean ``(E,)`` int64, its value in units.

        Raises:
            SourceError: an expression does not fit its columns, or does not give what it must.
        """
        views = self.views
        is_counted = np.ones(len(source_row), np.bool_)
        if spec.event_types is not None:
            types = views.event_types()
            assert types is not None
            is_counted &= types.is_in(list(spec.event_types)).fill_null(False).to_numpy()[source_row]
        if spec.where is not None:
            is_counted &= self._computed(spec, spec.where, "where")[source_row]
        if not isinstance(spec, Sum | Mean):
            return is_counted, None
        values = self._computed(spec, spec.value, "value")[source_row]
        is_counted &= ~np.isnan(values)
        try:
            units = in_units(np.where(is_counted, values, np.nan), spec.decimals)
        except ValueError as err:
            place = f"{views.sources[spec.source].place}: derived value {spec.name!r}: value"
            raise SourceError(f"{place} {err}", hint="scale it in the expression, or give fewer decimals") from err
        return is_counted, units

    def _computed(self, spec: Windowed, text: str, field: str) -> np.ndarray:
        """An expression over all rows of a view: booleans for ``where``, float64 with NaN for ``value``."""
        place = f"derived value {spec.name!r}: {field}"
        series = self.views.computed(spec.source, text, place)
        wanted = "true or false" if field == "where" else "a number"
        is_boolean = series.dtype == pl.Boolean
        is_right = is_boolean if field == "where" else is_boolean or series.dtype.is_numeric()
        if not is_right and series.dtype != pl.Null:
            raise SourceError(
                f"{self.views.sources[spec.source].place}: {place} must give {wanted}, got {str(series.dtype).lower()}",
                hint="compare with a value" if field == "where" else "CAST(x AS DOUBLE) makes a number of text",
            )
        if field == "where":
            return series.cast(pl.Boolean).fill_null(False).to_numpy()
        return series.cast(pl.Float64).fill_null(np.nan).to_numpy()

    def versions(self, view: VersionedView) -> tuple[np.ndarray, LatestVersion]:
        """The rows of a view of versions whose entity is known, and which of them is the latest when."""
        views, joined = self.views, self.joined
        entities = joined.users if view.of == "user" else joined.items
        rows = views.valid_rows(view.name)
        row_of_entity = entities.rows_of(views.keys(view.name, view.of).gather(rows))
        is_known = row_of_entity > 0
        rows, row_of_entity = rows[is_known], row_of_entity[is_known]
        created = None if view.created is None else views.created(view.name, view.created)[rows]
        ranks = _ranks(views.version_columns(view.name)[rows])
        return rows, LatestVersion.build(row_of_entity, views.time(view.name)[rows], created, ranks)

    def _versions(self, view: VersionedView) -> Iterator[tuple[AsOf, Lookup]]:
        """The version that each value of one view reads."""
        rows, latest = self.versions(view)
        for derived in self.schema.derived:
            if isinstance(derived, AsOf) and derived.view == view.name:
                max_age = None if derived.max_age is None else duration_us(derived.max_age)

                def find(asked: Asked, part: slice, max_age: int | None = max_age) -> np.ndarray:
                    found = latest.at(*self._group((view.of,), asked, part), max_age)
                    return np.where(found < 0, -1, np.append(rows, -1)[found])

                yield derived, find

    def ratio(self, spec: Ratio, found: Mapping[str, np.ndarray], asked: Asked, part: slice) -> np.ndarray:
        """A ratio of what was found for some requests, or for some impressions."""
        scope = self.schema.derived_scope(spec)
        parts = {d.name: d for d in self.schema.derived if d.name in (spec.numerator, spec.denominator)}

        def read(name: str) -> np.ndarray:
            is_wide = scope == "candidate" and self.schema.derived_scope(parts[name]) == "context"
            return found[name][asked.requests_of(part) if is_wide else part]

        return ratio(spec, read(spec.numerator), read(spec.denominator))

    def _filled(self, derived: Derived, asked: Asked, values: Callable[[slice], np.ndarray]) -> np.ndarray:
        """A value of all requests, or of all impressions, computed in chunks into a file."""
        size = len(asked.time) if self.schema.derived_scope(derived) == "context" else len(asked.item_row)
        dtype: Any = np.int64 if isinstance(derived, AsOf) else np.float64
        if size == 0:
            return np.empty(0, dtype)
        filled: np.ndarray = np.lib.format.open_memmap(
            self._folder / f"{derived.name}.npy", mode="w+", dtype=dtype, shape=(size,)
        )
        for start in range(0, size, CHUNK):
            part = slice(start, min(start + CHUNK, size))
            filled[part] = values(part)
        return filled


class ReadyValues:
    """Every value of a schema, ready to be looked up again and again; holds the sorted rows of all of them.

    Args:
        computation: of the logs.
    """

    def __init__(self, computation: Computation) -> None:
        self._computation = computation
        self._lookups = list(computation.lookups())

    def of(self, asked: Asked) -> dict[str, np.ndarray]:
        """Every value, as :func:`compute_derived` gives them.

        Args:
            asked: requests and impressions, whether or not a view holds them.
        """
        schema = self._computation.schema
        sizes = {"context": len(asked.time), "candidate": len(asked.item_row)}
        whole = {derived.name: slice(0, sizes[schema.derived_scope(derived)]) for derived in schema.derived}
        found = {derived.name: lookup(asked, whole[derived.name]) for derived, lookup in self._lookups}
        for derived in schema.derived:
            if isinstance(derived, Ratio):
                found[derived.name] = self._computation.ratio(derived, found, asked, whole[derived.name])
        return found


def raw_values(views: Views, feature: Feature, derived: Derived, found: np.ndarray) -> pa.Array[Any]:
    """Raw values of a feature of a derived value.

    Args:
        views: that it was computed from.
        feature: that reads it.
        derived: the value.
        found: ``(n,)``, as :func:`compute_derived` gives them.
    """
    if isinstance(derived, AsOf):
        return to_arrow(views.version_values(feature, derived).gather(pl.Series(found).replace(-1, None)))
    numbers: pa.Array[Any] = pa.array(found, from_pandas=True)
    return numbers


def _ranks(columns: pl.DataFrame) -> np.ndarray:
    """A total order of rows by all of their values: equal only where these are."""
    order = columns.with_row_index("@row").sort(columns.columns, maintain_order=True)["@row"].to_numpy()
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks
