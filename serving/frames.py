"""Impressions in a table, scored as requests.

Rows that belong to one request are scored together, so that its user and history are looked up once. Which rows those
are decides only the speed: a row's score never depends on its neighbours. The result is in the order of the rows.

The columns are those of the schema's impressions view: user, item, time, request (optional), and what context and
candidate features read. Beside them a table may hold

* columns that user and item features read: they take the place of what is stored;
* derived values, under their names: they take the place of what the feature source gives;
* histories, as list columns named ``<history>.<column>``: ``clicked.item_id``, ``clicked.time``, ``clicked.dwell``;
  all lists of a row equally long, oldest first. A null list stands for the stored history.

Shapes: R requests, N rows, T tasks.
"""

from __future__ import annotations

import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.encoding.columns import Array, as_array, as_times, flatten_lists
from recsys.errors import EncodingError, RequestError, SourceError, nearest
from recsys.schema import Feature, Schema
from serving.assembler import Given, GivenHistory, RawBatch
from serving.scorer import Scorer

_SECOND = {"s": 1_000_000, "ms": 1_000, "us": 1}


class FrameScores(NamedTuple):
    """Scores of a table.

    Attributes:
        probabilities: ``(N, T)`` float64, in the order of the rows.
        num_unknown_items: rows whose item is known to nobody but the table.
        num_unknown_users: rows whose user is.
    """

    probabilities: np.ndarray
    num_unknown_items: int
    num_unknown_users: int


