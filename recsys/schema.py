"""The schema: what the data is. Order of features, tables and tasks everywhere derives from it.

A schema names the views (impressions, events, users, items) with their columns, the features with their scope, the
histories and the tasks. ``scope`` says what a feature belongs to, and so how often it is stored and computed:

==========  =====================  ===============================  =======================
scope       read from              stored                           computed
==========  =====================  ===============================  =======================
user        the users view         once a user                      once a request
item        the items view         once an item                     once a candidate
context     the impressions view   once a request                   once a request
candidate   the impressions view   once an impression               once a candidate
event       the events view        once an event                    once an event
==========  =====================  ===============================  =======================

Features of scope context and candidate may read a derived value (:mod:`recsys.derived`) in place of a column.

Ids in every table: 0 is padding (never looked up), 1 is unknown (missing, rare or never seen), the rest are values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import available_timezones

from pydantic import AfterValidator, Field, model_validator

from recsys.config import Config, InconsistentError, load_yaml, validate
from recsys.derived import AsOf, Derived, Name, Ratio
from recsys.errors import SchemaError, nearest

PADDING_ID = 0
UNKNOWN_ID = 1
FIRST_ID = 2
"""The first id that stands for a value."""

Scope = Literal["user", "item", "context", "candidate", "event"]
TimeUnit = Literal["s", "ms", "us", "ns"]


class Vocabulary(Config):
    """A value's id is its place in a list fitted on the training period, most frequent first."""

    kind: Literal["vocabulary"] = "vocabulary"
    min_count: int = Field(1, ge=1, description="values seen less often in the training period are unknown")
    max_size: int | None = Field(None, ge=1, description="keep only this many values, the most frequent")


class Hash(Config):
    """A value's id is its hash modulo ``num_buckets``: nothing to fit, values may collide."""

    kind: Literal["hash"] = "hash"
    num_buckets: int = Field(ge=1, le=2**40)
    seed: int = Field(0, ge=0, lt=2**63)


class QuantileBuckets(Config):
    """A number's id is its bucket between quantiles of the training period."""

    kind: Literal["quantile"] = "quantile"
    num_buckets: int = Field(ge=2, le=65536)


class LogBuckets(Config):
    """A number's id is ``floor(log_base(1 + max(x, 0)))``, at most ``num_buckets - 1``."""

    kind: Literal["log"] = "log"
    base: float = Field(2.0, gt=1.0)
    num_buckets: int = Field(32, ge=2, le=65536)


class HourOfDay(Config):
    """The hour of a UTC time, shifted by a fixed offset: 24 values."""

    kind: Literal["hour_of_day"] = "hour_of_day"
    utc_offset_minutes: int = Field(0, ge=-1440, le=1440)


class DayOfWeek(Config):
    """The weekday of a UTC time, shifted by a fixed offset: 7 values, Monday first."""

    kind: Literal["day_of_week"] = "day_of_week"
    utc_offset_minutes: int = Field(0, ge=-1440, le=1440)


EncoderSpec = Annotated[
    Vocabulary | Hash | QuantileBuckets | LogBuckets | HourOfDay | DayOfWeek, Field(discriminator="kind")
]


class Standardise(Config):
    """``(f(x) - mean) / std`` over the training period, with ``f = log(1 + max(x, 0))`` if ``log1p``; missing is 0."""

    kind: Literal["standardise"] = "standardise"
    log1p: bool = False
    clip: float = Field(10.0, gt=0, description="bound on the magnitude of the result")


class Keep(Config):
    """The number as it is; missing is 0."""

    kind: Literal["keep"] = "keep"


TransformSpec = Annotated[Standardise | Keep, Field(discriminator="kind")]


class _Feature(Config):
    name: Name
    scope: Scope
    column: str | None = Field(None, min_length=1, description="source column; the feature's name if not given")

    @property
    def source_column(self) -> str:
        """Name of the column in the view that the scope reads from."""
        return self.column or self.name


