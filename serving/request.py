"""A ranking request: JSON in, one checked object out, or one error that lists everything that is wrong.

::

    {
      "user_id": 17,                                     the user's key; null or absent: an unknown user
      "candidates": [9, 4, {"item_id": 7, "price": 3}],  keys, or objects with the key and raw values of the candidate
      "time": "2026-01-31T12:00:00Z",                    ISO 8601 or UTC microseconds; now if not given
      "context": {"tab": 1},                             raw values of the request
      "user": {"age": 35},                               raw values of the user; each overrides what is stored
      "histories": {"clicked": [{"item_id": 4, "time": "2026-01-30T09:00:00Z", "dwell": 12}]},   oldest first
      "task": "click",                                   what to rank by; the first task if not given
      "request_id": "a1"                                 repeated in the reply
    }

Names of raw values are the columns that the schema's features read. Rules:

* there is at least one candidate, and no more than the limit; a candidate given twice is ranked twice;
* keys of candidates are all integers or all text; so are the keys of a history's events;
* a history given here replaces the stored one; its events may leave out their times, all of them or none;
* a time given as a number is UTC microseconds. Seconds, milliseconds and nanoseconds would silently give an empty
  history, so a number outside the training period and the ten years after it is refused where one of these units puts
  it inside; this needs an artifact that knows its period, and a period that begins after 1990;
* events at or after the request's time are not read, as in training; they are counted in the reply.

Messages name the place (``candidates[3].price``), never the value.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson

from recsys.errors import RequestError, nearest
from recsys.schema import Categorical, DayOfWeek, Dense, Feature, HourOfDay, Schema
from recsys.times import EARLIEST, MAX_TIME

_AFTER_TRAINING = 10 * 366 * 86_400_000_000
"""Microseconds after the training period in which requests are expected: ten years."""
_UNITS = (("seconds", 1_000_000, 1), ("milliseconds", 1_000, 1), ("nanoseconds", 1, 1_000))
_SHOWN = 20
_INT64 = 2**63

Key = int | str


@dataclass(frozen=True)
class InlineHistory:
    """Events that came with a request.

    Attributes:
        items: key of each event's item, oldest first.
        times: UTC microseconds; None where no event has one.
        values: raw values of each event and of its item, by column; None where an event has none.
    """

    items: Sequence[Key]
    times: Sequence[int] | None
    values: Sequence[Mapping[str, Any] | None]


@dataclass(frozen=True)
class RankRequest:
    """One checked request.

    Attributes:
        user_id: key of the user; None for an unknown one.
        candidates: key of each candidate.
        time: UTC microseconds.
        candidate_values: raw values of each candidate, by column; None where none has any.
        context: raw values by column.
        user: raw values by column.
        histories: by name.
        task: what to rank by; None for the first task.
        request_id: repeated in the reply.
    """

    user_id: Key | None
    candidates: Sequence[Key]
    time: int
    candidate_values: Sequence[Mapping[str, Any] | None] | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    user: Mapping[str, Any] = field(default_factory=dict)
    histories: Mapping[str, InlineHistory] = field(default_factory=dict)
    task: str | None = None
    request_id: str | int | None = None


class RequestParser:
    """Checks requests against a schema. Safe to call from several threads.

    Args:
        schema: the model's.
        max_candidates: of one request.
        max_events: of one history of a request.
        training_period: first and last time of the training requests, UTC microseconds; None if unknown.
    """

    _FIELDS = ("user_id", "candidates", "time", "context", "user", "histories", "task", "request_id")

    def __init__(
        self,
        schema: Schema,
        *,
        max_candidates: int = 10_000,
        max_events: int = 10_000,
        training_period: tuple[int, int] | None = None,
    ) -> None:
        views = schema.views
        self._expected: tuple[int, int] | None = None
        # A period that begins before has times of another origin, which tell nothing of the unit.
        if training_period is not None and training_period[0] >= EARLIEST:
            self._expected = training_period[0], training_period[1] + _AFTER_TRAINING
        self.max_candidates = max_candidates
        self.max_events = max_events
        self._tasks = [t.name for t in schema.tasks]
        self._histories = [h.name for h in schema.histories]
        self._item_keys = {views.impressions.item, *([views.items.key] if views.items else [])}
        self._event_item_keys = {*self._item_keys, *([views.events.item] if views.events else [])}
        self._event_time = views.events.time if views.events else "time"
        self._user_keys = {views.impressions.user, *([views.users.key] if views.users else [])}
        self._user_columns = _columns(schema.features_of("user"))
        self._context_columns = _columns(schema.features_of("context"))
        self._row_columns = _columns([*schema.features_of("item"), *schema.features_of("candidate")])
        self._event_columns = {
            h.name: _columns([*(schema.feature(a) for a in h.attributes), *h.event_features]) for h in schema.histories
        }
        self._numbers = {f.source_column for f in schema.all_features if isinstance(f, Dense)}
        self._instants = {f.source_column for f in schema.all_features if _reads_instant(schema, f)}

    def parse(self, body: bytes | str | Mapping[str, Any]) -> RankRequest:
        """Reads one request.

        Args:
            body: JSON, or what was read from it. Of a field that JSON gives twice the last one counts: the parser does
                not tell, and to look for it would cost as much as parsing.

        Raises:
            RequestError: with every problem of the request.
        """
        if not isinstance(body, Mapping):
            try:
                body = orjson.loads(body)
            except orjson.JSONDecodeError as err:
                raise RequestError(f"body must be JSON: {err.msg} at line {err.lineno} column {err.colno}") from err
            if not isinstance(body, dict):
                raise RequestError(f"body must be a JSON object, got {_kind(body)}")
        problems = [
            f"{_shown(name)} is not a known field, {nearest(str(name)[:50], self._FIELDS)}"
            for name in body
            if name not in self._FIELDS
        ]
        keys, values = self._candidates(body, problems)
        now = clock.time_ns() // 1000
        request = RankRequest(
            user_id=_key(body.get("user_id"), "user_id", problems, optional=True),
            candidates=keys,
            time=self._moment(body["time"], "time", problems) if body.get("time") is not None else now,
            candidate_values=values,
            context=self._object(body.get("context"), "context", self._context_columns, problems),
            user=self._user(body, problems),
            histories=self._inline_histories(body.get("histories"), problems),
            task=self._task(body.get("task"), problems),
            request_id=_request_id(body.get("request_id"), problems),
        )
        raise_problems(problems)
        return request

    def _user(self, body: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        """Raw values of the user; their key may be repeated among them, but be no other."""
        values = self._object(body.get("user"), "user", self._user_columns, problems)
        key = body.get("user_id")
        problems += [
            f"user.{name} must be user_id, got another"
            for name in sorted(self._user_keys)
            if key is not None and values.get(name, key) != key
        ]
        return values

    def _candidates(
        self, body: Mapping[str, Any], problems: list[str]
    ) -> tuple[list[Key], list[Mapping[str, Any] | None] | None]:
        given = body.get("candidates")
        if given is None:
            problems.append("candidates must be given")
            return [], None
        if not isinstance(given, list):
            problems.append(f"candidates must be a list, got {_kind(given)}")
            return [], None
        if not given:
            problems.append("candidates must name at least one")
            return [], None
        if len(given) > self.max_candidates:
            problems.append(f"candidates must be at most {self.max_candidates}, got {len(given)}")
            return [], None
        kinds = set(map(type, given))
        if kinds == {str} or (kinds == {int} and min(given) >= -_INT64 and max(given) < _INT64):
            return given, None
        keys: list[Key] = []
        values: list[Mapping[str, Any] | None] = []
        for place, candidate in enumerate(given):
            where = f"candidates[{place}]"
            if isinstance(candidate, dict):
                key, rest = self._keyed(candidate, where, self._item_keys, self._row_columns, problems)
                values.append(rest)
            else:
                key = _key(candidate, where, problems)
                values.append(None)
            keys.append(0 if key is None else key)
        _check_one_type(keys, "candidates", problems)
        return keys, values if any(values) else None

    def _keyed(
        self,
        given: dict[str, Any],
        where: str,
        key_names: set[str],
        columns: set[str],
        problems: list[str],
        *,
        also: Sequence[str] = (),
    ) -> tuple[Key | None, dict[str, Any]]:
        """Key and raw values of an item given as an object; ``also`` are further names that the object may have."""
        names = [n for n in given if n in key_names]
        if not names:
            problems.append(f"{where} must have {' or '.join(repr(n) for n in sorted(key_names))}")
            key: Key | None = None
        else:
            key = _key(given[names[0]], f"{where}.{names[0]}", problems)
            if any(given[n] != given[names[0]] for n in names[1:]):
                problems.append(f"{where}: {' and '.join(repr(n) for n in names)} must be equal")
        values = {n: v for n, v in given.items() if n not in key_names}
        return key, self._object(values, where, columns, problems, also=also)

    def _object(
        self, given: Any, where: str, columns: set[str], problems: list[str], *, also: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Raw values by column; ``also`` are names that are read elsewhere, for the hint."""
        if given is None:
            return {}
        if not isinstance(given, dict):
            problems.append(f"{where} must be an object, got {_kind(given)}")
            return {}
        values = {}
        for name, value in given.items():
            if name not in columns:
                known = nearest(name[:50], {*columns, *also})
                problems.append(f"{where}.{_shown(name)} is not a column that a feature reads, {known}")
            elif name in self._instants and isinstance(value, str):
                values[name] = _time(value, f"{where}.{name}", problems, lowest=-MAX_TIME)
            elif name in self._numbers and _has_boolean(value):
                problems.append(f"{where}.{name} must be a number, got a boolean")
            elif _is_value(value):
                values[name] = value
            else:
                problems.append(f"{where}.{name} must be a number, text, a boolean, null or a list of these")
        return values

    def _inline_histories(self, given: Any, problems: list[str]) -> dict[str, InlineHistory]:
        if given is None:
            return {}
        if not isinstance(given, dict):
            problems.append(f"histories must be an object, got {_kind(given)}")
            return {}
        histories = {}
        for name, events in given.items():
            where = f"histories.{_shown(name)}"
            if name not in self._histories:
                problems.append(f"{where} is not a history of the model, {nearest(name[:50], self._histories)}")
            elif not isinstance(events, list):
                problems.append(f"{where} must be a list, got {_kind(events)}")
            elif len(events) > self.max_events:
                problems.append(f"{where} must have at most {self.max_events} events, got {len(events)}")
            else:
                histories[name] = self._inline_history(name, where, events, problems)
        return histories

    def _inline_history(self, name: str, where: str, events: list[Any], problems: list[str]) -> InlineHistory:
        items: list[Key] = []
        times: list[int] = []
        values: list[Mapping[str, Any] | None] = []
        columns = self._event_columns[name]
        for place, event in enumerate(events):
            at = f"{where}[{place}]"
            key: Key | None
            if isinstance(event, dict):
                time = event.get("time", event.get(self._event_time))
                if time is not None:
                    times.append(self._moment(time, f"{at}.time", problems))
                rest = {n: v for n, v in event.items() if n not in ("time", self._event_time)}
                key, raw = self._keyed(rest, at, self._event_item_keys, columns, problems, also=("time",))
                values.append(raw or None)
            else:
                key = _key(event, at, problems)
                values.append(None)
            items.append(0 if key is None else key)
        if times and len(times) < len(events):
            problems.append(f"{where} must give the time of every event, or of none")
        _check_one_type(items, where, problems)
        return InlineHistory(items, times if times and len(times) == len(events) else None, values)

    def _moment(self, given: Any, where: str, problems: list[str]) -> int:
        """A time, whose unit is doubted where it is a number that another unit explains better."""
        if self._expected is not None and isinstance(given, int) and not isinstance(given, bool):
            first, last = self._expected
            if not first <= given <= last:
                for unit, times, parts in _UNITS:
                    if first <= given * times // parts <= last:
                        problems.append(
                            f"{where} must be UTC microseconds where it is a number, got {unit} by its size"
                        )
                        return 0
        return _time(given, where, problems)

    def _task(self, given: Any, problems: list[str]) -> str | None:
        if given is None:
            return None
        if not isinstance(given, str) or given not in self._tasks:
            shown = given[:50] if isinstance(given, str) else ""
            problems.append(f"task must be one of the model's, {nearest(shown, self._tasks)}")
            return None
        return given


