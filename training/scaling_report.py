"""The page of a scaling study: curves, figures, and the size to choose."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

from recsys.files import write_text
from training.power_law import Interval, PowerLaw
from training.report_chart import Plot, escape, round_ticks
from training.report_page import chart, figure, page, table, titled
from training.scaling import Curve, Recommendation, Study, sizes_of


def write_study_report(study: Study, path: str | Path) -> None:
    """Writes the page, whole or not at all."""
    write_text(path, render_study(study))


def render_study(study: Study) -> str:
    """The page as HTML text."""
    sections = [] if study.recommendation is None else [_recommendation(study.recommendation, study)]
    charts = "".join(_curve_chart(curve, study.metric) for curve in study.curves)
    sections.append(f'<section aria-label="Curves"><h2>Curves</h2><div class="charts">{charts}</div></section>')
    laws = table(
        ("Axis", "x", "A", "c", "gamma", "R2", "Points", "Decades of x"),
        [_law_row(curve) for curve in study.curves],
        numbers=False,
    )
    note = (
        "y = A - c x^-gamma by least squares; brackets are 95 % intervals over resampled residuals. A wide interval "
        "says that the sizes tried do not pin the value down."
    )
    sections.append(f'<section aria-label="Fits">{titled("Fits", laws)}<p class="note">{note}</p></section>')
    sections.append(f'<section aria-label="Sizes">{titled("Sizes", _sizes_table(study), wide=True)}</section>')
    subtitle = f"validation {study.metric} after one pass over the training data, {len(study.outcomes)} trials"
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page(f"{study.name} \u00b7 scaling", f"{study.name}: scaling", subtitle, when, sections)


def described(settings: dict[str, str]) -> str:
    """A size in words."""
    return ", ".join(f"{key} = {value}" for key, value in settings.items()) or "as given"


def _recommendation(found: Recommendation, study: Study) -> str:
    target = f"{study.metric} of {figure(found.target)}"
    if found.settings is None:
        text = f"No size reaches a {target}."
        if found.needed:
            guesses = "; ".join(f"{axis} at x = {x:,.3g}" for axis, x in found.needed.items())
            text += f" The curves say it takes, each alone: {guesses}. That is beyond what was tried."
    else:
        assert found.mean is not None
        assert found.flops_per_row is not None
        text = (
            f"The cheapest size with a {target}: {described(found.settings)}. It has {figure(found.mean)} in the mean "
            f"over seeds, at {found.flops_per_row:,.0f} operations a scored row."
        )
    return f'<section aria-label="Recommendation"><p class="lead">{escape(text)}</p></section>'


def _interval(value: Interval) -> str:
    return f"{figure(value.value)} [{figure(value.low)}, {figure(value.high)}]"


def _law_row(curve: Curve) -> tuple[str, ...]:
    law = curve.law
    if law is None:
        return (curve.axis, curve.x_name, f"not fitted: {curve.note}", "", "", "", f"{len(curve.x)}", "")
    fitted = (_interval(law.limit), _interval(law.scale), _interval(law.exponent), figure(law.r2))
    return (curve.axis, curve.x_name, *fitted, f"{law.num_points}", f"{law.decades:.1f}")


def _curve_chart(curve: Curve, metric: str) -> str:
    logs = [math.log10(x) for x in curve.x]
    low, high = min(logs), max(logs)
    pad = (high - low) * 0.05 or 0.5
    ys = [*curve.y, *(_along(curve.law, low, high)[place][1] for place in (0, -1) if curve.law is not None)]
    plot = Plot(
        list(range(math.ceil(low - pad), math.floor(high + pad) + 1)) or [round((low + high) / 2, 2)],
        round_ticks(min(ys), max(ys), 5),
        x_title=f"{curve.x_name}, power of ten",
        y_title=metric,
        x_range=(low - pad, high + pad),
    )
    if curve.law is not None:
        plot.line(_along(curve.law, low, high), "accent")
    for x, log, y in zip(curve.x, logs, curve.y, strict=True):
        plot.dot(log, y, f"{curve.x_name} {x:,.3g}: {figure(y)}")
    told = "not fitted" if curve.law is None else f"gamma {figure(curve.law.exponent.value)}, R2 {figure(curve.law.r2)}"
    listing = table((curve.x_name, metric), [(f"{x:,.4g}", figure(y)) for x, y in zip(curve.x, curve.y, strict=True)])
    alt = f"{len(curve.x)} points from {figure(min(curve.y))} to {figure(max(curve.y))}; {told}."
    return chart(curve.axis, told, plot.svg(curve.axis, alt), listing)


def _along(law: PowerLaw | None, low: float, high: float) -> list[tuple[float, float]]:
    if law is None:
        return []
    places = [low + (high - low) * step / 60 for step in range(61)]
    return [(place, law.predict(10**place)) for place in places]


def _sizes_table(study: Study) -> str:
    heads = ("Size", "Mean", "Deviation", "Seeds", "Parameters", "History", "Rows", "FLOPs a row", "Training s")
    return table(heads, study_sizes(study))


def study_sizes(study: Study) -> list[tuple[str, ...]]:
    """A row of text for each size: what it is, mean and deviation over seeds, and what it costs."""
    rows: list[tuple[str, ...]] = []
    for size in sizes_of(study.outcomes):
        one = size.outcomes[0]
        rows.append(
            (
                described(size.settings),
                figure(size.mean),
                figure(size.deviation),
                f"{len(size.outcomes)}",
                f"{one.parameters:,}",
                f"{one.history_length:,}",
                f"{one.rows:,}",
                f"{one.flops_per_row:,.0f}",
                f"{sum(o.train_s for o in size.outcomes) / len(size.outcomes):,.1f}",
            )
        )
    return rows
