"""``recsys build``: views to a training set."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from recsys.commands.options import ExperimentArgument, Json, Overrides


def build(
    config: ExperimentArgument,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    force: Annotated[bool, typer.Option("--force", help="Build even if an equal training set is there.")] = False,
    workers: Annotated[
        int,
        typer.Option("--workers", min=1, help="Spread events over so many Ray workers; the files are the same."),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Build the training set of an experiment: encode, join in time, split, check.

    Prints what was found: rows, time spans, users and items without attributes, events that no history reads, broken
    rows by reason; and notes, each of them something to look at before training.

    \b
    Example:
        recsys build configs/experiment/din_kuairand.yaml
        recsys build configs/experiment/din_simulated.yaml --set data.views=data/simulated
        recsys build configs/experiment/din_kuairand.yaml --workers 8
    """  # noqa: D301
    from feature_store.build import build_training_set
    from recsys.commands.terminal import print_facts, print_json
    from training.experiment import load_experiment

    experiment, schema = load_experiment(config, overrides)
    if workers > 1:
        from feature_store.distributed import build_distributed

        summary = build_distributed(schema, experiment.data, workers=workers, progress=True, force=force)
    else:
        summary = build_training_set(schema, experiment.data, progress=True, force=force)
    if as_json:
        print_json(summary.to_dict())
        return
    state = "up to date" if summary.skipped else f"built in {summary.seconds:.1f} s"
    facts: dict[str, Any] = {f"{split} impressions": rows for split, rows in summary.rows.items()}
    facts |= {"outside all splits": summary.outside_split}
    for scope, rows, without in (
        ("users", summary.users, summary.users_without_attributes),
        ("items", summary.items, summary.items_without_attributes),
    ):
        facts |= {scope: rows, f"{scope} without attributes": without}
    facts |= {f"history {history}, events": events for history, events in summary.events.items()}
    facts |= {"events in no history": summary.unused_events} if summary.events else {}
    facts |= {f"time of {log}": f"{first} to {last}" for log, (first, last) in summary.time_spans.items()}
    facts |= {
        f"quarantined: {view}, {reason}": rows
        for view, reasons in summary.quarantined.items()
        for reason, rows in reasons.items()
    }
    facts |= {f"table {table} rows": rows for table, rows in summary.table_sizes.items()}
    facts |= {"size": f"{summary.bytes / 2**20:,.1f} MiB"}
    facts |= {f"note {number}": note for number, note in enumerate(summary.notes, start=1)}
    print_facts(f"{experiment.data.training_set} ({state})", facts)
