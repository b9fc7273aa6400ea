"""Derived values: columns of the impressions that are computed from logs, as they were known at the request's time.

Each is declared as data, and features read it by its name as they would read a column. Nothing at or after the
request's time takes part: a row of a log counts from the first microsecond *after* the moment it was known at.

With ``t`` the request's time, ``s`` a row's own time, ``k >= s`` the moment that the row was known at, and ``w`` the
window, a row of the same group counts where::

    k < t    and    t - w <= s            (without a window: k < t)

``k`` is the greatest of ``s``, the row's created time where ``created`` names it, and ``s + known_after``.

=========  ===========================================================================================================
count      rows
sum        ``sum(x)`` over rows where ``x`` is not missing; 0 without any
mean       ``(sum(x) + prior * prior_count) / (n + prior_count)`` over the ``n`` rows where ``x`` is not missing;
           missing where the divisor is 0. Of a 0/1 value it is a rate
recency    ``t - s`` of the latest row, in seconds; missing without any
ratio      ``(a + add_to_numerator) / (b + add_to_denominator)`` of two of the above; missing where the divisor is 0
as_of      a time-versioned attribute: the version with the greatest ``s``
=========  ===========================================================================================================

A sum adds whole multiples of ``10 ** -decimals``, as integers: it is exact, so that it depends neither on the order of
the rows nor on where a window begins, and is the same to the last bit wherever it is computed.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from recsys.config import Config

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_LONGEST = 36_525 * 86_400
"""Seconds: longer ones mean "without limit", and are written as null."""


def duration_us(duration: str) -> int:
    """Microseconds of a duration.

    Example:
        >>> duration_us("7d") == 7 * 24 * 3600 * 1_000_000
        True
    """
    return int(duration[:-1]) * _SECONDS[duration[-1]] * 1_000_000


def _checked_duration(duration: str) -> str:
    if duration_us(duration) > _LONGEST * 1_000_000:
        raise ValueError("must be at most 100 years; leave it out to set no limit")
    return duration


Duration = Annotated[
    str, Field(pattern=r"^[1-9][0-9]{0,9}[smhdw]$", examples=["30m", "7d"]), AfterValidator(_checked_duration)
]
"""A whole number of seconds, minutes, hours, days or weeks, such as ``30m`` or ``7d``."""


class _Derived(Config):
    name: Name


class _OfRows(_Derived):
    """What is computed from rows of a log, group by group."""

    source: Literal["events", "impressions"] = "events"
    by: tuple[Name, ...] = Field(
        min_length=1, max_length=2, description="user, item, or categorical features of the user or of the item"
    )
    event_types: tuple[str, ...] | None = Field(None, min_length=1, description="all types if not given")
    where: str | None = Field(None, min_length=1, description="SQL expression of one row, such as is_click = 1")
    window: Duration | None = Field(None, description="rows so old count too; unlimited if not given")
    created: str | None = Field(None, min_length=1, description="column of the time since when a row is known")
    known_after: Duration | None = Field(None, description="a row is known so long after its time")

    @model_validator(mode="after")
    def _can_hold_rows(self) -> Self:
        if self.window and self.known_after and duration_us(self.window) <= duration_us(self.known_after):
            raise ValueError("window must be longer than known_after, or no row ever counts")
        if self.source == "impressions" and self.event_types is not None:
            raise ValueError("event_types is of events: select impressions by where")
        return self


class Count(_OfRows):
    """How many rows."""

    kind: Literal["count"] = "count"


class _OfValues(_OfRows):
    value: str = Field(min_length=1, description="SQL expression of one row, a number")
    decimals: int = Field(6, ge=0, le=12, description="values are rounded to so many")


class Sum(_OfValues):
    """The sum of a value."""

    kind: Literal["sum"] = "sum"


class Mean(_OfValues):
    """The mean of a value, drawn to ``prior`` as if it had been seen ``prior_count`` times before."""

    kind: Literal["mean"] = "mean"
    prior: float = 0.0
    prior_count: float = Field(0.0, ge=0.0)


class Recency(_OfRows):
    """Seconds since the latest row."""

    kind: Literal["recency"] = "recency"


class Ratio(_Derived):
    """Of two counts, sums, means or recencies, with additive smoothing."""

    kind: Literal["ratio"] = "ratio"
    numerator: Name
    denominator: Name
    add_to_numerator: float = Field(0.0, ge=0.0)
    add_to_denominator: float = Field(0.0, ge=0.0)


class AsOf(_Derived):
    """A column of a time-versioned view, as it was known."""

    kind: Literal["as_of"] = "as_of"
    view: Name = Field(description="one of views.versions")
    column: str | None = Field(None, min_length=1, description="the value's name if not given")
    max_age: Duration | None = Field(None, description="older versions count as missing; unlimited if not given")

    @property
    def source_column(self) -> str:
        """Name of the column in the view."""
        return self.column or self.name


Windowed = Count | Sum | Mean | Recency
Derived = Annotated[Count | Sum | Mean | Recency | Ratio | AsOf, Field(discriminator="kind")]
