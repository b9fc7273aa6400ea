from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from benchmarks.append import _by_day, run
from feature_store.datasets.simulator import SimulatorConfig, simulate

DAY = 86_400_000_000
VIEWS = ("before", "after")


def test_the_last_day_is_all_that_is_appended(tmp_path: Path) -> None:
    simulated = simulate(SimulatorConfig(num_impressions=2_000, num_days=4), tmp_path / "simulated")
    begin = simulated.first_time // DAY * DAY
    counts = _by_day(tmp_path, begin, 4)
    for log, order in (
        ("impressions", ["request_id", "item_id", "position"]),
        ("events", ["user_id", "time", "item_id"]),
    ):
        rows = pl.read_parquet(tmp_path / "simulated" / f"{log}.parquet")
        parts = {v: pl.concat(map(pl.read_parquet, sorted((tmp_path / v / f"{log}.parquet").iterdir()))) for v in VIEWS}
        assert parts["after"].sort(order).equals(rows.sort(order))
        assert parts["after"].height - parts["before"].height == counts[log] > 0
        new = parts["after"].tail(counts[log])
        assert parts["after"].head(parts["before"].height).equals(parts["before"])
        assert new["time"].to_physical().to_numpy().min() >= begin + 3 * DAY
        if log == "impressions":
            assert not set(new["request_id"]) & set(parts["before"]["request_id"])


@pytest.mark.slow
def test_figures_of_a_small_append() -> None:
    figures = run(4_000, num_days=4, repeats=1)
    json.dumps(figures)
    assert figures["days"] == 4
    for log in ("impressions", "events"):
        assert 0 < figures[f"appended_{log}"] < figures[log] / 2
    for kind in ("plain", "derived"):
        assert figures[f"{kind}_rows_are_the_same"] is True
        written = {way: figures[f"{kind}_{way}_bytes_written"] for way in ("append", "rebuild")}
        assert 0 < written["append"] < written["rebuild"]
        for way in written:
            assert figures[f"{kind}_{way}_seconds"] > 0
            assert figures[f"{kind}_{way}_cpu_seconds"] > 0
            assert figures[f"{kind}_{way}_peak_memory_mib"] > figures["libraries_memory_mib"] > 0
        ratio = figures[f"{kind}_rebuild_seconds"] / figures[f"{kind}_append_seconds"]
        assert figures[f"{kind}_times_as_fast_as_a_rebuild"] == pytest.approx(ratio, rel=0.05)
    assert figures["plain_carried_bytes"] == 0 < figures["derived_carried_bytes"]
    assert "polars" in figures["machine"]["packages"]
