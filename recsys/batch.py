"""The batch: R requests, N candidates, and histories that are never repeated.

A request is one user, one history, one context; ``request_of_row`` says which request each candidate belongs to. A
plain impression log is the special case R = N. Training, batch scoring, the service and ``mlflow.pyfunc`` all hand a
model this object.

Shapes: R requests, N candidates (rows), S events of all requests together, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys.encoding.encoder import EncodedColumn, Ragged
from recsys.schema import Schema
from recsys.training_set import (
    ITEM_ROW,
    ROW_START,
    SOURCE_ROW,
    TIME,
    USER_ROW,
    Split,
    Table,
    TrainingSet,
    end_column,
    label_column,
    start_column,
)


class Bags(NamedTuple):
    """Sets of ids of different sizes.

    Attributes:
        values: ``(total,)`` int64, the ids of all sets one after the other.
        offsets: ``(n + 1,)`` int64, set ``i`` is ``values[offsets[i]:offsets[i + 1]]``.
    """

    values: Tensor
    offsets: Tensor


Column = Tensor | Bags
"""Categorical: int64 ``(n,)``. Multi-valued categorical: :class:`Bags`. Dense: float32 ``(n, dim)``."""


@dataclass(frozen=True)
class HistoryBatch:
    """The events of R requests, jagged, oldest first.

    Attributes:
        offsets: ``(R + 1,)`` int64, the events of request ``r`` are ``offsets[r]`` up to ``offsets[r + 1]``.
        times: ``(S,)`` int64, UTC microseconds.
        features: columns of S events, the schema's attributes and then its event features.
    """

    offsets: Tensor
    times: Tensor
    features: Mapping[str, Column]

    @property
    def lengths(self) -> Tensor:
        """``(R,)`` int64."""
        return self.offsets.diff()


@dataclass(frozen=True)
class Batch:
    """R requests with N candidates.

    Attributes:
        request_of_row: ``(N,)`` int64, non-decreasing.
        time: ``(R,)`` int64, UTC microseconds.
        user: columns of R rows.
        context: columns of R rows.
        item: columns of N rows.
        candidate: columns of N rows.
        histories: by name.
        labels: ``(N, T)`` float32, NaN where missing; None where there are none.
        user_row: ``(R,)`` int64, row of the users table; None outside training sets.
        source_row: ``(N,)`` int64, row of the impressions view; None outside training sets.
    """

    request_of_row: Tensor
    time: Tensor
    user: Mapping[str, Column]
    context: Mapping[str, Column]
    item: Mapping[str, Column]
    candidate: Mapping[str, Column]
    histories: Mapping[str, HistoryBatch]
    labels: Tensor | None = None
    user_row: Tensor | None = None
    source_row: Tensor | None = None

    @property
    def num_requests(self) -> int:
        """R."""
        return self.time.shape[0]

    @property
    def num_rows(self) -> int:
        """N."""
        return self.request_of_row.shape[0]

    @classmethod
    def from_training_set(
        cls, training_set: TrainingSet, split: str, requests: np.ndarray | slice, *, max_length: int | None = None
    ) -> Batch:
        """Gathers some requests of a split from the mapped tables.

        Args:
            requests: positions of requests in the split, or a slice of them. A slice copies nothing of what is stored
                in order: the tensors are views of the mapped file.
            max_length: bound on the length of every history, beside the schema's own.
        """
        part = training_set.split(split)
        if isinstance(requests, slice):
            start, stop, _ = requests.indices(part.num_requests)
            requests = slice(start, stop)
            rows: np.ndarray | slice = slice(int(part.row_offsets[start]), int(part.row_offsets[stop]))
            counts = np.diff(part.row_offsets[start : stop + 1])
        elif part.is_flat:
            rows, counts = requests, np.ones(len(requests), dtype=np.int64)
        else:
            first = part.requests.array(ROW_START)[requests]
            counts = part.row_offsets[requests + 1] - first
            rows = concatenated_ranges(first, counts)
        return _gather(training_set, part, requests, rows, counts, max_length)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""

        def moved(columns: Mapping[str, Column]) -> dict[str, Column]:
            return {
                n: Bags(*(t.to(device) for t in c)) if isinstance(c, Bags) else c.to(device) for n, c in columns.items()
            }

        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            request_of_row=self.request_of_row.to(device),
            time=self.time.to(device),
            user=moved(self.user),
            context=moved(self.context),
            item=moved(self.item),
            candidate=moved(self.candidate),
            histories={
                name: HistoryBatch(h.offsets.to(device), h.times.to(device), moved(h.features))
                for name, h in self.histories.items()
            },
            labels=optional(self.labels),
            user_row=optional(self.user_row),
            source_row=optional(self.source_row),
        )

    def select_requests(self, positions: Tensor) -> Batch:
        """The batch of some of the requests, in the given order.

        Args:
            positions: ``(R',)`` int64.
        """
        first = torch.searchsorted(self.request_of_row, positions)
        last = torch.searchsorted(self.request_of_row, positions, right=True)
        rows = _ranges(first, last - first)
        request_of_row = torch.repeat_interleave(torch.arange(len(positions)), last - first)
        return self._selected(positions, rows, request_of_row)

    def exploded(self) -> Batch:
        """The same candidates with one request each: R = N, histories repeated.

        What other systems do at their first step; here it exists to prove that scores do not depend on it.
        """
        return self._selected(self.request_of_row, torch.arange(self.num_rows), torch.arange(self.num_rows))

    def _selected(self, requests: Tensor, rows: Tensor, request_of_row: Tensor) -> Batch:
        histories = {}
        for name, history in self.histories.items():
            lengths = history.lengths[requests]
            events = _ranges(history.offsets[requests], lengths)
            histories[name] = HistoryBatch(
                _offsets(lengths), history.times[events], {n: _rows_of(c, events) for n, c in history.features.items()}
            )
        return Batch(
            request_of_row=request_of_row,
            time=self.time[requests],
            user={n: _rows_of(c, requests) for n, c in self.user.items()},
            context={n: _rows_of(c, requests) for n, c in self.context.items()},
            item={n: _rows_of(c, rows) for n, c in self.item.items()},
            candidate={n: _rows_of(c, rows) for n, c in self.candidate.items()},
            histories=histories,
            labels=None if self.labels is None else self.labels[rows],
            user_row=None if self.user_row is None else self.user_row[requests],
            source_row=None if self.source_row is None else self.source_row[rows],
        )


def _rows_of(column: Column, rows: Tensor) -> Column:
    if isinstance(column, Bags):
        lengths = column.offsets.diff()[rows]
        return Bags(column.values[_ranges(column.offsets[rows], lengths)], _offsets(lengths))
    return column[rows]


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """``[start_0, start_0 + 1, ...; start_1, ...]``."""
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()), device=starts.device)


def concatenated_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``[start_0, start_0 + 1, ...; start_1, ...]``: positions of many slices, one after the other.

    Example:
        >>> concatenated_ranges(np.array([10, 0]), np.array([2, 3]))
        array([10, 11,  0,  1,  2])
    """
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def take(column: EncodedColumn, rows: np.ndarray | slice) -> Column:
    """Rows of a stored column as a tensor, or as bags.

    A slice of a plain column is a view. Ids stay int64, so that none is ever rounded.
    """
    if isinstance(column, Ragged):
        if isinstance(rows, slice):
            rows = np.arange(rows.start, rows.stop)
        starts = column.offsets[rows]
        lengths = column.offsets[rows + 1] - starts
        values = column.values[concatenated_ranges(starts, lengths)]
        return Bags(torch.from_numpy(values), torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])))
    taken = tensor_view(column[rows])
    return taken[:, None] if taken.dtype == torch.float32 and taken.dim() == 1 else taken


