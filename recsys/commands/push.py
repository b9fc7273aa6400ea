"""``recsys push``: events into an online store, as they happen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys.commands.materialize import StoreArgument, encoder_at, microseconds
from recsys.commands.options import Json

_MOST_TYPES = 20
"""That are told of: a stream may bring any number."""


def push(
    store: StoreArgument,
    model: Annotated[
        Path,
        typer.Option("--model", "-m", help="Artifact or training set whose encoder the store has."),
    ],
    events: Annotated[
        list[str] | None,
        typer.Argument(metavar="EVENT...", help="JSON objects, columns of the events view; from stdin otherwise."),
    ] = None,
    any_time: Annotated[
        bool,
        typer.Option("--any-time", help="Take times before 1990 too, of logs whose times only number the rows."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Add events to users' histories and derived values: the next request sees them.

    An event names its user, item, time (now if not given) and type by the columns of the events view, and may give raw
    values of the columns that histories and derived values read. Without EVENT, one JSON object a line is read from
    stdin. A type that nothing names is no error, for logs hold others too, but is told on stderr, once.

    \b
    Example:
        recsys push lmdb:data/online --model artifacts/din '{"user_id": 17, "item_id": 3, "type": "click"}'
        tail -f events.jsonl | recsys push redis://localhost:6379/0 --model artifacts/din
    """  # noqa: D301
    import sys

    from feature_store.online.location import open_backend
    from feature_store.online.store import OnlineStore
    from recsys.commands.terminal import print_facts, print_json
    from recsys.errors import DataError

    encoder = encoder_at(model)
    online = OnlineStore(open_backend(store, is_writable=True, is_made=False), encoder)
    pushed: dict[str, int] = {history.name: 0 for history in online.schema.histories}
    num_events = num_derived_only = num_unused = 0
    tell_type = _types_told(online)
    try:
        for number, line in enumerate(events or sys.stdin.buffer, start=1):
            if not line.strip():
                continue
            try:
                event = _event(_text(line), online, any_time=any_time)
                histories, derived = online.push(event)
            except DataError as err:
                hints = [err.hint] if err.hint else []
                hints += ["those before it are in the store: go on with this one"] if num_events else []
                raise type(err)(f"event {number}: {err.message}", hint="; ".join(hints) or None) from err
            num_events += 1
            num_derived_only += bool(derived) and not histories
            num_unused += not derived and not histories
            tell_type(number, event.type, is_used=bool(histories or derived))
            for name in histories:
                pushed[name] += 1
    finally:
        online.close()
    if as_json:
        counts = {"events": num_events, "fed_derived_values_only": num_derived_only, "changed_nothing": num_unused}
        print_json({"store": store, **counts, "pushed": pushed})
        return
    facts: dict[str, Any] = {f"{name} events": n for name, n in pushed.items()}
    if online.schema.derived:
        facts["feed derived values only"] = num_derived_only
    print_facts(store, {"events": num_events, **facts, "in no history, change nothing": num_unused})


def _types_told(online: Any) -> Callable[..., None]:
    """What tells of each type that no history and no derived value names, once, as its first event comes."""
    from feature_store.online.pushing import named_types
    from recsys.commands.terminal import messages
    from recsys.errors import nearest

    named = named_types(online.schema)
    told: set[str] = set()

    def tell(number: int, kind: str | None, *, is_used: bool) -> None:
        if kind is None or kind in named or kind in told or len(told) == _MOST_TYPES:
            return
        told.add(kind)
        hint = nearest(kind, named)
        what = "goes to histories of all types only" if is_used else "changes nothing"
        if not is_used or hint.startswith("did you mean"):
            words = f"event {number}: type {kind!r} is named by no history and no derived value, and {what}: {hint}"
            messages().print(words, markup=False, soft_wrap=True)

    return tell


def _text(line: str | bytes) -> str:
    """A line of stdin, or an argument; a byte order mark is no part of it."""
    from recsys.errors import DataError

    try:
        return (line if isinstance(line, str) else line.decode()).removeprefix("\ufeff")
    except UnicodeDecodeError as err:
        raise DataError("must be UTF-8, got other bytes") from err


def _object(text: str) -> dict[str, Any]:
    """A JSON object in which nothing is said twice."""
    import json

    from recsys.errors import DataError

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise DataError(f"{next(n for n in names if names.count(n) > 1)!r} must be given once, got it twice")
        return found

    def refuse(word: str) -> None:
        raise DataError(f"must be a JSON object, which has no {word}", hint="write null for what is missing")

    try:
        given = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except DataError:
        raise
    except (ValueError, RecursionError) as err:
        raise DataError("must be a JSON object, got other text") from err
    if not isinstance(given, dict):
        raise DataError("must be a JSON object, got another JSON value")
    return given


def _event(line: str, online: Any, *, any_time: bool) -> Any:
    """One event from its JSON."""
    import time

    from feature_store.online.pushing import Event
    from feature_store.time_spans import iso
    from recsys.errors import ConfigError, DataError
    from recsys.times import EARLIEST

    given = _object(line)
    view = online.schema.views.events
    if view is None:
        raise DataError("the model must have a history, got none", hint="there is nothing that events could change")
    keys = {}
    for what, column in (("user", view.user), ("item", view.item)):
        keys[what] = given.pop(column, None)
        if not isinstance(keys[what], (int, str)) or isinstance(keys[what], bool):
            raise DataError(f"{column!r} must be given, an integer or text: the {what}'s key")
    when = given.pop(view.time, None)
    if when is not None and (isinstance(when, bool) or not isinstance(when, (int, str))):
        raise DataError(f"{view.time!r} must be ISO 8601 text or UTC microseconds")
    try:
        at = time.time_ns() // 1000 if when is None else microseconds(str(when))
    except ConfigError as err:
        raise DataError(
            f"{view.time!r} must be ISO 8601 text with an offset, or UTC microseconds", hint=err.hint
        ) from err
    if not any_time and 0 <= at < EARLIEST:
        raise DataError(
            f"{view.time!r} must be ISO 8601 text or UTC microseconds, got {when}, which is {iso(at)}",
            hint="seconds times 1,000,000 are microseconds; --any-time takes it as it is",
        )
    kind = None if view.type is None else given.pop(view.type, None)
    if kind is not None and not isinstance(kind, (str, int)):
        raise DataError(f"{view.type!r} must be text or an integer: the event's type")
    return Event(
        user=keys["user"],
        item=keys["item"],
        time=at,
        # As a build reads types that are no text.
        type=None if kind is None else str(kind).lower() if isinstance(kind, bool) else str(kind),
        values=given,
    )
