"""``recsys simulate``: a click log whose true probabilities are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.commands.options import Json, Overrides

MIN_IMPRESSIONS, MAX_IMPRESSIONS = 1_000, 1_000_000_000
"""The bounds of the simulator's own configuration."""


def simulate(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of views to write.")] = Path("data/simulated"),
    impressions: Annotated[
        int, typer.Option(min=MIN_IMPRESSIONS, max=MAX_IMPRESSIONS, help="Impressions, a thousand to a billion.")
    ] = 200_000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds and sizes give equal files.")] = 0,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    as_json: Json = False,
) -> None:
    """Simulate a click log, with the true probability of every impression kept aside.

    \b
    Example:
        recsys simulate --impressions 200000 --seed 7 --output data/simulated
        recsys simulate --impressions 1000000 --set num_days=30 --set click_rate=0.05
    """  # noqa: D301
    import os

    from feature_store.datasets.simulator import SimulatorConfig
    from feature_store.datasets.simulator import simulate as write_simulation
    from recsys.commands.terminal import counting, print_facts, print_json, stage
    from recsys.config import apply_overrides, validate
    from recsys.files import check_can_write

    check_can_write(output, name="--output")
    values = apply_overrides({"num_impressions": impressions, "seed": seed}, overrides)
    config = validate(SimulatorConfig, values, source="simulate")
    with stage(f"simulate {config.num_impressions:,} impressions") as tell:
        summary = write_simulation(config, output, counting(tell, "impressions"), workers=os.cpu_count() or 1)
    if as_json:
        print_json({"output": str(output), **summary.to_dict()})
        return
    ceiling = summary.ceiling
    print_facts(
        f"{output}",
        {
            **summary.num_rows,
            "requests": summary.num_requests,
            "click rate": ceiling.click_rate,
            "best possible AUC": ceiling.auc,
            "best possible logloss": ceiling.logloss,
            "true probabilities": str(output / "truth.parquet"),
        },
    )
