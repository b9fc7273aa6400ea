"""``recsys data``: public data sets, from their own files to views; checks of what was built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from recsys.commands.options import Json, Overrides

LEAKS_FOUND = 3
"""Exit status of a check that found something."""


class DataCommands(TyperGroup):
    """What is no command of the group is the name of a data set: ``recsys data frappe`` converts it."""

    def get_help_option(self, ctx: Any) -> Any:
        """The ``--help`` flag, False unless given: Typer leaves None, which it imports pydantic to turn into a bool."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command of some arguments."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["convert", *args]
        return super().resolve_command(ctx, args)


data = typer.Typer(
    cls=DataCommands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@data.callback()
def group() -> None:
    """Public data sets, and checks of data: `recsys data NAME` is short for `recsys data convert NAME`.

    \b
    Example:
        recsys data list
        recsys data frappe --raw downloads/frappe --output data/frappe
        recsys data check-leaks configs/experiment/din_kuairand.yaml
    """  # noqa: D301


@data.command()
def convert(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Data set, or `list` for a listing of them.")],
    raw: Annotated[Path | None, typer.Option("--raw", help="Folder of the original files.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of views to write.")] = None,
    negatives: Annotated[
        str | None,
        typer.Option("--negatives", help="How to draw negatives: uniform, popularity or in_category.", metavar="KIND"),
    ] = None,
    per_positive: Annotated[
        int | None, typer.Option("--per-positive", help="Negatives for each positive.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the drawn negatives.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Convert a public data set from its original files.

    Sets that hold only what users did get negatives that are drawn; how is recorded in dataset.json.

    \b
    Example:
        recsys data list
        recsys data kuairand_pure --raw downloads/kuairand_pure --output data/kuairand_pure
        recsys data taobao_userbehavior --raw downloads/taobao --negatives uniform --per-positive 4 --seed 7
    """  # noqa: D301
    from feature_store.datasets import DATASETS
    from recsys.commands.terminal import counting, print_facts, print_json, stage
    from recsys.errors import ConfigError, nearest
    from recsys.files import check_can_write

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
    sampling = _sampling(dataset, negatives, per_positive, seed)
    output = output or Path("data") / name
    check_can_write(output, name="--output")
    with stage(f"convert {name}") as tell:
        progress = counting(tell, "steps")
        if dataset.load_sampled is None or sampling is None:
            summary = dataset.load(raw, output, progress)
        else:
            summary = dataset.load_sampled(raw, output, progress, sampling)
    if as_json:
        print_json({"output": str(output), **summary.to_dict()})
        return
    facts: dict[str, Any] = {f"read {file}": rows for file, rows in summary.rows_read.items()}
    facts |= {f"wrote {view}": rows for view, rows in summary.rows_written.items()}
    facts |= {f"events: {kind}": rows for kind, rows in summary.num_events_by_type.items()}
    facts |= {"exact repeats dropped": summary.repeats_dropped, **summary.findings}
    facts |= {f"drawn: {words}": value for words, value in summary.sampling.items()}
    facts |= {f"split: {words}": str(value) for words, value in summary.split.items()}
    print_facts(name, facts | {"views": str(output)})


def _sampling(dataset: Any, kind: str | None, per_positive: int | None, seed: int) -> Any:
    """How to draw negatives; None for a set with impressions."""
    from feature_store.datasets import NegativeSampling
    from recsys.errors import ConfigError

    if dataset.sampling is None:
        if kind is not None or per_positive is not None:
            raise ConfigError(f"--negatives and --per-positive need a data set without impressions, got {dataset.name}")
        return None
    default = dataset.sampling
    return NegativeSampling(kind or default.kind, per_positive or default.per_positive, seed)  # type: ignore[arg-type]


@data.command("check-leaks")
def check_leaks(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Experiment file whose training set is built.")],
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    rows: Annotated[int, typer.Option("--rows", help="Impressions to recompute by brute force.", min=1)] = 300,
    max_auc: Annotated[
        float,
        typer.Option("--max-auc", help="A feature that by itself is clearly above is implausible.", min=0.5, max=1),
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Of the samples.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Check a training set for leaks: recompute rows from the views, look for features that tell too much.

    Ends with status 3 if there is a leak; names the rows (of the impressions view, from 0) and the features.

    \b
    Example:
        recsys data check-leaks configs/experiment/din_kuairand.yaml --rows 1000
    """  # noqa: D301
    from feature_store.leaks import check_leaks as check
    from recsys.commands.terminal import print_facts, print_json, print_table, stage
    from training.experiment import load_experiment

    experiment, schema = load_experiment(config, overrides)
    with stage("check for leaks"):
        report = check(experiment.data, schema=schema, num_rows=rows, seed=seed, max_auc=max_auc)
    if as_json:
        print_json(report.to_dict())
    else:
        shown = [(f.feature, f.task, f.auc, f.lower, f.num_rows) for f in report.features[:15]]
        heads = ("feature by itself", "task", "AUC", "lower bound", "rows")
        print_table(f"{report.training_set}: most telling features", heads, shown)
        facts: dict[str, Any] = {"impressions recomputed": report.rows_recomputed}
        for d in report.differences[:20]:
            facts[f"differs: {d.split}, source row {d.source_row}, {d.place}"] = f"{d.stored}, expected {d.expected}"
        if len(report.differences) > 20:
            facts["further differences"] = len(report.differences) - 20
        for late in report.late:
            words = f"late events: {late.split}, history {late.history}, {late.num_requests} requests"
            facts[words] = f"source rows {', '.join(map(str, late.source_rows[:10]))}"
        for feature in report.implausible:
            rows_named = ", ".join(map(str, feature.source_rows))
            facts[f"tells too much: {feature.feature} about {feature.task}"] = (
                f"AUC {feature.auc:.4f}, source rows {rows_named}"
            )
        print_facts("", facts | {"result": "no leak found" if report.is_clean else "leaks found"})
    if not report.is_clean:
        raise typer.Exit(LEAKS_FOUND)


@data.command()
def append(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Experiment file whose training set grows.")],
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    as_json: Json = False,
) -> None:
    """Append new log files to a training set: a day of logs is a day of work.

    Reads the files of the impressions and events views that are new since the last build or append. What was built
    stays as it is, ids too; the version before is kept until it is pruned. The split may move forward.

    \b
    Example:
        recsys data append configs/experiment/din_simulated.yaml
        recsys data append configs/experiment/din_simulated.yaml --set data.split.test_end=2025-01-21T00:00:00Z
    """  # noqa: D301
    from feature_store.append import append_to_training_set
    from recsys.commands.terminal import print_facts, print_json, stage
    from training.experiment import load_experiment

    experiment, schema = load_experiment(config, overrides)
    with stage("append"):
        summary = append_to_training_set(schema, experiment.data)
    if as_json:
        print_json(summary.to_dict())
        return
    state = "no new impressions" if summary.skipped else f"appended in {summary.seconds:.1f} s"
    facts: dict[str, Any] = {f"{split} impressions": rows for split, rows in summary.rows.items()}
    facts |= {"outside all splits": summary.outside_split}
    facts |= {"users": summary.users, "users without attributes": summary.users_without_attributes}
    facts |= {"items": summary.items, "items without attributes": summary.items_without_attributes}
    facts |= {f"history {history}, events": events for history, events in summary.events.items()}
    facts |= {
        f"quarantined: {view}, {reason}": rows
        for view, reasons in summary.quarantined.items()
        for reason, rows in reasons.items()
    }
    facts |= {f"note {number}": note for number, note in enumerate(summary.notes, start=1)}
    print_facts(f"{experiment.data.training_set} ({state})", facts)


@data.command()
def prune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Experiment file.")],
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    keep: Annotated[int, typer.Option("--keep", help="Older versions that stay.", min=0)] = 1,
    as_json: Json = False,
) -> None:
    """Delete older versions of a training set; the set itself stays.

    \b
    Example:
        recsys data prune configs/experiment/din_simulated.yaml --keep 7
    """  # noqa: D301
    from feature_store.append import prune_versions
    from feature_store.workspace import versions_of
    from recsys.commands.terminal import print_facts, print_json
    from training.experiment import load_experiment

    training_set = load_experiment(config, overrides)[0].data.training_set
    gone = [str(path) for path in prune_versions(training_set, keep=keep)]
    left = [str(path) for path in versions_of(Path(training_set).resolve())]
    if as_json:
        print_json({"training_set": training_set, "pruned": gone, "kept": left})
        return
    print_facts(training_set, {"pruned": ", ".join(gone) or "nothing", "kept": ", ".join(left) or "nothing"})


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