class Categorical(_Feature):
    """One value, embedded."""

    kind: Literal["categorical"] = "categorical"
    table: Name | None = Field(None, description="a shared table; the feature's own if not given")
    encoder: EncoderSpec | None = Field(
        None, description="encoder of the feature's own table; a vocabulary if not given"
    )

    @property
    def table_name(self) -> str:
        """Name of the embedding table that holds the feature's ids."""
        return self.table or self.name


class MultiCategorical(Categorical):
    """A set of values, embedded and pooled. Read from a list column, or from text split at ``separator``."""

    kind: Literal["multi_categorical"] = "multi_categorical"  # type: ignore[assignment]
    separator: str | None = Field(None, min_length=1, description="splits text columns; list columns need none")
    max_values: int | None = Field(None, ge=1, description="keep only the first so many values")


class Dense(_Feature):
    """A number, or a vector of ``dim`` numbers, fed to the network as it is after the transform."""

    kind: Literal["dense"] = "dense"
    transform: TransformSpec = Standardise()
    dim: int = Field(1, ge=1, le=65536)


Feature = Annotated[Categorical | MultiCategorical | Dense, Field(discriminator="kind")]


class Table(Config):
    """An embedding table that several features share."""

    encoder: EncoderSpec = Vocabulary()


class History(Config):
    """The user's events strictly before the request, oldest first.

    ``attributes`` name item features: each event has them through its item, in the candidate's own tables.
    ``max_length`` bounds what a batch reads, not what is stored: storage is two integers a request whatever the length.
    With ``max_age_hours``, an event counts for that long: up to a request exactly so much later.
    """

    name: Name
    event_types: tuple[str, ...] | None = Field(None, min_length=1, description="all types if not given")
    max_length: int = Field(50, ge=1, le=1_000_000, description="the newest so many events")
    max_age_hours: float | None = Field(
        None, gt=0, le=2e6, description="no event more than so much older than the request; any age if not given"
    )
    attributes: tuple[Name, ...] = Field(min_length=1)
    event_features: tuple[Feature, ...] = ()

    @property
    def max_age_us(self) -> int | None:
        """``max_age_hours`` in microseconds."""
        return None if self.max_age_hours is None else round(self.max_age_hours * 3_600_000_000)


class Task(Config):
    """One 0/1 label and one logit. A missing label takes no part in the task's loss or metrics."""

    name: Name
    label: str = Field(min_length=1, description="column of the impressions view")
    at_least: float | None = Field(
        None, description="label is 1 where the column is at least this; else it must hold 0/1"
    )


class ParquetFormat(Config):
    """Parquet; columns keep their types."""

    kind: Literal["parquet"] = "parquet"


class ArrowFormat(Config):
    """Arrow IPC, file or stream (Feather version 2 is the former); columns keep their types."""

    kind: Literal["arrow"] = "arrow"


class CsvFormat(Config):
    """Text with a row a line and fields between separators; what a column holds, its use decides."""

    kind: Literal["csv"] = "csv"
    separator: str = Field(
        ",", min_length=1, max_length=8, description="one character, or several such as '::', which nothing may quote"
    )
    columns: tuple[str, ...] | None = Field(
        None, min_length=1, description="names in the order of the fields, of files without a header"
    )
    encoding: Literal["utf-8", "latin-1"] = "utf-8"

    @model_validator(mode="after")
    def _has_no_quotes(self) -> Self:
        if any(c in self.separator for c in '"\r\n'):
            raise ValueError("separator must hold no quote and no line end")
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise ValueError("columns must have different names")
        return self


class JsonLinesFormat(Config):
    """One JSON object a line; a column has one type in all lines, and is missing where a line lacks it."""

    kind: Literal["json_lines"] = "json_lines"


class LibfmFormat(Config):
    """``label index:value index:value ...``, as many entries in every line.

    Columns are ``row`` (the line from 0, which can stand for the time that the format lacks), ``label``, and of the
    j-th entry, from 1, ``x<j>`` (its index) and ``v<j>`` (its value).
    """

    kind: Literal["libfm"] = "libfm"


FormatSpec = Annotated[
    ParquetFormat | ArrowFormat | CsvFormat | JsonLinesFormat | LibfmFormat, Field(discriminator="kind")
]


