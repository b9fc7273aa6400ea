"""``recsys demo``: the whole platform, once, on simulated data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.commands.options import Json

if TYPE_CHECKING:
    from recsys.commands.demo_stages import DemoResult


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of everything that the demo writes.")] = Path(
        "runs/demo"
    ),
    impressions: Annotated[int, typer.Option(min=10_000, help="Impressions to simulate.")] = 200_000,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs, at most.")] = 3,
    as_json: Json = False,
) -> None:
    """Run everything once on simulated data: a trained, exported, served model in under three minutes.

    What an earlier run of the same size left in the folder is used again; an interrupted one is gone on with.

    \b
    Example:
        recsys demo
        recsys demo --impressions 1000000 --epochs 4 --output runs/big
    """  # noqa: D301
    from recsys.commands.terminal import messages, print_json, stage

    with stage("load the libraries"):
        from recsys.commands.demo_stages import run_demo
    result = run_demo(output, impressions=impressions, epochs=epochs)
    messages().print()
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)


def _show(result: DemoResult) -> None:
    from recsys.commands.terminal import print_facts, print_table

    print_table(
        f"One request over HTTP: {result.num_candidates} candidates of user {result.user}, {result.latency_ms:.1f} ms",
        ("place", "item", "probability", "true probability", "clicked"),
        [
            (str(place + 1), str(c.item), c.probability, c.true_probability, "yes" if c.clicked else "no")
            for place, c in enumerate(result.top_candidates)
        ],
    )
    scorers: list[tuple[str, Mapping[str, Any], int | None, float | None]] = [
        ("true probabilities (ceiling)", result.metrics("ceiling"), None, None),
        *((m.name, m.metrics, m.network_parameters, m.scoring_ms) for m in result.models),
        ("item popularity (floor)", result.metrics("floor"), None, None),
    ]
    print_table(
        f"The test period, {result.scorers['model'].num_rows:,} impressions that no stage has learnt from",
        ("", "AUC", "GAUC", "logloss", "ECE", "weights", "ms"),
        [
            (name, *(values[c] for c in ("auc", "gauc", "logloss", "ece")), size, ms)
            for name, values, size, ms in scorers
        ],
    )
    note = f"The artifact is {result.model_name}'s. Weights: without tables. Milliseconds: the network alone, "
    print_facts("", {"note": note + f"one thread, a request of {result.num_candidates} candidates."})
    tracked = "not tracked" if result.mlflow is None else f"{result.mlflow[0]}  run {result.mlflow[1]}"
    print_facts(
        "",
        {
            "artifact": result.artifact,
            "scores": result.scores,
            "report": result.report,
            "MLflow run": tracked,
            "serve it": f"recsys serve {result.artifact}",
        },
    )
