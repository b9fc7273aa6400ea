"""``recsys evaluate``: metrics of a trained run on a split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from recsys.commands.options import Json


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.")],
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Which part to score.")] = "test",
    base: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|popularity",
            help="Compare with another run on the same training set, or with the items' click rates: adds RelaImpr.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate the best checkpoint of a run: AUC, GAUC, logloss, NE, ECE; with a base, RelaImpr of AUC and GAUC.

    \b
    Example:
        recsys evaluate runs/din_kuairand
        recsys evaluate runs/din_kuairand --split validation --json
        recsys evaluate runs/din_kuairand --base popularity
    """  # noqa: D301
    from recsys.commands.terminal import counting, print_json, print_metrics, print_table, stage
    from training.console import quiet_libraries
    from training.evaluate import base_metrics, plain, predict, relative_improvements
    from training.evaluate import evaluate as metrics_of
    from training.run import TrainedRun

    quiet_libraries()
    trained = TrainedRun.load(run)
    training_set = trained.training_set()
    with stage(f"score {split}") as tell:
        count, total, done = counting(tell, "rows"), training_set.split(split).num_rows, 0

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            count(done, total)

        config = trained.experiment.training
        predictions = predict(
            trained.model,
            training_set,
            split,
            config.evaluation_batch_size,
            history_length=config.history_length,
            advance=advance,
        )
    tasks = plain(metrics_of(predictions))
    of_base = None
    if base is not None:
        with stage(f"score {base}"):
            of_base = plain(base_metrics(base, training_set, predictions, split, config.evaluation_batch_size))
    relative = None if of_base is None else relative_improvements(tasks, of_base)
    if as_json:
        compared = {} if of_base is None else {"base": base, "base_tasks": of_base, "rela_impr": relative}
        print_json({"run": str(run), "split": split, "tasks": tasks} | compared)
        return
    name = trained.experiment.name
    if of_base is None or relative is None:
        print_metrics(f"{name}, {split} split", tasks)
        return
    pairs = {f"{who} {task}": metrics[task] for task in tasks for who, metrics in ((name, tasks), (base, of_base))}
    print_metrics(f"{name} and {base}, {split} split", pairs)
    rows = [[task, found["auc"], found["gauc"], tasks[task]["gauc_users"]] for task, found in relative.items()]
    print_table(f"RelaImpr over {base}, percent", ("", "AUC", "GAUC", "users of GAUC"), rows)
