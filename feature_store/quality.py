"""Is the data as it should be: expectations of columns, broken rows, drift between two periods.

Every finding has a status by rule: *fail*, *warn* or *pass*. The whole is as bad as its worst finding.

* An **expectation** of the schema fails or warns as it declares.
* **Broken rows** of a view (what a build would set aside) fail above the limit of the build and warn below it.
* **Drift** of a feature or label between the reference and the current period, over impressions (so that a user counts
  as often as they are shown something), by PSI less its noise and by Jensen-Shannon distance: see
  :mod:`feature_store.drift`. Quantiles and frequent values come from the reference period.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from feature_store.build import DataConfig
from feature_store.drift import Histogram, histogram, js_distance, psi, psi_noise
from feature_store.joined import Joined
from feature_store.sources import feature_use
from feature_store.views import Views
from recsys.errors import ConfigError
from recsys.schema import Dense, DriftRules, Expectation, Feature, Schema

Status = Literal["pass", "warn", "fail"]
_STATUSES: tuple[Status, ...] = ("fail", "warn", "pass")
_WORSE: dict[str, int] = {"pass": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Check:
    """One rule and what came of it.

    Attributes:
        place: view and column.
        rule: what was expected, in words.
        got: what was found, in words.
        value: what was found, as a number; None where there is nothing to measure.
        status: by the rule.
    """

    place: str
    rule: str
    got: str
    value: float | None
    status: Status


@dataclass(frozen=True)
class Drift:
    """How one feature, or label, moved.

    Attributes:
        name: of the feature or the task.
        psi: population stability index.
        noise: PSI of two samples of one distribution.
        js: Jensen-Shannon distance.
        unseen: share of current values that the reference period does not hold; None of numbers.
        status: by the rules; features that are ignored pass.
        histogram: both periods in the same bins.
    """

    name: str
    psi: float
    noise: float
    js: float
    unseen: float | None
    status: Status
    histogram: Histogram


@dataclass(frozen=True)
class ColumnFacts:
    """One column of a view as it was measured."""

    view: str
    column: str
    null_rate: float
    distinct: int | None
    lowest: float | None
    highest: float | None


@dataclass(frozen=True)
class QualityReport:
    """Everything that was checked.

    Attributes:
        name: of the schema.
        checked_at: ISO 8601, UTC.
        periods: reference and current, ``[from, to)`` in ISO 8601, with impressions of each.
        rows: of each view.
        checks: expectations and broken rows.
        drift: of features and tasks, the largest PSI first.
        columns: of every column in use.
        rules: of drift.
    """

    name: str
    checked_at: str
    periods: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, int]
    checks: tuple[Check, ...]
    drift: tuple[Drift, ...]
    columns: tuple[ColumnFacts, ...]
    rules: DriftRules = field(default_factory=DriftRules)

    @property
    def status(self) -> Status:
        """The worst of all."""
        statuses = [c.status for c in self.checks] + [d.status for d in self.drift]
        return max(statuses, key=_WORSE.__getitem__, default="pass")

    def count(self, status: Status) -> int:
        """Findings with a status."""
        return sum(c.status == status for c in self.checks) + sum(d.status == status for d in self.drift)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        drift = [
            {
                **{key: getattr(d, key) for key in ("name", "psi", "noise", "js", "unseen", "status")},
                "bins": [
                    {"label": label, "reference": int(r), "current": int(c)}
                    for label, r, c in zip(d.histogram.labels, d.histogram.reference, d.histogram.current, strict=True)
                ],
            }
            for d in self.drift
        ]
        return {
            "name": self.name,
            "status": self.status,
            "checked_at": self.checked_at,
            "periods": {name: dict(period) for name, period in self.periods.items()},
            "rows": dict(self.rows),
            "counts": {status: self.count(status) for status in _STATUSES},
            "checks": [asdict(c) for c in self.checks],
            "drift": drift,
            "columns": [asdict(c) for c in self.columns],
            "rules": self.rules.model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Periods:
    """Two half-open periods, UTC microseconds.

    Attributes:
        reference: what the current period is compared with.
        current: the newer one.
    """

    reference: tuple[int, int]
    current: tuple[int, int]

    @classmethod
    def of_split(cls, data: DataConfig, first: int) -> Periods:
        """Training against everything after it."""
        times = data.split.boundaries
        train_end, test_end = times["train_end"], times["test_end"]
        assert train_end is not None
        assert test_end is not None
        start = first if times["train_start"] is None else times["train_start"]
        return cls((start, train_end), (train_end, test_end))


def check_quality(
    schema: Schema, data: DataConfig, *, periods: Periods | None = None, now: datetime | None = None
) -> QualityReport:
    """Checks views against the expectations of their schema, and one period against another.

    Args:
        schema: what the views hold, and what is expected of them.
        data: where they are.
        periods: to compare; training and everything after it if None.
        now: when freshness is judged; the present if None.

    Raises:
        SourceError: a file or column is missing or of the wrong type.
        ConfigError: a period holds no impression.
    """
    now = datetime.now(UTC) if now is None else now
    with tempfile.TemporaryDirectory(prefix="recsys-check-") as scratch:
        views = Views(schema, data.views_root, staging=Path(scratch), max_quarantined_fraction=1.0)
        measured = {(u.column, v): _measure(views, v, u.column) for v in views.sources for u in views.uses(v)}
        checks = [c for e in schema.quality.expectations for c in _expected(views, e, measured[e.column, e.view], now)]
        joined = Joined.join(views, lambda _: None)
        checks += _broken_rows(views, data.max_quarantined_fraction)
        times = joined.requests.time
        chosen = periods or Periods.of_split(data, int(times[0]) if len(times) else 0)
        drift, shown = _drifts(joined, chosen)
        return QualityReport(
            name=schema.name,
            checked_at=now.astimezone(UTC).isoformat(timespec="seconds"),
            periods=shown,
            rows={view: source.num_rows for view, source in views.sources.items()},
            checks=tuple(checks),
            drift=tuple(sorted(drift, key=lambda d: -d.psi)),
            columns=tuple(measured.values()),
            rules=schema.quality.drift,
        )


def _measure(views: Views, view: str, column: str) -> ColumnFacts:
    series = _typed(views, view, column)
    if series.dtype.is_float():
        series = series.fill_nan(None)
    null_rate = series.null_count() / len(series) if len(series) else 0.0
    if isinstance(series.dtype, (pl.List, pl.Array)):
        return ColumnFacts(view, column, null_rate, None, None, None)
    distinct = series.n_unique() - (series.null_count() > 0)
    if not series.dtype.is_numeric():
        return ColumnFacts(view, column, null_rate, distinct, None, None)
    lowest, highest = series.min(), series.max()
    plain = [None if v is None else float(v) for v in (lowest, highest)]  # type: ignore[arg-type]
    return ColumnFacts(view, column, null_rate, distinct, plain[0], plain[1])


def _typed(views: Views, view: str, column: str) -> pl.Series:
    """A column as the first of its uses reads it."""
    use = next(u for u in views.uses(view) if u.column == column)
    return views.sources[view].column(use)


def _expected(views: Views, rule: Expectation, facts: ColumnFacts, now: datetime) -> list[Check]:
    place = f"{rule.view}.{rule.column}"

    def check(words: str, got: str, value: float | None, *, holds: bool) -> Check:
        return Check(place, words, got, value, "pass" if holds else rule.severity)

    found = []
    if rule.max_null_rate is not None:
        words = f"missing in at most {rule.max_null_rate:.2%} of the rows"
        found.append(
            check(words, f"{facts.null_rate:.2%}", facts.null_rate, holds=facts.null_rate <= rule.max_null_rate)
        )
    if rule.lowest is not None or rule.highest is not None:
        found.append(_in_range(views, rule, facts, check))
    for words, bound, is_least in (
        ("at least {} distinct values", rule.min_distinct, True),
        ("at most {} distinct values", rule.max_distinct, False),
    ):
        if bound is not None:
            if facts.distinct is None:
                found.append(
                    check(words.format(f"{bound:,}"), "lists, whose values are not counted", None, holds=False)
                )
                continue
            holds = facts.distinct >= bound if is_least else facts.distinct <= bound
            found.append(check(words.format(f"{bound:,}"), f"{facts.distinct:,}", float(facts.distinct), holds=holds))
    if rule.max_age_hours is not None:
        found.append(_fresh(views, rule, now, check))
    return found


def _in_range(views: Views, rule: Expectation, facts: ColumnFacts, check: Any) -> Check:
    low = "" if rule.lowest is None else f" at least {rule.lowest:g}"
    high = "" if rule.highest is None else f" at most {rule.highest:g}"
    words = f"numbers{low}{' and' if low and high else ''}{high}"
    if rule.max_outside_rate:
        words += f" in all but {rule.max_outside_rate:.2%}"
    series = _typed(views, rule.view, rule.column)
    if not series.dtype.is_numeric():
        return check(words, "no numbers", None, holds=False)  # type: ignore[no-any-return]
    known = series.cast(pl.Float64).fill_nan(None).drop_nulls()
    is_outside = pl.repeat(False, len(known), eager=True)
    if rule.lowest is not None:
        is_outside |= known < rule.lowest
    if rule.highest is not None:
        is_outside |= known > rule.highest
    rate = float(np.mean(is_outside.to_numpy())) if len(known) else 0.0
    got = "no value" if facts.lowest is None else f"{facts.lowest:g} to {facts.highest:g}, {rate:.2%} outside"
    return check(words, got, rate, holds=rate <= rule.max_outside_rate)  # type: ignore[no-any-return]


def _fresh(views: Views, rule: Expectation, now: datetime, check: Any) -> Check:
    words = f"the newest at most {rule.max_age_hours:g} hours old"
    use = next((u for u in views.uses(rule.view) if u.column == rule.column and u.role in ("time", "instant")), None)
    series = None if use is None else views.sources[rule.view].column(use).drop_nulls()
    if series is None or len(series) == 0:
        return check(words, "no time", None, holds=False)  # type: ignore[no-any-return]
    newest = int(series.max())  # type: ignore[arg-type]
    age = now.timestamp() / 3600 - newest / 3.6e9
    got = f"{age:,.1f} hours" + (", in the future" if age < 0 else "")
    return check(words, got, age, holds=0 <= age <= (rule.max_age_hours or 0))  # type: ignore[no-any-return]


def _broken_rows(views: Views, limit: float) -> list[Check]:
    found = []
    for view, quarantine in views.quarantines.items():
        rate = quarantine.num_rows / max(views.sources[view].num_rows, 1)
        status: Status = "fail" if rate > limit else "warn" if quarantine.num_rows else "pass"
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in quarantine.counts.items())
        got = f"{quarantine.num_rows:,} ({rate:.2%})" + (f": {reasons}" if reasons else "")
        found.append(Check(view, f"broken rows: none, at most {limit:.1%}", got, rate, status))
    return found


def _drifts(joined: Joined, periods: Periods) -> tuple[list[Drift], dict[str, dict[str, Any]]]:
    cuts = {name: np.searchsorted(joined.requests.time, getattr(periods, name)).tolist() for name in _PERIODS}
    slices = {name: slice(start, end) for name, (start, end) in cuts.items()}
    shown = {}
    for name, part in slices.items():
        start, end = (_iso(t) for t in getattr(periods, name))
        rows = joined.rows_of(part)
        shown[name] = {"from": start, "to": end, "impressions": rows.stop - rows.start}
        if rows.stop == rows.start:
            times = joined.requests.time
            span = f"{_iso(int(times[0]))} to {_iso(int(times[-1]))}" if len(times) else "no time"
            raise ConfigError(
                f"the {name} period must hold an impression, got none from {start} to {end}",
                hint=f"impressions span {span}",
            )
    found = []
    for feature in joined.schema.features:
        both = [_shown(joined, feature, slices[name]) for name in _PERIODS]
        found.append(_drift(joined.schema, feature.name, histogram(both[0], both[1])))
    for task in joined.schema.tasks:
        shown_rows = [joined.source_row[joined.rows_of(slices[name])] for name in _PERIODS]
        both = [pl.Series(joined.views.labels(task, rows_of_period)) for rows_of_period in shown_rows]
        counted = histogram(*(s.fill_nan(None).cast(pl.Int64) for s in both))
        found.append(_drift(joined.schema, task.name, counted))
    return found, shown


_PERIODS = ("reference", "current")


def _iso(time: int) -> str:
    return datetime.fromtimestamp(time / 1e6, UTC).isoformat(timespec="seconds")


def _drift(schema: Schema, name: str, counted: Histogram) -> Drift:
    rules = schema.quality.drift
    value, noise = psi(counted.reference, counted.current), psi_noise(counted.reference, counted.current)
    js = js_distance(counted.reference, counted.current)
    status: Status = "pass"
    if name not in rules.ignore:
        # JS squared is about PSI / (8 ln 2) for small differences, and has noise accordingly.
        clear = float(np.sqrt(max(js * js - noise / (8.0 * np.log(2.0)), 0.0)))
        if value - noise > rules.fail_psi or clear > rules.fail_js:
            status = "fail"
        elif value - noise > rules.warn_psi or clear > rules.warn_js:
            status = "warn"
    return Drift(name, value, noise, js, counted.unseen, status, counted)


def _shown(joined: Joined, feature: Feature, requests: slice) -> pl.Series:
    """Raw values of a feature, one an impression (context: a request) of a period."""
    rows = joined.rows_of(requests)
    if feature.scope in ("user", "item"):
        column = joined.entity_column(feature)
        if feature.scope == "user":
            places = np.repeat(joined.user_row[requests], joined.requests.row_counts[requests])
        else:
            places = joined.item_row[rows]
        series = _series(column).gather(places)
    elif feature.scope == "context":
        series = _series(joined.context_column(feature, requests))
    else:
        series = _series(joined.candidate_column(feature, rows))
    return _comparable(joined, feature, series)


def _series(column: Any) -> pl.Series:
    series = pl.from_arrow(column)
    assert isinstance(series, pl.Series)
    return series


def _comparable(joined: Joined, feature: Feature, series: pl.Series) -> pl.Series:
    """Values as drift compares them: numbers as floats, times as the hour or weekday that is encoded, text pieces."""
    use = feature_use(joined.schema, feature)
    if use.role == "number":
        return series.cast(pl.Float64)
    if use.role == "vector":
        return series.list.eval(pl.element().cast(pl.Float64).pow(2)).list.sum().sqrt()
    if use.role == "bag" and series.dtype == pl.String:
        assert use.separator is not None
        return series.str.split(use.separator).list.eval(pl.element().filter(pl.element() != ""))
    if use.role == "instant":
        assert not isinstance(feature, Dense)
        spec: Any = joined.schema.table_encoders[feature.table_name]
        moment = (series.cast(pl.Int64) + spec.utc_offset_minutes * 60_000_000).cast(pl.Datetime("us"))
        parts: pl.Series = moment.dt.hour() if spec.kind == "hour_of_day" else moment.dt.weekday()
        return parts
    return series