def tensor_view(array: np.ndarray) -> Tensor:
    """A tensor over a numpy array, read-only ones included: a batch is never written to."""
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Shared(array)))


class _Shared:
    """The same memory without numpy's read-only mark, which torch can only warn about."""

    def __init__(self, array: np.ndarray) -> None:
        self._keep_alive = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}


def _gather(
    training_set: TrainingSet,
    part: Split,
    requests: np.ndarray | slice,
    rows: np.ndarray | slice,
    counts: np.ndarray,
    max_length: int | None,
) -> Batch:
    schema = training_set.schema
    user_row = part.requests.array(USER_ROW)[requests]
    item_row = part.impressions.array(ITEM_ROW)[rows]
    histories = {}
    for history in schema.histories:
        log = training_set.events[history.name]
        end = part.requests.array(end_column(history.name))[requests]
        start = part.requests.array(start_column(history.name))[requests]
        length = np.minimum(end - start, min(max_length or history.max_length, history.max_length))
        histories[history.name] = history_slices(schema, history.name, log, training_set.items, end - length, length)
    labels = np.stack([part.impressions.array(label_column(t.name))[rows] for t in schema.tasks], axis=1)
    return Batch(
        request_of_row=torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int64), counts)),
        time=tensor_view(part.requests.array(TIME)[requests]),
        user=_entity_columns(training_set.users, [f.name for f in schema.features_of("user")], user_row),
        context={f.name: take(part.requests.columns[f.name], requests) for f in schema.features_of("context")},
        item=_entity_columns(training_set.items, [f.name for f in schema.features_of("item")], item_row),
        candidate={f.name: take(part.impressions.columns[f.name], rows) for f in schema.features_of("candidate")},
        histories=histories,
        labels=torch.from_numpy(labels),
        user_row=tensor_view(user_row),
        source_row=tensor_view(part.impressions.array(SOURCE_ROW)[rows]),
    )


def _entity_columns(table: Table, names: list[str], rows: np.ndarray) -> dict[str, Column]:
    return {name: take(table.columns[name], rows) for name in names}


def history_slices(
    schema: Schema, name: str, log: Table, items: Table, start: np.ndarray, length: np.ndarray
) -> HistoryBatch:
    """Gathers slices of an event log, with the attributes of each event's item.

    Args:
        log: the history's event log.
        items: the items table; events refer to its rows.
        start: ``(R,)`` int64, first event of each slice.
        length: ``(R,)`` int64, events in each slice.
    """
    history = schema.history(name)
    events = concatenated_ranges(start, length)
    item_row = log.array(ITEM_ROW)[events]
    features: dict[str, Column] = _entity_columns(items, list(history.attributes), item_row)
    features.update({f.name: take(log.columns[f.name], events) for f in history.event_features})
    offsets = np.zeros(len(length) + 1, dtype=np.int64)
    np.cumsum(length, out=offsets[1:])
    return HistoryBatch(torch.from_numpy(offsets), tensor_view(log.array(TIME)[events]), features)
