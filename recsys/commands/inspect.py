"""``recsys data inspect``: what columns hold, and a schema that builds as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recsys.commands.options import Json

Column = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the log; guessed by name if not given.")]


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A log, a folder of views, or an fsspec address.")],
    schema: Annotated[Path | None, typer.Option("--schema", "-s", help="Write the proposed schema here.")] = None,
    experiment: Annotated[
        Path | None,
        typer.Option("--experiment", "-e", help="Write an experiment over it here (needs --schema)."),
    ] = None,
    user: Column = None,
    item: Column = None,
    time: Column = None,
    label: Column = None,
    request: Column = None,
    declared: Annotated[
        str | None,
        typer.Option("--format", metavar="YAML", help="Format of the files, such as '{kind: csv, separator: \"::\"}'."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Profile columns (types, cardinalities, nulls, time span) and propose a schema.

    \b
    Example:
        recsys data inspect downloads/ratings.csv
        recsys data inspect data/mine --schema configs/schema/mine.yaml --experiment configs/experiment/mine.yaml
        recsys build configs/experiment/mine.yaml
    """  # noqa: D301
    import os

    from feature_store.propose import Roles, propose
    from recsys.commands.terminal import print_facts, print_json, print_table, stage
    from recsys.errors import ConfigError
    from recsys.files import check_can_write, write_text

    if experiment is not None and schema is None:
        raise ConfigError("--experiment must come with --schema, which it refers to")
    for option, target in (("--schema", schema), ("--experiment", experiment)):
        if target is None:
            continue
        if target.exists():
            raise ConfigError(f"{target} must not exist yet: nothing is overwritten", hint="choose another name")
        check_can_write(target, name=option)
    with stage(f"inspect {path}"):
        proposal = propose(path, roles=Roles(user, item, time, label, request), declared=_format(declared))
    written: dict[str, Any] = {}
    if schema is not None:
        write_text(schema, proposal.schema_yaml())
        written["schema"] = str(schema)
    if experiment is not None and schema is not None:
        relative = os.path.relpath(schema.resolve(), experiment.resolve().parent)
        write_text(experiment, proposal.experiment_yaml(relative, f"data/{proposal.name}_set"))
        written["experiment"] = str(experiment)
    if as_json:
        profiles = {view: profile.to_dict() for view, profile in proposal.profiles.items()}
        print_json({"views": profiles, "schema": proposal.mapping, "comments": proposal.comments, "written": written})
        return
    for view, profile in proposal.profiles.items():
        rows = [_row(column, profile.num_rows) for column in profile.columns.values()]
        title = f"{view}: {profile.path}, {profile.num_rows:,} rows in {profile.files} file{'s'[: profile.files > 1]}"
        print_table(title, ("column", "holds", "distinct", "missing", "from", "to"), rows)
    if schema is None:
        typer.echo(proposal.schema_yaml(), nl=False)
    elif experiment is not None:
        print_facts("written", written | {"next": f"recsys build {experiment}"})
    else:
        print_facts("written", written)


def _format(text: str | None) -> Any:
    from recsys.config import parse_yaml, validate
    from recsys.schema import EntityView

    if text is None:
        return None
    return validate(
        EntityView, {"path": ".", "key": ".", "format": parse_yaml(text, source="--format")}, source="--format"
    ).format


def _row(column: Any, num_rows: int) -> tuple[Any, ...]:
    first, last = column.span or (column.lowest, column.highest)
    holds = column.kind if column.separator is None else f"texts between {column.separator}"
    return column.name, holds, column.distinct, f"{column.num_null / max(num_rows, 1):.1%}", first, last
