"""``recsys materialize``: a training set into an online store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recsys.commands.options import Json

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="lmdb:PATH or redis://HOST:PORT/DB.")]


def materialize(
    store: StoreArgument,
    training_set: Annotated[
        Path, typer.Option("--training-set", "-t", help="Training set to take users, items and events from.")
    ],
    until: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Only events before it: ISO 8601 with offset, or UTC microseconds; all otherwise.",
        ),
    ] = None,
    keep_events: Annotated[
        int | None,
        typer.Option(min=1, help="Newest events of a history that a user keeps; what the model reads otherwise."),
    ] = None,
    user_ttl: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Users expire so long after they were last written.")
    ] = None,
    item_ttl: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Items expire so long after they were last written.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring an online store up to a training set: users, items, and users' newest events.

    Run it again whenever the training set or the time has moved on; it writes what differs. Limits are those of the
    first run. An interrupted run goes on where it stopped.

    \b
    Example:
        recsys materialize lmdb:data/online --training-set data/training_set
        recsys materialize redis://localhost:6379/0 --training-set data/training_set --until 2026-01-31T00:00:00Z
    """  # noqa: D301
    from dataclasses import asdict

    from feature_store.online.location import open_backend
    from feature_store.online.materialize import materialize as bring_up
    from feature_store.online.store import Limits, OnlineStore
    from recsys.commands.terminal import print_facts, print_json, stage
    from recsys.config import validate
    from recsys.training_set import TrainingSet

    given = {"keep_events": keep_events, "user_ttl_s": user_ttl, "item_ttl_s": item_ttl}
    limits = validate(Limits, given, source="options")
    end = None if until is None else microseconds(until)
    opened = TrainingSet.open(training_set)
    online = OnlineStore(open_backend(store, is_writable=True), opened.encoder, limits=limits)
    try:
        with stage(f"materialize {training_set}") as tell:
            summary = bring_up(
                online, opened, end, progress=lambda kind, done, total: tell(f"{kind}: {done:,} of {total:,}")
            )
    finally:
        online.close()
    if as_json:
        print_json({"store": store, **asdict(summary)})
        return
    facts: dict[str, Any] = {f"{kind} written": n for kind, n in summary.written.items()}
    facts |= {f"{kind} compared": n for kind, n in summary.visited.items()}
    print_facts(store, facts | {"went on with an interrupted run": summary.resumed})


def microseconds(text: str) -> int:
    """UTC microseconds of a time given as text."""
    from datetime import UTC, datetime

    from recsys.errors import ConfigError

    if text.lstrip("-").isdigit():
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as err:
        raise ConfigError(f"TIME must be ISO 8601 or UTC microseconds, got {text!r}") from err
    if moment.tzinfo is None:
        raise ConfigError(f"TIME must say its offset, got {text!r}", hint=f"write {text}Z for UTC")
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
