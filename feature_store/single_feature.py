r"""How well each feature by itself tells the positives: what tells them too well mostly knows the answer.

A feature's score of a row is fitted on the training split and judged on a later one:

* an id scores the share of positives among the training rows with the id, drawn to the base rate of all rows by ten
  rows' weight, :math:`(p + 10 b) / (n + 10)`; a set of ids scores their mean; an id never seen, and an empty set,
  ``b``;
* a number scores itself, or minus itself where that fits training better, and also as an id of its bucket between
  hundred quantiles of training; the better of the two counts, so that a bump in the middle is found;
* of a history, three numbers: its length, the time since its last event, and how many of its last fifty events are on
  the candidate. An event that the impression itself caused, logged a moment too early, shows in the latter two.

The AUC is implausible if it is above a limit by more than three of its standard errors, with twenty rows of each class
at least.

Source: Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982 (standard error).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recsys.encoding import EncodedColumn, Ragged
from recsys.metrics import auc
from recsys.schema import Feature
from recsys.training_set import (
    ITEM_ROW,
    SOURCE_ROW,
    TIME,
    USER_ROW,
    Split,
    TrainingSet,
    end_column,
    label_column,
    start_column,
)

MIN_CLASS = 20
"""Rows of each class below which an AUC says nothing."""
_PRIOR_ROWS = 10.0
_NUM_BUCKETS = 100
_NUM_RECENT = 50
_NUM_NAMED = 10
_MAX_DIM = 64


@dataclass(frozen=True)
class FeatureAuc:
    """What one feature tells about one task.

    Attributes:
        feature: its name; ``history.length``, ``history.recency``, ``history.candidate`` of a history.
        task: by name.
        split: where it was judged.
        auc: of the feature's score by itself; NaN with too few rows of a class.
        lower: three standard errors below.
        num_rows: judged rows with a label.
        is_implausible: whether ``lower`` is above the limit.
        source_rows: of an implausible feature, the positives that it scores highest, as rows of the impressions view.
    """

    feature: str
    task: str
    split: str
    auc: float
    lower: float
    num_rows: int
    is_implausible: bool
    source_rows: tuple[int, ...]


def single_feature_aucs(
    training_set: TrainingSet, *, max_auc: float, max_rows: int = 1_000_000, seed: int = 0
) -> list[FeatureAuc]:
    """Judges every feature on every task; the most telling first.

    Args:
        training_set: with rows after the training period; without them nothing is judged.
        max_auc: the limit.
        max_rows: rows read of each split; larger ones are sampled.
        seed: of the sample.
    """
    judged = _judging_split(training_set)
    if judged is None:
        return []
    rng = np.random.default_rng(seed)
    train = _Rows(training_set, training_set.split("train"), max_rows, rng)
    later = _Rows(training_set, judged, max_rows, rng)
    tasks = [task.name for task in training_set.schema.tasks]
    found = []
    for name, fit, judge in _columns(train, later):
        for task in tasks:
            label_column_ = label_column(task)
            scores = _scores(fit, train.labels(label_column_), judge)
            found.append(_judge(name, task, judged.name, later.labels(label_column_), scores, later, max_auc))
    return sorted(found, key=lambda f: (-f.auc if not math.isnan(f.auc) else 1.0, f.feature, f.task))


def _judging_split(training_set: TrainingSet) -> Split | None:
    """Validation, unless only the test split has enough rows of each class of every task, or validation has none."""
    splits = [s for s in map(training_set.split, ("validation", "test")) if s.num_rows]
    tasks = [label_column(task.name) for task in training_set.schema.tasks]

    def has_enough(split: Split) -> bool:
        labels = [split.impressions.array(column) for column in tasks]
        return all(min((x == 0).sum(), (x == 1).sum()) >= MIN_CLASS for x in labels)

    return next((s for s in splits if has_enough(s)), splits[0] if splits else None)


class _Rows:
    """Some impressions of a split with everything that belongs to them."""

    def __init__(self, training_set: TrainingSet, split: Split, max_rows: int, rng: np.random.Generator) -> None:
        self.training_set, self.split = training_set, split
        self.rows = np.arange(split.num_rows)
        if split.num_rows > max_rows:
            self.rows = np.sort(rng.choice(split.num_rows, max_rows, replace=False))
        self.request = np.searchsorted(split.row_offsets, self.rows, side="right") - 1
        self.item_row = split.impressions.array(ITEM_ROW)[self.rows]

    def labels(self, column: str) -> np.ndarray:
        """``(n,)`` float32, NaN where missing."""
        labels: np.ndarray = self.split.impressions.array(column)[self.rows]
        return labels

    def feature(self, feature: Feature) -> EncodedColumn:
        """The feature's encoded value of each row."""
        split, training_set = self.split, self.training_set
        if feature.scope == "user":
            return _gather(training_set.users.columns[feature.name], split.requests.array(USER_ROW)[self.request])
        if feature.scope == "item":
            return _gather(training_set.items.columns[feature.name], self.item_row)
        if feature.scope == "context":
            return _gather(split.requests.columns[feature.name], self.request)
        return _gather(split.impressions.columns[feature.name], self.rows)

    def history(self, name: str) -> dict[str, np.ndarray]:
        """``length``, ``recency`` and ``candidate`` of each row."""
        log, requests = self.training_set.events[name], self.split.requests
        start, end = requests.array(start_column(name)), requests.array(end_column(name))
        length = end - start
        has_events = length > 0
        recency = np.full(len(length), -1.0)
        recency[has_events] = requests.array(TIME)[has_events] - log.array(TIME)[end[has_events] - 1]
        stop, recent = end[self.request], np.minimum(length, _NUM_RECENT)[self.request]
        matches = np.zeros(len(self.rows), dtype=np.int64)
        items = log.array(ITEM_ROW)
        for back in range(1, _NUM_RECENT + 1):
            there = np.flatnonzero(recent >= back)
            if len(there) == 0:
                break
            matches[there] += items[stop[there] - back] == self.item_row[there]
        return {
            "length": length[self.request].astype(np.float64),
            "recency": recency[self.request],
            "candidate": matches.astype(np.float64),
        }


