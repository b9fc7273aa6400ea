"""The page of a scaling study: curves, figures, and the size to choose."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

from recsys.files import write_text
from training.power_law import Interval, PowerLaw
from training.report_chart import Plot, escape, round_ticks
from training.report_page import chart, figure, page, table, titled
from training.scaling import Curve, Recommendation, Size, Study, short_names, sizes_of


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
    bound = "at most 1" if study.higher_is_better else "at least 0"
    note = (
        f"{formula(study)} by least squares, A {bound}; brackets are 95 % intervals over resampled residuals. "
        "A wide interval says that the sizes tried do not pin the value down. Where a fit ends at a bound, the law is "
        "not identified: its R2 tells how well the curve describes the points, and nothing follows for other x."
    )
    sections.append(f'<section aria-label="Fits">{titled("Fits", laws)}<p class="note">{note}</p></section>')
    sections.append(f'<section aria-label="Sizes">{titled("Sizes", _sizes_table(study), wide=True)}</section>')
    subtitle = f"validation {study.metric} after one pass over the training data, {len(study.outcomes)} trials"
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page(f"{study.name} \u00b7 scaling", f"{study.name}: scaling", subtitle, when, sections)


def formula(study: Study) -> str:
    """The law that is fitted."""
    return f"y = A {'-' if study.higher_is_better else '+'} c x^-gamma"


def described(settings: dict[str, str]) -> str:
    """A size in words."""
    return ", ".join(f"{key} = {value}" for key, value in settings.items()) or "as given"


def doubts(study: Study) -> dict[str, str]:
    """Why a law is not fitted or not identified, by the axis of the curve."""
    found = {}
    for curve in study.curves:
        if curve.law is None:
            found[curve.axis] = f"not fitted: {curve.note}"
        elif curve.law.not_identified is not None:
            found[curve.axis] = f"not identified: {curve.law.not_identified}"
    return found


def needs(study: Study) -> dict[str, str]:
    """What the curves say that the target takes, each alone: by axis, and whether that lies within what was tried."""
    if study.recommendation is None:
        return {}
    found = {}
    for curve in study.curves:
        x = study.recommendation.needed.get(curve.axis)
        if x is not None:
            low, high = min(curve.x), max(curve.x)
            tried = f"{low:,.3g} to {high:,.3g}"
            where = "within" if low <= x <= high else ("below" if x < low else "beyond")
            found[curve.axis] = f"{x:,.3g} {curve.x_name}, {where} the {tried} tried"
    return found


def _recommendation(found: Recommendation, study: Study) -> str:
    target = f"{study.metric} of {figure(found.target)}"
    if found.settings is None:
        text = f"No size reaches a {target}."
        if guesses := "; ".join(f"{axis}: {words}" for axis, words in needs(study).items()):
            text += f" The curves say it takes, each alone: {guesses}."
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
    if law.not_identified is not None:
        doubt = f"not identified: {law.not_identified}"
        return (curve.axis, curve.x_name, doubt, "", "", figure(law.r2), f"{law.num_points}", f"{law.decades:.1f}")
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
    told = _told(curve.law)
    listing = table((curve.x_name, metric), [(f"{x:,.4g}", figure(y)) for x, y in zip(curve.x, curve.y, strict=True)])
    alt = f"{len(curve.x)} points from {figure(min(curve.y))} to {figure(max(curve.y))}; {told}."
    return chart(curve.axis, told, plot.svg(curve.axis, alt), listing)


def _told(law: PowerLaw | None) -> str:
    if law is None:
        return "not fitted"
    gamma = "not identified" if law.not_identified is not None else f"gamma {figure(law.exponent.value)}"
    return f"{gamma}, R2 {figure(law.r2)}"


def _along(law: PowerLaw | None, low: float, high: float) -> list[tuple[float, float]]:
    if law is None:
        return []
    places = [low + (high - low) * step / 60 for step in range(61)]
    return [(place, law.predict(10**place)) for place in places]


def _sizes_table(study: Study) -> str:
    heads = ("Size", "Mean", "Deviation", "Seeds", "Parameters", "History", "Rows", "FLOPs a row", "Training s")
    return table(heads, [(name, mean, sd, f"{seeds}", *costs) for name, mean, sd, seeds, *costs in study_sizes(study)])


def study_sizes(study: Study) -> list[tuple[str, str, str, int, str, str, str, str, str]]:
    """A row for each size: its name, mean and deviation over seeds, number of seeds, and what it costs."""
    sizes = sizes_of(study.outcomes)
    names = short_names(list(dict.fromkeys(key for size in sizes for key in size.settings)))
    return [_size_row(size, names) for size in sizes]


def _size_row(size: Size, names: dict[str, str]) -> tuple[str, str, str, int, str, str, str, str, str]:
    one = size.outcomes[0]
    return (
        described({names[key]: value for key, value in size.settings.items()}),
        figure(size.mean),
        figure(size.deviation),
        len(size.outcomes),
        f"{one.parameters:,}",
        f"{one.history_length:,}",
        f"{one.rows:,}",
        f"{one.flops_per_row:,.0f}",
        f"{sum(o.train_s for o in size.outcomes) / len(size.outcomes):,.1f}",
    )
