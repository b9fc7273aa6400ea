"""``recsys data``: public data sets, from their own files to views."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recsys.commands.options import Json


def data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Data set, or `list` for a listing of them.")],
    raw: Annotated[Path | None, typer.Option("--raw", help="Folder of the original files.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of views to write.")] = None,
    as_json: Json = False,
) -> None:
    """Convert a public data set from its original files.

    \b
    Example:
        recsys data list
        recsys data kuairand_pure --raw downloads/kuairand_pure --output data/kuairand_pure
    """  # noqa: D301
    from feature_store.datasets import DATASETS
    from recsys.commands.terminal import counting, print_facts, print_json, stage
    from recsys.errors import ConfigError, nearest

    if name == "list":
        _list(DATASETS, as_json=as_json)
        return
    if name not in DATASETS:
        raise ConfigError(f"NAME must be a known data set, got {name!r}", hint=nearest(name, [*DATASETS, "list"]))
    dataset = DATASETS[name]
    if raw is None:
        raise ConfigError(
            f"--raw must name the folder of the original files of {name}",
            hint=f"it holds {', '.join(dataset.raw_files)}; get them from {dataset.source}",
        )
    output = output or Path("data") / name
    with stage(f"convert {name}") as tell:
        summary = dataset.load(raw, output, counting(tell, "steps"))
    if as_json:
        print_json({"output": str(output), **summary.to_dict()})
        return
    facts: dict[str, Any] = {f"read {file}": rows for file, rows in summary.rows_read.items()}
    facts |= {f"wrote {view}": rows for view, rows in summary.rows_written.items()}
    facts |= {f"events: {kind}": rows for kind, rows in summary.num_events_by_type.items()}
    facts |= {"exact repeats dropped": summary.repeats_dropped, **summary.findings, "views": str(output)}
    print_facts(name, facts)


def _list(datasets: Any, *, as_json: bool) -> None:
    from recsys.commands.terminal import print_facts, print_json

    listing = {
        name: {
            "description": dataset.description,
            "source": dataset.source,
            "licence": dataset.licence,
            "raw_files": list(dataset.raw_files),
            "schema_file": dataset.schema_file,
        }
        for name, dataset in datasets.items()
    }
    if as_json:
        print_json(listing)
        return
    for name, entry in listing.items():
        print_facts(name, entry | {"raw_files": ", ".join(entry["raw_files"])})
