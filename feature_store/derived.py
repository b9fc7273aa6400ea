"""Computes derived values for every request and impression; what each is, :mod:`recsys.derived` says.

Rows of a log are sorted once for all values of the same groups; each value is two binary searches a look-up
(:mod:`recsys.windows`), chunk by chunk, into a file of the staging folder. So memory holds the log and the value at
work, not all values of all impressions. It grows with the rows of the log, and of the views of versions, unlike that of
a schema without derived values, whose events are looked at shard by shard (:mod:`feature_store.event_shards`).

An append computes them of the new rows of a log, and of what is carried of those before (:mod:`feature_store.carried`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from feature_store.carried import Carried, CarriedRows, Carrier, first_of_groups
from feature_store.expressions import row_expression
from feature_store.sources import Kind, feature_use, to_arrow, words_of
from feature_store.views import Views, windowed
from recsys.derived import AsOf, Derived, Mean, Ratio, Sum, Windowed, duration_us
from recsys.errors import SourceError
from recsys.schema import Feature, Schema, Scope, VersionedView
from recsys.windows import GroupedRows, LatestVersion, WindowedValue, check_units, in_units, ratio

if TYPE_CHECKING:
    from feature_store.joined import Joined

CHUNK = 1 << 20
"""Look-ups at once."""

_SCALE = "scale it in the expression, or give fewer decimals"
_NOTHING = np.empty(0, np.int64)

Family = tuple[str, tuple[str, ...], str | None]
"""The log, the groups and the created column that values share."""


def families(schema: Schema) -> dict[Family, list[Windowed]]:
    """Values of the same rows in the same groups, log by log."""
    alike: dict[Family, list[Windowed]] = {}
    for spec in sorted(windowed(schema), key=lambda spec: spec.source):
        alike.setdefault((spec.source, spec.by, spec.created), []).append(spec)
    return alike


def carried_attributes(schema: Schema) -> list[str]:
    """Attributes whose groups totals are kept by (:mod:`feature_store.carried`)."""
    found: dict[str, None] = {}
    for (_, by, _), specs in families(schema).items():
        if len({scope_of(schema, name) for name in by}) == 2 and any(spec.window is None for spec in specs):
            found |= dict.fromkeys(name for name in by if name not in ("user", "item"))
    return list(found)


def value_kinds(views: Views) -> dict[str, dict[str, Kind]]:
    """By log and column: what the columns of plain values hold that expressions of derived values read."""
    found: dict[str, dict[str, Kind]] = {}
    for spec in windowed(views.schema):
        if spec.source not in views.sources:
            continue
        names = {c for text, field in views.expressions(spec) for c in row_expression(text, field)[1]}
        kinds = views.sources[spec.source].kinds
        as_numbers = views.as_numbers.get(spec.source, ())
        found.setdefault(spec.source, {}).update(
            (use.column, "number" if use.column in as_numbers else kinds[use.column])
            for use in views.uses(spec.source)
            if use.role == "value" and use.column in names
        )
    return found


def read_as_before(views: Views, before: Mapping[str, Mapping[str, Kind]]) -> dict[str, set[str]]:
    """Lets expressions read columns of new files as a build of all files would read them.

    Args:
        views: of the new files.
        before: what the columns held in those before, as :func:`value_kinds` gives it.

    Returns:
        By log, columns that held integers so far and hold fractions now: the files before are to be read again.

    Raises:
        SourceError: a column holds text in some files and numbers in others.
    """
    widened: dict[str, set[str]] = {}
    as_numbers: dict[str, set[str]] = {}
    for log, columns in value_kinds(views).items():
        for column, kind in columns.items():
            earlier = before.get(log, {}).get(column, "null")
            if "null" in (kind, earlier) or kind == earlier:
                continue
            if {kind, earlier} != {"integer", "number"}:
                raise SourceError(
                    f"{views.sources[log].place}: column {column!r} must hold {words_of(earlier)} as in the files that "
                    f"the set was built from, got {words_of(kind)}: derived values are computed from it",
                    hint="write it with one type in every file",
                )
            (widened if earlier == "integer" else as_numbers).setdefault(log, set()).add(column)
    views.as_numbers = as_numbers
    return widened


def scope_of(schema: Schema, name: str) -> Scope:
    """Whose a group is, of those that ``by`` names: ``"user"`` or ``"item"``."""
    return name if name in ("user", "item") else schema.feature(name).scope  # type: ignore[return-value]


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


@dataclass(frozen=True)
class FamilyRows:
    """The rows that values of the same groups are computed from: carried ones, then those of a log.

    Attributes:
        log: the latter.
        by: what the groups are.
        user_row: ``(E,)`` int64.
        item_row: ``(E,)`` int64.
        time: ``(E,)`` int64.
        created: ``(E,)`` int64; None if each is known since its time.
        before: the carried ones, if any.
    """

    log: Log
    by: tuple[str, ...]
    user_row: np.ndarray
    item_row: np.ndarray
    time: np.ndarray
    created: np.ndarray | None
    before: CarriedRows | None = None


class Computation:
    """Reads the rows of logs and versions, and computes from them.

    Args:
        joined: everything but the derived values.
        before: what is carried of the rows that came before those of ``joined``.
    """

    def __init__(self, joined: Joined, before: Carried | None = None) -> None:
        self.joined = joined
        self.views: Views = joined.views
        self.schema = joined.schema
        self._before = before
        self._codes: dict[str, tuple[np.ndarray, int]] = {}
        self._groups: dict[str, np.ndarray] = {}
        self._folder = self.views.staging / "derived"
        self._folder.mkdir(parents=True, exist_ok=True)

    def run(self, newest: int | None = None) -> tuple[dict[str, np.ndarray], Carried | None]:
        """Every derived value of a schema, and what is carried of them.

        Args:
            newest: UTC microseconds; requests to come are not earlier. Nothing is carried if not given.

        Returns:
            By name: ``(R,)`` or ``(N,)`` by its scope; float64 with NaN where missing, of versions int64 rows of their
            view with -1 where there is none. And what is carried.

        Raises:
            QuarantineError: too many versions are broken.
            SourceError: an expression does not fit its columns, or does not give what it must.
        """
        joined = self.joined
        asked = Asked(joined.user_row, joined.requests.time, joined.item_row, joined.requests.row_start)
        found: dict[str, np.ndarray] = {}
        carried: dict[str, CarriedRows] = {}
        for specs, rows in self._families():
            carrier = None if newest is None else self._carrier(specs, rows, newest)
            for spec, value in self.values(specs, rows, carrier):
                found[spec.name] = self._filled(spec, asked, partial(self._at, value, asked))
            if carrier is not None:
                carried[specs[0].name] = carrier.finish()
        for view in self.schema.views.versions:
            for version, lookup in self._versions(view):
                found[version.name] = self._filled(version, asked, partial(lookup, asked))
        for derived in self.schema.derived:
            if isinstance(derived, Ratio):
                found[derived.name] = self._filled(derived, asked, partial(self.ratio, derived, found, asked))
        values = {derived.name: found[derived.name] for derived in self.schema.derived}
        return values, None if newest is None else self._carried(newest, carried)

    def lookups(self) -> Iterator[tuple[Windowed | AsOf, Lookup]]:
        """Every value but ratios, each ready to be looked up; one after the other, so that none need be kept."""
        for specs, rows in self._families():
            for spec, value in self.values(specs, rows):
                yield spec, partial(self._at, value)
        for view in self.schema.views.versions:
            yield from self._versions(view)

    def carry(self, newest: int) -> Carried:
        """What is carried of the values, of which none is looked up."""
        carried: dict[str, CarriedRows] = {}
        for specs, rows in self._families():
            carrier = self._carrier(specs, rows, newest)
            for spec, counts, units in self._counted(specs, rows):
                carrier.add(spec, counts, units)
            carried[specs[0].name] = carrier.finish()
        return self._carried(newest, carried)

    def _families(self) -> Iterator[tuple[list[Windowed], FamilyRows]]:
        logs: dict[str, Log] = {}
        for (source, by, created), specs in families(self.schema).items():
            if source not in logs:
                logs[source] = self.log(source)
            before = None if self._before is None else self._before.rows[specs[0].name]
            yield specs, self.rows(logs[source], by, created, before)

    def rows(self, log: Log, by: tuple[str, ...], created: str | None, before: CarriedRows | None = None) -> FamilyRows:
        """The rows of a log, behind those that are carried, with the columns that values of the same groups share."""
        since = None
        if created is not None:
            is_read = log.source in self.views.sources
            since = self.views.created(log.source, created, log.source_row) if is_read else _NOTHING
        if before is None:
            return FamilyRows(log, by, log.user_row, log.item_row, log.time, since)
        if since is not None:
            assert before.created is not None
            since = np.concatenate([before.created, since])
        user_row = np.concatenate([before.user_row, log.user_row])
        item_row = np.concatenate([before.item_row, log.item_row])
        return FamilyRows(log, by, user_row, item_row, np.concatenate([before.time, log.time]), since, before)

    def values(
        self, specs: Sequence[Windowed], rows: FamilyRows, carrier: Carrier | None = None
    ) -> Iterator[tuple[Windowed, WindowedValue]]:
        """Values of the same groups of rows, ready to be looked up; ``carrier`` is shown each."""
        key, is_grouped = self.keys(rows.by, rows.user_row, rows.item_row)
        created = None if rows.created is None else rows.created[is_grouped]
        grouped = GroupedRows(key[is_grouped], rows.time[is_grouped], created)
        for spec, counts, units in self._counted(specs, rows):
            yield (
                spec,
                WindowedValue.build(spec, grouped, counts[is_grouped], None if units is None else units[is_grouped]),
            )
            if carrier is not None:
                carrier.add(spec, counts, units)

    def _counted(
        self, specs: Sequence[Windowed], rows: FamilyRows
    ) -> Iterator[tuple[Windowed, np.ndarray, np.ndarray | None]]:
        """What all rows add to each value: how many that count, and of a sum and of a mean their sum in units."""
        for spec in specs:
            counts, units = self.counted(spec, rows.log.source_row)
            if rows.before is not None:
                counts = np.concatenate([rows.before.counts[spec.name], counts.astype(np.int64)])
            if rows.before is not None and units is not None:
                units = np.concatenate([rows.before.units[spec.name], units])
                try:
                    check_units(units, spec.decimals)  # type: ignore[union-attr]
                except ValueError as err:
                    raise SourceError(f"derived value {spec.name!r}: value {err}", hint=_SCALE) from err
            yield spec, counts, units

    def _carrier(self, specs: Sequence[Windowed], rows: FamilyRows, newest: int) -> Carrier:
        scopes = {scope_of(self.schema, name) for name in rows.by}
        first: dict[Scope, np.ndarray] = {}
        if len(scopes) == 2 and any(spec.window is None for spec in specs):
            for name in rows.by:
                codes, _, scope = self.coded(name)
                if codes is not None:
                    first[scope] = self._first_of_groups(name, codes)
        return Carrier(
            rows.user_row,
            rows.item_row,
            rows.time,
            rows.created,
            scopes=scopes,
            first_of_group=first,
            newest=newest,
        )

    def holds(self, before: Carried) -> bool:
        """Whether users and items that an attribute had put in one group still are in one."""
        found = ((name, self.coded(name)[0]) for name in before.groups)
        return not any(codes is not None and before.is_split(name, codes) for name, codes in found)

    def _first_of_groups(self, name: str, codes: np.ndarray) -> np.ndarray:
        if name not in self._groups:
            self._groups[name] = first_of_groups(codes)
        return self._groups[name]

    def _carried(self, newest: int, rows: Mapping[str, CarriedRows]) -> Carried:
        kinds: dict[str, dict[str, Kind]] = {}
        if self._before is not None:
            kinds = {log: dict(columns) for log, columns in self._before.kinds.items()}
        for log, columns in value_kinds(self.views).items():
            known = kinds.setdefault(log, {})
            known |= {column: kind for column, kind in columns.items() if kind != "null" or column not in known}
        return Carried(newest, rows, dict(self._groups), kinds)

    def log(self, source: str) -> Log:
        """The valid rows of ``"events"`` or ``"impressions"``."""
        views, joined = self.views, self.joined
        if source == "impressions":
            user_row = np.repeat(joined.user_row, joined.requests.row_counts)
            time = views.time("impressions")[joined.source_row]
            return Log(source, joined.source_row, user_row, joined.item_row, time)
        rows = joined.happened
        if rows is None:  # no file of the view is read
            return Log(source, _NOTHING, _NOTHING, _NOTHING, _NOTHING)
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

    def coded(self, name: str) -> tuple[np.ndarray | None, int, Scope]:
        """The number of each entity's group, -1 where its attribute is missing; how many; and whose it is."""
        joined = self.joined
        if name in ("user", "item"):
            return None, (joined.users if name == "user" else joined.items).num_rows, scope_of(self.schema, name)
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
        if spec.source not in views.sources:
            return is_counted, np.zeros(len(source_row), np.int64) if isinstance(spec, Sum | Mean) else None
        if spec.event_types is not None:
            types = views.event_types()
            assert types is not None
            is_counted &= types.is_in(list(spec.event_types)).fill_null(False).to_numpy()[source_row]
        if spec.where is not None:
            is_true = self._computed(spec, spec.where, "where").cast(pl.Boolean).fill_null(False)
            is_counted &= is_true.to_numpy()[source_row]
        if not isinstance(spec, Sum | Mean):
            return is_counted, None
        numbers = self._computed(spec, spec.value, "value").cast(pl.Float64)
        self._note_nan(spec, source_row[is_counted & numbers.is_nan().fill_null(False).to_numpy()[source_row]])
        values = numbers.fill_null(np.nan).to_numpy()[source_row]
        is_counted &= ~np.isnan(values)
        try:
            units = in_units(np.where(is_counted, values, np.nan), spec.decimals)
        except ValueError as err:
            place = f"{views.sources[spec.source].place}: derived value {spec.name!r}: value"
            raise SourceError(f"{place} {err}", hint=_SCALE) from err
        return is_counted, units

    def _note_nan(self, spec: Sum | Mean, source_row: np.ndarray) -> None:
        """Says which rows do not count because their value is none, such as 0 / 0; a null is missing, and no fault."""
        if len(source_row) == 0:
            return
        note = (
            f"{self.views.sources[spec.source].place}: derived value {spec.name!r}: value gives NaN in "
            f"{len(source_row):,} rows, first row {int(source_row.min()):,}: they count for nothing"
        )
        if note not in self.views.notes:
            self.views.notes.append(note)

    def _computed(self, spec: Windowed, text: str, field: str) -> pl.Series:
        """An expression over all rows of a view: true or false for ``where``, a number for ``value``."""
        place = f"derived value {spec.name!r}: {field}"
        series = self.views.computed(spec.source, text, place)
        wanted = "true or false" if field == "where" else "a number"
        is_boolean = series.dtype == pl.Boolean
        is_right = is_boolean if field == "where" else is_boolean or series.dtype.is_numeric()
        if not is_right and series.dtype != pl.Null:
            source = self.views.sources[spec.source]
            advice = source.cast_advice(text, row_expression(text, place)[1])
            raise SourceError(
                f"{source.place}: {place} must give {wanted}, got {str(series.dtype).lower()}",
                hint="compare with a value"
                if field == "where"
                else advice or "CAST(x AS DOUBLE) makes a number of text that is written as one",
            )
        return series

    def versions(self, view: VersionedView) -> tuple[np.ndarray, LatestVersion]:
        """The rows of a view of versions whose entity is known, and which of them is the latest when."""
        views, joined = self.views, self.joined
        entities = joined.users if view.of == "user" else joined.items
        rows = views.valid_rows(view.name)
        row_of_entity = entities.rows_of(views.keys(view.name, view.of).gather(rows))
        is_known = row_of_entity > 0
        rows, row_of_entity = rows[is_known], row_of_entity[is_known]
        created = None if view.created is None else views.created(view.name, view.created, rows)
        ranks = _ranks(views.version_columns(view.name)[rows])
        return rows, LatestVersion.build(row_of_entity, views.version_times(view.name, rows), created, ranks)

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
        """Every value, as :meth:`Computation.run` gives them.

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
        found: ``(n,)``, as :meth:`Computation.run` gives them.
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
