"""Views encoded for a model that is there already: what the online store is filled from without a training set.

Users, items and events are those of the views as they are now; their ids and numbers are those of the model's encoder.
Nothing is fitted, and impressions are read only where derived values read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from feature_store.build import DataConfig, view_files
from feature_store.derived import Computation, Log
from feature_store.joined import Joined
from feature_store.online.derived import (
    KNOWN,
    Family,
    Layout,
    Rows,
    code_column,
    code_of,
    counts_column,
    since_column,
    units_column,
    value_column,
)
from feature_store.online.keys import stored_keys
from feature_store.sources import feature_use, to_arrow
from feature_store.tables import write_entities
from feature_store.views import Views
from recsys.config import fingerprint, validate
from recsys.derived import AsOf, Windowed
from recsys.encoding import EncodedColumn, Encoder
from recsys.errors import ConfigError, SchemaError, SourceError
from recsys.schema import Feature, Schema
from recsys.training_set import EncodedTables, TrainingSet
from recsys.windows import WindowedValue

Stage = Callable[[str], None]


class ViewSnapshot(EncodedTables):
    """Users, items, events and derived values of views, encoded.

    Args:
        joined: the views.
        encoder: of the model.
        folder: for tables; they are there as long as it is.
        files: identity of the views' files.
    """

    def __init__(self, joined: Joined, encoder: Encoder, folder: Path, files: Any) -> None:
        super().__init__(folder, encoder.schema)
        self.encoder = encoder
        self.fingerprint = fingerprint(
            {"files": files, "schema": fingerprint(self.schema), "encoder": encoder.fingerprint}
        )
        self.derived = ViewDerived(joined, encoder) if self.schema.derived else None
        write_entities(folder, joined, encoder, stage=lambda _: None)


@contextmanager
def view_snapshot(
    data: DataConfig, encoder: Encoder, *, schema: Schema | None = None, stage: Stage = lambda _: None
) -> Iterator[ViewSnapshot]:
    """Reads views and encodes them into a folder that goes with the block.

    Args:
        data: where the views are.
        encoder: of the model.
        schema: what the views are said to hold, if that is known: it must be the encoder's.
        stage: called with the name of each stage as it begins.

    Raises:
        ConfigError: the schema is another than the encoder's.
        QuarantineError: too many rows of a view are broken.
        SourceError: a view cannot be read as the schema says.
        EncodingError: a value cannot be encoded.
    """
    if schema is not None and fingerprint(schema) != fingerprint(encoder.schema):
        raise ConfigError(
            f"the experiment's schema must be the one of the model, {encoder.schema.name!r}, got another",
            hint="give the experiment that the model was trained by",
        )
    files = view_files(encoder.schema, data)
    with TemporaryDirectory(prefix="recsys-views-") as scratch:
        folder = Path(scratch)
        views = Views(
            encoder.schema,
            data.views_root,
            staging=folder / ".staging",
            max_quarantined_fraction=data.max_quarantined_fraction,
        )
        joined = Joined.join(views, stage, is_derived=False)
        yield ViewSnapshot(joined, encoder, folder, files)


@contextmanager
def training_set_views(training_set: TrainingSet, *, stage: Stage = lambda _: None) -> Iterator[ViewSnapshot]:
    """The views that a training set was built from, which must be as they were.

    Raises:
        SourceError: their files have changed, or are gone.
    """
    data = validate(DataConfig, training_set.manifest["build_config"], source=str(training_set.folder))
    if view_files(training_set.schema, data) != training_set.manifest["inputs"]["files"]:
        raise SourceError(
            f"the views of {training_set.folder} must be as they were when it was built, got other files: its derived "
            "values are computed from them",
            hint="materialize from the views as they are now with --experiment, or build the training set again",
        )
    with view_snapshot(data, training_set.encoder, stage=stage) as snapshot:
        yield snapshot


class ViewDerived:
    """A :class:`~feature_store.online.materialize.DerivedSource` of joined views.

    Args:
        joined: the views.
        encoder: of the model.

    Raises:
        SchemaError: two values of an attribute have one code.
        SourceError: an expression does not fit its columns.
    """

    def __init__(self, joined: Joined, encoder: Encoder) -> None:
        self._joined = joined
        self._encoder = encoder
        self._layout = Layout(encoder)
        self._computation = Computation(joined)
        self._logs: dict[str, Log] = {}
        self._code: dict[str, np.ndarray] = {}
        self._versions: dict[str, Any] = {}
        self._asked: set[str] = set()
        self._ready: dict[str, WindowedValue] = {}
        specs: list[Windowed] = [s for f in self._layout.families for s in f.specs] + [
            *self._layout.of_items,
            *self._layout.of_users,
        ]
        self.last = max((int(self._log(s.source).time.max(initial=-1)) for s in specs), default=-1)
        texts = [text for spec in specs if spec.source == "events" for text, _ in joined.views.expressions(spec)]
        self.column_types = joined.views.column_types("events", texts) if texts else {}

    def _log(self, source: str) -> Log:
        if source not in self._logs:
            self._logs[source] = self._computation.log(source)
        return self._logs[source]

    def values(self, of: str, until: int) -> dict[str, EncodedColumn]:
        """See :class:`~feature_store.online.materialize.DerivedSource`."""
        layout, joined = self._layout, self._joined
        entities = joined.items if of == "item" else joined.users
        row = np.arange(entities.num_rows)
        found: dict[str, EncodedColumn] = {}
        for spec in layout.of_items if of == "item" else layout.of_users:
            found[value_column(spec.name)] = self._at(spec, row, until)
        if of == "item":
            found.update({code_column(name): self._codes(name) for name in layout.codes})
        for view in joined.schema.views.versions:
            if view.of != of:
                continue
            if view.name not in self._versions:
                self._versions[view.name] = self._computation.versions(view)
            rows, latest = self._versions[view.name]
            number = latest.at(row, np.full(len(row), until), None)
            found[since_column(view.name)] = np.where(number < 0, -1, np.append(latest.time, -1)[number])
            source_row = pl.Series(np.where(number < 0, -1, np.append(rows, -1)[number])).replace(-1, None)
            for feature in layout.version_features(of):
                derived = joined.schema.derived_of(feature)
                if isinstance(derived, AsOf) and derived.view == view.name:
                    values = joined.views.version_values(feature, derived).gather(source_row)
                    found[feature.name] = self._encoder.encode(feature.name, to_arrow(values))
        return found

    def _at(self, spec: Windowed, row: np.ndarray, until: int) -> np.ndarray:
        """A value of every item, or of every user, as of a time."""
        value = self._ready.get(spec.name)
        if value is None:
            rows = self._computation.rows(self._log(spec.source), spec.by, spec.created)
            ((_, value),) = self._computation.values([spec], rows)
            # A run asks once: only for who materialises again and again, the sorted rows are kept.
            if spec.name in self._asked:
                self._ready[spec.name] = value
            self._asked.add(spec.name)
        key, _ = self._computation.keys(spec.by, row, row)
        return value.at(key, np.full(len(row), until))

    def rows(self, family: Family) -> Rows:
        """See :class:`~feature_store.online.materialize.DerivedSource`."""
        log, computation = self._log(family.source), self._computation
        columns: dict[str, np.ndarray] = {}
        is_any = np.zeros(len(log.time), np.bool_)
        for spec in family.specs:
            is_counted, units = computation.counted(spec, log.source_row)
            columns[counts_column(spec.name)] = is_counted.astype(np.uint8)
            if units is not None:
                columns[units_column(spec.name)] = units
            is_any |= is_counted
        for name in family.codes:
            columns[code_column(name)] = self._codes(name)[log.item_row]
        if family.created is not None:
            columns[KNOWN] = self._joined.views.created(family.source, family.created, log.source_row)
        order = np.flatnonzero(is_any)
        order = order[np.lexsort((log.time[order], log.user_row[order]))]
        users = self._joined.users.num_rows
        offsets = np.searchsorted(log.user_row[order], np.arange(users + 1))
        return Rows(offsets, log.time[order], {name: column[order] for name, column in columns.items()})

    def _codes(self, name: str) -> np.ndarray:
        """The code of each row of the table of items, or of its attribute; -1 where it is missing."""
        if name not in self._code:
            items = self._joined.items
            if name == "item":
                keys, _ = stored_keys(items.index.keys, "item_id", b"")
                codes = np.array([-1, *map(code_of, keys)], np.int64)
                num_distinct = len(keys)
            else:
                codes, num_distinct = self._attribute_codes(self._joined.schema.feature(name))
            if len(np.unique(codes[codes >= 0])) < num_distinct:
                raise SchemaError(f"derived values by {name!r}: two of its values have one code of 63 bits")
            self._code[name] = codes
        return self._code[name]

    def _attribute_codes(self, feature: Feature) -> tuple[np.ndarray, int]:
        values = pl.from_arrow(self._joined.items.column(feature_use(self._joined.schema, feature)))
        assert isinstance(values, pl.Series)
        if values.dtype.is_float():
            values = values.fill_nan(None)
        frame = pl.DataFrame({"value": values})
        distinct = frame.drop_nulls().unique()["value"]
        table = pl.DataFrame({"value": distinct, "code": [code_of(repr(v).encode()) for v in distinct.to_list()]})
        if values.dtype == pl.Null:
            return np.full(len(values), -1), 0
        codes = frame.join(table, on="value", how="left", maintain_order="left")["code"].fill_null(-1)
        return codes.cast(pl.Int64).to_numpy(), len(distinct)
