"""``recsys data check``: expectations, broken rows, drift."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recsys.commands.options import ExperimentArgument, Json, Overrides

FAILED = 3
"""Exit status of a check that found something."""

Period = Annotated[
    str | None, typer.Option(metavar="FROM..TO", help="ISO 8601 times with offsets; by the split if not given.")
]


def check(
    config: ExperimentArgument,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    reference: Period = None,
    current: Period = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write the report with plots as one page.")] = None,
    file: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Check views: expectations of the schema, broken rows, drift between two periods.

    Ends with status 3 if something fails; warnings do not change the status.

    \b
    Example:
        recsys data check configs/experiment/din_kuairand.yaml --html quality.html
        recsys data check mine.yaml --reference 2022-04-08T00:00Z..2022-04-22T00:00Z --current 2022-04-22T00:00Z..2022-05-09T00:00Z
    """  # noqa: D301, E501
    from feature_store.quality import Periods, check_quality
    from feature_store.quality_page import quality_page
    from recsys.commands.terminal import print_facts, print_json, print_table, stage
    from recsys.errors import ConfigError
    from recsys.files import check_can_write, write_json, write_text
    from training.experiment import load_experiment

    experiment, schema = load_experiment(config, overrides)
    if (reference is None) != (current is None):
        raise ConfigError("--reference and --current must be given together")
    for option, target in (("--html", page), ("--output", file)):
        if target is not None and target.is_dir():
            raise ConfigError(f"{option} must name a file to write, got a folder, {target}")
        if target is not None:
            check_can_write(target, name=option)
    periods = None
    if reference is not None and current is not None:
        periods = Periods(_period("--reference", reference), _period("--current", current))
    with stage("check the data"):
        report = check_quality(schema, experiment.data, periods=periods)
    if page is not None:
        write_text(page, quality_page(report))
    if file is not None:
        write_json(file, report.to_dict())
    if as_json:
        print_json(report.to_dict())
    else:
        rows: list[tuple[Any, ...]] = [(c.place, c.status, c.rule, c.got) for c in report.checks]
        print_table("expectations and broken rows", ("where", "status", "rule", "found"), rows)
        moved = [(d.name, d.status, d.psi, d.js, d.unseen) for d in report.drift]
        print_table("drift", ("feature or task", "status", "PSI", "JS", "unseen"), moved)
        facts: dict[str, Any] = {
            name: f"{period['from']} to {period['to']}, {period['impressions']:,} impressions"
            for name, period in report.periods.items()
        }
        facts |= {"failures": report.count("fail"), "warnings": report.count("warn"), "result": report.status}
        print_facts("", facts | ({"page": str(page)} if page else {}) | ({"report": str(file)} if file else {}))
    if report.status == "fail":
        raise typer.Exit(FAILED)


def _period(option: str, text: str) -> tuple[int, int]:
    from feature_store.split import microseconds
    from recsys.errors import ConfigError

    first, separator, last = text.partition("..")
    if not separator:
        raise ConfigError(f"{option} must read FROM..TO, got {text!r}")
    try:
        start, end = microseconds(first), microseconds(last)
    except ValueError as err:
        raise ConfigError(f"{option}: {err}") from err
    if start >= end:
        raise ConfigError(f"{option} must begin before it ends, got {text!r}")
    return start, end
