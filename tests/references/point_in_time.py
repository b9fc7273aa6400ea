"""What a training set must hold, from the rows of the views by double loops; nothing shared with the builder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class ExpectedImpression(NamedTuple):
    """One impression as it must be found in a training set.

    Attributes:
        user: key.
        item: key.
        time: of its request.
        history: numbers of the events before the request, oldest first.
    """

    user: Any
    item: Any
    time: int
    history: tuple[int, ...]


def comes_before(event: Row, other: Row, order: Sequence[str]) -> bool:
    """Whether the values of an event are smaller: those of the first column in which the two differ; missing first."""
    for column in order:
        mine, its = event[column], other[column]
        if mine != its:
            return mine is None or (its is not None and bool(mine < its))
    return False


def history_before(
    events: Sequence[Row], user: Any, time: int, types: Sequence[str] | None, order: Sequence[str]
) -> tuple[int, ...]:
    """Numbers of a user's events strictly before a time, oldest first, equal times by the values of columns.

    Args:
        events: of all users.
        user: key.
        time: of the request.
        types: of the events that count; None for all.
        order: columns, the most significant first.
    """
    found: list[int] = []
    for number, event in enumerate(events):
        if event["user"] == user and event["time"] < time and (types is None or event["type"] in types):
            place = len(found)
            while place > 0 and comes_before(event, events[found[place - 1]], ["time", *order]):
                place -= 1
            found.insert(place, number)
    return tuple(found)


def request_time(impressions: Sequence[Row], impression: Row) -> int:
    """The earliest time of an impression's request; its own where impressions are not grouped."""
    if "request" not in impression:
        return int(impression["time"])
    return min(int(other["time"]) for other in impressions if other["request"] == impression["request"])


def expected_impressions(
    impressions: Sequence[Row], events: Sequence[Row], types: Sequence[str] | None, order: Sequence[str] = ("item",)
) -> list[ExpectedImpression]:
    """One entry an impression, in the order of the list; ``order`` as for :func:`history_before`."""
    expected = []
    for impression in impressions:
        time = request_time(impressions, impression)
        history = history_before(events, impression["user"], time, types, order)
        expected.append(ExpectedImpression(impression["user"], impression["item"], time, history))
    return expected
