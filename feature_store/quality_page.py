"""The quality report as one HTML page that opens anywhere: no script, nothing from outside, plots as inline SVG.

Every plot has its figures in a table below it; text that comes from the data is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from feature_store.drift import Histogram
from feature_store.quality import Drift, QualityReport, Status

_WORDS = {"pass": "passes", "warn": "warns", "fail": "fails"}
_MAX_BARS = 24


def quality_page(report: QualityReport) -> str:
    """The page as HTML."""
    statuses: tuple[Status, ...] = ("fail", "warn", "pass")
    counts = ", ".join(f"{report.count(status)} {_WORDS[status]}" for status in statuses)
    periods = "; ".join(
        f"{name} {period['from']} to {period['to']} ({period['impressions']:,} impressions)"
        for name, period in report.periods.items()
    )
    rows = ", ".join(f"{view} {count:,}" for view, count in report.rows.items())
    rules = report.rules
    limits = (
        f"PSI (less its noise) warns above {rules.warn_psi:g} and fails above {rules.fail_psi:g}; "
        f"Jensen-Shannon distance above {rules.warn_js:g} and {rules.fail_js:g}."
    )
    parts = [
        f"<h1>Data quality of {_escape(report.name)}: {_status(report.status)}</h1>",
        f'<p>{counts}. <span class="quiet">Checked {_escape(report.checked_at)}; rows: {_escape(rows)}.</span></p>',
        "<h2>Expectations and broken rows</h2>",
        _table(
            ("status", "where", "rule", "found"),
            [(_status(c.status), _escape(c.place), _escape(c.rule), _escape(c.got)) for c in report.checks],
        ),
        "<h2>Drift</h2>",
        f"<p>{_escape(periods)}.</p>",
        f'<p class="quiet">{_escape(limits)}</p>',
        _table(
            ("status", "feature or task", "PSI", "noise", "JS distance", "unseen values"),
            [
                (
                    _status(d.status),
                    _escape(d.name),
                    f"{d.psi:.4f}",
                    f"{d.noise:.4f}",
                    f"{d.js:.4f}",
                    "" if d.unseen is None else f"{d.unseen:.2%}",
                )
                for d in report.drift
            ],
            numbers=(2, 3, 4, 5),
        ),
        '<p class="quiet"><span class="key one"></span>reference<span class="key two"></span>current</p>',
        '<div class="plots">' + "".join(_figure(d) for d in report.drift) + "</div>",
        "<h2>Columns</h2>",
        _table(
            ("view", "column", "missing", "distinct", "lowest", "highest"),
            [
                (
                    _escape(c.view),
                    _escape(c.column),
                    f"{c.null_rate:.2%}",
                    "" if c.distinct is None else f"{c.distinct:,}",
                    "" if c.lowest is None else f"{c.lowest:,.6g}",
                    "" if c.highest is None else f"{c.highest:,.6g}",
                )
                for c in report.columns
            ],
            numbers=(2, 3, 4, 5),
        ),
    ]
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    title = f"Data quality of {_escape(report.name)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def _status(status: str) -> str:
    return f'<span class="status {status}">{_WORDS[status]}</span>'


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: tuple[int, ...] = ()) -> str:
    if not rows:
        return '<p class="quiet">Nothing is declared.</p>'

    def cells(row: tuple[str, ...], tag: str) -> str:
        classes = [' class="number"' if i in numbers else "" for i in range(len(row))]
        return "".join(f"<{tag}{cls}>{cell}</{tag}>" for cls, cell in zip(classes, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells(heads, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(drift: Drift) -> str:
    shares = list(_shares(drift.histogram))
    facts = f"PSI {drift.psi:.4f}, JS distance {drift.js:.4f}"
    rows = [(_escape(label), f"{p:.2%}", f"{q:.2%}") for label, p, q in shares]
    table = _table(("value", "reference", "current"), rows, numbers=(1, 2))
    return (
        f'<figure><figcaption>{_escape(drift.name)} {_status(drift.status)}</figcaption><p class="quiet">{facts}</p>'
        f"{_bars(drift, shares)}<details><summary>figures</summary>{table}</details></figure>"
    )


def _shares(counted: Histogram) -> Iterator[tuple[str, float, float]]:
    """Bins with their shares in both periods; empty ones are left out."""
    totals = [max(int(np.sum(counts)), 1) for counts in (counted.reference, counted.current)]
    for label, r, c in zip(counted.labels, counted.reference, counted.current, strict=True):
        if r or c:
            yield label, float(r) / totals[0], float(c) / totals[1]


def _bars(drift: Drift, shares: list[tuple[str, float, float]]) -> str:
    shown = shares if len(shares) <= _MAX_BARS else [*shares[: _MAX_BARS - 2], *shares[-2:]]
    width, height, base = 520.0, 170.0, 120.0
    step = (width - 20) / max(len(shown), 1)
    top = max((max(p, q) for _, p, q in shown), default=1.0) or 1.0
    marks = [f'<line class="axis" x1="10" y1="{base}" x2="{width - 10}" y2="{base}"/>']
    for place, (label, p, q) in enumerate(shown):
        left = 10 + place * step
        for cls, share, shift in (("one", p, 0.1), ("two", q, 0.5)):
            tall = share / top * (base - 12)
            box = f'x="{left + shift * step:.1f}" y="{base - tall:.1f}" width="{0.4 * step:.1f}" height="{tall:.1f}"'
            words = _escape(f"{label}: {'reference' if cls == 'one' else 'current'} {share:.2%}")
            marks.append(f'<rect class="{cls}" {box}><title>{words}</title></rect>')
        text = label if len(label) <= 12 else label[:11] + "\u2026"
        turn = f"translate({left + 0.5 * step:.1f} {base + 12}) rotate(35)"
        marks.append(f'<text transform="{turn}">{_escape(text)}</text>')
    name = _escape(f"{drift.name}: shares of {len(shown)} values in the reference and the current period")
    return f'<svg role="img" aria-label="{name}" viewBox="0 0 {width:g} {height:g}">{"".join(marks)}</svg>'
