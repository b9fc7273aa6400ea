"""What derived values carry from a build, or from an append, to the next append: it reads no log a second time.

Let ``T`` be the newest request's time. Requests to come have ``t >= T``, so that of the rows that a value counts

* with a window ``w``, those of a time ``s >= T - w`` are kept as they are; no other can count again;
* without a window, those known before ``T`` count at every ``t``: they are kept as one *total* a group, a row that
  stands for their number, their sum and their latest time. Those known at ``T`` or later are kept as they are.

So what is kept grows with the rows of the longest window and with the groups, not with the logs. It is exact: numbers
are integers, and rows and totals go through the same look-ups (:mod:`recsys.windows`) as the rows of a build.

Rows refer to the tables of users and items, whose rows never change place. Totals of an attribute's groups are kept by
user or item, so that they follow an attribute that changes; only those of a user *and* an attribute of items, and the
like, would be as many as rows: each such group is kept under the first item (or user) that has the attribute's value.
They hold as long as the items of a group stay together (:meth:`Carried.is_split`).

::

    derived/state.json               the newest time, kinds of the columns that expressions read
    derived/<value>.arrow            rows of the values that share log, groups and created column, by the first's name
    derived/groups/<attribute>.arrow the first row of each user's or item's group
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from feature_store.event_log import stable_order
from feature_store.sources import Kind
from recsys.derived import Windowed, duration_us
from recsys.errors import IntegrityError
from recsys.files import read_object, replacing_file, write_json
from recsys.schema import Scope

VERSION = 1
"""Of these files; others are not read, and the logs are read again."""

FOLDER = "derived"
_REBUILD = "build the whole set again: recsys build CONFIG --force"
_STATE, _GROUPS, _GROUP = "state.json", "groups", "first"
_NARROW = (np.dtype(np.uint8), np.dtype(np.int32))


@dataclass(frozen=True)
class CarriedRows:
    """Rows of a log, or totals of several, for the values of the same groups.

    Attributes:
        user_row: ``(K,)`` int64; 0 where users decide no group.
        item_row: ``(K,)`` int64; 0 where items decide no group.
        time: ``(K,)`` int64, UTC microseconds.
        created: ``(K,)`` int64, since when each is known; None if since its time.
        counts: by value, ``(K,)`` int64: how many rows each stands for that the value counts.
        units: by sum and mean, ``(K,)`` int64: the sum of their values in units of ``10 ** -decimals``.
    """

    user_row: np.ndarray
    item_row: np.ndarray
    time: np.ndarray
    created: np.ndarray | None
    counts: Mapping[str, np.ndarray]
    units: Mapping[str, np.ndarray]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """As they are stored, by name."""
        columns = {"@user_row": self.user_row, "@item_row": self.item_row, "@time": self.time}
        if self.created is not None:
            columns["@created"] = self.created
        columns |= {f"count.{name}": column for name, column in self.counts.items()}
        return columns | {f"units.{name}": column for name, column in self.units.items()}

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray]) -> Self:
        """Of stored columns."""
        named = {
            kind: {name.removeprefix(kind): c for name, c in columns.items() if name.startswith(kind)}
            for kind in ("count.", "units.")
        }
        return cls(
            columns["@user_row"],
            columns["@item_row"],
            columns["@time"],
            columns.get("@created"),
            named["count."],
            named["units."],
        )


class Carrier:
    """Picks what is carried of the values of one log in the same groups, one value after the other.

    Args:
        user_row: ``(E,)`` int64, of the log's rows.
        item_row: ``(E,)`` int64.
        time: ``(E,)`` int64.
        created: ``(E,)`` int64, or None.
        scopes: whose rows decide the group: ``"user"``, ``"item"`` or both.
        first_of_group: by scope, ``(n,)`` int64: the row that stands for each row of its table in totals; each for
            itself if not given.
        newest: UTC microseconds; requests to come are not earlier.
    """

    def __init__(
        self,
        user_row: np.ndarray,
        item_row: np.ndarray,
        time: np.ndarray,
        created: np.ndarray | None,
        *,
        scopes: set[Scope],
        first_of_group: Mapping[Scope, np.ndarray],
        newest: int,
    ) -> None:
        nothing = np.broadcast_to(np.int64(0), len(time))
        self._rows = {"user": user_row, "item": item_row}
        self._rows |= {scope: nothing for scope in ("user", "item") if scope not in scopes}
        self._time, self._created = time, created
        self._first_of_group = first_of_group
        self._newest = newest
        self._specs: list[Windowed] = []
        self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._totals: list[dict[str, np.ndarray]] = []

    def add(self, spec: Windowed, counts: np.ndarray, units: np.ndarray | None) -> None:
        """Looks at one value.

        Args:
            spec: what it is.
            counts: ``(E,)`` bool or int64, how many rows each row stands for that the value counts.
            units: ``(E,)`` int64, of a sum and of a mean.
        """
        is_counted = counts != 0
        if spec.window is not None:
            is_kept = is_counted & (self._time >= self._newest - duration_us(spec.window))
            totals = None
        else:
            known = self._time + (0 if spec.known_after is None else duration_us(spec.known_after))
            if self._created is not None:
                known = np.maximum(known, self._created)
            is_kept = is_counted & (known >= self._newest)
            totals = self._totalled(spec, np.flatnonzero(is_counted & ~is_kept), counts, units, known)
        kept = np.flatnonzero(is_kept)
        self._specs.append(spec)
        self._kept.append((kept, counts[kept], None if units is None else units[kept]))
        if totals is not None:
            self._totals.append(totals)

    def _totalled(
        self, spec: Windowed, rows: np.ndarray, counts: np.ndarray, units: np.ndarray | None, known: np.ndarray
    ) -> dict[str, np.ndarray]:
        """One row a group."""
        group = {scope: column[rows] for scope, column in self._rows.items()}
        group |= {scope: first[group[scope]] for scope, first in self._first_of_group.items()}
        order = _grouped(group["user"], group["item"])
        rows, user, item = rows[order], group["user"][order], group["item"][order]
        is_first = np.ones(len(rows), np.bool_)
        is_first[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
        starts = np.flatnonzero(is_first)
        totals = {"@user_row": user[starts], "@item_row": item[starts]}
        if len(starts) == 0:
            return totals
        totals["@time"] = np.maximum.reduceat(self._time[rows], starts)
        if self._created is not None:
            totals["@created"] = np.maximum.reduceat(known[rows], starts)
        totals[f"count.{spec.name}"] = np.add.reduceat(counts[rows].astype(np.int64), starts)
        if units is not None:
            totals[f"units.{spec.name}"] = np.add.reduceat(units[rows], starts)
        return totals

    def finish(self) -> CarriedRows:
        """Rows as they are, in the order of their times and then of their other values, then totals value by value."""
        is_kept = np.zeros(len(self._time), np.bool_)
        for kept, _, _ in self._kept:
            is_kept[kept] = True
        rows = np.flatnonzero(is_kept)
        parts = {
            "@user_row": [self._rows["user"][rows]],
            "@item_row": [self._rows["item"][rows]],
            "@time": [self._time[rows]],
        }
        if self._created is not None:
            parts["@created"] = [self._created[rows]]
        for spec, (kept, counts, units) in zip(self._specs, self._kept, strict=True):
            place = np.searchsorted(rows, kept)
            parts[f"count.{spec.name}"] = [_placed(len(rows), place, counts)]
            if units is not None:
                parts[f"units.{spec.name}"] = [_placed(len(rows), place, units)]
        order = _by_values(self._time[rows], [columns[0] for columns in parts.values()])
        parts = {name: [columns[0][order]] for name, columns in parts.items()}
        for totals in self._totals:
            size = len(totals["@user_row"])
            for name, columns in parts.items():
                columns.append(totals[name] if name in totals else np.zeros(size, np.int64))
        return CarriedRows.of({name: np.concatenate(columns) for name, columns in parts.items()})


def _grouped(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Positions that sort pairs, by user and then item; those of one pair in any order: their totals are the same."""
    width = int(item.max(initial=0)) + 1
    if (int(user.max(initial=0)) + 1) * width < 2**63:
        return np.argsort(user * width + item)
    return np.lexsort((item, user))


