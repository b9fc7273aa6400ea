"""The report of a run: one HTML file that opens anywhere.

No script, and no font, image or style from outside: charts are inline SVG whose colours are CSS variables, so that
light, dark and print each get their own. Every chart has a text alternative, and its figures in a table below it. Text
that comes from outside (names, configuration, paths) is escaped.

:class:`ReportData` is plain data: :func:`write_report` reads no run, no model and no data set. :func:`history_buckets`
and :func:`reliability_bins` turn predictions into those parts of it that are figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from recsys.files import write_text
from recsys.metrics import Metrics, auc, reliability_by_quantile
from training.report_chart import Plot, escape, round_ticks
from training.report_page import chart, figure, page, short, table, titled

Role = Literal["model", "teacher", "ceiling", "floor"]

HISTORY_EDGES = (0, 1, 5, 10, 20, 50, 100, 500)
"""First history length of each bucket of :func:`history_buckets`; the last is open."""


@dataclass(frozen=True)
class ScoreRow:
    """Metrics of one scorer.

    Args:
        name: what gave the scores.
        role: the model itself, what taught it, the best that is possible (ceiling), or what needs no learning (floor).
        metrics: all over the same rows as the other scorers'; what is undefined is NaN.
    """

    name: str
    role: Role
    metrics: Metrics


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows of similar predicted probability: what was predicted, what happened."""

    predicted: float
    observed: float
    num_rows: int


@dataclass(frozen=True)
class HistoryBucket:
    """AUC over the rows whose history length lies in ``first..last`` (``last`` None: and above)."""

    first: int
    last: int | None
    auc: float
    num_rows: int
    num_positives: int

    @property
    def label(self) -> str:
        """The bucket in words: ``0``, ``5-9``, ``1000+``."""
        if self.last is None:
            return f"{self.first:,}+"
        return f"{self.first:,}" if self.first == self.last else f"{self.first:,}\u2013{self.last:,}"


@dataclass(frozen=True)
class TaskReport:
    """All figures of one task."""

    name: str
    scores: tuple[ScoreRow, ...]
    reliability: tuple[ReliabilityBin, ...] = ()
    history: tuple[HistoryBucket, ...] = ()


@dataclass(frozen=True)
class LearningCurve:
    """The course of training. Points are ``(epochs trained, value)``; epochs may be fractions.

    Args:
        train_loss: mean loss since the point before.
        validation: the metric that chooses the best epoch.
        validation_name: its name.
        best_epoch: the epoch whose weights were kept.
        higher_is_better: direction of the validation metric.
    """

    train_loss: tuple[tuple[float, float], ...]
    validation: tuple[tuple[float, float], ...]
    validation_name: str
    best_epoch: float | None
    higher_is_better: bool = True


