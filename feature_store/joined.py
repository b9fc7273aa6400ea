"""Views joined by row number: what a training set holds, numbered and in order, but not encoded yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol, Self

import numpy as np
import polars as pl
import pyarrow as pa

from feature_store.carried import Carried
from feature_store.derived import Computation, raw_values
from feature_store.entities import Entities
from feature_store.event_checks import EventChecks
from feature_store.event_log import EventLog
from feature_store.event_shards import (
    DistinctKeys,
    EventBlock,
    EventShards,
    bits_type,
    in_shard_order,
    runs_of_rows,
    shard_bounds,
    shard_of_keys,
)
from feature_store.point_in_time import Requests
from feature_store.sources import feature_use, to_arrow
from feature_store.time_spans import check_unit, span
from feature_store.views import Views
from recsys.derived import Derived
from recsys.encoding import KeyIndex
from recsys.errors import SourceError
from recsys.schema import Feature, History, Schema
from recsys.training_set import Table


class EventWork(Protocol):
    """Who looks through the events and sorts them."""

    def scan(self, views: Views) -> Happened:
        """Checks every event, finds the keys."""

    def logs(
        self, views: Views, happened: Happened, users: Entities, items: Entities, checks: EventChecks
    ) -> tuple[dict[str, EventLog], int]:
        """The event log of each history, and how many events are in none.

        Every valid event is counted by ``checks``, which are run before the events are sorted.
        """


class LocalEvents:
    """Does it in this process, shard by shard."""

    def scan(self, views: Views) -> Happened:
        """See :class:`EventWork`."""
        return Happened.scan(views)

    def logs(
        self, views: Views, happened: Happened, users: Entities, items: Entities, checks: EventChecks
    ) -> tuple[dict[str, EventLog], int]:
        """See :class:`EventWork`."""
        return _event_logs(views, happened, users, items, checks)


class EventKeys(LocalEvents):
    """Finds the users and items of events, and no histories."""

    def logs(
        self,
        views: Views,
        happened: Happened,
        users: Entities,
        items: Entities,  # noqa: ARG002
        checks: EventChecks,
    ) -> tuple[dict[str, EventLog], int]:
        """See :class:`EventWork`."""
        for _, block in happened.blocks(views):
            checks.see(block)
        checks.run()
        return _no_logs(views, users)


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
        logs: the event log of each history; events of one user and one time are put in order when it is written.
        num_unused_events: events that are in no history.
        time_spans: first and last time of the impressions and of each event type, as ISO 8601 text.
        happened: ``(E,)`` int64, valid rows of the events view; None if it is not read, or nothing is derived.
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
    def join(
        cls,
        views: Views,
        stage: Callable[[str], None],
        *,
        known: Mapping[str, Table] | None = None,
        not_before: int | None = None,
        work: EventWork | None = None,
        is_derived: bool = True,
    ) -> Self:
        """Checks every row, numbers the entities, groups the impressions, sorts the events.

        Args:
            views: the opened views.
            stage: called with the name of each stage as it begins.
            known: tables of users and of items, by scope, whose rows keep their places; new ones come after them.
            not_before: UTC microseconds; earlier impressions are set aside.
            work: who looks through the events; this process if not given.
            is_derived: whether to compute the derived values of every impression.

        Raises:
            QuarantineError: too many rows of a view are broken.
            SourceError: a history finds none of its event types; the times of a log cannot be meant
                (:mod:`feature_store.time_spans`); or a derived value cannot be computed.
        """
        stage("Checking impressions")
        shown = views.valid_rows("impressions")
        if not_before is not None:
            is_late = views.time("impressions")[shown] < not_before
            views.quarantine("impressions", "earlier than what was built before", shown[is_late])
            shown = shown[~is_late]
        stage("Checking events")
        work = work or LocalEvents()
        happened = work.scan(views) if "events" in views.sources else None
        stage("Joining users")
        users, user_row = _entities(views, "user", shown, happened, known)
        stage("Joining items")
        items, item_row = _entities(views, "item", shown, happened, known)
        stage("Grouping impressions")
        requests = _requests(views, shown, user_row, item_row)
        views.notes += check_unit(requests.time, views.time_column("impressions"))
        # In the order of the requests from here on; what is in that of the view need not be in memory with the events.
        is_whole = len(shown) == views.sources["impressions"].num_rows
        source_row = requests.order if is_whole else shown[requests.order]
        item_row = item_row[requests.order]
        user_row = user_row[requests.order[requests.row_start]]
        del shown
        stage("Sorting events")
        spans: dict[str, tuple[str, str]] = {}
        if happened is None:
            logs, num_unused = _no_logs(views, users)
        else:
            checks = EventChecks(views, _first_and_last(requests), is_whole=known is None)
            logs, num_unused = work.logs(views, happened, users, items, checks)
            spans = checks.spans
        shown_span = span(requests.time)
        joined = cls(
            views=views,
            users=users,
            items=items,
            requests=requests,
            source_row=source_row,
            item_row=item_row,
            user_row=user_row,
            logs=logs,
            num_unused_events=num_unused,
            time_spans=spans if shown_span is None else {"impressions": shown_span, **spans},
            happened=None if happened is None or not views.schema.derived else np.flatnonzero(happened.is_valid),
        )
        if not views.schema.derived or not is_derived:
            return joined
        stage("Computing derived values")
        return joined.with_derived()[0]

    def with_derived(self, *, before: Carried | None = None, newest: int | None = None) -> tuple[Self, Carried | None]:
        """The same with the derived values of every impression, and what is carried of them to the next append.

        Args:
            before: what is carried of the rows that came before these.
            newest: UTC microseconds; requests to come are not earlier. Nothing is carried if not given.

        Raises:
            QuarantineError: too many versions are broken.
            SourceError: an expression does not fit its columns, or does not give what it must.
        """
        derived, carried = Computation(self, before).run(newest)
        return replace(self, derived=derived), carried

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
        return to_arrow(self.views.values_in(feature, self.source_row[self.requests.row_start[requests]]))

    def candidate_column(self, feature: Feature, rows: slice) -> pa.Array[Any]:
        """Raw values of a candidate feature, one an impression."""
        derived = self.schema.derived_of(feature)
        if derived is not None:
            return self._derived_column(feature, derived, rows)
        if self.views.reads_time(feature):
            times: pa.Array[Any] = pa.array(self.views.time("impressions")[self.source_row[rows]])
            return times
        return to_arrow(self.views.values_in(feature, self.source_row[rows]))

    def _derived_column(self, feature: Feature, derived: Derived, rows: slice) -> pa.Array[Any]:
        return raw_values(self.views, feature, derived, self.derived[derived.name][rows])

    def event_column(self, feature: Feature, history: str) -> pa.Array[Any]:
        """Raw values of an event feature, one an event of the history's log."""
        log = self.logs[history]
        if "events" not in self.views.sources:  # an append without new events
            nothing: pa.Array[Any] = pa.nulls(0)
            return nothing
        if self.views.reads_time(feature):
            times: pa.Array[Any] = pa.array(log.time)
            return times
        return to_arrow(self.views.values_in(feature, log.source_row))

    def event_sequence(self, history: str) -> np.ndarray | None:
        """What orders events of equal times, one an event of the history's log; None if no column is declared."""
        log, events = self.logs[history], self.schema.views.events
        if events is None or events.sequence is None:
            return None
        if "events" not in self.views.sources:  # an append without new events
            return np.empty(0, dtype=np.int64)
        return self.views.sequence(log.source_row)

    def rows_of(self, requests: slice) -> slice:
        """The impressions of consecutive requests."""
        offsets = np.append(self.requests.row_start, self.requests.num_rows)
        return slice(int(offsets[requests.start]), int(offsets[requests.stop]))


