"""The views of a schema, opened: which columns each is read for, which of its rows are valid."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from feature_store.expressions import row_expression
from feature_store.opening import open_source
from feature_store.quarantine import Quarantine, checked_blocks
from feature_store.sources import (
    VIEW_OF_SCOPE,
    Source,
    Use,
    feature_use,
    settle_key_types,
    settle_value_types,
)
from feature_store.time_spans import TimeColumn, check_unit
from recsys.derived import AsOf, Mean, Ratio, Sum, Windowed
from recsys.schema import EventsView, Feature, FormatSpec, ImpressionsView, Schema, Task, VersionedView


def view_paths(schema: Schema) -> dict[str, str]:
    """Path of each view that is read, relative to the folder of views; events only if something is made of them."""
    views = schema.views
    paths = {"impressions": views.impressions.path}
    is_derived_of = any(d.source == "events" for d in windowed(schema))
    if views.events is not None and (schema.histories or is_derived_of):
        paths["events"] = views.events.path
    if views.users is not None:
        paths["users"] = views.users.path
    if views.items is not None:
        paths["items"] = views.items.path
    paths.update({view.name: view.path for view in views.versions})
    return paths


def windowed(schema: Schema) -> list[Windowed]:
    """The derived values that are computed from rows of a log."""
    return [d for d in schema.derived if not isinstance(d, Ratio | AsOf)]


def version_view(schema: Schema, name: str) -> VersionedView | None:
    """A view of versions; None if the name is that of another view."""
    return next((view for view in schema.views.versions if view.name == name), None)


def view_format(schema: Schema, view: str) -> FormatSpec | None:
    """The declared format of a view; None if its files' names tell."""
    declared = version_view(schema, view) or getattr(schema.views, view)
    return None if declared is None else declared.format


