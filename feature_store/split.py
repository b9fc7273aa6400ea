"""The periods of training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from recsys.config import Config


def _checked_time(value: int | str) -> int | str:
    microseconds(value)
    return value


Time = Annotated[int | str, AfterValidator(_checked_time)]
"""ISO 8601 text with an offset, or integer UTC microseconds."""


def microseconds(time: int | str) -> int:
    """A point in time as UTC microseconds.

    Example:
        >>> microseconds("2022-05-01T00:00:00+08:00")
        1651334400000000

    Raises:
        ValueError: the text is no ISO 8601 time, or has no offset.
    """
    if isinstance(time, int):
        return time
    try:
        moment = datetime.fromisoformat(time)
    except ValueError as err:
        raise ValueError("must be an ISO 8601 time such as 2022-05-01T00:00:00+08:00, or integer microseconds") from err
    if moment.tzinfo is None:
        raise ValueError(f"must have an offset: write {moment.isoformat()}Z if it is UTC")
    delta = moment - datetime.fromtimestamp(0, UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


class SplitConfig(Config):
    """Half-open periods: ``[train_start, train_end)``, ``[train_end, validation_end)``, ``[validation_end, test_end)``.

    A request belongs to the period of its time, with all of its impressions. Those outside all periods are counted, not
    used.
    """

    train_start: Time | None = Field(None, description="from the first impression if not given")
    train_end: Time
    validation_end: Time
    test_end: Time

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        names = [n for n in ("train_start", "train_end", "validation_end", "test_end") if getattr(self, n) is not None]
        times = [microseconds(getattr(self, n)) for n in names]
        for earlier, later, before, after in zip(names, names[1:], times, times[1:], strict=False):
            if before >= after:
                raise ValueError(f"must give {earlier} before {later}")
        return self

    @property
    def boundaries(self) -> dict[str, int | None]:
        """The four times in UTC microseconds; ``train_start`` may be None."""
        start = None if self.train_start is None else microseconds(self.train_start)
        return {
            "train_start": start,
            "train_end": microseconds(self.train_end),
            "validation_end": microseconds(self.validation_end),
            "test_end": microseconds(self.test_end),
        }

    def slices(self, time: np.ndarray) -> Mapping[str, slice]:
        """Which requests each split holds.

        Args:
            time: ``(R,)`` int64, UTC microseconds, non-decreasing.
        """
        times = self.boundaries
        edges = [np.iinfo(np.int64).min if t is None else t for t in times.values()]
        cuts = np.searchsorted(time, edges).tolist()
        return {
            "train": slice(cuts[0], cuts[1]),
            "validation": slice(cuts[1], cuts[2]),
            "test": slice(cuts[2], cuts[3]),
        }
