"""Fits the encoder on what the training period holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.joined import Joined
from feature_store.sources import VIEW_OF_SCOPE
from recsys.encoding import Encoder, EncoderFitter
from recsys.schema import Feature


def fit_encoder(joined: Joined, train: slice, *, train_end: int, stage: Callable[[str], None]) -> Encoder:
    """Fits every feature on its occurrences in training.

    A value counts once for each impression that it is part of, be it through the user, the item or the request. The
    value of an event, and of its item where a history reads it, also counts once for each event before the period's
    end.

    Args:
        joined: the data.
        train: requests of the training split.
        train_end: UTC microseconds; events before it count.
        stage: called with the name of each stage as it begins.
    """
    fitter = EncoderFitter(joined.schema)

    def update(feature: Feature, column: pa.Array[Any], weights: np.ndarray | None = None) -> None:
        if 0 < len(column) == column.null_count:
            _note_empty(joined, feature)
        fitter.update(feature.name, column, weights)

    rows = joined.rows_of(train)
    rows_of_request = joined.requests.row_counts[train]
    shown_to = np.bincount(joined.user_row[train], rows_of_request, minlength=joined.users.num_rows).astype(np.int64)
    shown = np.bincount(joined.item_row[rows], minlength=joined.items.num_rows)
    is_past = {name: log.time < train_end for name, log in joined.logs.items()}
    happened_to = {
        history.name: np.bincount(
            joined.logs[history.name].item_row[np.flatnonzero(is_past[history.name])], minlength=joined.items.num_rows
        )
        for history in joined.schema.histories
        if history.attributes
    }
    for feature in joined.schema.features:
        stage(f"Fitting {feature.name}")
        if feature.scope == "user":
            update(feature, joined.entity_column(feature), shown_to)
        elif feature.scope == "item":
            readers = [history.name for history in joined.schema.histories if feature.name in history.attributes]
            weights = sum((happened_to[name] for name in readers), start=shown)
            update(feature, joined.entity_column(feature), weights)
        elif feature.scope == "context":
            update(feature, joined.context_column(feature, train), rows_of_request)
        else:
            update(feature, joined.candidate_column(feature, rows))
    for history in joined.schema.histories:
        for feature in history.event_features:
            stage(f"Fitting {feature.name}")
            weights = is_past[history.name].astype(np.int64)
            update(feature, joined.event_column(feature, history.name), weights)
    return fitter.finish()


def _note_empty(joined: Joined, feature: Feature) -> None:
    """Says that a feature has nothing to learn from."""
    if joined.schema.derived_of(feature) is not None:
        joined.views.notes.append(
            f"feature {feature.name!r}: its derived value is missing in the whole training period"
        )
        return
    source = joined.views.sources.get(VIEW_OF_SCOPE[feature.scope])
    if source is not None and source.num_rows:
        joined.views.notes.append(
            f"{source.place}: column {feature.source_column!r} (feature {feature.name!r}) is empty in every row"
        )
