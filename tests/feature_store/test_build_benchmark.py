from __future__ import annotations

import json

from benchmarks.build import run


def test_figures_of_a_small_build() -> None:
    figures = run(5_000, max_lengths=(5, 1_000), repeats=1)
    json.dumps(figures)
    assert figures["impressions"] >= 5_000
    assert figures["requests_and_impressions_are_the_same_bytes"] is True
    assert figures["bytes_per_impression_at_5"] == figures["bytes_per_impression_at_1000"]
    assert figures["copied_history_bytes_per_impression_at_5"] < figures["copied_history_bytes_per_impression_at_1000"]
    assert figures["copied_history_bytes_per_impression_at_5"] <= 5 * 8
    for length in (5, 1_000):
        rate = figures["impressions"] / figures[f"seconds_at_{length}"]
        assert abs(figures[f"rows_per_s_at_{length}"] / rate - 1) < 0.05
        assert figures[f"peak_memory_mib_at_{length}"] > figures["libraries_memory_mib"] > 0
    assert {"cpu", "cores", "memory_gib", "packages", "date"} <= set(figures["machine"])
    assert "polars" in figures["machine"]["packages"]