def _columns(train: _Rows, later: _Rows) -> Iterator[tuple[str, EncodedColumn, EncodedColumn]]:
    schema = train.training_set.schema
    for feature in schema.features:
        fit, judge = train.feature(feature), later.feature(feature)
        if isinstance(fit, np.ndarray) and isinstance(judge, np.ndarray) and fit.ndim == 2:
            for place in range(min(fit.shape[1], _MAX_DIM)):
                yield f"{feature.name}[{place}]", fit[:, place], judge[:, place]
        else:
            yield feature.name, fit, judge
    for history in schema.histories:
        fits, judges = train.history(history.name), later.history(history.name)
        for name, column in fits.items():
            yield f"{history.name}.{name}", column, judges[name]


def _gather(column: EncodedColumn, rows: np.ndarray) -> EncodedColumn:
    if not isinstance(column, Ragged):
        gathered: np.ndarray = column[rows]
        return gathered
    start, length = column.offsets[rows], column.offsets[rows + 1] - column.offsets[rows]
    offsets = np.append(0, np.cumsum(length))
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1], length) + np.repeat(start, length)
    return Ragged(column.values[places], offsets)


def _scores(fit: EncodedColumn, labels: np.ndarray, judge: EncodedColumn) -> list[np.ndarray]:
    """Scores of the judged rows, one or two ways."""
    known = ~np.isnan(labels)
    if not known.any():
        return []
    base = float(labels[known].mean())
    if isinstance(fit, Ragged):
        assert isinstance(judge, Ragged)
        length = np.diff(fit.offsets)
        known_value = np.repeat(known, length)
        shares = _Shares(fit.values[known_value], np.repeat(labels, length)[known_value], base)
        length = np.diff(judge.offsets)
        of_row = np.repeat(np.arange(len(length)), length)
        total = np.bincount(of_row, weights=shares.of(judge.values), minlength=len(length))
        return [np.where(length > 0, total / np.maximum(length, 1), base)]
    assert isinstance(judge, np.ndarray)
    values, labels = fit[known], labels[known]
    if np.issubdtype(values.dtype, np.integer):
        return [_Shares(values, labels, base).of(judge)]
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _NUM_BUCKETS + 1)[1:-1]))
    shares = _Shares(np.searchsorted(edges, values, side="right"), labels, base)
    sign = 1.0 if not auc(labels, values) < 0.5 else -1.0
    return [sign * judge.astype(np.float64), shares.of(np.searchsorted(edges, judge, side="right"))]


class _Shares:
    """Share of positives by id, drawn to the base rate."""

    def __init__(self, ids: np.ndarray, labels: np.ndarray, base: float) -> None:
        self._base = base
        self._ids, place = np.unique(ids, return_inverse=True)
        positives = np.bincount(place, weights=labels, minlength=len(self._ids))
        counts = np.bincount(place, minlength=len(self._ids))
        self._shares = (positives + _PRIOR_ROWS * base) / (counts + _PRIOR_ROWS)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """``(n,)`` float64."""
        if len(self._ids) == 0:
            return np.full(len(ids), self._base)
        place = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[place] == ids, self._shares[place], self._base)


def _judge(
    name: str, task: str, split: str, labels: np.ndarray, scores: list[np.ndarray], later: _Rows, max_auc: float
) -> FeatureAuc:
    positives, negatives = int(np.count_nonzero(labels == 1)), int(np.count_nonzero(labels == 0))
    num_rows = positives + negatives
    if min(positives, negatives) < MIN_CLASS or not scores:
        return FeatureAuc(name, task, split, math.nan, math.nan, num_rows, is_implausible=False, source_rows=())
    values = [auc(labels, score) for score in scores]
    best = int(np.argmax(values))
    lower = values[best] - 3 * standard_error(values[best], positives, negatives)
    rows: tuple[int, ...] = ()
    if lower > max_auc:
        told = np.flatnonzero(labels == 1)
        told = told[np.argsort(-scores[best][told], kind="stable")][:_NUM_NAMED]
        rows = tuple(later.split.impressions.array(SOURCE_ROW)[later.rows[told]].tolist())
    return FeatureAuc(name, task, split, values[best], lower, num_rows, lower > max_auc, rows)


def standard_error(value: float, positives: int, negatives: int) -> float:
    r"""Of an AUC :math:`A`, with :math:`Q_1 = A / (2 - A)` and :math:`Q_2 = 2 A^2 / (1 + A)`.

    .. math:: \sqrt{\frac{A (1 - A) + (p - 1)(Q_1 - A^2) + (n - 1)(Q_2 - A^2)}{p n}}

    Example:
        >>> standard_error(0.5, 1, 1)  # a coin: sqrt(1/4)
        0.5
    """
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (positives - 1) * (q1 - value**2) + (negatives - 1) * (q2 - value**2)
    return math.sqrt(max(variance, 0.0) / (positives * negatives))