@dataclass(frozen=True)
class Happened:
    """What a first look at the events finds.

    Attributes:
        is_valid: ``(num_rows,)`` bool, the rows of the view without a problem.
        keys: the different keys of their users and of their items, by scope.
    """

    is_valid: np.ndarray
    keys: Mapping[str, pl.Series]

    @classmethod
    def scan(cls, views: Views) -> Self:
        """Reads the events once, block by block."""
        distinct = {scope: DistinctKeys() for scope in ("user", "item")}
        columns = {scope: views.key_expression("events", scope) for scope in distinct}
        is_valid = np.empty(views.sources["events"].num_rows, dtype=bool)
        num_rows = 0
        for valid, block in views.checked_blocks("events", columns):
            is_valid[num_rows : num_rows + len(valid)] = valid
            num_rows += len(valid)
            block = block if valid.all() else block.filter(valid)
            for scope, found in distinct.items():
                found.add(block[scope])
        return cls(is_valid, {scope: found.result() for scope, found in distinct.items()})

    def blocks(self, views: Views) -> Iterator[tuple[np.ndarray, pl.DataFrame]]:
        """Source rows of the valid events, and the columns of :func:`event_columns`; some at a time."""
        num_rows = 0
        for block in views.sources["events"].blocks(event_columns(views)):
            is_valid = self.is_valid[num_rows : num_rows + block.height]
            source_row = np.arange(num_rows, num_rows + block.height)
            num_rows += block.height
            yield (source_row, block) if is_valid.all() else (source_row[is_valid], block.filter(is_valid))


