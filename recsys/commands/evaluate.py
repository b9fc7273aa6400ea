"""``recsys evaluate``: metrics of a trained run on a split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from recsys.commands.options import Json


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.")],
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Which part to score.")] = "test",
    as_json: Json = False,
) -> None:
    """Evaluate the best checkpoint of a run: AUC, GAUC, logloss, NE, ECE.

    \b
    Example:
        recsys evaluate runs/din_kuairand
        recsys evaluate runs/din_kuairand --split validation --json
    """  # noqa: D301
    from recsys.commands.terminal import counting, print_json, print_metrics, stage
    from training.console import quiet_libraries
    from training.evaluate import evaluate as metrics_of
    from training.evaluate import plain, predict
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
    if as_json:
        print_json({"run": str(run), "split": split, "tasks": tasks})
        return
    print_metrics(f"{trained.experiment.name}, {split} split", tasks)
