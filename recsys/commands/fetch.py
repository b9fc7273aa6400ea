"""``recsys fetch``: what an online store holds of a user and of items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.commands.materialize import StoreArgument, encoder_at, microseconds
from recsys.commands.options import Json

if TYPE_CHECKING:
    from feature_store.online.fetched import Fetched, FetchedEntity, FetchedUser

_SHOWN_EVENTS = 10


def fetch(
    store: StoreArgument,
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="Artifact or training set whose encoder the store has; reads its values."),
    ] = None,
    user: Annotated[str | None, typer.Option("--user", "-u", metavar="KEY", help="User to look up.")] = None,
    item: Annotated[
        list[str], typer.Option("--item", "-i", metavar="KEY", help="Item to look up; repeat for more.")
    ] = [],  # noqa: B006 - Typer copies it
    at: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="As a request of then: ISO 8601 with offset, or UTC microseconds; or now."),
    ] = None,
    events: Annotated[
        int | None,
        typer.Option(min=0, help="Newest events of a history to show; 10 otherwise, with --json all that are seen."),
    ] = None,
    count: Annotated[bool, typer.Option("--count", help="Count the users and items; reads through the store.")] = False,
    as_json: Json = False,
) -> None:
    """Show what an online store holds of a user and of items, as a request would get it.

    Attributes, derived values and the events of each history before the time, in raw values where the encoder can tell
    them, with when they expire. Without --user and --item: whose encoder the store has, its limits, up to when it is
    materialised. Ends with status 2 if the store holds nothing of a user or an item, after showing the others.

    \b
    Example:
        recsys fetch lmdb:data/online
        recsys fetch lmdb:data/online --model artifacts/din --user 17
        recsys fetch redis://localhost:6379/0 -m artifacts/din -u 17 -i 3 -i 5 --at 2026-01-31T12:00:00Z --json
    """  # noqa: D301
    import time
    from dataclasses import asdict

    from feature_store.online.fetched import fetch as look_up
    from feature_store.online.fetched import parsed_key
    from feature_store.online.location import open_backend
    from feature_store.online.store import OnlineStore, stored_meta
    from recsys.commands.terminal import print_facts, print_json
    from recsys.errors import ConfigError
    from recsys.times import MAX_TIME

    if model is None and (user is not None or item):
        raise ConfigError(
            "--model must be given with --user and --item, got none: values are stored encoded",
            hint="the artifact or training set that the store was filled for",
        )
    when = time.time_ns() // 1000 if at is None else microseconds(at)
    if not 0 <= when < MAX_TIME:
        raise ConfigError(f"--at must lie between 1970 and 2200, in UTC microseconds or as ISO 8601 text, got {at}")
    encoder = None if model is None else encoder_at(model)
    backend = open_backend(store, is_writable=False)
    try:
        meta = stored_meta(backend)
        found = None
        if encoder is not None:
            online = OnlineStore(backend, encoder)
            if user is not None or item:
                key = None if user is None else parsed_key(online, "user_id", user)
                found = look_up(online, key, [parsed_key(online, "item_id", i) for i in item], when)
        counts = _counts(backend) if count else {}
    finally:
        backend.close()
    if as_json:
        shown = None if found is None else asdict(found)
        if shown and shown["user"]:
            for history in shown["user"]["histories"].values():
                first = 0 if events is None else max(len(history["times"]) - events, 0)
                history["times"], history["events"] = history["times"][first:], history["events"][first:]
        print_json({"store": store, **meta, **counts, **(shown or {})})
    else:
        print_facts(store, _about(meta) | counts)
        if found is not None:
            _print(found, _SHOWN_EVENTS if events is None else events)
    if found is not None:
        _check_known(found)


def _counts(backend: Any) -> dict[str, int]:
    """Users and items with features; those that expired and were not removed yet are among them."""
    from feature_store.online.keys import ITEM, USER

    # A scan may give a key twice.
    return {name: len({key for key, _ in backend.scan(prefix)}) for name, prefix in (("users", USER), ("items", ITEM))}


def _about(meta: dict[str, Any]) -> dict[str, Any]:
    """What a store says about itself, in words."""
    done, derived = meta.get("materialized"), meta.get("derived")
    return {
        "schema": meta["schema_name"],
        "encoder fingerprint": meta["encoder_fingerprint"],
        **{f"limit {name}": value for name, value in meta["limits"].items() if value is not None},
        "materialised until": _instant(done["until"]) if done else "not yet",
        **({"derived values as of": _instant(derived["as_of"])} if derived else {}),
    }


def _instant(time: int) -> str:
    from feature_store.time_spans import iso

    return f"{iso(time)} ({time})"


def _expiry(expires: int | None) -> str:
    import time

    from feature_store.time_spans import iso

    if expires is None:
        return "never"
    return f"{'expired' if expires * 1000 <= time.time_ns() else 'expires'} {iso(expires)}"


def _print(found: Fetched, num_events: int) -> None:
    from recsys.commands.terminal import print_facts

    if found.user is not None:
        print_facts(f"\nuser {found.user.key}, a request at {_instant(found.at)}", _entity(found.user))
        _print_histories(found.user, num_events)
    for item in found.items:
        print_facts(f"\nitem {item.key}", _entity(item))


def _entity(entity: FetchedEntity) -> dict[str, Any]:
    state = "stored" if entity.is_known else "not stored: a request gets unknown values"
    if entity.is_known or entity.expires is not None:
        state += f", {_expiry(entity.expires)}" if entity.expires is not None else ", never expires"
    facts: dict[str, Any] = {"features": state}
    facts |= {f"  {name}": _cell(value) for name, value in entity.features.items()}
    if entity.derived or entity.refused:
        facts["derived values"] = ""
        facts |= {f"  {name}": "missing" if value is None else _cell(value) for name, value in entity.derived.items()}
        facts |= {f"  {name}": f"not given: it {reason}" for name, reason in entity.refused.items()}
    return facts


def _print_histories(user: FetchedUser, num_events: int) -> None:
    from feature_store.time_spans import iso
    from recsys.commands.terminal import print_facts, print_table

    for name, rows in user.num_rows.items():
        print_facts("", {f"{name}, for derived values": f"{rows:,}, {_expires_of(user.rows_expire[name], rows)}"})
    for name, history in user.histories.items():
        shown = history.events[max(len(history.events) - num_events, 0) :]
        times = history.times[len(history.times) - len(shown) :]
        state = f"{history.num_stored:,} events stored, {_expires_of(history.expires, history.num_stored)}"
        title = f"\nhistory {name}: {state}; the request sees {len(history.events):,}"
        if not shown:
            print_facts(title, {})
            continue
        if len(shown) < len(history.events):
            title += f", the newest {len(shown):,}"
        heads = ("time", *shown[0])
        cells = [(iso(time), *map(_cell, event.values())) for time, event in zip(times, shown, strict=True)]
        print_table(title, heads, cells)


def _expires_of(expires: int | None, num_values: int) -> str:
    if expires is None:
        return "never expire" if num_values else "none"
    return _expiry(expires)


def _cell(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(_cell, value)) or "\u2013"
    if isinstance(value, float):
        return f"{value:.10g}"
    return "unknown" if value is None else str(value)


def _check_known(found: Fetched) -> None:
    """Names who is not there.

    Raises:
        DataError: the store holds nothing of the user, or of an item.
    """
    from recsys.errors import DataError

    missing: list[tuple[str, FetchedEntity]] = []
    if found.user is not None and not found.user.is_stored:
        missing.append(("user", found.user))
    missing += [("item", item) for item in found.items if not item.is_known]
    if not missing:
        return
    words = ", ".join(
        f"{what} {entity.key}" + ("" if entity.expires is None else f" ({_expiry(entity.expires)})")
        for what, entity in missing
    )
    raise DataError(
        f"{words} must be in the store, got nothing of {'it' if len(missing) == 1 else 'them'}",
        hint="`recsys materialize` writes users and items, `recsys push` events; a request gets unknown values",
    )
