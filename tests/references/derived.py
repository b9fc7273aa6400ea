"""Derived values by loops over all rows, from their definitions; nothing shared with the builder.

Rows are plain mappings with ``time`` and, where they have one, ``created``; ``x`` is a row's value, None where missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

Row = dict[str, Any]


def known_at(row: Row, known_after: int) -> int:
    """The moment since when a row is known: the latest of its time, its created time, and its time plus a delay."""
    moment = int(row["time"])
    for other in (row.get("created"), row["time"] + known_after):
        if other is not None and other > moment:
            moment = int(other)
    return moment


def visible(rows: Sequence[Row], time: int, window: int | None, known_after: int) -> list[Row]:
    """Rows that count at a time: known strictly before it, and not older than the window."""
    found = []
    for row in rows:
        if known_at(row, known_after) >= time:
            continue
        if window is not None and row["time"] < time - window:
            continue
        found.append(row)
    return found


def count(rows: Sequence[Row], time: int, *, window: int | None = None, known_after: int = 0) -> float:
    """How many rows count."""
    return float(len(visible(rows, time, window, known_after)))


def _total(rows: Sequence[Row], decimals: int) -> tuple[Fraction, int]:
    """The exact sum of the values, each rounded to so many decimals, and how many there are."""
    values = [row["x"] for row in rows if row["x"] is not None]
    return sum((Fraction(round(x * 10**decimals)) for x in values), Fraction(0)) / 10**decimals, len(values)


def total(rows: Sequence[Row], time: int, *, window: int | None, known_after: int, decimals: int) -> float:
    """The sum of the values."""
    return float(_total(visible(rows, time, window, known_after), decimals)[0])


def mean(
    rows: Sequence[Row],
    time: int,
    *,
    window: int | None,
    known_after: int,
    decimals: int,
    prior: float,
    prior_count: float,
) -> float | None:
    """The mean of the values, drawn to the prior; None where there is nothing to divide by."""
    summed, number = _total(visible(rows, time, window, known_after), decimals)
    if number + prior_count == 0:
        return None
    return float((summed + Fraction(prior) * Fraction(prior_count)) / (number + Fraction(prior_count)))


def recency(rows: Sequence[Row], time: int, *, window: int | None = None, known_after: int = 0) -> float | None:
    """Seconds since the latest row; None without any."""
    ages = [time - row["time"] for row in visible(rows, time, window, known_after)]
    return min(ages) / 1e6 if ages else None


def ratio(numerator: float | None, denominator: float | None, plus: float, below: float) -> float | None:
    """``(numerator + plus) / (denominator + below)``; None where it has no value."""
    if numerator is None or denominator is None or denominator + below == 0:
        return None
    return (numerator + plus) / (denominator + below)


def as_of(rows: Sequence[Row], time: int, *, max_age: int | None) -> Row | None:
    """The latest version known strictly before a time: of the greatest time, then created time, then ``x``.

    A version that is missing a value comes before those that have one.
    """
    best: Row | None = None
    for row in rows:
        if known_at(row, 0) >= time:
            continue
        if best is None or _is_later(row, best):
            best = row
    if best is None or (max_age is not None and time - best["time"] > max_age):
        return None
    return best


def _is_later(row: Row, other: Row) -> bool:
    for name in ("time", "created", "x"):
        a, b = row.get(name), other.get(name)
        if a != b:
            return b is None or (a is not None and a > b)
    return False
