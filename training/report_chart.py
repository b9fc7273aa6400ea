"""Charts of the report: one panel of inline SVG, whose colours are classes that ``report.css`` fills in."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any


def escape(value: Any) -> str:
    """Text for HTML and SVG, in elements and in quoted attributes.

    Example:
        >>> escape('<a href="x">')
        '&lt;a href=&quot;x&quot;&gt;'
    """
    return html.escape(str(value), quote=True)


def round_ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers that enclose ``low..high``, about ``count`` of them; whole numbers if asked for.

    Example:
        >>> round_ticks(0.0, 0.93, 5)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = magnitude * next(m for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    if whole:
        step = float(max(1, math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tick_text(ticks: Sequence[float]) -> Callable[[float], str]:
    """Writes every tick with the decimals that tell two neighbours apart."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    decimals = next((d for d in range(8) if abs(round(step, d) - step) < step * 1e-6), 8)
    return lambda value: f"{value:,.{decimals}f}"


class Plot:
    """One panel: axes first, then marks in data units, drawn in the order of the calls.

    Args:
        x_ticks: places of the labels below; the axis spans them unless ``x_range`` is given.
        y_ticks: places of the grid lines; the axis spans them.
        x_title: what the horizontal axis shows.
        y_title: what the vertical axis shows.
        x_range: ends of the horizontal axis.
        x_labels: two lines of text at each tick, in place of its number.
    """

    width, height = 520.0, 320.0
    left, right, top, bottom = 64.0, 16.0, 14.0, 50.0

    def __init__(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        *,
        x_title: str,
        y_title: str,
        x_range: tuple[float, float] | None = None,
        x_labels: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        if x_labels:
            self.bottom = 64.0
        self.x_low, self.x_high = x_range or (x_ticks[0], x_ticks[-1])
        self.y_low, self.y_high = y_ticks[0], y_ticks[-1]
        self.base, self.end = self.height - self.bottom, self.width - self.right
        self.marks: list[str] = []
        y_text, x_text = _tick_text(y_ticks), _tick_text(x_ticks)
        for tick in y_ticks:
            y = self._y(tick)
            self._line("grid", self.left, y, self.end, y)
            self._write(y_text(tick), self.left - 8, y + 4, anchor="end")
        for place, tick in enumerate(x_ticks):
            lines = x_labels[place] if x_labels else (x_text(tick),)
            for number, line in enumerate(lines):
                self._write(line, self._x(tick), self.base + 18 + 15 * number, cls="quiet" if number else "")
        self._line("axis", self.left, self.base, self.end, self.base)
        self._write(x_title, (self.left + self.end) / 2, self.height - 8, cls="title")
        turn = f"translate(14 {(self.top + self.base) / 2:g}) rotate(-90)"
        self.marks.append(f'<text class="title" transform="{turn}" text-anchor="middle">{escape(y_title)}</text>')

    def _x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.end - self.left)

    def _y(self, value: float) -> float:
        return self.top + (self.y_high - value) / (self.y_high - self.y_low) * (self.base - self.top)

    def _line(self, cls: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.marks.append(f'<line class="{cls}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def _write(self, text: str, x: float, y: float, *, cls: str = "", anchor: str = "middle") -> None:
        shown = f' class="{cls}"' if cls else ""
        self.marks.append(f'<text{shown} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], cls: str) -> None:
        """A line through the points; ``cls`` is ``accent`` or ``reference``."""
        where = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        self.marks.append(f'<polyline class="line {cls}" points="{where}"/>')

    def dot(self, x: float, y: float, title: str, cls: str = "") -> None:
        """A point that tells ``title`` when pointed at; ``cls`` is empty, ``small`` or ``best``."""
        radius = {"small": 2.5, "best": 6.0}.get(cls, 4.5)
        place = f'cx="{self._x(x):.1f}" cy="{self._y(y):.1f}" r="{radius}"'
        self.marks.append(f'<circle class="dot {cls}" {place}><title>{escape(title)}</title></circle>')

    def whisker(self, x: float, low: float, high: float) -> None:
        """The interval of a point."""
        self._line("whisker", self._x(x), self._y(low), self._x(x), self._y(high))

    def vertical(self, x: float, label: str) -> None:
        """A marked place on the horizontal axis."""
        at = self._x(x)
        self._line("mark", at, self.top, at, self.base)
        near_left = at < (self.left + self.end) / 2
        anchor, shift = ("start", 6) if near_left else ("end", -6)
        self._write(label, at + shift, self.base - 8, cls="mark-label", anchor=anchor)

    def label(self, x: float, y: float, text: str, *, dx: float, dy: float) -> None:
        """Quiet text that ends at a place, shifted by so many pixels."""
        self._write(text, self._x(x) + dx, self._y(y) + dy, cls="reference-label", anchor="end")

    def svg(self, title: str, description: str) -> str:
        """The panel, with its text alternative as the accessible name."""
        name = escape(f"{title}. {description}")
        box = f"0 0 {self.width:g} {self.height:g}"
        return f'<svg role="img" aria-label="{name}" viewBox="{box}">{"".join(self.marks)}</svg>'