def raise_problems(problems: Sequence[str]) -> None:
    """Raises one error for all problems of a request; returns where there are none.

    Raises:
        RequestError: with the problems, at most 20 of them in full.
    """
    if not problems:
        return
    shown = list(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        shown.append(f"and {len(problems) - _SHOWN} more")
    raise RequestError("; ".join(shown))


def _columns(features: Iterable[Feature]) -> set[str]:
    return {f.source_column for f in features}


def _reads_instant(schema: Schema, feature: Feature) -> bool:
    return isinstance(feature, Categorical) and isinstance(
        schema.table_encoders[feature.table_name], (HourOfDay, DayOfWeek)
    )


def _key(given: Any, where: str, problems: list[str], *, optional: bool = False) -> Key | None:
    if isinstance(given, str) or (isinstance(given, int) and not isinstance(given, bool) and -_INT64 <= given < _INT64):
        return given
    if not (optional and given is None):
        problems.append(f"{where} must be a 64-bit integer or text, got {_kind(given)}")
    return None


def _check_one_type(keys: Sequence[Key], where: str, problems: list[str]) -> None:
    if len(set(map(type, keys))) > 1 and not problems:
        problems.append(f"{where} must have keys of one type, got integers and text")


def _time(given: Any, where: str, problems: list[str], *, lowest: int = 0) -> int:
    """UTC microseconds from ISO 8601 text (UTC where it has no offset) or a whole number."""
    microseconds: int | None = None
    if isinstance(given, str):
        try:
            moment = datetime.fromisoformat(given)
        except ValueError:
            problems.append(f"{where} must be ISO 8601 or UTC microseconds, got other text")
            return 0
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
        since = moment - datetime(1970, 1, 1, tzinfo=UTC)
        microseconds = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    elif isinstance(given, int) and not isinstance(given, bool):
        microseconds = given
    if microseconds is None:
        problems.append(f"{where} must be ISO 8601 or UTC microseconds, got {_kind(given)}")
        return 0
    if not lowest <= microseconds < MAX_TIME:
        problems.append(f"{where} must lie between 1970 and 2200, in microseconds where it is a number")
        return 0
    return microseconds


def _request_id(given: Any, problems: list[str]) -> str | int | None:
    if given is None or (isinstance(given, (str, int)) and not isinstance(given, bool) and len(str(given)) <= 200):
        return given
    problems.append("request_id must be text of at most 200 characters, or an integer")
    return None


def _has_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list) and any(isinstance(v, bool) for v in value))


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(v is None or isinstance(v, (bool, int, float, str)) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _kind(value: Any) -> str:
    """JSON's word for the type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)) and not -_INT64 <= value < _INT64:
        # The parser reads integers beyond 64 bits as numbers with a fraction.
        return "a number beyond 64 bits"
    names = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number with a decimal point"}
    return names.get(type(value), type(value).__name__)


def _shown(name: Any) -> str:
    """A name that a caller made up, short and in one line."""
    return repr(str(name)[:50])
