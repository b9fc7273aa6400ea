from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.build_peers import ENVIRONMENT, HISTORY, LABEL, _flatten, _pandas, run
from feature_store.datasets.simulator import SimulatorConfig, simulate


@pytest.mark.slow
def test_figures_without_fuxictr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    figures = run(3_000, max_length=10)
    assert "left out" in figures["fuxictr"]
    for name in ("recsys", "pandas"):
        assert figures[f"{name}_rows_per_s"] > 0
        assert figures[f"{name}_peak_memory_mib"] > 50
    ratio = figures["pandas_seconds"] / figures["recsys_seconds"]
    assert figures["times_as_fast_as_pandas"] == pytest.approx(ratio, rel=0.1)


def test_pandas_finds_the_histories_that_a_double_loop_finds(tmp_path: Path) -> None:
    summary = simulate(SimulatorConfig(num_impressions=1_000, warm_up_clicks_per_user=3.0), tmp_path / "views")
    middle = (summary.first_time + summary.last_time) // 2
    span = summary.last_time - summary.first_time
    options = {"views": str(tmp_path / "views"), "folder": str(tmp_path), "max_length": 10}
    options |= {"train_end": middle, "validation_end": middle + span // 4, "test_end": summary.last_time + 1}
    _flatten(options)
    _pandas(options)
    views = {n: pd.read_parquet(tmp_path / "views" / f"{n}.parquet") for n in ("impressions", "events")}
    clicks = views["events"][views["events"]["type"] == "click"]
    train = views["impressions"][views["impressions"]["time"] < middle]
    flat = pd.read_parquet(tmp_path / "flat_train.parquet")
    encoded = pd.read_parquet(tmp_path / "pandas_train.parquet")
    assert len(flat) == len(train) == len(encoded)
    lengths = []
    for (_, row), text, ids in zip(train.iterrows(), flat[HISTORY], encoded[HISTORY], strict=True):
        past = clicks[(clicks["user_id"] == row["user_id"]) & (clicks["time"] < row["time"])]
        expected = past.sort_values("time", kind="stable")["item_id"].tolist()[-10:]
        assert [int(item) for item in text.split("^") if item] == expected
        assert len(ids) == len(expected)
        lengths.append(len(expected))
    assert max(lengths) == 10
    assert min(lengths) < 10
    assert encoded[LABEL].tolist() == train[LABEL].astype(float).tolist()
