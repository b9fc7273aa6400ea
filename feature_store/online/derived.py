"""Derived values from the online store: what is kept of them, and how a request's are computed.

What a value is computed of (:attr:`Windowed.by`) decides what is kept:

=============================  ======================================================================================
user; user and item; user and  the user's rows of the log that count, with what each adds. The value is computed at
an attribute of items          the request's time, by :mod:`recsys.windows`, as in training
item, attributes of items      the number, with the item, as of the time of materialising
user and an attribute of       the number, with the user, as of the time of materialising
users; attributes of users
attributes of both             nothing: there is no one key to find it by
as_of                          the version, encoded, with its time, as of the time of materialising; its age is
                               checked at the request's time
ratio                          nothing: it is computed of its parts
=============================  ======================================================================================

A number that is kept carries the time that it is of, and is refused for requests before that time: it would be of their
future. Materialised again and found unchanged, it keeps that time. Rows begin with a record that counts nowhere, whose
time says since when all rows are there; a window that reaches further back is refused, never computed of a part.

The attribute of an item by which rows are grouped is kept as a *code*, 63 bits of a hash. That no two values share one
is checked when they are written.

Shapes: R requests, N candidates, S rows of all users together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from feature_store.online.codec import Codec, concatenated, take_rows
from recsys.derived import AsOf, Mean, Ratio, Sum, Windowed, duration_us
from recsys.encoding.encoder import EncodedColumn, Encoder
from recsys.schema import Feature, Schema
from recsys.windows import GroupedRows, WindowedValue, ratio

AS_OF = "@as_of"
KNOWN = "@known"
ITEM_VALUES = b"vi"
"""What the keys of items' derived values begin with."""
USER_VALUES = b"vu"
"""What the keys of users' derived values begin with."""


def value_column(name: str) -> str:
    """Column of a number as of the time of materialising."""
    return f"@value.{name}"


def code_column(by: str) -> str:
    """Column of the code of an item, or of its attribute; -1 where it is missing."""
    return f"@code.{by}"


def counts_column(name: str) -> str:
    """Column of rows: 1 where a row counts for a value."""
    return f"@counts.{name}"


def units_column(name: str) -> str:
    """Column of rows: what a row adds to a sum, in units of ``10 ** -decimals``."""
    return f"@units.{name}"


def since_column(view: str) -> str:
    """Column of the time of the version that is kept, UTC microseconds; -1 where there is none."""
    return f"@since.{view}"


