"""``recsys scale``: an experiment at many sizes, and the curves through the results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.commands.options import ExperimentArgument, Json, Overrides

if TYPE_CHECKING:
    from training.scaling import Curve


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
        float | None, typer.Option(help="Recommend the cheapest size whose validation metric is this or better.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trials at a time; above 1 they run under Ray Tune.")] = 1,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    as_json: Json = False,
) -> None:
    """Study how a model scales: one epoch at each size, power laws with intervals, a plot, a recommendation.

    The training set must be built. Sizes are judged on the validation split. Run the same command again to go on with
    an interrupted study: finished trials are kept. A power law takes four different sizes of a setting, the experiment
    as given among them.

    \b
    Example:
        recsys scale configs/experiment/suan_simulated.yaml --vary model.num_layers=1,2,3,4 \\
            --vary training.data_fraction=0.01,0.03,0.1,0.3,1 --vary training.history_length=5,10,20,50 \\
            --seeds 3 --target 0.74 --workers 2
    """  # noqa: D301
    from recsys.commands.terminal import counting, messages, print_facts, print_json, print_table, stage
    from training.console import quiet_libraries
    from training.experiment import load_experiment
    from training.scaling import Axis, run_study, short_names
    from training.scaling_report import described, doubts, formula, needs, study_sizes

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
            warn=lambda words: messages().print(words, markup=False, soft_wrap=True),
        )
    if as_json:
        print_json(study.to_json() | {"folder": str(folder)})
        return
    title = f"{study.name}: validation {study.metric} after one epoch, {seeds} seed{'s' * (seeds > 1)} a size"
    heads = ("size", "mean", "sd", "params", "history", "rows", "FLOPs/row", "train s")
    print_table(title, heads, [(*row[:3], *row[4:]) for row in study_sizes(study)])
    axis = short_names([curve.axis for curve in study.curves])
    laws = [(axis[curve.axis], *_law_row(curve)) for curve in study.curves]
    print_table(f"power laws, {formula(study)}", ("axis", "x", "A", "gamma", "95 %", "R2"), laws)
    print_facts("", doubts(study))
    facts = {"report": str(folder / "study.html"), "figures": str(folder / "study.json")}
    if study.recommendation is not None:
        chosen = study.recommendation.settings
        facts["cheapest for the target"] = "none of these sizes" if chosen is None else described(chosen)
        if chosen is None:
            facts |= {f"by the curve of {key}": words for key, words in needs(study).items()}
    print_facts("", facts)


def _law_row(curve: Curve) -> tuple[Any, ...]:
    law = curve.law
    if law is None:
        return (curve.x_name, "not fitted", None, None, None)
    if law.not_identified is not None:
        return (curve.x_name, "not identified", None, None, law.r2)
    interval = f"[{law.exponent.low:.3g}, {law.exponent.high:.3g}]"
    return (curve.x_name, law.limit.value, law.exponent.value, interval, law.r2)
