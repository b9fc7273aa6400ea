"""``recsys sweep``: several experiments with several seeds, as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.commands.options import Json, Overrides


def sweep(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="Experiment files, on one training set.")],
    folder: Annotated[Path, typer.Option("--folder", help="Folder of the sweep; holds every run and the table.")],
    seeds: Annotated[str, typer.Option(metavar="1,2,3", help="Seeds, each for every experiment.")] = "1,2,3",
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="Experiment that RelaImpr is over; the first if not given.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of each run; above 1 they run under Ray.")] = 1,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    as_json: Json = False,
) -> None:
    """Train several experiments with several seeds; resumes where it stopped; writes sweep.md and sweep.json.

    \b
    Example:
        recsys sweep configs/experiment/din_kuairand*.yaml --folder runs/din_ablations --base din_kuairand_base
        recsys sweep a.yaml b.yaml --folder runs/ab --seeds 1,2,3,4,5 --set training.num_threads=1
    """  # noqa: D301
    from recsys.commands.terminal import messages, print_json, print_table
    from recsys.errors import ConfigError
    from training.experiment import load_experiment
    from training.sweep import Arm, run_sweep

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError as err:
        raise ConfigError(f"--seeds must be whole numbers with commas between, got {seeds!r}") from err
    if min(numbers) < 0:
        raise ConfigError(f"--seeds must be at least 0, got {min(numbers)}")
    arms = [Arm(*load_experiment(config, overrides)) for config in configs]
    console = messages()
    table = run_sweep(arms, numbers, folder, base=base, workers=workers, say=console.print)
    if as_json:
        print_json({"folder": str(folder)} | table)
        return
    for task in next(iter(table["arms"].values()))["validation"]:
        rows = [
            [
                name,
                arm["validation"][task]["auc"]["mean"],
                arm["test"].get(task, {}).get("auc", {}).get("mean"),
                arm["test"].get(task, {}).get("auc", {}).get("sd"),
                arm["rela_impr"].get(task, {}).get("auc"),
                arm["test"].get(task, {}).get("gauc", {}).get("mean"),
            ]
            for name, arm in table["arms"].items()
        ]
        columns = ["experiment", "validation AUC", "test AUC", "sd", f"RelaImpr over {table['base']}, %", "test GAUC"]
        print_table(task, columns, rows)
    console.print(f"table: {folder / 'sweep.md'}")
