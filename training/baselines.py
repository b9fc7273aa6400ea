"""What a model is measured against: the least that needs no learning, and the most that is possible.

Both give a probability for every row of a split, in its order, so that all three are judged on the same rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from feature_store.files import find_files
from recsys.errors import DataError, SchemaError, SourceError, nearest
from recsys.training_set import ITEM_ROW, SOURCE_ROW, TrainingSet, label_column

PRIOR_IMPRESSIONS = 20.0
"""Impressions at the mean rate that every item is given, so that rare items keep near it."""


def item_popularity(
    training_set: TrainingSet, split: str, task: str, *, prior_impressions: float = PRIOR_IMPRESSIONS
) -> np.ndarray:
    r"""Each candidate's smoothed rate in the training period: the floor.

    .. math:: p_i = \frac{c_i + a r}{n_i + a}

    with :math:`c_i` positives among the :math:`n_i` labelled training impressions of item :math:`i`, :math:`r` the rate
    over all of them and :math:`a` = ``prior_impressions``. Items never shown, and unknown items, get :math:`r`.

    Args:
        split: whose rows to score.
        task: whose label counts.
        prior_impressions: :math:`a`, more than 0.

    Returns:
        ``(N,)`` float64, rows in the order of the split.

    Raises:
        SchemaError: there is no such task.
        DataError: no training impression has the label.
    """
    tasks = [t.name for t in training_set.schema.tasks]
    if task not in tasks:
        raise SchemaError(f"task must be one of the schema's, got {task!r}", hint=nearest(task, tasks))
    shown = training_set.split("train").impressions
    labels, items = shown.array(label_column(task)), shown.array(ITEM_ROW)
    known = ~np.isnan(labels)
    if not known.any():
        raise DataError(f"task {task!r} must have labels in the training split, got none")
    num_items = training_set.items.num_rows
    clicks = np.bincount(items[known], weights=labels[known].astype(np.float64), minlength=num_items)
    impressions = np.bincount(items[known], minlength=num_items)
    rate = clicks.sum() / impressions.sum()
    clicks[0] = impressions[0] = 0  # all unknown items share row 0: what is known of one says nothing of another
    popularity = (clicks + prior_impressions * rate) / (impressions + prior_impressions)
    return np.asarray(popularity[training_set.split(split).impressions.array(ITEM_ROW)])


def true_probabilities(truth: str | Path, training_set: TrainingSet, split: str) -> np.ndarray:
    """The probabilities that a simulation drew the labels from: the ceiling.

    Args:
        truth: file or folder with a row for each impression of the view, in its order, and the column ``probability``.
        split: whose rows are wanted.

    Returns:
        ``(N,)`` float64, rows in the order of the split.

    Raises:
        SourceError: the file is missing, lacks the column, or is shorter than the impressions view.
    """
    truth = Path(truth)
    parts = []
    for file in find_files("truth", truth.parent, truth.name):
        table = pq.ParquetFile(file)
        if "probability" not in table.schema_arrow.names:
            raise SourceError(f"{file} must have a column 'probability', got {', '.join(table.schema_arrow.names)}")
        parts.append(table.read(["probability"]).column(0).to_numpy())
    probabilities = np.concatenate(parts)
    rows = training_set.split(split).impressions.array(SOURCE_ROW)
    if len(rows) and int(rows.max()) >= len(probabilities):
        raise SourceError(
            f"{truth} must have a row for each impression, got {len(probabilities):,} of {int(rows.max()) + 1:,}",
            hint="it must be of the simulation that the training set was built from",
        )
    return np.asarray(probabilities[rows], dtype=np.float64)