def _entities(
    views: Views,
    scope: str,
    shown: np.ndarray,
    happened: Happened | None,
    known: Mapping[str, Table] | None,
) -> tuple[Entities, np.ndarray]:
    """The users, or the items, of their view and of the valid rows of the logs; and the row of each impression's."""
    order = in_shard_order if scope == "user" else pl.Series.sort
    if known is not None:
        first = known[scope].keys
        assert first is not None
        order = partial(_behind, pl.Series(first[1:]), order)
    keys_shown = _taken(views.keys("impressions", scope), shown).rechunk()
    logs = [keys_shown]
    if happened is not None:
        logs.append(happened.keys[scope])
    view = f"{scope}s"
    if view not in views.sources:
        entities = Entities.join(None, views.key_column("impressions", scope), None, logs, order=order)
        return entities, entities.rows_of(keys_shown)
    rows = views.valid_rows(view)
    keys = views.keys(view, scope).gather(rows)
    is_first = keys.is_first_distinct()
    column = views.key_column(view, scope)
    views.quarantine(view, f"{column} repeats that of an earlier row", rows[~is_first.to_numpy()])
    in_view = (keys.filter(is_first), rows[is_first.to_numpy()])
    entities = Entities.join(views.sources[view], column, in_view, logs, order=order)
    return entities, entities.rows_of(keys_shown)


def _behind(known: pl.Series, order: Callable[[pl.Series], pl.Series], keys: pl.Series) -> pl.Series:
    """Known keys as they are, then those that are new, in their own order."""
    if keys.dtype != known.dtype:
        raise SourceError(
            f"keys must be of the type that the set was built with, {known.dtype}, got {keys.dtype}",
            hint="write the keys with one type in every file",
        )
    return pl.concat([known, order(keys.filter(~keys.is_in(known.implode())))])


def _first_and_last(requests: Requests) -> tuple[int, int] | None:
    """Time of the first request and of the last; they are sorted by time."""
    return (int(requests.time[0]), int(requests.time[-1])) if requests.num_requests else None


def _no_logs(views: Views, users: Entities) -> tuple[dict[str, EventLog], int]:
    """Empty logs, of a schema with histories whose events are not read."""
    nothing = np.empty(0, dtype=np.int64)
    log = EventLog(nothing, nothing, nothing, np.zeros(users.num_rows + 1, dtype=np.int64))
    return {history.name: log for history in views.schema.histories}, 0


