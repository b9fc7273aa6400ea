"""Views joined by row number: what a training set holds, numbered and in order, but not encoded yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa

from feature_store.derived import compute_derived
from feature_store.entities import Entities
from feature_store.event_log import EventLog
from feature_store.point_in_time import Requests
from feature_store.sources import feature_use, to_arrow
from feature_store.time_spans import check_overlap, check_unit, span
from feature_store.views import Views
from recsys.derived import AsOf, Derived
from recsys.errors import SourceError, nearest
from recsys.schema import Feature, History, Schema


@dataclass(frozen=True)
class Joined:
    """Users, items, requests and event logs, referring to each other by row.

    Attributes:
        views: what they were read from.
        users: the users.
        items: the items.
        requests: the requests, sorted by time, and the order of their impressions.
        source_row: ``(N,)`` int64, row of the view of each impression, in order.
        item_row: ``(N,)`` int64, its row of the items table.
        user_row: ``(R,)`` int64, row of the users table of each request.
        logs: the event log of each history.
        num_unused_events: events that are in no history.
        time_spans: first and last time of the impressions and of each event type, as ISO 8601 text.
        happened: ``(E,)`` int64, valid rows of the events view; None if it is not read.
        derived: of each derived value, one a request or one an impression by its scope: numbers, NaN where missing; of
            versions, the row of their view, -1 where there is none.
    """

    views: Views
    users: Entities
    items: Entities
    requests: Requests
    source_row: np.ndarray
    item_row: np.ndarray
    user_row: np.ndarray
    logs: Mapping[str, EventLog]
    num_unused_events: int
    time_spans: Mapping[str, tuple[str, str]]
    happened: np.ndarray | None = None
    derived: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def join(cls, views: Views, stage: Callable[[str], None], *, is_derived: bool = True) -> Self:
        """Checks every row, numbers the entities, groups the impressions, sorts the events.

        Args:
            views: the opened views.
            stage: called with the name of each stage as it begins.
            is_derived: whether to compute the derived values of every impression.

        Raises:
            QuarantineError: too many rows of a view are broken.
            SourceError: a history finds none of its event types; the times of a log cannot be meant
                (:mod:`feature_store.time_spans`); or a derived value cannot be computed.
        """
        stage("Checking impressions")
        shown = views.valid_rows("impressions")
        stage("Checking events")
        happened = views.valid_rows("events") if "events" in views.sources else None
        stage("Joining users")
        users = _entities(views, "user", shown, happened)
        stage("Joining items")
        items = _entities(views, "item", shown, happened)
        stage("Grouping impressions")
        user_row = users.rows_of(views.keys("impressions", "user").gather(shown))
        item_row = items.rows_of(views.keys("impressions", "item").gather(shown))
        requests = _requests(views, shown, user_row, item_row)
        views.notes += check_unit(requests.time, views.time_column("impressions"))
        stage("Sorting events")
        logs, num_unused, spans = _event_logs(views, happened, users, items, requests)
        joined = cls(
            views=views,
            users=users,
            items=items,
            requests=requests,
            source_row=shown[requests.order],
            item_row=item_row[requests.order],
            user_row=user_row[requests.order[requests.row_start]],
            logs=logs,
            num_unused_events=num_unused,
            time_spans=spans,
            happened=happened,
        )
        if not views.schema.derived or not is_derived:
            return joined
        stage("Computing derived values")
        return replace(joined, derived=compute_derived(joined))

    @property
    def schema(self) -> Schema:
        """What the data is."""
        return self.views.schema

    def entity_column(self, feature: Feature) -> pa.Array[Any]:
        """Raw values of a user or item feature for every row of its table; null for the unknown entity."""
        entities = self.users if feature.scope == "user" else self.items
        return entities.column(feature_use(self.schema, feature))

    def context_column(self, feature: Feature, requests: slice) -> pa.Array[Any]:
        """Raw values of a context feature, one a request."""
        derived = self.schema.derived_of(feature)
        if derived is not None:
            return self._derived_column(feature, derived, requests)
        if self.views.reads_time(feature):
            times: pa.Array[Any] = pa.array(self.requests.time[requests])
            return times
        return to_arrow(self.views.values(feature).gather(self.source_row[self.requests.row_start[requests]]))

    def candidate_column(self, feature: Feature, rows: slice) -> pa.Array[Any]:
        """Raw values of a candidate feature, one an impression."""
        derived = self.schema.derived_of(feature)
        if derived is not None:
            return self._derived_column(feature, derived, rows)
        if self.views.reads_time(feature):
            times: pa.Array[Any] = pa.array(self.views.time("impressions")[self.source_row[rows]])
            return times
        return to_arrow(self.views.values(feature).gather(self.source_row[rows]))

    def _derived_column(self, feature: Feature, derived: Derived, rows: slice) -> pa.Array[Any]:
        found = self.derived[derived.name][rows]
        if isinstance(derived, AsOf):
            return to_arrow(self.views.version_values(feature, derived).gather(pl.Series(found).replace(-1, None)))
        numbers: pa.Array[Any] = pa.array(found, from_pandas=True)
        return numbers

    def event_column(self, feature: Feature, history: str) -> pa.Array[Any]:
        """Raw values of an event feature, one an event of the history's log."""
        log = self.logs[history]
        if self.views.reads_time(feature):
            times: pa.Array[Any] = pa.array(log.time)
            return times
        return to_arrow(self.views.values(feature).gather(log.source_row))

    def rows_of(self, requests: slice) -> slice:
        """The impressions of consecutive requests."""
        offsets = np.append(self.requests.row_start, self.requests.num_rows)
        return slice(int(offsets[requests.start]), int(offsets[requests.stop]))


