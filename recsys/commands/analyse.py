"""``recsys analyse``: what attention and representation vectors do in a trained DARE or TWIN."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recsys.commands.options import Json

analyse = typer.Typer(no_args_is_help=True, help="Look into a trained DARE or TWIN: gradients, attention, clusters.")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.")]
SplitName = Annotated[Literal["train", "validation", "test"], typer.Option("--split", help="Which part to look at.")]
Task = Annotated[str | None, typer.Option(help="Whose label; the schema's first task if not given.")]
HistoryName = Annotated[str | None, typer.Option("--history", help="Which history; the first if not given.")]
MaxRows = Annotated[int, typer.Option(min=1, help="Rows to look at, from the split's start.")]


@analyse.command()
def gradients(
    run: Run,
    batches: Annotated[int, typer.Option(min=1, help="Of the training split, in its order.")] = 50,
    as_json: Json = False,
) -> None:
    """Which role would move a table, attention or representation, and do they agree?

    \b
    Example:
        recsys analyse gradients runs/twin_kuairand
    """  # noqa: D301
    from recsys.commands.terminal import print_json, print_table, stage
    from training.analysis import as_json as plain
    from training.analysis import batches_of, role_gradients

    trained, training_set = _opened(run)
    training = trained.experiment.training
    with stage("gradients"):
        found = role_gradients(
            trained.model,
            trained.experiment.model,
            trained.schema,
            batches_of(
                training_set,
                "train",
                training.batch_size,
                limit=batches,
                history_length=training.history_length,
            ),
            training.task_weights,
        )
    if as_json:
        print_json({"run": str(run), "tables": {table: plain(value) for table, value in found.items()}})
        return
    print_table(
        f"{trained.experiment.name}: gradients of attention and of representation (values), and conflicts",
        ("table", "attention", "values", "ratio", "steps <0", "rows <0", "cosine"),
        [
            (
                table,
                _told(g.attention_norm, ".3g"),
                _told(g.representation_norm, ".3g"),
                _told(g.ratio, ".2f"),
                _told(g.conflicting_steps, ".1%"),
                _told(g.conflicting_rows, ".1%"),
                _told(g.cosine, ".3f"),
            )
            for table, g in found.items()
        ],
    )


def _told(value: float, form: str) -> str:
    """A figure; a dash where there is none, for want of events."""
    return "-" if value != value else format(value, form)


@analyse.command()
def attention(
    run: Run,
    feature: Annotated[str, typer.Option(help="The history's attribute that is the category.")],
    split: SplitName = "test",
    task: Task = None,
    history: HistoryName = None,
    places: Annotated[int, typer.Option(min=1, help="Newest events to look at.")] = 20,
    max_rows: MaxRows = 200_000,
    min_rows: Annotated[int, typer.Option(min=2, help="Of a category of candidates.")] = 200,
    min_pairs: Annotated[int, typer.Option(min=1, help="Events of a category at a place.")] = 20,
    as_json: Json = False,
) -> None:
    """Do learnt scores rank events as mutual information with the label does? NDCG.

    \b
    Example:
        recsys analyse attention runs/dare_kuairand --feature duration
    """  # noqa: D301
    from recsys.commands.terminal import print_facts, print_json, stage
    from training.analysis import as_json as plain
    from training.analysis import attention_accuracy, scored_rows

    trained, training_set = _opened(run)
    with stage("attention"):
        rows = scored_rows(
            trained.model,
            training_set,
            split,
            task=_task(trained, task),
            history=history or trained.schema.histories[0].name,
            feature=feature,
            places=places,
            max_rows=max_rows,
            history_length=trained.experiment.training.history_length,
        )
        found = plain(
            attention_accuracy(
                rows.target, rows.events, rows.scores, rows.labels, min_rows=min_rows, min_pairs=min_pairs
            )
        )
    if as_json:
        print_json({"run": str(run), "split": split, **found})
        return
    print_facts(f"{trained.experiment.name}, {split} split", found)


@analyse.command()
def discriminability(
    run: Run,
    split: SplitName = "test",
    task: Task = None,
    history: HistoryName = None,
    clusters: Annotated[
        list[int] | None,
        typer.Option(min=2, help="How many, given once or more; if not given, 2 to 1,000, at most as many as rows."),
    ] = None,
    max_rows: MaxRows = 100_000,
    as_json: Json = False,
) -> None:
    """How much does the cluster of the pooled history tell about the label? Bits.

    \b
    Example:
        recsys analyse discriminability runs/dare_kuairand --clusters 10 --clusters 100
    """  # noqa: D301
    from recsys.commands.terminal import print_json, print_table, stage
    from training.analysis import categories_of, cluster, information_of_clusters, scored_rows

    trained, training_set = _opened(run)
    name = history or trained.schema.histories[0].name
    with stage("discriminability") as tell:
        rows = scored_rows(
            trained.model,
            training_set,
            split,
            task=_task(trained, task),
            history=name,
            feature=categories_of(trained.schema, name)[0],
            places=1,
            max_rows=max_rows,
            history_length=trained.experiment.training.history_length,
        )
        found = []
        for number in _numbers_of_clusters(clusters, len(rows.labels)):
            tell(f"{number} clusters")
            bits = information_of_clusters(cluster(rows.pooled, number), rows.labels)
            found.append({"clusters": number, "bits": bits})
    if as_json:
        print_json({"run": str(run), "split": split, "rows": len(rows.labels), "clusters": found})
        return
    print_table(
        f"{trained.experiment.name}, {split} split, {len(rows.labels):,} rows: information of the pooled history about "
        "the label",
        ("clusters", "bits"),
        [(f["clusters"], f"{f['bits']:.5f}") for f in found],
    )


def _numbers_of_clusters(given: list[int] | None, num_rows: int) -> list[int]:
    """Those asked for, or the usual ones that the rows are enough for."""
    from recsys.errors import ConfigError, DataError

    if num_rows < 2:
        raise DataError(f"there must be 2 rows to cluster, got {num_rows}", hint="look at another --split")
    if not given:
        return [number for number in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if number <= num_rows]
    if max(given) > num_rows:
        raise ConfigError(
            f"--clusters must be at most {num_rows:,}, the rows that are looked at, got {max(given):,}",
            hint="look at more rows with --max-rows or another --split, or ask for fewer clusters",
        )
    return given


def _opened(run: Path) -> tuple[Any, Any]:
    from training.console import quiet_libraries
    from training.run import TrainedRun

    quiet_libraries()
    trained = TrainedRun.load(run)
    return trained, trained.training_set()


def _task(trained: Any, task: str | None) -> str:
    from recsys.errors import ConfigError

    names = [t.name for t in trained.schema.tasks]
    if task is not None and task not in names:
        raise ConfigError(f"--task must be one of {', '.join(names)}, got {task!r}")
    return task or str(names[0])