@dataclass(frozen=True)
class DataSummary:
    """What was learnt from.

    Args:
        name: of the training set.
        rows: rows of each split and view.
        fingerprints: of training set, schema, encoder.
        quarantined: rows set aside, by reason.
        boundaries: of the splits, in words.
    """

    name: str
    rows: Mapping[str, int]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    quarantined: Mapping[str, int] = field(default_factory=dict)
    boundaries: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows.

    Args:
        title: of the page; the experiment's name.
        subtitle: model and data in a line.
        created_at: time in words.
        split: the split that the figures are over.
        tasks: figures, a task each.
        curve: the course of training, where known.
        data: what was learnt from.
        config: the resolved configuration.
        environment: versions, machine, durations.
    """

    title: str
    subtitle: str
    created_at: str
    split: str
    tasks: tuple[TaskReport, ...]
    data: DataSummary
    config: Mapping[str, Any]
    environment: Mapping[str, str]
    curve: LearningCurve | None = None


def history_buckets(
    history_length: np.ndarray, labels: np.ndarray, scores: np.ndarray, *, edges: Sequence[int] = HISTORY_EDGES
) -> tuple[HistoryBucket, ...]:
    """AUC by history length, over the non-empty buckets.

    Args:
        history_length: events before the request, of each row.
        labels: 0, 1 or NaN (missing: the row takes no part).
        scores: of each row, in any monotone unit.
        edges: first length of each bucket, ascending; the last bucket is open.

    Shape:
        all (N,)
    """
    known = ~np.isnan(labels)
    history_length, labels, scores = history_length[known], labels[known], scores[known]
    bucket_of_row = np.searchsorted(np.asarray(edges), history_length, side="right") - 1
    buckets = []
    for position, first in enumerate(edges):
        rows = bucket_of_row == position
        if not rows.any():
            continue
        last = edges[position + 1] - 1 if position + 1 < len(edges) else None
        positives = int(labels[rows].sum())
        buckets.append(HistoryBucket(first, last, auc(labels[rows], scores[rows]), int(rows.sum()), positives))
    return tuple(buckets)


def reliability_bins(
    labels: np.ndarray, probabilities: np.ndarray, *, num_bins: int = 15
) -> tuple[ReliabilityBin, ...]:
    """Mean prediction and observed rate over bins of about equally many rows (:func:`reliability_by_quantile`).

    Shape:
        labels, probabilities: (N,); NaN labels take no part.
    """
    table = reliability_by_quantile(labels, probabilities, num_bins)
    columns = (table.mean_probability, table.mean_label, table.count)
    return tuple(ReliabilityBin(float(p), float(y), int(n)) for p, y, n in zip(*columns, strict=True) if n)


def auc_interval(value: float, num_positives: int, num_negatives: int) -> tuple[float, float]:
    """95 % interval of an AUC, clipped to 0..1.

    With ``A`` the AUC, ``p`` positives and ``n`` negatives, the variance is
    ``(A(1-A) + (p-1)(A/(2-A) - A^2) + (n-1)(2A^2/(1+A) - A^2)) / (pn)``.

    Source:
        Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic (ROC) curve",
        Radiology 1982, equations 1 and 2.
    """
    if math.isnan(value) or num_positives == 0 or num_negatives == 0:
        return math.nan, math.nan
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    spread = (num_positives - 1) * (q1 - value**2) + (num_negatives - 1) * (q2 - value**2)
    variance = (value * (1 - value) + spread) / (num_positives * num_negatives)
    half = 1.96 * math.sqrt(max(variance, 0.0))
    return max(0.0, value - half), min(1.0, value + half)


def rate_interval(rate: float, num_rows: int) -> tuple[float, float]:
    """95 % interval of a rate over ``num_rows`` rows.

    Source:
        Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    z2 = 1.96**2
    middle = (rate + z2 / (2 * num_rows)) / (1 + z2 / num_rows)
    half = math.sqrt(z2 * (rate * (1 - rate) / num_rows + z2 / (4 * num_rows**2))) / (1 + z2 / num_rows)
    return max(0.0, middle - half), min(1.0, middle + half)


def write_report(path: str | Path, data: ReportData) -> Path:
    """Writes the report, whole or not at all: a reader never sees half of it.

    Returns:
        The path, absolute.
    """
    path = Path(path).absolute()
    write_text(path, render_report(data))
    return path


def render_report(data: ReportData) -> str:
    """The report as HTML text."""
    sections = [_task_section(task, data, alone=len(data.tasks) == 1) for task in data.tasks]
    if data.curve is not None and (data.curve.train_loss or data.curve.validation):
        sections.append(_curve_section(data.curve))
    sections += [_data_section(data.data), _config_section(data.config), _environment_section(data.environment)]
    return page(f"{data.title} \u00b7 run report", data.title, data.subtitle, data.created_at, sections)


# Sections


def _task_section(task: TaskReport, data: ReportData, *, alone: bool) -> str:
    title = "Result" if alone else f"Task {task.name}"
    figures = []
    if task.reliability:
        figures.append(_reliability_figure(task))
    if task.history:
        figures.append(_history_figure(task))
    charts = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    return f"""<section aria-label="{escape(title)}">
<h2>{escape(title)} <span class="aside">{escape(task.name)} on the {escape(data.split)} split</span></h2>
{_gap_sentence(task)}
{_score_table(task)}
{charts}
</section>
"""


def _gap_sentence(task: TaskReport) -> str:
    """How far the model got between floor and ceiling; empty when one of the three is missing."""
    by_role = {row.role: row for row in task.scores}
    if not {"model", "ceiling", "floor"} <= by_role.keys():
        return ""
    model, ceiling, floor = (by_role[role].metrics.auc for role in ("model", "ceiling", "floor"))
    if not ceiling > floor:
        return ""
    share = (model - floor) / (ceiling - floor)
    return (
        f'<p class="lead">AUC <strong>{figure(model)}</strong>: the model closes <strong>{share:.0%}</strong> '
        f"of the gap between {escape(by_role['floor'].name)} ({figure(floor)}) and {escape(by_role['ceiling'].name)} "
        f"({figure(ceiling)}).</p>"
    )


