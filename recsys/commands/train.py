"""``recsys train``: a training set to a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.commands.options import ExperimentArgument, Json, Overrides


def train(
    config: ExperimentArgument,
    run: Annotated[Path | None, typer.Option("--run", help="Folder of the run; runs/NAME if not given.")] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; above 1 they run under Ray. A run may go on with another number.")
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from the run's last checkpoint, or start again.")
    ] = True,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the training set with its checksums, once after it was last touched, or never.",
        ),
    ] = True,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    as_json: Json = False,
) -> None:
    """Train the model of an experiment; resumes where an interrupted run stopped.

    \b
    Example:
        recsys train configs/experiment/din_kuairand.yaml --run runs/din_kuairand
        recsys train configs/experiment/din_kuairand.yaml --set training.seed=2 --run runs/seed2
        recsys train configs/experiment/din_kuairand.yaml --workers 2
    """  # noqa: D301
    from recsys.commands.terminal import print_facts, print_json, print_metrics
    from training.experiment import load_experiment
    from training.run import RunFolder
    from training.tracking import tracked_run
    from training.trainer import train as train_run

    experiment, schema = load_experiment(config, overrides)
    folder = RunFolder(run or Path("runs") / experiment.name)
    result = train_run(experiment, schema, folder.path, resume=resume, workers=workers, verify=verify)
    tracked = tracked_run(folder.path)
    places = {
        "run": str(folder.path),
        "report": str(folder.report) if folder.report.is_file() else None,
        "mlflow": None if tracked is None else {"tracking_uri": tracked[0], "run_id": tracked[1]},
    }
    if as_json:
        print_json(result.summary() | places)
        return
    splits = {"validation": result.validation} | ({} if result.test is None else {"test": result.test})
    print_metrics(
        f"{experiment.name}: epoch {result.best_epoch} of {result.epochs}, best by validation {result.selected_by}",
        {f"{split} {task}": metrics for split, tasks in splits.items() for task, metrics in tasks.items()},
    )
    facts = {"run": places["run"], "report": places["report"] or "not written"}
    if tracked is not None:
        facts["MLflow"] = f"{tracked[0]}  run {tracked[1]}"
    print_facts("", facts | {"speed": f"{result.train_rows_per_s:,.0f} rows/s"})
