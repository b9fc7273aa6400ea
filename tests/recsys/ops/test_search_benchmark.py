from __future__ import annotations

import json

from benchmarks.search import run


def test_figures_of_a_small_search() -> None:
    figures = run((40,), (1, 3), (16, 8), top_k=5, table_rows=100, rounds=2)
    json.dumps(figures)
    for number in (1, 3):
        for part in ("gather", "scores", "search", "stage"):
            at = f"at_40_events_{number}_candidates_width"
            wide, narrow = figures[f"{part}_us_{at}_16"], figures[f"{part}_us_{at}_8"]
            assert abs(figures[f"ratio_{part}_{at}_8"] - narrow / wide) < 0.05
    assert figures["half_width_within_bar"].endswith("of 2")