@dataclass(frozen=True)
class FrameReader:
    """Reads tables of impressions.

    Attributes:
        schema: the model's.
        reads_entities: whether columns that user and item features read count; if not, only what is stored does.
        is_complete: whether the time and every column of context and candidate features must be there. If not, the
            time is now and the others are unknown.
        has_derived: whether the feature source gives derived values, so that their columns need not be there.
    """

    schema: Schema
    reads_entities: bool = True
    is_complete: bool = False
    has_derived: bool = False

    def check(self, columns: Sequence[str], source: str) -> None:
        """Checks that a table has the columns that it needs.

        Args:
            columns: names.
            source: names the table in messages.

        Raises:
            SourceError: some are missing; all of them are named.
        """
        shown = self.schema.views.impressions
        needed, derived = [shown.user, shown.item], []
        if self.is_complete:
            features = [f for scope in ("context", "candidate") for f in self._features(scope)]
            derived = [f.source_column for f in features if self.schema.derived_of(f) is not None]
            needed += [shown.time, *(f.source_column for f in features if f.source_column not in derived)]
        missing = [c for c in dict.fromkeys(needed) if c not in columns]
        if missing:
            raise SourceError(f"{source} must have {_named(missing)}", hint=nearest(missing[0], columns))
        missing = [c for c in dict.fromkeys(derived) if c not in columns]
        if missing and not self.has_derived:
            raise SourceError(
                f"{source} must have {_named(missing)}, or the views that these derived values are computed from must "
                "be given",
                hint="recsys score --views FOLDER computes them, each as it was known at its row's time",
            )
        histories = {h.name for h in self.schema.histories}
        for column in columns:
            name, dot, rest = column.partition(".")
            if dot and name in histories and rest not in self._history_columns(name):
                raise SourceError(
                    f"{source}: column {column!r} is nothing that history {name!r} reads",
                    hint=nearest(rest, self._history_columns(name)),
                )

    def read(self, table: pa.Table, source: str) -> tuple[RawBatch, np.ndarray]:
        """Groups rows into requests.

        Returns:
            The requests, and for each of their rows its place in the table.

        Raises:
            SourceError: a column is missing or holds something else.
        """
        self.check(table.column_names, source)
        columns = {name: as_array(table.column(name)) for name in table.column_names}
        shown = self.schema.views.impressions
        n = table.num_rows
        times = self._times(columns.get(shown.time), n, source)
        of_request = self._given_columns(columns, ("user", "context") if self.reads_entities else ("context",))
        of_row = self._given_columns(columns, ("item", "candidate") if self.reads_entities else ("candidate",))
        requests = columns.get(shown.request) if shown.request is not None else None
        # Rows with histories of their own are put together only where the table says which belong together.
        histories = {h.name: self._history_parts(h.name, columns) for h in self.schema.histories}
        histories = {name: parts for name, parts in histories.items() if parts}
        if histories and requests is None:
            group = np.arange(n)
        else:
            told_apart = [columns[shown.user], *of_request.values()]
            told_apart.append(pa.array(times) if requests is None else requests)
            group = groups_of(told_apart, n)
        order = np.argsort(group, kind="stable")
        first = np.flatnonzero(np.diff(group[order], prepend=-1))
        lead = order[first]
        request_of_row = np.repeat(np.arange(len(first)), np.diff(first, append=n))
        raw = RawBatch(
            request_of_row=request_of_row,
            # What came after a request's earliest row cannot have been known when it was ranked.
            time=np.minimum.reduceat(times[order], first) if n else times,
            row_time=times[order],
            users=columns[shown.user].take(pa.array(lead)),
            items=columns[shown.item].take(pa.array(order)),
            user=self._taken(of_request, "user", lead, source),
            context=self._taken(of_request, "context", lead, source),
            row=self._taken(of_row, None, order, source),
            histories={name: self._history(name, parts, lead, source) for name, parts in histories.items()},
        )
        return raw, order

    def _features(self, scope: str) -> tuple[Feature, ...]:
        return self.schema.features_of(scope)  # type: ignore[arg-type]

    def _given_columns(self, columns: Mapping[str, Array], scopes: Sequence[str]) -> dict[str, Array]:
        """Columns that features of some scopes read, but for keys and the time, which are known anyway."""
        shown = self.schema.views.impressions
        names = [f.source_column for s in scopes for f in self._features(s)]
        return {
            c: columns[c]
            for c in dict.fromkeys(names)
            if c in columns and c not in (shown.user, shown.item, shown.time)
        }

    def _taken(
        self, columns: Mapping[str, Array], scope: str | None, rows: np.ndarray, source: str
    ) -> dict[str, Given]:
        names = set(columns) if scope is None else {f.source_column for f in self._features(scope)}
        return {
            name: Given(column.take(pa.array(rows)), None, f"{source}: column {name!r}")
            for name, column in columns.items()
            if name in names
        }

    def _times(self, column: Array | None, n: int, source: str) -> np.ndarray:
        shown = self.schema.views.impressions
        if column is None:
            return np.full(n, clock.time_ns() // 1000, np.int64)
        where = f"{source}: column {shown.time!r}"
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = _parsed(column, where)
        try:
            values, valid = as_times(column, where=where)
        except EncodingError as err:
            raise SourceError(err.message, hint=err.hint) from err
        if valid is not None and not valid.all():
            raise SourceError(f"{where} must hold a time in every row, got {int((~valid).sum())} without")
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            values = values // 1000 if shown.time_unit == "ns" else values * _SECOND[shown.time_unit]
        return np.ascontiguousarray(values)

    # Histories

    def _history_columns(self, name: str) -> set[str]:
        """What a history's list columns may be called, after the dot."""
        history, events = self.schema.history(name), self.schema.views.events
        read = {self.schema.feature(a).source_column for a in history.attributes}
        read |= {f.source_column for f in history.event_features}
        return read | self._item_names() | {"time"} | ({events.time, events.item} if events else set())

    def _item_names(self) -> set[str]:
        views = self.schema.views
        names = {views.impressions.item}
        if views.items is not None:
            names.add(views.items.key)
        if views.events is not None:
            names.add(views.events.item)
        return names

    def _history_parts(self, name: str, columns: Mapping[str, Array]) -> dict[str, Array]:
        return {c.removeprefix(f"{name}."): a for c, a in columns.items() if c.startswith(f"{name}.")}

    def _history(self, name: str, parts: Mapping[str, Array], lead: np.ndarray, source: str) -> GivenHistory:
        keys = [c for c in parts if c in self._item_names()]
        if not keys:
            raise SourceError(
                f"{source}: history {name!r} must have the column {name}.{self.schema.views.impressions.item}"
            )
        for column, array in parts.items():
            if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
                raise SourceError(f"{source}: column {name}.{column} must hold lists, got {array.type}")
        given = np.flatnonzero(parts[keys[0]].take(pa.array(lead)).is_valid().to_numpy(zero_copy_only=False))
        rows = pa.array(lead[given])
        items, offsets = flatten_lists(parts[keys[0]].take(rows))
        flat: dict[str, Array] = {}
        for column, array in parts.items():
            values, other = flatten_lists(array.take(rows))
            if not np.array_equal(other, offsets):
                raise SourceError(f"{source}: lists of {name}.{column} and {name}.{keys[0]} must be equally long")
            flat[column] = values
        events = self.schema.views.events
        time_names = ("time", events.time) if events else ("time",)
        time = next((flat.pop(c) for c in time_names if c in flat), None)
        where = f"{source}: column {name}.time"
        if time is not None and (pa.types.is_string(time.type) or pa.types.is_large_string(time.type)):
            time = _parsed(time, where)
        columns = {
            c: Given(v, None, f"{source}: column {name}.{c}") for c, v in flat.items() if c not in self._item_names()
        }
        try:
            times = None if time is None else as_times(time, where=where).values
        except EncodingError as err:
            raise SourceError(err.message, hint=err.hint) from err
        return GivenHistory(given, offsets, items, times, columns)


def _named(columns: Sequence[str]) -> str:
    return f"the column{'s' if len(columns) > 1 else ''} {', '.join(map(repr, columns))}"


def _parsed(column: Array, where: str) -> Array:
    """ISO 8601 text as times; UTC where it has no offset."""
    for kind in (pa.timestamp("us", "UTC"), pa.timestamp("us")):
        try:
            return column.cast(kind)
        except pa.ArrowInvalid:
            continue
    raise SourceError(f"{where} must hold times, got text that is not ISO 8601")


def groups_of(columns: Sequence[Array], n: int) -> np.ndarray:
    """``(n,)`` int64: equal for rows that are equal in every column, numbered by their first row.

    Rows of a column of lists are never equal.
    """
    code = np.zeros(n, np.int64)
    for column in columns:
        if pa.types.is_nested(column.type):
            return np.arange(n)
        encoded = (
            column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column, null_encoding="encode")
        )
        part = pc.fill_null(encoded.indices, len(encoded.dictionary)).to_numpy(zero_copy_only=False)
        combined = code * (len(encoded.dictionary) + 1) + part
        code = np.unique(combined, return_inverse=True)[1].astype(np.int64)
    first = np.full(int(code.max(initial=-1)) + 1, n, np.int64)
    np.minimum.at(first, code, np.arange(n))
    return np.argsort(np.argsort(first))[code]