class Views:
    """Opened and checked views, and the broken rows of each.

    Args:
        schema: what the views hold.
        root: folder or address that their paths are relative to.
        staging: folder for files that are fetched or that have to be read once as a whole.
        max_quarantined_fraction: of the rows of a view.
        only: the files to read of each view, as their identities name them; views that are not named stay closed.
        last: files of views that come after the others, in this order, named likewise.

    Attributes:
        sources: by name; only the views that are read.
        quarantines: by name.
        notes: what is no fault, but worth knowing.
        staging: folder for what is not kept.
        as_numbers: by view, columns of integers that expressions read as fractions, for other files hold them so;
            none at first.

    Raises:
        SourceError: a file or a column is missing or of the wrong type.
    """

    def __init__(
        self,
        schema: Schema,
        root: str | Path,
        *,
        staging: Path,
        max_quarantined_fraction: float,
        only: Mapping[str, Container[str]] | None = None,
        last: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.schema = schema
        self.staging = staging
        self._max_fraction = max_quarantined_fraction
        self._uses = self._find_uses()
        self.as_numbers: Mapping[str, Collection[str]] = {}
        self._checked_times: set[tuple[str, str]] = set()
        self._looked_for_nan: set[tuple[str, str]] = set()
        self.sources: dict[str, Source] = {
            view: open_source(
                view,
                root,
                path,
                self._uses[view],
                staging=staging,
                declared=view_format(schema, view),
                is_wanted=lambda f, view=view: only is None or f.identity["file"] in only[view],  # type: ignore[misc]
                last=(last or {}).get(view, ()),
                reserved=self._derived_names() if view == "impressions" else (),
            )
            for view, path in view_paths(schema).items()
            if only is None or view in only
        }
        self.notes: list[str] = [note for source in self.sources.values() for note in source.notes]
        for scope in ("user", "item"):
            keyed = ["impressions", "events", f"{scope}s", *(v.name for v in schema.views.versions if v.of == scope)]
            self._settle({v: self.key_column(v, scope) for v in keyed if v in self.sources})
        request = schema.views.impressions.request
        if request is not None and request not in self.sources["impressions"].key_types:
            self._settle({"impressions": request})
        self.sources = {v: settle_value_types(s, self._uses[v]) for v, s in self.sources.items()}
        self.quarantines = {view: Quarantine(source) for view, source in self.sources.items()}

    def uses(self, view: str) -> tuple[Use, ...]:
        """What a view's columns are read for; a column that is read twice counts once, as its first use reads it."""
        by_column: dict[str, Use] = {}
        for use in self._uses[view]:
            by_column.setdefault(use.column, use)
        return tuple(by_column.values())

    def _settle(self, columns: Mapping[str, str]) -> None:
        pairs = [(self.sources[view], column) for view, column in columns.items()]
        settled = settle_key_types(pairs, tolerance=self._max_fraction)
        self.sources.update(zip(columns, settled, strict=True))

    def _find_uses(self) -> dict[str, list[Use]]:
        """What the schema reads of each view, read or not."""
        views = self.schema.views
        uses: dict[str, list[Use]] = {"impressions": self._log_uses("impressions", views.impressions)}
        if views.impressions.request is not None:
            uses["impressions"].append(self._key_use(views.impressions.request, "views.impressions.request"))
        uses["impressions"] += [_label_use(task) for task in self.schema.tasks]
        if views.events is not None:
            uses["events"] = self._log_uses("events", views.events)
            if views.events.type is not None:
                uses["events"].append(Use(views.events.type, "type", "views.events.type"))
            if views.events.sequence is not None:
                uses["events"].append(Use(views.events.sequence, "sequence", "views.events.sequence"))
        if views.users is not None:
            uses["users"] = [self._key_use(views.users.key, "views.users.key")]
        if views.items is not None:
            uses["items"] = [self._key_use(views.items.key, "views.items.key")]
        for version in views.versions:
            uses[version.name] = [
                self._key_use(version.key, f"views.versions: {version.name!r}: key"),
                *self._time_uses(version.name, version.time, version.created),
            ]
        for feature in self.schema.all_features:
            view, derived = VIEW_OF_SCOPE[feature.scope], self.schema.derived_of(feature)
            if isinstance(derived, AsOf):
                uses[derived.view].append(self._version_use(feature, derived))
            elif derived is None and view in uses and not self.reads_time(feature):
                uses[view].append(feature_use(self.schema, feature))
        for spec in windowed(self.schema):
            reader = f"derived value {spec.name!r}"
            if spec.created is not None:
                uses[spec.source].append(self._time_use(spec.source, spec.created, reader))
            for text, field in self.expressions(spec):
                _, columns = row_expression(text, f"{reader}: {field}")
                uses[spec.source] += [Use(column, "value", reader) for column in columns]
        return uses

    def _derived_names(self) -> set[str]:
        """Names of the derived values that features read, as they would read a column of the impressions."""
        found = (self.schema.derived_of(feature) for feature in self.schema.features)
        return {derived.name for derived in found if derived is not None}

    @staticmethod
    def expressions(spec: Windowed) -> list[tuple[str, str]]:
        """The expressions of a derived value, and the field that holds each."""
        found = [] if spec.where is None else [(spec.where, "where")]
        return [*found, (spec.value, "value")] if isinstance(spec, Sum | Mean) else found

    def _version_use(self, feature: Feature, derived: AsOf) -> Use:
        """How a feature reads a column of versions."""
        version = version_view(self.schema, derived.view)
        assert version is not None
        use = feature_use(self.schema, feature)
        return replace(use, column=derived.source_column, time_zone=version.time_zone)

    def _time_use(self, view: str, column: str, reader: str) -> Use:
        log = self._log(view)
        assert log is not None
        return Use(column, "time", reader, log.time_unit, time_zone=log.time_zone)

    def _time_uses(self, view: str, time: str, created: str | None) -> list[Use]:
        place = f"views.versions: {view!r}"
        found = [self._time_use(view, time, f"{place}: time")]
        return found if created is None else [*found, self._time_use(view, created, f"{place}: created")]

    def _log_uses(self, view: str, columns: ImpressionsView | EventsView) -> list[Use]:
        time = Use(columns.time, "time", f"views.{view}.time", columns.time_unit, time_zone=columns.time_zone)
        keys = {"user": columns.user, "item": columns.item}
        return [*(self._key_use(column, f"views.{view}.{key}") for key, column in keys.items()), time]

    def _key_use(self, column: str, reader: str) -> Use:
        return Use(column, "key", reader, is_negative_kept=self.schema.views.negative_keys == "keep")

    def reads_time(self, feature: Feature) -> bool:
        """Whether a feature reads its log's own time, which is known in microseconds whatever its unit."""
        log = self._log(VIEW_OF_SCOPE[feature.scope])
        return (
            log is not None
            and feature.source_column == log.time
            and feature_use(self.schema, feature).role == "instant"
        )

    def _log(self, view: str) -> ImpressionsView | EventsView | VersionedView | None:
        if view == "impressions":
            return self.schema.views.impressions
        return self.schema.views.events if view == "events" else version_view(self.schema, view)

    def key_column(self, view: str, scope: str) -> str:
        """Column of a view that holds the key of the user, or of the item."""
        log = self._log(view)
        if isinstance(log, VersionedView):
            return log.key
        if log is not None:
            return log.user if scope == "user" else log.item
        entity = self.schema.views.users if scope == "user" else self.schema.views.items
        assert entity is not None
        return entity.key

    def keys(self, view: str, scope: str) -> pl.Series:
        """The key of the user, or of the item, of every row of a view."""
        return self.sources[view].column(self._key(view, scope))

    def key_expression(self, view: str, scope: str) -> pl.Expr:
        """The same as an expression."""
        return self.sources[view].typed(self._key(view, scope))

    def _key(self, view: str, scope: str) -> Use:
        return Use(self.key_column(view, scope), "key", view)

    def request_keys(self) -> pl.Series | None:
        """The key of the request of every impression; None if each is its own."""
        column = self.schema.views.impressions.request
        return None if column is None else self.sources["impressions"].column(Use(column, "key", "request"))

    def time(self, view: str) -> np.ndarray:
        """``(num_rows,)`` int64: UTC microseconds, of valid rows; others have no meaning."""
        return self.sources[view].read({"time": self.time_expression(view)})["time"].to_numpy()

    def time_expression(self, view: str) -> pl.Expr:
        """The same as an expression."""
        log = self._log(view)
        assert log is not None
        use = Use(log.time, "time", view, log.time_unit, time_zone=log.time_zone)
        return self.sources[view].typed(use).fill_null(-1)

    def time_column(self, view: str) -> TimeColumn:
        """The time column of a log as messages name it; text counts as integers if its first value is one."""
        log = self._log(view)
        assert log is not None
        return self._time_column(view, log.time, "time")

    def _time_column(self, view: str, column: str, name: str) -> TimeColumn:
        log, source = self._log(view), self.sources[view]
        assert log is not None
        kind = source.kinds[column]
        is_integer = kind == "integer" or (kind == "text" and source.begins_with_integer(column))
        field = f"views.versions: {view!r}" if isinstance(log, VersionedView) else f"views.{view}"
        return TimeColumn(source.place, field, column, log.time_unit if is_integer else None, name)

    def created(self, view: str, column: str, rows: np.ndarray) -> np.ndarray:
        """Since when rows of a view are known, UTC microseconds.

        Args:
            rows: ``(n,)`` int64, valid ones.

        Returns:
            ``(n,)`` int64.

        Raises:
            SourceError: these times were read in too fine a unit, so that all would be known since 1970.
        """
        use = self._time_use(view, column, "created")
        times: np.ndarray = self.sources[view].column(use).fill_null(-1).to_numpy()[rows]
        self._check_times(view, column, "created", times)
        return times

    def version_times(self, view: str, rows: np.ndarray) -> np.ndarray:
        """Since when versions hold, UTC microseconds.

        Args:
            rows: ``(n,)`` int64, valid ones.

        Returns:
            ``(n,)`` int64.

        Raises:
            SourceError: these times were read in too fine a unit, so that all would hold since 1970.
        """
        log = self._log(view)
        assert log is not None
        times: np.ndarray = self.time(view)[rows]
        self._check_times(view, log.time, "time", times)
        return times

    def _check_times(self, view: str, column: str, name: str, times: np.ndarray) -> None:
        """Looks at the times of a column the first time that they are asked for: several values may share it."""
        if (view, column) not in self._checked_times:
            self._checked_times.add((view, column))
            self.notes += check_unit(times, self._time_column(view, column, name))

    def computed(self, view: str, text: str, reader: str) -> pl.Series:
        """An SQL expression over every row of a view; its columns are as their first use reads them.

        NaN counts as missing; how many values hold it, one of the notes says, once for each column.

        Raises:
            SourceError: it cannot be computed of what the columns hold.
        """
        expression, columns = row_expression(text, reader)
        self._note_nan(view, [column for column in columns if (view, column) not in self._looked_for_nan])
        uses = [use for use in self.uses(view) if use.column in columns]
        return self.sources[view].computed(
            expression, uses, reader, text=text, as_numbers=self.as_numbers.get(view, ())
        )

    def _note_nan(self, view: str, columns: Sequence[str]) -> None:
        self._looked_for_nan.update((view, column) for column in columns)
        for column, count in self.sources[view].num_nan(columns).items():
            if count:
                self.notes.append(
                    f"{self.sources[view].place}: column {column!r} holds NaN in {count:,} rows: derived values take "
                    "it as missing"
                )

    def column_types(self, view: str, texts: Sequence[str]) -> dict[str, str]:
        """Polars types of the columns that SQL expressions read, as they read them."""
        names = {column for text in texts for column in row_expression(text, view)[1]}
        source = self.sources[view]
        types = source.frame.select(**{u.column: source.typed(u) for u in self.uses(view) if u.column in names})
        return {name: str(kind) for name, kind in types.collect_schema().items()}

    def version_values(self, feature: Feature, derived: AsOf) -> pl.Series:
        """Raw values of a feature in every row of its view of versions."""
        return self.sources[derived.view].column(self._version_use(feature, derived))

    def version_columns(self, view: str) -> pl.DataFrame:
        """Everything that is read of a view of versions, but for its key and times."""
        source = self.sources[view]
        uses = [use for use in self.uses(view) if use.role not in ("key", "time")]
        return source.read({use.column: source.typed(use) for use in sorted(uses, key=lambda use: use.column)})

    def event_types(self) -> pl.Series | None:
        """The type of every event as text; None if events have none."""
        types = self.event_type_expression()
        return None if types is None else self.sources["events"].read({"type": types})["type"]

    def event_type_expression(self) -> pl.Expr | None:
        """The same as an expression."""
        events = self.schema.views.events
        if events is None or events.type is None:
            return None
        return self.sources["events"].typed(Use(events.type, "type", "events"))

    def sequence(self, rows: np.ndarray) -> np.ndarray | None:
        """``(n,)`` int64: what orders some events of equal times, the smallest integer where it is missing.

        Args:
            rows: ``(n,)`` int64, of the events, in any order.

        Returns:
            None if no column is declared.
        """
        events = self.schema.views.events
        if events is None or events.sequence is None:
            return None
        source = self.sources["events"]
        numbers = source.typed(Use(events.sequence, "sequence", "events")).fill_null(np.iinfo(np.int64).min)
        found: np.ndarray = source.read_in(rows, numbers).to_numpy()
        return found

    def labels(self, task: Task, rows: np.ndarray) -> np.ndarray:
        """``(n,)`` float32: the label of some impressions, NaN where it is missing.

        Args:
            task: whose label it is.
            rows: ``(n,)`` int64, of the view.
        """
        source = self.sources["impressions"]
        label = source.typed(_label_use(task))
        if task.at_least is not None:
            label = label.fill_nan(None) >= task.at_least
        values: np.ndarray = source.read_in(rows, label.cast(pl.Float32).fill_null(np.nan)).to_numpy()
        return values

    def values(self, feature: Feature) -> pl.Series:
        """Raw values of a feature in every row of its view."""
        return self.sources[VIEW_OF_SCOPE[feature.scope]].column(feature_use(self.schema, feature))

    def values_in(self, feature: Feature, rows: np.ndarray) -> pl.Series:
        """Raw values of a feature in some rows of its view.

        Args:
            feature: of any scope.
            rows: ``(n,)`` int64, in any order.
        """
        source = self.sources[VIEW_OF_SCOPE[feature.scope]]
        return source.read_in(rows, source.typed(feature_use(self.schema, feature)))

    def context_columns(self) -> Iterator[tuple[str, pl.Series]]:
        """Each column that context features read, with its raw values in every impression; one at a time is read."""
        features = {
            f.source_column: f
            for f in self.schema.features_of("context")
            if not self.reads_time(f) and self.schema.derived_of(f) is None
        }
        return ((column, self.values(feature)) for column, feature in features.items())

    def valid_rows(self, view: str) -> np.ndarray:
        """``(n,)`` int64: rows of a view without a problem; the others are set aside.

        Raises:
            QuarantineError: too many are broken.
        """
        blocks = [is_valid for is_valid, _ in self.checked_blocks(view, {})]
        return np.flatnonzero(np.concatenate(blocks)) if blocks else np.empty(0, dtype=np.int64)

    def checked_blocks(self, view: str, columns: Mapping[str, pl.Expr]) -> Iterator[tuple[np.ndarray, pl.DataFrame]]:
        """Reads columns of a view block by block; at the end, rows with a problem are set aside.

        Yields:
            ``(n,)`` bool, the rows of the block without a problem, and the columns of all of its rows.

        Raises:
            QuarantineError: too many are broken.
        """
        source, quarantine = self.sources[view], self.quarantines[view]
        yield from checked_blocks(source, quarantine, self.problems(view), columns)
        quarantine.enforce(self._max_fraction)

    def problems(self, view: str) -> list[tuple[str, pl.Expr]]:
        """What can be wrong with a row of a view: reasons, and expressions that are true where it is."""
        source = self.sources[view]
        problems = {reason: expression for use in self._uses[view] for reason, expression in source.problems(use)}
        if view == "impressions":
            problems.update(self._label_problems(source))
        return list(problems.items())

    def _label_problems(self, source: Source) -> dict[str, pl.Expr]:
        labels = [source.typed(_label_use(task)).fill_nan(None) for task in self.schema.tasks]
        problems = {
            f"{task.label} is neither 0 nor 1": label.is_in([0.0, 1.0]).not_()
            for task, label in zip(self.schema.tasks, labels, strict=True)
            if task.at_least is None
        }
        problems["every label is missing"] = pl.all_horizontal([label.is_null() for label in labels])
        return problems

    def quarantine(self, view: str, reason: str, source_rows: np.ndarray) -> None:
        """Sets more rows of a view aside.

        Raises:
            QuarantineError: too many are broken.
        """
        self.quarantines[view].add(reason, source_rows)
        self.quarantines[view].enforce(self._max_fraction)


def _label_use(task: Task) -> Use:
    return Use(task.label, "label", f"task {task.name!r}")
