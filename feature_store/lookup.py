"""Derived values of impressions that no view holds, such as those of a file to score, by the code of the build.

The logs are those of the schema's views; the impressions asked for are not rows of them: they count for no value,
unless a view of impressions holds them, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from feature_store.derived import Asked, Computation, ReadyValues, raw_values
from feature_store.files import is_address
from feature_store.joined import EventKeys, Joined
from feature_store.online.derived import DerivedColumns
from feature_store.views import Views
from recsys.encoding.columns import Array
from recsys.encoding.encoder import Encoder
from recsys.errors import ConfigError

MAX_QUARANTINED_FRACTION = 0.1
"""As of a build that does not say another."""


class DerivedLookup:
    """Derived values of any users and items at any time, encoded as training rows are.

    The views are read when the first value is asked for, and then held: memory grows with the rows of the logs.

    Args:
        views: of the encoder's schema.
        encoder: of the model.
    """

    def __init__(self, views: Views, encoder: Encoder) -> None:
        self._views = views
        self._encoder = encoder

    @cached_property
    def _joined(self) -> Joined:
        return Joined.join(self._views, lambda _: None, work=EventKeys(), is_derived=False)

    @cached_property
    def _values(self) -> ReadyValues:
        return ReadyValues(Computation(self._joined))

    def derived(self, users: Array, items: Array, time: np.ndarray, request_of_row: np.ndarray) -> DerivedColumns:
        """Derived values of R requests and N impressions; who is in no view has no rows, and no attributes.

        Args:
            users: ``(R,)`` keys.
            items: ``(N,)`` keys.
            time: ``(R,)`` int64, UTC microseconds.
            request_of_row: ``(N,)`` int64, non-decreasing.

        Raises:
            EncodingError: keys are text where those of the views are integers, or the reverse.
            QuarantineError: too many rows of a view are broken.
            SourceError: a view cannot be read as the schema says.
        """
        joined, schema = self._joined, self._encoder.schema
        found = self._values.of(
            Asked(
                user_row=joined.users.index.positions(users, where="user_id") + 1,
                time=time,
                item_row=joined.items.index.positions(items, where="item_id") + 1,
                row_start=np.searchsorted(request_of_row, np.arange(len(time))),
            )
        )
        columns = {}
        for feature in schema.features:
            derived = schema.derived_of(feature)
            if derived is not None:
                raw = raw_values(joined.views, feature, derived, found[derived.name])
                columns[feature.name] = self._encoder.encode(feature.name, raw)
        return DerivedColumns(columns, {})


@contextmanager
def derived_lookup(
    views: str, encoder: Encoder, *, max_quarantined_fraction: float = MAX_QUARANTINED_FRACTION
) -> Iterator[DerivedLookup]:
    """Opens views for as long as the block.

    Args:
        views: folder, or fsspec address, that the paths of the schema's views are relative to.
        encoder: of the model.
        max_quarantined_fraction: a view with a larger share of broken rows is refused.

    Raises:
        ConfigError: the schema has no derived values.
        SourceError: a file or column of a view is missing or of the wrong type.
    """
    if not encoder.schema.derived:
        raise ConfigError(
            f"views must be given to a model with derived values only: {encoder.schema.name!r} has none",
            hint="leave them out: users, items and histories come from stored features",
        )
    with TemporaryDirectory(prefix="recsys-views-") as scratch:
        opened = Views(
            encoder.schema,
            views if is_address(views) else Path(views),
            staging=Path(scratch),
            max_quarantined_fraction=max_quarantined_fraction,
        )
        yield DerivedLookup(opened, encoder)