def score_table(scorer: Scorer, table: pa.Table, reader: FrameReader, *, source: str, batch_size: int) -> FrameScores:
    """Scores every row of a table.

    Args:
        source: names the table in messages.
        batch_size: rows that are scored at once, about; requests are not cut.

    Raises:
        SourceError: a column is missing or cannot be read.
    """
    raw, order = reader.read(table, source)
    probabilities = np.zeros((table.num_rows, len(scorer.artifact.tasks)))
    unknown_items = unknown_users = 0
    for part in cut(raw, batch_size):
        try:
            assembled = scorer.assembler.assemble(part.raw)
        except RequestError as err:
            raise SourceError(err.message, hint=err.hint) from err
        probabilities[order[part.rows]] = scorer.score(assembled.batch)
        unknown_items += int(np.count_nonzero(~assembled.is_known_item))
        unknown_users += int(np.count_nonzero(~assembled.is_known_user[part.raw.request_of_row]))
    return FrameScores(probabilities, unknown_items, unknown_users)


class Part(NamedTuple):
    """Some requests of a batch.

    Attributes:
        raw: the requests.
        rows: their rows in the whole.
    """

    raw: RawBatch
    rows: slice


def cut(raw: RawBatch, batch_size: int) -> list[Part]:
    """Cuts a batch between requests, into parts of about ``batch_size`` rows; a request is never cut."""
    num_requests, num_rows = len(raw.time), len(raw.request_of_row)
    if num_rows <= batch_size:
        return [Part(raw, slice(0, num_rows))] if num_rows else []
    starts = np.searchsorted(raw.request_of_row, np.arange(num_requests + 1))
    parts = []
    begin = 0
    while begin < num_requests:
        end = int(np.searchsorted(starts, starts[begin] + batch_size, side="right")) - 1
        end = min(max(end, begin + 1), num_requests)
        parts.append(_part(raw, begin, end, slice(int(starts[begin]), int(starts[end]))))
        begin = end
    return parts


def _part(raw: RawBatch, begin: int, end: int, rows: slice) -> Part:
    def sliced(columns: Mapping[str, Given], window: slice) -> dict[str, Given]:
        length = window.stop - window.start
        return {n: Given(g.values.slice(window.start, length), None, g.where) for n, g in columns.items()}

    histories = {}
    for name, history in raw.histories.items():
        first, last = np.searchsorted(history.requests, [begin, end])
        events = slice(int(history.offsets[first]), int(history.offsets[last]))
        histories[name] = GivenHistory(
            history.requests[first:last] - begin,
            history.offsets[first : last + 1] - history.offsets[first],
            history.items.slice(events.start, events.stop - events.start),
            None if history.times is None else history.times[events],
            sliced(history.columns, events),
        )
    part = RawBatch(
        request_of_row=raw.request_of_row[rows] - begin,
        time=raw.time[begin:end],
        row_time=None if raw.row_time is None else raw.row_time[rows],
        users=raw.users.slice(begin, end - begin),
        items=raw.items.slice(rows.start, rows.stop - rows.start),
        user=sliced(raw.user, slice(begin, end)),
        context=sliced(raw.context, slice(begin, end)),
        row=sliced(raw.row, rows),
        histories=histories,
    )
    return Part(part, rows)