@cache
def _zones() -> frozenset[str]:
    """Names of all time zones; finding them looks at hundreds of files."""
    return frozenset(available_timezones())


def _known_zone(name: str) -> str:
    known = _zones()
    if name not in known:
        raise ValueError(f"{name!r} is not a time zone, {nearest(name, known)}")
    return name


TimeZone = Annotated[str, AfterValidator(_known_zone)]


class _View(Config):
    format: FormatSpec | None = Field(None, description="of its files; by their names if not given")
    time_zone: TimeZone = Field("UTC", description="of times that carry no zone or offset; integers are always UTC")


class ImpressionsView(_View):
    """One row an impression."""

    path: str = "impressions.parquet"
    user: str
    item: str
    time: str
    time_unit: TimeUnit = Field("us", description="of integer columns; timestamps carry their own")
    request: str | None = Field(None, description="groups impressions; each is its own request if not given")


class EventsView(_View):
    """One row a past interaction.

    The order of rows means nothing: events of one user and one time are ordered by their ``sequence``, then by what a
    history holds of them (:mod:`feature_store.tied_events`).
    """

    path: str = "events.parquet"
    user: str
    item: str
    time: str
    time_unit: TimeUnit = "us"
    type: str | None = Field(None, description="column of the event type; needed by histories that filter on it")
    sequence: str | None = Field(
        None, min_length=1, description="column of integers that rise from event to event: the order of equal times"
    )


class EntityView(_View):
    """One row a user, or an item."""

    path: str
    key: str


class VersionedView(_View):
    """One row a version of a user's, or of an item's, attributes: what they were from its time on."""

    name: Name
    path: str
    of: Literal["user", "item"]
    key: str
    time: str
    time_unit: TimeUnit = "us"
    created: str | None = Field(None, min_length=1, description="column of the time since when a version is known")


class Views(Config):
    """Where each view is, relative to the folder of views (a file, a folder or a pattern), and its key columns."""

    impressions: ImpressionsView
    events: EventsView | None = None
    users: EntityView | None = None
    items: EntityView | None = None
    versions: tuple[VersionedView, ...] = Field((), description="attributes that change over time")
    negative_keys: Literal["quarantine", "keep"] = Field(
        "quarantine", description="negative keys mostly stand for nobody; keep them where keys are signed hashes"
    )


ViewName = Literal["impressions", "events", "users", "items"]


class Expectation(Config):
    """What a column must be like; every rule that is given is checked, over all rows of the view."""

    view: ViewName
    column: str = Field(min_length=1, description="one that the schema reads")
    max_null_rate: float | None = Field(None, ge=0.0, le=1.0, description="share of missing values")
    lowest: float | None = Field(None, description="no number may be smaller")
    highest: float | None = Field(None, description="no number may be larger")
    max_outside_rate: float = Field(
        0.0, ge=0.0, le=1.0, description="share of values that may lie outside all the same"
    )
    min_distinct: int | None = Field(None, ge=0)
    max_distinct: int | None = Field(None, ge=0)
    max_age_hours: float | None = Field(None, gt=0, description="of the newest time, when it is checked")
    severity: Literal["fail", "warn"] = "fail"

    @model_validator(mode="after")
    def _expects_something(self) -> Self:
        rules = ("max_null_rate", "lowest", "highest", "min_distinct", "max_distinct", "max_age_hours")
        if all(getattr(self, rule) is None for rule in rules):
            raise ValueError(f"must give at least one of {', '.join(rules)}")
        for low, high in (("lowest", "highest"), ("min_distinct", "max_distinct")):
            if None not in (getattr(self, low), getattr(self, high)) and getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} must be at most {high}")
        return self


class DriftRules(Config):
    """From where on a difference between two periods is a warning, or a failure.

    Defaults of PSI: Siddiqi, Credit Risk Scorecards, 2006. Those of the Jensen-Shannon distance are where a small
    change has these PSI: its square is then about PSI / (8 ln 2).
    """

    warn_psi: float = Field(0.1, gt=0.0)
    fail_psi: float = Field(0.25, gt=0.0)
    warn_js: float = Field(0.13, gt=0.0, le=1.0)
    fail_js: float = Field(0.21, gt=0.0, le=1.0)
    ignore: tuple[Name, ...] = Field((), description="features that are meant to change, such as the weekday")