def _by_values(time: np.ndarray, columns: Sequence[np.ndarray]) -> np.ndarray:
    """Positions that sort rows by time, those of one time by all columns: the order of the log decides nothing."""
    order = stable_order(time)
    same = np.diff(time[order]) == 0
    tied = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False)) if len(time) else np.empty(0, np.int64)
    if len(tied):
        rows = order[tied]
        order[tied] = rows[stable_order(time[rows], *(column[rows] for column in columns))]
    return order


def _placed(size: int, place: np.ndarray, values: np.ndarray) -> np.ndarray:
    column = np.zeros(size, np.int64)
    column[place] = values
    return column


def first_of_groups(codes: np.ndarray) -> np.ndarray:
    """The first row of each row's group; its own where it has none.

    Args:
        codes: ``(n,)`` int64, the group of each row, -1 without one.

    Example:
        >>> first_of_groups(np.array([-1, 4, 2, 4, -1]))
        array([0, 1, 2, 1, 4])
    """
    first = np.arange(len(codes))
    grouped = np.flatnonzero(codes >= 0)
    _, index, number = np.unique(codes[grouped], return_index=True, return_inverse=True)
    first[grouped] = grouped[index][number]
    return first


@dataclass(frozen=True)
class Carried:
    """All that derived values carry.

    Attributes:
        newest: UTC microseconds; requests to come are not earlier.
        rows: of the values that share log, groups and created column, by the name of the first.
        groups: by attribute, ``(n,)`` int64: the first row of each row's group, as totals name it.
        kinds: by log and column: what the columns hold that expressions read.
    """

    newest: int
    rows: Mapping[str, CarriedRows]
    groups: Mapping[str, np.ndarray]
    kinds: Mapping[str, Mapping[str, Kind]]

    def is_split(self, name: str, codes: np.ndarray) -> bool:
        """Whether users or items that an attribute had put in one group are in several now.

        Args:
            name: of the attribute.
            codes: ``(n,)`` int64, the group of each row now, -1 without one; new rows behind those known.
        """
        first = self.groups[name]
        return bool((codes[first] != codes[: len(first)]).any())

    def write(self, folder: Path) -> None:
        """Writes the files into the folder of a training set."""
        place = folder / FOLDER
        (place / _GROUPS).mkdir(parents=True)
        for name, rows in self.rows.items():
            _write(place / f"{name}.arrow", rows.columns)
        for name, first in self.groups.items():
            _write(place / _GROUPS / f"{name}.arrow", {_GROUP: first})
        kinds = {log: dict(columns) for log, columns in self.kinds.items()}
        state = {"version": VERSION, "newest": self.newest, "kinds": kinds}
        write_json(place / _STATE, state)

    @classmethod
    def open(cls, folder: Path, values: Sequence[str], attributes: Sequence[str]) -> Self | None:
        """Reads the files of a training set.

        Args:
            folder: of the set.
            values: names that rows are kept under.
            attributes: whose groups are kept.

        Returns:
            None if the set has none, or those of another version.

        Raises:
            IntegrityError: a file is broken or missing.
        """
        place = folder / FOLDER
        if not (place / _STATE).is_file():
            return None
        state = read_object(place / _STATE, {"version": int, "newest": int, "kinds": dict}, hint=_REBUILD)
        if state["version"] != VERSION:
            return None
        return cls(
            int(state["newest"]),
            {name: CarriedRows.of(_read(place / f"{name}.arrow")) for name in values},
            {name: _read(place / _GROUPS / f"{name}.arrow")[_GROUP] for name in attributes},
            state["kinds"],
        )


def _write(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """One record batch, each column as narrow as its numbers allow, compressed: it is read as a whole."""
    batch = pa.record_batch([pa.array(_narrow(c)) for c in columns.values()], names=list(columns))
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        replacing_file(path) as draft,
        pa.OSFile(str(draft), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema, options=options) as writer,
    ):
        writer.write_batch(batch)


def _narrow(column: np.ndarray) -> np.ndarray:
    low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
    fitting = (t for t in _NARROW if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return column.astype(next(fitting, np.dtype(np.int64)))


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with pa.OSFile(str(path), "rb") as source:
            batch: Any = pa.ipc.open_file(source).get_batch(0)
    except (pa.ArrowException, OSError) as err:
        raise IntegrityError(
            f"{path} cannot be read as an Arrow file: {err}",
            hint=_REBUILD,
        ) from err
    columns = zip(batch.schema.names, batch.columns, strict=True)
    return {name: column.to_numpy(zero_copy_only=False).astype(np.int64) for name, column in columns}