def code_of(value: bytes) -> int:
    """63 bits that stand for a value."""
    return int.from_bytes(blake2b(value, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Family:
    """Values that are computed of the same rows of a user.

    Attributes:
        source: the log.
        created: its column of the time since when a row is known; None if since its time.
        specs: the values.
        codes: what of items their rows are grouped by: ``"item"``, or attributes.
        window_us: rows older than this count for none of the values; None if any row may count.
    """

    source: str
    created: str | None
    specs: tuple[Windowed, ...]
    codes: tuple[str, ...]

    @property
    def name(self) -> str:
        """For messages and summaries."""
        return f"rows of {self.source}" + (f" by {self.created}" if self.created else "")

    @property
    def window_us(self) -> int | None:
        """The longest window; None if one has no limit."""
        windows = [spec.window for spec in self.specs]
        return None if None in windows else max(duration_us(window) for window in windows if window is not None)

    @property
    def numbers(self) -> dict[str, str]:
        """Columns of a row, beside its time."""
        known = {KNOWN: "<i8"} if self.created else {}
        sums = [spec.name for spec in self.specs if isinstance(spec, Sum | Mean)]
        return {
            **known,
            **{code_column(by): "<i8" for by in self.codes},
            **{units_column(name): "<i8" for name in sums},
            **{counts_column(spec.name): "<u1" for spec in self.specs},
        }


class Layout:
    """What is kept of a schema's derived values.

    Args:
        encoder: of the model.

    Attributes:
        families: of users' rows.
        of_items: numbers that are kept with items.
        of_users: numbers that are kept with users.
        codes: what of items the rows of all families are grouped by.
        codecs: of items' values, of users' values, and of the rows of each family.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.schema: Schema = encoder.schema
        self._encoder = encoder
        placed = [(spec, _placed(self.schema, spec)) for spec in self._windowed]
        alike: dict[tuple[str, str | None], list[Windowed]] = {}
        for spec, place in placed:
            if place == "rows":
                alike.setdefault((spec.source, spec.created), []).append(spec)
        self.families = tuple(
            Family(source, created, tuple(specs), tuple(sorted({b for s in specs for b in s.by} - {"user"})))
            for (source, created), specs in alike.items()
        )
        self.codes = tuple(sorted({code for family in self.families for code in family.codes}))
        self.of_items = tuple(spec for spec, place in placed if place == "item")
        self.of_users = tuple(spec for spec, place in placed if place == "user")
        self.refused = frozenset(spec.name for spec, place in placed if place is None)
        self.features: dict[str, Feature] = {
            f.name: f for f in self.schema.features if self.schema.derived_of(f) is not None
        }

    @property
    def is_empty(self) -> bool:
        """Whether the schema has no derived values."""
        return not self.features

    def version_features(self, of: str) -> list[Feature]:
        """Features that read versions of users, or of items."""
        scope = "context" if of == "user" else "candidate"
        return [f for f in self.features.values() if f.scope == scope and isinstance(self.schema.derived_of(f), AsOf)]

    def views(self, of: str) -> list[str]:
        """Views of versions of users, or of items."""
        return [view.name for view in self.schema.views.versions if view.of == of]

    def keeps(self, of: str) -> bool:
        """Whether anything is kept with users, or with items."""
        codec = self.codec_of(of)
        return bool(codec.features) or len(codec.numbers) > 1  # beside the time

    def time_of_values(self, of: str) -> slice:
        """The bytes of what is kept with a user, or with an item, that hold the time."""
        return self.codec_of(of).bytes_of(AS_OF)

    def codec_of(self, of: str) -> Codec:
        """Of what is kept with items, or with users."""
        items, users, _ = self.codecs
        return items if of == "item" else users

    @cached_property
    def codecs(self) -> tuple[Codec, Codec, tuple[Codec, ...]]:
        """Of items' values, of users' values, and of the rows of each family."""
        attributes = {n: self.schema.feature(n).source_column for s in self._windowed for n in s.by if _is_own(n)}
        meaning = [[d.model_dump(mode="json") for d in self.schema.derived], attributes]
        numbers = {
            "item": {value_column(s.name): "<f8" for s in self.of_items} | {code_column(c): "<i8" for c in self.codes},
            "user": {value_column(s.name): "<f8" for s in self.of_users},
        }
        items, users = (
            Codec(
                self._encoder,
                "values",
                [f.name for f in self.version_features(of)],
                name=f"derived values of {of}s",
                numbers={AS_OF: "<i8", **numbers[of], **{since_column(view): "<i8" for view in self.views(of)}},
                meaning=[of, *meaning],
            )
            for of in ("item", "user")
        )
        rows = tuple(
            Codec(self._encoder, "rows", [], name=family.name, numbers=family.numbers, meaning=meaning)
            for family in self.families
        )
        return items, users, rows

    @property
    def _windowed(self) -> list[Windowed]:
        return [spec for spec in self.schema.derived if not isinstance(spec, Ratio | AsOf)]


def _is_own(by: str) -> bool:
    return by not in ("user", "item")


def _placed(schema: Schema, spec: Windowed) -> str | None:
    """Where a value comes from: a user's rows, what is kept with the user or with the item, or nowhere."""
    scope_of = {name: schema.feature(name).scope if _is_own(name) else name for name in spec.by}
    scopes = set(scope_of.values())
    if "user" in spec.by and {scope for name, scope in scope_of.items() if name != "user"} <= {"item"}:
        return "rows"
    return next(iter(scopes)) if len(scopes) == 1 else None


class Kept(NamedTuple):
    """What is kept with n users or items.

    Attributes:
        columns: of those that are there.
        is_known: ``(n,)`` bool, which those are.
    """

    columns: Mapping[str, EncodedColumn]
    is_known: np.ndarray


class Rows(NamedTuple):
    """Rows of R users, each user's first record being no row: its time says since when all are there.

    Attributes:
        offsets: ``(R + 1,)`` int64.
        times: ``(S,)`` int64.
        columns: S rows each.
    """

    offsets: np.ndarray
    times: np.ndarray
    columns: Mapping[str, EncodedColumn]


class DerivedRead(NamedTuple):
    """What the store holds for the derived values of some requests.

    Attributes:
        items: of N candidates.
        users: of R users.
        rows: of R users, family by family.
        item_keys: stored form of the candidates' keys.
    """

    items: Kept
    users: Kept
    rows: Sequence[Rows]
    item_keys: Sequence[bytes]


class DerivedColumns(NamedTuple):
    """Derived values of R requests and N candidates.

    Attributes:
        columns: encoded, by feature.
        refused: features that the store cannot give, and why.
    """

    columns: dict[str, EncodedColumn]
    refused: dict[str, str]


class _Refused(Exception):  # noqa: N818 - a reason, not an error
    """Why a value cannot be given."""


def derived_columns(
    encoder: Encoder, layout: Layout, read: DerivedRead, time: np.ndarray, request_of_row: np.ndarray
) -> DerivedColumns:
    """Computes the derived values of some requests, and encodes them.

    Args:
        encoder: of the model.
        layout: of its schema.
        read: what the store holds.
        time: ``(R,)`` int64, UTC microseconds.
        request_of_row: ``(N,)`` int64.
    """
    computed = _Computed(layout, read, time, request_of_row)
    found = DerivedColumns({}, {})
    for name, feature in layout.features.items():
        spec = layout.schema.derived_of(feature)
        try:
            if isinstance(spec, AsOf):
                found.columns[name] = computed.version(encoder, feature, spec)
            else:
                assert spec is not None
                values = computed.of(spec)
                found.columns[name] = encoder.encode(name, pa.array(values, from_pandas=True))
        except _Refused as reason:
            found.refused[name] = str(reason)
    return found


def derived_numbers(
    layout: Layout, read: DerivedRead, time: np.ndarray, request_of_row: np.ndarray
) -> dict[str, np.ndarray]:
    """The numbers that :func:`derived_columns` encodes, by feature: ``(R,)`` or ``(N,)`` float64, NaN where missing.

    Without versions, which the store keeps encoded, and without what it cannot give.
    """
    computed = _Computed(layout, read, time, request_of_row)
    found: dict[str, np.ndarray] = {}
    for name, feature in layout.features.items():
        spec = layout.schema.derived_of(feature)
        if spec is None or isinstance(spec, AsOf):
            continue
        with suppress(_Refused):
            found[name] = computed.of(spec)
    return found


class _Computed:
    """Values of some requests, each computed once."""

    def __init__(self, layout: Layout, read: DerivedRead, time: np.ndarray, request_of_row: np.ndarray) -> None:
        self._layout = layout
        self._read = read
        self._time = time
        self._request_of_row = request_of_row
        self._values: dict[str, np.ndarray] = {}
        self._grouped: dict[tuple[int, tuple[str, ...]], tuple[GroupedRows, np.ndarray, np.ndarray]] = {}

    def of(self, spec: Windowed | Ratio) -> np.ndarray:
        """``(R,)`` or ``(N,)`` float64 by the value's scope; NaN where it is missing."""
        if spec.name not in self._values:
            self._values[spec.name] = self._ratio(spec) if isinstance(spec, Ratio) else self._windowed(spec)
        return self._values[spec.name]

    def _ratio(self, spec: Ratio) -> np.ndarray:
        schema = self._layout.schema
        is_wide = schema.derived_scope(spec) == "candidate"
        parts = {d.name: d for d in schema.derived if d.name in (spec.numerator, spec.denominator)}
        values = []
        for name in (spec.numerator, spec.denominator):
            part = parts[name]
            assert not isinstance(part, AsOf)
            value = self.of(part)
            is_narrow = is_wide and schema.derived_scope(part) == "context"
            values.append(value[self._request_of_row] if is_narrow else value)
        return ratio(spec, *values)

    def _windowed(self, spec: Windowed) -> np.ndarray:
        layout = self._layout
        if spec.name in layout.refused:
            raise _Refused("is of attributes of users and of items together, which no key of the store finds")
        if spec in layout.of_items:
            return self._kept(spec, self._read.items, self._time[self._request_of_row])
        if spec in layout.of_users:
            return self._kept(spec, self._read.users, self._time)
        return self._of_rows(spec)

    def _kept(self, spec: Windowed, kept: Kept, time: np.ndarray) -> np.ndarray:
        """Numbers as of the time of materialising; of who is not kept, those of a group without rows."""
        self._check_time(kept, time)
        found = np.full(len(kept.is_known), _without_rows(spec))
        found[kept.is_known] = kept.columns[value_column(spec.name)]
        return found

    def _check_time(self, kept: Kept, time: np.ndarray) -> None:
        as_of = kept.columns[AS_OF]
        assert isinstance(as_of, np.ndarray)
        if (as_of > time[kept.is_known]).any():
            raise _Refused("is kept as of a time after the request's")

    def version(self, encoder: Encoder, feature: Feature, spec: AsOf) -> EncodedColumn:
        """The version as of the time of materialising, unless it is too old by the request's."""
        is_of_user = feature.scope == "context"
        kept = self._read.users if is_of_user else self._read.items
        time = self._time if is_of_user else self._time[self._request_of_row]
        self._check_time(kept, time)
        since = kept.columns[since_column(spec.view)]
        assert isinstance(since, np.ndarray)
        is_there = since >= 0
        if spec.max_age is not None:
            is_there &= time[kept.is_known] - since <= duration_us(spec.max_age)
        # Of those that are not there, the row after the last: the unknown value.
        rows = np.full(len(kept.is_known), len(since))
        rows[kept.is_known] = np.where(is_there, np.arange(len(since)), len(since))
        return take_rows(concatenated([kept.columns[feature.name], encoder.unknown_column(feature.name, 1)]), rows)

    def _of_rows(self, spec: Windowed) -> np.ndarray:
        layout = self._layout
        (place,) = (n for n, family in enumerate(layout.families) if spec in family.specs)
        rows = self._read.rows[place]
        self._check_reach(spec, rows)
        grouped, is_grouped, asked = self._groups(place, spec.by)
        columns = rows.columns
        counts = columns[counts_column(spec.name)]
        assert isinstance(counts, np.ndarray)
        units = columns[units_column(spec.name)] if isinstance(spec, Sum | Mean) else None
        assert units is None or isinstance(units, np.ndarray)
        value = WindowedValue.build(
            spec, grouped, counts[is_grouped].astype(np.bool_), None if units is None else units[is_grouped]
        )
        is_of_user = layout.schema.derived_scope(spec) == "context"
        return value.at(asked, self._time if is_of_user else self._time[self._request_of_row])

    def _check_reach(self, spec: Windowed, rows: Rows) -> None:
        """Refuses a window that reaches further back than all rows are kept."""
        has_any = np.diff(rows.offsets) > 0
        since = rows.times[rows.offsets[:-1][has_any]]
        reach = 0 if spec.window is None else np.maximum(self._time[has_any] - duration_us(spec.window), 0)
        if (since > reach).any():
            raise _Refused("reaches further back than the store keeps the user's rows")

    def _groups(self, place: int, by: tuple[str, ...]) -> tuple[GroupedRows, np.ndarray, np.ndarray]:
        """Rows by group, which of them have one, and the group of each request or candidate, -1 without one."""
        by = tuple(sorted(by))
        if (place, by) not in self._grouped:
            rows, num_requests = self._read.rows[place], len(self._time)
            key = np.repeat(np.arange(num_requests), np.diff(rows.offsets))
            asked = np.arange(num_requests)
            is_grouped = np.ones(len(key), np.bool_)
            for name in by:
                if name == "user":
                    continue
                stored = rows.columns[code_column(name)]
                assert isinstance(stored, np.ndarray)
                code = self._codes(name)
                distinct, number = np.unique(np.concatenate([stored, code]), return_inverse=True)
                is_grouped = stored >= 0
                key = key * len(distinct) + number[: len(stored)]
                asked = asked[self._request_of_row] * len(distinct) + number[len(stored) :]
                asked[code < 0] = -1
            known = rows.columns.get(KNOWN)
            assert known is None or isinstance(known, np.ndarray)
            grouped = GroupedRows(key[is_grouped], rows.times[is_grouped], None if known is None else known[is_grouped])
            self._grouped[place, by] = grouped, is_grouped, asked
        return self._grouped[place, by]

    def _codes(self, name: str) -> np.ndarray:
        """``(N,)`` int64: the code of each candidate, or of its attribute; -1 where it is missing."""
        kept = self._read.items
        codes = np.full(len(kept.is_known), -1)
        codes[kept.is_known] = kept.columns[code_column(name)]
        if name == "item":
            for place in np.flatnonzero(~kept.is_known).tolist():
                codes[place] = code_of(self._read.item_keys[place])
        return codes


def _without_rows(spec: Windowed) -> float:
    """The value of a group without rows; of an entity that is not known, whose attribute is missing, none."""
    if any(map(_is_own, spec.by)):
        return float("nan")
    none = np.empty(0, np.int64)
    units = none if isinstance(spec, Sum | Mean) else None
    value = WindowedValue.build(spec, GroupedRows(none, none), none.astype(np.bool_), units)
    return float(value.at(np.zeros(1, np.int64), np.zeros(1, np.int64))[0])