class Quality(Config):
    """What ``recsys data check`` checks."""

    expectations: tuple[Expectation, ...] = ()
    drift: DriftRules = DriftRules()


class Schema(Config):
    """What the data is: views, features, histories, tasks; and what is expected of it.

    Example:
        >>> schema = Schema.load("configs/schema/simulated.yaml")  # doctest: +SKIP
        >>> [f.name for f in schema.features_of("item")]  # doctest: +SKIP
        ['item_id', 'category']
    """

    name: Name
    views: Views
    tables: dict[Name, Table] = Field(default_factory=dict)
    features: tuple[Feature, ...] = Field(min_length=1)
    derived: tuple[Derived, ...] = ()
    histories: tuple[History, ...] = ()
    tasks: tuple[Task, ...] = Field(min_length=1)
    quality: Quality = Quality()

    @classmethod
    def load(cls, path: str | Path) -> Schema:
        """Reads a schema from YAML.

        Raises:
            ConfigError: with every violation and its path.
        """
        return validate(cls, load_yaml(path), source=str(path))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise InconsistentError(problems)
        return self

    def _problems(self) -> Iterator[str]:
        yield from self._name_problems()
        yield from self._view_problems()
        yield from self._table_problems()
        for history in self.histories:
            yield from self._history_problems(history)
        yield from self._version_problems()
        yield from self._derived_problems()
        for feature in self.features:
            yield from self._derived_feature_problems(feature)
        yield from self._quality_problems()

    def _name_problems(self) -> Iterator[str]:
        taken: set[str] = set()
        for feature in self.features:
            if feature.name in taken:
                yield f"feature {feature.name!r} is declared twice"
            taken.add(feature.name)
        for history in self.histories:
            if history.name in taken:
                yield f"history {history.name!r}: the name is taken"
            taken.add(history.name)
            for feature in history.event_features:
                if feature.name in taken:
                    yield f"history {history.name!r}: event feature {feature.name!r}: the name is taken"
                taken.add(feature.name)
        if len({t.name for t in self.tasks}) < len(self.tasks):
            yield "two tasks have the same name"

    def _view_problems(self) -> Iterator[str]:
        views = self.views
        for feature in self.features:
            if feature.scope == "event":
                yield f"feature {feature.name!r} has scope 'event': declare it under a history's event_features"
            if feature.scope == "user" and views.users is None and feature.source_column != views.impressions.user:
                yield f"user feature {feature.name!r} needs views.users"
            if feature.scope == "item" and views.items is None and feature.source_column != views.impressions.item:
                yield f"item feature {feature.name!r} needs views.items"

    def _table_problems(self) -> Iterator[str]:
        embedded = [f for f in self.all_features if isinstance(f, Categorical)]
        own = {f.name for f in embedded if f.table is None}
        for feature in embedded:
            if feature.table is None:
                if feature.name in self.tables and feature.encoder is not None:
                    yield f"feature {feature.name!r} gives an encoder, and so does its table"
                continue
            if feature.encoder is not None:
                yield f"feature {feature.name!r} gives both table and encoder: the encoder belongs to the table"
            if feature.table not in self.tables and feature.table not in own:
                hint = nearest(feature.table, [*self.tables, *own])
                yield f"feature {feature.name!r}: table {feature.table!r} is not known, {hint}"
        for table in self.tables:
            if table not in {f.table_name for f in embedded}:
                yield f"table {table!r} is used by no feature"

    def _history_problems(self, history: History) -> Iterator[str]:
        place = f"history {history.name!r}"
        if self.views.events is None:
            yield f"{place} needs views.events"
        elif history.event_types is not None and self.views.events.type is None:
            yield f"{place} filters on event types and needs views.events.type"
        if len(set(history.attributes)) < len(history.attributes):
            yield f"{place} repeats an attribute"
        scopes = {f.name: f.scope for f in self.features}
        for attribute in history.attributes:
            if attribute not in scopes:
                hint = nearest(attribute, [name for name, scope in scopes.items() if scope == "item"])
                yield f"{place}: attribute {attribute!r} is not a feature, {hint}"
            elif scopes[attribute] != "item":
                yield f"{place}: attribute {attribute!r} must be an item feature, got scope {scopes[attribute]!r}"
        for feature in history.event_features:
            if feature.scope != "event":
                yield f"{place}: event feature {feature.name!r} must have scope 'event', got {feature.scope!r}"

    def _version_problems(self) -> Iterator[str]:
        taken = {"impressions", "events", "users", "items"}
        for view in self.views.versions:
            if view.name in taken:
                yield f"views.versions: {view.name!r}: the name is taken"
            taken.add(view.name)
            if view.name not in {d.view for d in self.derived if isinstance(d, AsOf)}:
                yield f"views.versions: {view.name!r} is read by no derived value"

    def _derived_problems(self) -> Iterator[str]:
        shown = self.views.impressions
        own = {shown.user, shown.item, shown.time, shown.request, *(task.label for task in self.tasks)}
        parts = {n for d in self.derived if isinstance(d, Ratio) for n in (d.numerator, d.denominator)}
        read = {d.name for d in map(self.derived_of, self.features) if d is not None}
        taken: set[str] = set()
        for derived in self.derived:
            place = f"derived value {derived.name!r}"
            if derived.name in taken:
                yield f"{place} is declared twice"
            taken.add(derived.name)
            if derived.name in own:
                yield f"{place} has the name of a column of the impressions that is read"
            if derived.name not in parts | read:
                yield f"{place} is read by no feature of scope context or candidate"
            yield from (f"{place}{problem}" for problem in self._source_problems(derived))

    def _source_problems(self, derived: Derived) -> Iterator[str]:
        if isinstance(derived, Ratio):
            plain = [d.name for d in self.derived if not isinstance(d, Ratio | AsOf)]
            for part in (derived.numerator, derived.denominator):
                if part not in plain:
                    yield f": {part!r} must be a derived count, sum, mean or recency, {nearest(part, plain)}"
            return
        if isinstance(derived, AsOf):
            views = [view.name for view in self.views.versions]
            if derived.view not in views:
                yield f": view {derived.view!r} must be one of views.versions, {nearest(derived.view, views)}"
            return
        if derived.source == "events":
            if self.views.events is None:
                yield " needs views.events"
            elif derived.event_types is not None and self.views.events.type is None:
                yield " filters on event types and needs views.events.type"
        if len(set(derived.by)) < len(derived.by):
            yield ": by names the same twice"
        single = [f for f in self.features if isinstance(f, Categorical) and not isinstance(f, MultiCategorical)]
        groups = ["user", "item", *(f.name for f in single if f.scope in ("user", "item"))]
        for name in derived.by:
            if name not in groups:
                yield f": by must name user, item or a categorical feature of either, got {name!r}, " + nearest(
                    name, groups
                )

    def _derived_feature_problems(self, feature: Feature) -> Iterator[str]:
        derived = self.derived_of(feature)
        if derived is None:
            return
        place = f"feature {feature.name!r} of the derived value {derived.name!r}"
        scope = self.derived_scope(derived)
        if feature.scope != scope:
            yield f"{place} must have scope {scope!r}, got {feature.scope!r}"
        if isinstance(derived, AsOf):
            return
        if isinstance(feature, Dense):
            if feature.dim != 1:
                yield f"{place} must have dim 1, got {feature.dim}"
        elif isinstance(feature, MultiCategorical) or not isinstance(
            self.table_encoders.get(feature.table_name), QuantileBuckets | LogBuckets
        ):
            yield f"{place} must be dense, or categorical with the encoder quantile or log: it is a number"

    def derived_of(self, feature: Feature) -> Derived | None:
        """The derived value that a feature reads; None if it reads a column of its view."""
        if feature.scope not in ("context", "candidate"):
            return None
        return next((d for d in self.derived if d.name == feature.source_column), None)

    def derived_scope(self, derived: Derived) -> Literal["context", "candidate"]:
        """What a derived value belongs to: the request if it is of the user alone, else the impression."""
        if isinstance(derived, Ratio):
            parts = [d for d in self.derived if d.name in (derived.numerator, derived.denominator)]
            kinds = {self.derived_scope(d) for d in parts if not isinstance(d, Ratio)}
            return "candidate" if "candidate" in kinds else "context"
        if isinstance(derived, AsOf):
            of_item = {view.name for view in self.views.versions if view.of == "item"}
            return "candidate" if derived.view in of_item else "context"
        of_user = {"user", *(f.name for f in self.features if f.scope == "user")} - {"item"}
        return "context" if set(derived.by) <= of_user else "candidate"

    def _quality_problems(self) -> Iterator[str]:
        read = self._columns_read()
        for place, expected in enumerate(self.quality.expectations):
            columns = read.get(expected.view, set())
            if expected.column not in columns:
                yield (
                    f"quality.expectations.{place}: column {expected.column!r} of view {expected.view!r} is read by "
                    f"nothing, {nearest(expected.column, columns) if columns else 'as the whole view is'}"
                )
        names = [feature.name for feature in self.features] + [task.name for task in self.tasks]
        for name in self.quality.drift.ignore:
            if name not in names:
                yield f"quality.drift.ignore: {name!r} is no feature and no task, {nearest(name, names)}"

    def _columns_read(self) -> dict[str, set[str]]:
        """Columns that something reads, by view."""
        views = self.views
        impressions = views.impressions
        read = {"impressions": {impressions.user, impressions.item, impressions.time, *(t.label for t in self.tasks)}}
        if impressions.request is not None:
            read["impressions"].add(impressions.request)
        is_counted = any(not isinstance(d, Ratio | AsOf) and d.source == "events" for d in self.derived)
        if views.events is not None and (self.histories or is_counted):  # else the view is not opened
            read["events"] = {views.events.user, views.events.item, views.events.time}
            read["events"] |= {column for column in (views.events.type, views.events.sequence) if column is not None}
        for name, entity in (("users", views.users), ("items", views.items)):
            if entity is not None:
                read[name] = {entity.key}
        of_scope = {"user": "users", "item": "items", "event": "events"}
        for feature in self.all_features:
            if self.derived_of(feature) is not None:
                continue
            read.setdefault(of_scope.get(feature.scope, "impressions"), set()).add(feature.source_column)
        return read

    @property
    def all_features(self) -> tuple[Categorical | MultiCategorical | Dense, ...]:
        """Features, then the histories' event features, in declaration order."""
        return (*self.features, *(f for h in self.histories for f in h.event_features))

    def features_of(self, scope: Scope) -> tuple[Categorical | MultiCategorical | Dense, ...]:
        """Features of one scope, in declaration order."""
        return tuple(f for f in self.all_features if f.scope == scope)

    def feature(self, name: str) -> Categorical | MultiCategorical | Dense:
        """One feature by name.

        Raises:
            SchemaError: there is none; the message lists the nearest.
        """
        for feature in self.all_features:
            if feature.name == name:
                return feature
        raise SchemaError(f"feature {name!r} must be declared", hint=nearest(name, [f.name for f in self.all_features]))

    def history(self, name: str) -> History:
        """One history by name.

        Raises:
            SchemaError: there is none.
        """
        for history in self.histories:
            if history.name == name:
                return history
        raise SchemaError(f"history {name!r} must be declared", hint=nearest(name, [h.name for h in self.histories]))

    @property
    def table_encoders(self) -> dict[str, Any]:
        """Encoder of every embedding table, in order of first use."""
        encoders: dict[str, Any] = {}
        for feature in self.all_features:
            if not isinstance(feature, Categorical):
                continue
            table = feature.table_name
            if table in self.tables:
                encoders[table] = self.tables[table].encoder
            elif feature.table is None:
                encoders[table] = feature.encoder or Vocabulary()
            else:  # another feature's own table: that feature decides the encoder, this one may hold its place
                encoders.setdefault(table, None)
        return encoders
