"""``recsys materialize``: a training set, or views, into an online store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.commands.options import Json

if TYPE_CHECKING:
    from recsys.encoding import Encoder

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="lmdb:PATH or redis://HOST:PORT/DB.")]


def materialize(
    store: StoreArgument,
    training_set: Annotated[
        Path | None, typer.Option("--training-set", "-t", help="Training set to take users, items and events from.")
    ] = None,
    experiment: Annotated[
        Path | None,
        typer.Option("--experiment", "-e", help="Take them from the experiment's views, as they are now."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="Artifact whose encoder views are encoded by; the experiment's training set otherwise.",
        ),
    ] = None,
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
    keep_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Newest rows of a user for derived values; all that windows reach otherwise."),
    ] = None,
    user_ttl: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Users expire so long after they were last written.")
    ] = None,
    item_ttl: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Items expire so long after they were last written.")
    ] = None,
    map_gib: Annotated[
        int | None,
        typer.Option(min=1, max=65536, help="The most that an LMDB store can hold from now on; 64 GiB at first."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring an online store up to a training set, or to views: users, items, users' newest events, derived values.

    Derived values are computed from the views: those of the training set, which must be as they were, or those of the
    experiment as they are now. Run it again whenever the data or the time has moved on; it writes what differs. Limits
    are those of the first run. An interrupted run goes on where it stopped.

    \b
    Example:
        recsys materialize lmdb:data/online --training-set data/training_set
        recsys materialize redis://localhost:6379/0 --training-set data/training_set --until 2026-01-31T00:00:00Z
        recsys materialize lmdb:data/online --experiment configs/experiment/din_simulated.yaml --model artifacts/din
    """  # noqa: D301
    from dataclasses import asdict

    from feature_store.online.location import open_backend
    from feature_store.online.materialize import materialize as bring_up
    from feature_store.online.store import Limits, OnlineStore
    from recsys.commands.terminal import print_facts, print_json, stage
    from recsys.config import validate
    from recsys.errors import ConfigError

    if (training_set is None) == (experiment is None):
        raise ConfigError("one of --training-set and --experiment must be given")
    given = {"keep_events": keep_events, "keep_rows": keep_rows, "user_ttl_s": user_ttl, "item_ttl_s": item_ttl}
    limits = validate(Limits, given, source="options")
    end = None if until is None else _end(until)
    with (
        stage(f"materialize {training_set or experiment}") as tell,
        _source(training_set, experiment, model, tell) as (
            source,
            derived,
        ),
    ):
        _check_end(end, source)
        online = OnlineStore(open_backend(store, is_writable=True, map_gib=map_gib), source.encoder, limits=limits)
        try:
            summary = bring_up(
                online,
                source,
                end,
                progress=lambda kind, done, total: tell(f"{kind}: {done:,} of {total:,}"),
                derived=derived,
            )
        finally:
            online.close()
    if as_json:
        print_json({"store": store, **asdict(summary)})
        return
    facts: dict[str, Any] = {f"{kind} written": n for kind, n in summary.written.items()}
    facts |= {f"{kind} compared": n for kind, n in summary.visited.items()}
    facts |= {f"{kind}, users with more than are kept": n for kind, n in summary.cut_users.items() if n}
    if online.limits.user_ttl_s or online.limits.item_ttl_s:
        facts["expired, removed"] = summary.swept
    print_facts(store, facts | {"went on with an interrupted run": summary.resumed})


@contextmanager
def _source(
    training_set: Path | None, experiment: Path | None, model: Path | None, tell: Callable[[str], None]
) -> Iterator[tuple[Any, Any]]:
    """What a store is filled from, and what derived values are computed of; None without any."""
    from recsys.errors import ConfigError
    from recsys.training_set import TrainingSet

    if experiment is not None:
        from feature_store.snapshot import view_snapshot
        from training.experiment import load_experiment

        found, schema = load_experiment(experiment, [])
        encoder = TrainingSet.open(found.data.training_set).encoder if model is None else encoder_at(model)
        with view_snapshot(found.data, encoder, schema=schema, stage=tell) as snapshot:
            yield snapshot, snapshot.derived
        return
    if model is not None:
        raise ConfigError("--model must be given with --experiment only: a training set has its encoder")
    assert training_set is not None
    opened = TrainingSet.open(training_set)
    if not opened.schema.derived:
        yield opened, None
        return
    from feature_store.snapshot import training_set_views

    with training_set_views(opened, stage=tell) as snapshot:
        yield snapshot, snapshot.derived


def encoder_at(model: Path) -> Encoder:
    """The encoder of an artifact, or of a training set.

    Raises:
        ConfigError: the folder is neither.
        IntegrityError: the encoder is damaged.
    """
    from recsys.encoding import Encoder
    from recsys.errors import ConfigError

    if not (model / "encoder" / "encoder.json").is_file():
        raise ConfigError(f"--model must be the folder of an artifact or of a training set, got {model}")
    return Encoder.load(model / "encoder")


def _end(until: str) -> int:
    from recsys.errors import ConfigError
    from recsys.times import MAX_TIME

    end = microseconds(until)
    if not 0 <= end < MAX_TIME:
        raise ConfigError(
            f"--until must lie between 1970 and 2200, in UTC microseconds or as ISO 8601 text, got {until}"
        )
    return end


def _check_end(end: int | None, source: Any) -> None:
    """Refuses an end in seconds or milliseconds: nothing would have happened yet."""
    from feature_store.time_spans import iso
    from recsys.errors import ConfigError
    from recsys.times import EARLIEST
    from recsys.training_set import TIME

    last = max((int(log.array(TIME).max(initial=-1)) for log in source.events.values()), default=-1)
    if end is not None and end < EARLIEST <= last:
        raise ConfigError(
            f"--until must be ISO 8601 text or UTC microseconds, got {end}, which is {iso(end)}: events go on until "
            f"{iso(last)}",
            hint="seconds times 1,000,000 are microseconds",
        )


def microseconds(text: str) -> int:
    """UTC microseconds of a time given as text."""
    import re
    from datetime import UTC, datetime

    from recsys.errors import ConfigError

    if re.fullmatch(r"-?[0-9]{1,30}", text):
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as err:
        raise ConfigError(f"TIME must be ISO 8601 or UTC microseconds, got {text!r}") from err
    if moment.tzinfo is None:
        raise ConfigError(f"TIME must say its offset, got {text!r}", hint=f"write {moment.isoformat()}Z for UTC")
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
