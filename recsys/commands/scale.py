"""``recsys scale``: an experiment at many sizes, and the curves through the results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.commands.options import ExperimentArgument, Json, Overrides


def scale(
    config: ExperimentArgument,
    vary: Annotated[
        list[str],
        typer.Option("--vary", metavar="A.B=V1,V2", help="A setting and its values; repeat for more settings."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the study; runs/NAME_scaling if not given.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds a size.")] = 1,
    grid: Annotated[
        bool, typer.Option("--grid/--one-at-a-time", help="All combinations, or each setting varied alone.")
    ] = False,
    target: Annotated[
        float | None, typer.Option(help="Recommend the cheapest size whose validation metric reaches this.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trials at a time; above 1 they run under Ray Tune.")] = 1,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    as_json: Json = False,
) -> None:
    """Study how a model scales: one epoch at each size, power laws with intervals, a plot, a recommendation.

    The training set must be built. Sizes are judged on the validation split. Run the same command again to go on with
    an interrupted study: finished trials are kept.

    \b
    Example:
        recsys scale configs/experiment/suan_simulated.yaml --vary model.num_layers=1,2,4 \\
            --vary training.data_fraction=0.01,0.03,0.1,0.3,1 --vary training.history_length=5,10,20,50 \\
            --seeds 3 --target 0.74 --workers 2
    """  # noqa: D301
    from recsys.commands.terminal import counting, print_facts, print_json, print_table, stage
    from training.console import quiet_libraries
    from training.experiment import load_experiment
    from training.scaling import Axis, run_study
    from training.scaling_report import described, study_sizes

    quiet_libraries()
    axes = [Axis.parse(text) for text in vary]
    folder = out or Path("runs") / f"{load_experiment(config, overrides)[0].name}_scaling"
    with stage(f"scale {config.stem}") as tell:
        study = run_study(
            config,
            axes,
            folder,
            seeds=seeds,
            grid=grid,
            target=target,
            workers=workers,
            overrides=overrides,
            advance=counting(tell, "trials"),
        )
    if as_json:
        print_json(study.to_json() | {"folder": str(folder)})
        return
    heads = ("size", study.metric, "sd", "seeds", "parameters", "history", "rows", "FLOPs/row", "train s")
    print_table(f"{study.name}: validation {study.metric} after one epoch", heads, study_sizes(study))
    laws = [
        (
            c.axis,
            *(
                ("not fitted", "", "", "", "")
                if c.law is None
                else (
                    c.x_name,
                    c.law.limit.value,
                    c.law.exponent.value,
                    f"[{c.law.exponent.low:.3g}, {c.law.exponent.high:.3g}]",
                    c.law.r2,
                )
            ),
        )
        for c in study.curves
    ]
    print_table("power laws, y = A - c x^-gamma", ("axis", "x", "A", "gamma", "95 %", "R2"), laws)
    facts = {"report": str(folder / "study.html"), "figures": str(folder / "study.json")}
    if study.recommendation is not None:
        chosen = study.recommendation.settings
        facts["cheapest for the target"] = "none of these sizes" if chosen is None else described(chosen)
    print_facts("", facts)
