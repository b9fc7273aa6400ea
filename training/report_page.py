"""Parts that every page of ours shares: its frame, tables, charts with their figures, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from training.report_chart import escape


def page(head: str, title: str, subtitle: str, when: str, sections: Iterable[str]) -> str:
    """A page that opens anywhere: no script, and nothing from outside.

    Args:
        head: title of the browser's tab.
        title, subtitle, when: at its top, escaped here.
        sections: HTML, put in as they are.
    """
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(head)}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p class="subtitle">{escape(subtitle)}</p>
<p class="when">{escape(when)}</p>
</header>
{"".join(sections)}
</main>
</body>
</html>
"""


def figure(value: float) -> str:
    """Four decimals, more for what would read 0.0000; an en dash for what is undefined."""
    if not math.isfinite(value):
        return "\u2013" if math.isnan(value) else ("\u221e" if value > 0 else "\u2212\u221e")
    if value != 0 and abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def short(count: int) -> str:
    """A count in at most four characters: 950, 12k, 1.4M."""
    for unit, name in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if count >= unit:
            scaled = count / unit
            return f"{scaled:.1f}{name}" if scaled < 9.95 else f"{scaled:.0f}{name}"
    return str(count)


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: bool = True,
    code: bool = False,
    row_heads: bool = True,
) -> str:
    """A table; the first column heads its row, the others are numbers unless told otherwise."""

    def cell(place: int, text: str) -> str:
        if place == 0 and row_heads:
            return f'<th scope="row">{escape(text)}</th>'
        shown = f"<code>{escape(text)}</code>" if code else escape(text)
        return f'<td class="number">{shown}</td>' if numbers else f"<td>{shown}</td>"

    head = "".join(
        f'<th scope="col"{" class=number" if numbers and (place or not row_heads) else ""}>{escape(h)}</th>'
        for place, h in enumerate(heads)
    )
    body = "".join(f"<tr>{''.join(cell(p, t) for p, t in enumerate(row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def titled(title: str, body: str, *, wide: bool = False) -> str:
    """A block with a heading of its own."""
    return f"<div{' class=whole' if wide else ''}><h3>{escape(title)}</h3>{body}</div>"


def chart(title: str, note: str, svg: str, figures: str) -> str:
    """A chart with its title, what it means, and the table of its figures folded below."""
    return (
        f'<figure><figcaption><h3>{escape(title)}</h3><p class="quiet">{escape(note)}</p></figcaption>{svg}'
        f"<details><summary>Figures</summary>{figures}</details></figure>"
    )