def _requests(views: Views, shown: np.ndarray, user_row: np.ndarray, item_row: np.ndarray) -> Requests:
    """Groups valid impressions; requests that contradict themselves are set aside."""
    time = _taken(pl.Series(views.time("impressions")), shown).to_numpy()
    keys = views.request_keys()
    if keys is None:
        return Requests.group(time, user_row, item_row)
    requests = Requests.group(time, user_row, item_row, _taken(keys, shown))
    del time, keys  # room for the columns that follow
    contradictory = np.zeros(requests.num_requests, dtype=bool)
    of_user = (views.key_column("impressions", "user"), pl.Series(user_row))
    of_context = ((column, _taken(values, shown)) for column, values in views.context_columns())
    for column, values in chain([of_user], of_context):
        differing = requests.where_differing(values) & ~contradictory
        rows = shown[requests.order[np.repeat(differing, requests.row_counts)]]
        views.quarantine("impressions", f"{column} differs within the request", np.sort(rows))
        contradictory |= differing
    return requests.without(contradictory)


def _taken(values: pl.Series, rows: np.ndarray) -> pl.Series:
    """Values of some rows, ascending; as they are if those are all, which takes no copy."""
    return values if len(rows) == len(values) else values.gather(rows)


def _event_logs(
    views: Views, happened: Happened, users: Entities, items: Entities, checks: EventChecks
) -> tuple[dict[str, EventLog], int]:
    """The event log of each history, and how many events are in none."""
    histories = views.schema.histories
    shards = EventShards(
        user_bounds(users),
        num_items=items.num_rows,
        num_events=len(happened.is_valid),
        num_histories=len(histories),
        folder=views.staging / "shards",
    )
    num_unused = 0
    for source_row, block in happened.blocks(views):
        checks.see(block)
        found = numbered(source_row, block, users.index, items.index, histories)
        shards.add(found)
        num_unused += block.height - found.num_events
    checks.run()
    return dict(zip([h.name for h in histories], shards.logs(), strict=True)), num_unused


def numbered(
    source_row: np.ndarray, block: pl.DataFrame, users: KeyIndex, items: KeyIndex, histories: Sequence[History]
) -> EventBlock:
    """The events of a block that some history holds, by rows of users and items.

    Args:
        source_row: ``(n,)`` int64.
        block: the columns of :func:`event_columns`.
        users: their keys, in the order of their table.
        items: their keys, in the order of their table.
        histories: of the schema.
    """
    is_of_type = {name: block[f"is {name}"].to_numpy() for name in _named_types(histories)}
    member = np.zeros(block.height, dtype=bits_type(len(histories)))
    for bit, history in enumerate(histories):
        if history.event_types is None:
            member |= member.dtype.type(1 << bit)
        for name in history.event_types or ():
            member |= is_of_type[name].astype(member.dtype) << member.dtype.type(bit)
    is_used = member > 0
    if not is_used.all():
        block = block.select("user", "item", "time").filter(is_used)
        used = np.flatnonzero(is_used)  # places are looked up several times faster than a mask
        source_row, member = source_row[used], member[used]
    user_row, item_row = (
        index.positions(to_arrow(block[scope])) for scope, index in (("user", users), ("item", items))
    )
    user_row += 1
    item_row += 1
    return EventBlock(source_row, user_row, item_row, block["time"].to_numpy(), member)


def event_columns(views: Views) -> dict[str, pl.Expr]:
    """Keys, times and types of the events, and for each type that histories name whether they are of it."""
    columns = {scope: views.key_expression("events", scope) for scope in ("user", "item")}
    columns["time"] = views.time_expression("events")
    types = views.event_type_expression()
    if types is not None:
        columns["type"] = types
        columns |= {f"is {n}": (types == n).fill_null(False) for n in _named_types(views.schema.histories)}
    return columns


def user_bounds(users: Entities) -> np.ndarray:
    """The first user row of each shard. Users that an append added lie behind the others: any runs of rows will do."""
    keys = users.index.keys
    is_in_order = len(keys) == 0 or bool((np.diff(shard_of_keys(keys).astype(np.int64)) >= 0).all())
    return shard_bounds(keys) + 1 if is_in_order else runs_of_rows(users.num_rows)


def _named_types(histories: Sequence[History]) -> tuple[str, ...]:
    """The event types that histories name, each once."""
    return tuple(dict.fromkeys(name for h in histories for name in h.event_types or ()))
