"""What is looked at while events pass: whether their times and their types can be meant."""

from __future__ import annotations

import polars as pl

from feature_store.time_spans import TimeCounts, check_overlap, check_unit
from feature_store.views import Views
from recsys.derived import Windowed
from recsys.errors import SourceError, nearest


class EventChecks:
    """Counts events block by block, in memory that grows with their types alone; then judges all of them.

    Args:
        views: the opened views.
        impressions: time of the first and of the last request, UTC microseconds; None if there are none.
        is_whole: whether these are all events. Where more were there before, a history may find none of its types.

    Attributes:
        times: the counts.
        spans: first and last time of each type as text, once judged (:meth:`run`).
    """

    def __init__(self, views: Views, impressions: tuple[int, int] | None, *, is_whole: bool) -> None:
        self._views = views
        self._is_whole = is_whole
        self.times = TimeCounts(impressions, is_typed=views.event_type_expression() is not None)
        self.spans: dict[str, tuple[str, str]] = {}

    def see(self, block: pl.DataFrame) -> None:
        """Counts some valid events: columns ``time`` and, if they have one, ``type``."""
        self.times.add(block["time"], block["type"] if self.times.is_typed else None)

    def run(self) -> None:
        """Refuses events that cannot be meant, notes what is odd; to be called once all events have been seen.

        Raises:
            SourceError: the times (:mod:`feature_store.time_spans`) or the types of a history cannot be meant.
        """
        views, impressions = self._views, self.times.impressions
        column = views.time_column("events")
        views.notes += check_unit(self.times, column)
        if impressions is not None:
            self.spans, notes = check_overlap(self.times, None, impressions, column)
            views.notes += notes
        if not self.times.is_typed:
            return
        for history in views.schema.histories:
            if history.event_types is not None:
                self._check_types(f"history {history.name!r}", history.event_types)
        for spec in views.schema.derived:
            if isinstance(spec, Windowed) and spec.source == "events" and spec.event_types is not None:
                self._check_types(f"derived value {spec.name!r}", spec.event_types)

    def _check_types(self, reader: str, event_types: tuple[str, ...]) -> None:
        """Names the types of a history, or of a derived value, that never occur.

        That is an error if none occurs, or if one occurs written otherwise (in case, spaces, ``-`` and ``_``): it
        cannot be meant. Else it is a note: a sample may lack a type that is rare.
        """
        place = self._views.sources["events"].place
        present = self.times.by_type["type"].drop_nulls().sort().to_list()
        absent = sorted(set(event_types) - set(present))
        written = {_letters(name): name for name in present}
        for name in absent:
            if _letters(name) in written:
                raise SourceError(
                    f"{place}: {reader} must name event types as they are written, got {name!r}",
                    hint=f"did you mean {written[_letters(name)]!r}?",
                )
        if self._is_whole and self.times.num_rows and len(absent) == len(set(event_types)):
            raise SourceError(
                f"{place}: {reader} must find events of type {', '.join(event_types)}, got none",
                hint=nearest(event_types[0], present) if present else "no event has a type: check views.events.type",
            )
        self._views.notes += [
            f"{reader}: there is no event of type {name!r} ({nearest(name, present)})" for name in absent
        ]


def _letters(name: str) -> str:
    """What two spellings of an event type share."""
    return "".join(name.casefold().replace("-", " ").replace("_", " ").split())
