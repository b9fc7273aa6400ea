"""The views of a schema, opened: which columns each is read for, which of its rows are valid."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import numpy as np
import polars as pl

from feature_store.quarantine import Quarantine, checked_blocks
from feature_store.sources import (
    VIEW_OF_SCOPE,
    Source,
    Use,
    feature_use,
    open_source,
    settle_key_types,
    settle_value_types,
)
from recsys.schema import EventsView, Feature, FormatSpec, ImpressionsView, Schema, Task


def view_paths(schema: Schema) -> dict[str, str]:
    """Path of each view that is read, relative to the folder of views. Events are read only for histories."""
    views = schema.views
    paths = {"impressions": views.impressions.path}
    if views.events is not None and schema.histories:
        paths["events"] = views.events.path
    if views.users is not None:
        paths["users"] = views.users.path
    if views.items is not None:
        paths["items"] = views.items.path
    return paths


def view_format(schema: Schema, view: str) -> FormatSpec | None:
    """The declared format of a view; None if its files' names tell."""
    declared = getattr(schema.views, view)
    return None if declared is None else declared.format


class Views:
    """Opened and checked views, and the broken rows of each.

    Args:
        schema: what the views hold.
        root: folder or address that their paths are relative to.
        staging: folder for files that are fetched or that have to be read once as a whole.
        max_quarantined_fraction: of the rows of a view.
        only: the files to read of each view, as their identities name them; views that are not named stay closed.

    Attributes:
        sources: by name; only the views that are read.
        quarantines: by name.
        notes: what is no fault, but worth knowing.
        staging: folder for what is not kept.

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
    ) -> None:
        self.schema = schema
        self.staging = staging
        self._max_fraction = max_quarantined_fraction
        self._uses = self._find_uses()
        self.sources: dict[str, Source] = {
            view: open_source(
                view,
                root,
                path,
                self._uses[view],
                staging=staging,
                declared=view_format(schema, view),
                is_wanted=lambda f, view=view: only is None or f.identity["file"] in only[view],  # type: ignore[misc]
            )
            for view, path in view_paths(schema).items()
            if only is None or view in only
        }
        self.notes: list[str] = [note for source in self.sources.values() for note in source.notes]
        self._settle({v: self.key_column(v, "user") for v in ("impressions", "events", "users") if v in self.sources})
        self._settle({v: self.key_column(v, "item") for v in ("impressions", "events", "items") if v in self.sources})
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
        if views.users is not None:
            uses["users"] = [self._key_use(views.users.key, "views.users.key")]
        if views.items is not None:
            uses["items"] = [self._key_use(views.items.key, "views.items.key")]
        for feature in self.schema.all_features:
            view = VIEW_OF_SCOPE[feature.scope]
            if view in uses and not self.reads_time(feature):
                uses[view].append(feature_use(self.schema, feature))
        return uses

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

    def _log(self, view: str) -> ImpressionsView | EventsView | None:
        if view == "impressions":
            return self.schema.views.impressions
        return self.schema.views.events if view == "events" else None

    def key_column(self, view: str, scope: str) -> str:
        """Column of a view that holds the key of the user, or of the item."""
        log = self._log(view)
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

    def labels(self, task: Task) -> np.ndarray:
        """``(num_rows,)`` float32: the label of every impression, NaN where it is missing."""
        values = self.sources["impressions"].column(_label_use(task)).fill_null(np.nan).to_numpy()
        if task.at_least is not None:
            values = np.where(np.isnan(values), np.nan, values >= task.at_least)
        return values.astype(np.float32)

    def values(self, feature: Feature) -> pl.Series:
        """Raw values of a feature in every row of its view."""
        return self.sources[VIEW_OF_SCOPE[feature.scope]].column(feature_use(self.schema, feature))

    def context_columns(self) -> dict[str, pl.Series]:
        """Raw values of what context features read, by column, in every impression."""
        features = [f for f in self.schema.features_of("context") if not self.reads_time(f)]
        return {f.source_column: self.values(f) for f in features}

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