_SCORE_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("AUC", "\u2191", "area under the ROC curve over all rows"),
    ("GAUC", "\u2191", "impression-weighted mean of the AUC of each user with both classes"),
    ("Logloss", "\u2193", "mean, in nats"),
    ("NE", "\u2193", "logloss over the entropy of the base rate, so 1 is a constant prediction"),
    ("ECE", "\u2193", "expected calibration error"),
)


def _score_table(task: TaskReport) -> str:
    heads = "".join(
        f'<th scope="col" class="number" title="{meaning}">{name}<span aria-hidden="true"> {arrow}</span></th>'
        for name, arrow, meaning in _SCORE_COLUMNS
    )
    body = []
    for row in task.scores:
        m = row.metrics
        cells = "".join(f'<td class="number">{figure(v)}</td>' for v in (m.auc, m.gauc, m.logloss, m.ne, m.ece))
        chip = "" if row.role == "model" else f' <span class="chip">{row.role}</span>'
        body.append(
            f'<tr class="{row.role}"><th scope="row">{escape(row.name)}{chip}</th>{cells}'
            f'<td class="number">{m.gauc_users:,}</td><td class="number">{m.num_rows:,}</td>'
            f'<td class="number">{m.num_positives:,}</td></tr>'
        )
    notes = "; ".join(f"{name} ({arrow}): {meaning}" for name, arrow, meaning in _SCORE_COLUMNS)
    return f"""<div class="wide" role="region" tabindex="0" aria-label="Metrics of {escape(task.name)}">
<table class="scores">
<thead><tr><th scope="col">Scorer</th>{heads}<th scope="col" class="number">Users in GAUC</th>
<th scope="col" class="number">Rows</th><th scope="col" class="number">Positives</th></tr></thead>
<tbody>{"".join(body)}</tbody></table></div>
<p class="note">{escape(notes)}. \u2191 higher is better, \u2193 lower is better; \u2013 undefined.</p>"""


def _reliability_figure(task: TaskReport) -> str:
    bins = task.reliability
    total = sum(b.num_rows for b in bins)
    intervals = [rate_interval(b.observed, b.num_rows) for b in bins]
    top = max([b.predicted for b in bins] + [high for _, high in intervals])
    axis = round_ticks(0.0, top, 5)
    plot = Plot(axis, axis, x_title="predicted probability", y_title="observed rate")
    plot.line([(axis[0], axis[0]), (axis[-1], axis[-1])], "reference")
    for point, (low, high) in zip(bins, intervals, strict=True):
        plot.whisker(point.predicted, low, high)
    for point in bins:
        plot.dot(
            point.predicted,
            point.observed,
            f"predicted {figure(point.predicted)}, observed {figure(point.observed)}, {point.num_rows:,} rows",
        )
    plot.label(axis[-1], axis[-1], "perfect", dx=-26, dy=10)
    gap = sum(abs(b.predicted - b.observed) * b.num_rows for b in bins) / total
    alt = f"{len(bins)} bins; the mean distance between predicted and observed rate is {figure(gap)}."
    listing = table(
        ("Predicted", "Observed", "Rows"),
        [(figure(b.predicted), figure(b.observed), f"{b.num_rows:,}") for b in bins],
        row_heads=False,
    )
    return chart(
        "Reliability",
        "Bins of equally many rows; bars are 95 % intervals of the observed rate.",
        plot.svg(f"Reliability of {task.name}", alt),
        listing,
    )


def _history_figure(task: TaskReport) -> str:
    buckets = task.history
    intervals = [auc_interval(b.auc, b.num_positives, b.num_rows - b.num_positives) for b in buckets]
    shown = [v for interval in intervals for v in interval if not math.isnan(v)]
    axis = round_ticks(min([0.5, *shown]), max([0.55, *shown]), 5)
    plot = Plot(
        [i + 0.5 for i in range(len(buckets))],
        axis,
        x_title="events before the request; rows below",
        y_title="AUC",
        x_range=(0.0, float(len(buckets))),
        x_labels=[(b.label, short(b.num_rows)) for b in buckets],
    )
    if axis[0] <= 0.5:
        plot.line([(0.0, 0.5), (float(len(buckets)), 0.5)], "reference")
        plot.label(float(len(buckets)), 0.5, "chance", dx=-4, dy=-6)
    for place, (low, high) in enumerate(intervals):
        if not math.isnan(low):
            plot.whisker(place + 0.5, low, high)
    for place, bucket in enumerate(buckets):
        if not math.isnan(bucket.auc):
            title = f"{bucket.label} events: AUC {figure(bucket.auc)}, {bucket.num_rows:,} rows"
            plot.dot(place + 0.5, bucket.auc, title)
    alt = "; ".join(f"{b.label} events: {figure(b.auc)} over {b.num_rows:,} rows" for b in buckets) + "."
    listing = table(
        ("Events", "AUC", "Rows", "Positives"),
        [(b.label, figure(b.auc), f"{b.num_rows:,}", f"{b.num_positives:,}") for b in buckets],
    )
    return chart(
        "AUC by history length",
        "Bars are 95 % intervals (Hanley and McNeil).",
        plot.svg(f"AUC of {task.name} by history length", alt),
        listing,
    )