def _entities(views: Views, scope: str, shown: np.ndarray, happened: np.ndarray | None) -> Entities:
    """The users, or the items, of their view and of the valid rows of the logs."""
    logs = [views.keys("impressions", scope).gather(shown)]
    if happened is not None:
        logs.append(views.keys("events", scope).gather(happened))
    view = f"{scope}s"
    if view not in views.sources:
        return Entities.join(None, views.key_column("impressions", scope), None, logs)
    rows = views.valid_rows(view)
    keys = views.keys(view, scope).gather(rows)
    is_first = keys.is_first_distinct()
    column = views.key_column(view, scope)
    views.quarantine(view, f"{column} repeats that of an earlier row", rows[~is_first.to_numpy()])
    return Entities.join(views.sources[view], column, (keys.filter(is_first), rows[is_first.to_numpy()]), logs)


def _requests(views: Views, shown: np.ndarray, user_row: np.ndarray, item_row: np.ndarray) -> Requests:
    """Groups valid impressions; requests that contradict themselves are set aside."""
    time = views.time("impressions")[shown]
    keys = views.request_keys()
    if keys is None:
        return Requests.group(time, user_row, item_row)
    numbers = keys.gather(shown).rank("dense").cast(pl.Int64).to_numpy() - 1
    requests = Requests.group(time, user_row, item_row, numbers)
    contradictory = np.zeros(requests.num_requests, dtype=bool)
    checked = {views.key_column("impressions", "user"): pl.Series(user_row)}
    checked.update({column: values.gather(shown) for column, values in views.context_columns().items()})
    for column, values in checked.items():
        differing = requests.where_differing(values) & ~contradictory
        rows = shown[requests.order[np.repeat(differing, requests.row_counts)]]
        views.quarantine("impressions", f"{column} differs within the request", np.sort(rows))
        contradictory |= differing
    return requests.without(contradictory)


def _event_logs(
    views: Views, happened: np.ndarray | None, users: Entities, items: Entities, requests: Requests
) -> tuple[dict[str, EventLog], int, dict[str, tuple[str, str]]]:
    """The event log of each history, how many events are in none, and the time spans of everything."""
    shown = span(requests.time)
    spans = {} if shown is None else {"impressions": shown}
    if happened is None:
        return {}, 0, spans
    everything = EventLog.build(
        happened,
        users.rows_of(views.keys("events", "user").gather(happened)),
        items.rows_of(views.keys("events", "item").gather(happened)),
        views.time("events")[happened],
        num_users=users.num_rows,
    )
    types = views.event_types()
    types = None if types is None else types.gather(everything.source_row)
    _check_times(views, everything, types, requests, spans)
    is_used = np.zeros(everything.num_events, dtype=bool)
    logs = {}
    for history in views.schema.histories:
        if history.event_types is None or types is None:
            logs[history.name] = everything
            is_used[:] = True
        else:
            is_chosen = types.is_in(list(history.event_types)).fill_null(False)
            _check_types(views, history, types, is_chosen)
            logs[history.name] = everything.filtered(is_chosen.to_numpy())
            is_used |= is_chosen.to_numpy()
    return logs, int(np.count_nonzero(~is_used)), spans


def _check_times(
    views: Views, events: EventLog, types: pl.Series | None, requests: Requests, spans: dict[str, tuple[str, str]]
) -> None:
    """Refuses events whose times cannot be meant; adds the span of each type, and notes what is odd."""
    column = views.time_column("events")
    views.notes += check_unit(events.time, column)
    if requests.num_requests:
        first, last = (int(requests.time[place]) for place in (0, -1))
        found, notes = check_overlap(events.time, types, (first, last), column)
        spans.update(found)
        views.notes += notes


def _check_types(views: Views, history: History, types: pl.Series, is_chosen: pl.Series) -> None:
    """Names the types of a history that never occur.

    That is an error if none occurs, or if one occurs written otherwise (in case, spaces, ``-`` and ``_``): it cannot
    be meant. Else it is a note: a sample may lack a type that is rare.
    """
    assert history.event_types is not None
    present = types.drop_nulls().unique().to_list()
    absent = sorted(set(history.event_types) - set(present))
    written = {_letters(name): name for name in present}
    for name in absent:
        if _letters(name) in written:
            raise SourceError(
                f"{views.sources['events'].place}: history {history.name!r} must name event types as they are "
                f"written, got {name!r}",
                hint=f"did you mean {written[_letters(name)]!r}?",
            )
    if len(types) == 0 or is_chosen.any():
        views.notes += [
            f"history {history.name!r}: there is no event of type {name!r} ({nearest(name, present)})"
            for name in absent
        ]
        return
    raise SourceError(
        f"{views.sources['events'].place}: history {history.name!r} must find events of type "
        f"{', '.join(history.event_types)}, got none",
        hint=nearest(history.event_types[0], present),
    )


def _letters(name: str) -> str:
    """What two spellings of an event type share."""
    return "".join(name.casefold().replace("-", " ").replace("_", " ").split())