def _curve_section(curve: LearningCurve) -> str:
    every = [*curve.train_loss, *curve.validation]
    last = max(x for x, _ in every)
    epochs = round_ticks(0.0, last, 6, whole=True)
    figures = []
    for name, points, is_validation in (
        ("Training loss", curve.train_loss, False),
        (f"Validation {curve.validation_name}", curve.validation, True),
    ):
        points = tuple((x, y) for x, y in points if not math.isnan(y))
        if not points:
            continue
        values = [y for _, y in points]
        axis = round_ticks(min(values), max(values), 5)
        plot = Plot(epochs, axis, x_title="epochs trained", y_title=name[0].lower() + name[1:])
        if curve.best_epoch is not None:
            plot.vertical(curve.best_epoch, "best")
        plot.line(points, "accent")
        if len(points) <= 60:
            for x, y in points:
                best = is_validation and x == curve.best_epoch
                size = "best" if best else "small" if len(points) > 20 else ""
                plot.dot(x, y, f"epoch {x:g}: {figure(y)}", size)
        direction = ("highest" if curve.higher_is_better else "lowest") if is_validation else "last"
        chosen = (max if curve.higher_is_better else min)(values) if is_validation else values[-1]
        alt = f"{name} over {last:g} epochs, from {figure(values[0])}; {direction} {figure(chosen)}."
        thin = points if len(points) <= 40 else points[:: math.ceil(len(points) / 40)]
        listing = table(("Epochs", name), [(f"{x:g}", figure(y)) for x, y in thin])
        note = "Mean since the point before." if not is_validation else _best_note(curve)
        figures.append(chart(name, note, plot.svg(name, alt), listing))
    return f"""<section aria-label="Training">
<h2>Training</h2>
<div class="charts">{"".join(figures)}</div>
</section>
"""


def _best_note(curve: LearningCurve) -> str:
    if curve.best_epoch is None:
        return "At the end of each epoch."
    return f"At the end of each epoch; the weights of epoch {curve.best_epoch:g} were kept."


def _data_section(data: DataSummary) -> str:
    parts = [titled("Rows", table(("Part", "Rows"), [(name, f"{count:,}") for name, count in data.rows.items()]))]
    if data.boundaries:
        parts.append(titled("Splits", table(("Boundary", "Value"), list(data.boundaries.items()), numbers=False)))
    if data.quarantined:
        rows = [(reason, f"{count:,}") for reason, count in data.quarantined.items()]
        parts.append(titled("Quarantined rows", table(("Reason", "Rows"), rows)))
    else:
        parts.append(titled("Quarantined rows", '<p class="quiet">None.</p>'))
    if data.fingerprints:
        rows = [(name, value) for name, value in data.fingerprints.items()]
        parts.append(titled("Fingerprints", table(("Of", "sha256"), rows, numbers=False, code=True), wide=True))
    return f"""<section aria-label="Data">
<h2>Data <span class="aside">{escape(data.name)}</span></h2>
<div class="facts">{"".join(parts)}</div>
</section>
"""


def _config_section(config: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=100)
    return f"""<section aria-label="Configuration">
<h2>Configuration <span class="aside">resolved; a complete experiment file</span></h2>
<pre tabindex="0" role="region" aria-label="Resolved configuration">{escape(text)}</pre>
</section>
"""


def _environment_section(environment: Mapping[str, str]) -> str:
    listing = table(("Name", "Value"), [(name, str(value)) for name, value in environment.items()], numbers=False)
    return f"""<section aria-label="Environment">
<h2>Environment</h2>
<div class="facts">{listing}</div>
</section>
"""


# Pieces


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
