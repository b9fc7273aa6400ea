"""The benchmark of all models on one log, at a small size."""

from pathlib import Path

import pytest

from benchmarks import models

pytestmark = pytest.mark.slow


def test_it_trains_resumes_and_tells_the_distance_to_the_ceiling(tmp_path: Path) -> None:
    settings = {"impressions": 4000, "models": ["lr", "lightsuan_distilled"], "epochs": 1, "threads": 1}
    models.run(tmp_path, seeds=[1], **settings)  # type: ignore[arg-type]
    first = (tmp_path / "runs" / "lr" / "seed-1" / "summary.json").stat()
    found = models.run(tmp_path, seeds=[1, 2], **settings)  # type: ignore[arg-type]
    assert (tmp_path / "runs" / "lr" / "seed-1" / "summary.json").stat().st_mtime_ns == first.st_mtime_ns
    assert set(found["models"]) == {"lr", "lightsuan_distilled"}
    for row in found["models"].values():
        assert len(row["auc"]) == 2
        assert row["to_ceiling"] == pytest.approx(found["ceiling"]["auc"] - sum(row["auc"]) / 2)
        assert row["to_ceiling"] > 0
        assert row["scoring_ms"] > 0
        assert row["step_ms"] > 0
    teacher = found["models"]["lightsuan_distilled"]
    assert teacher["table_parameters"] < 2 * found["models"]["lr"]["table_parameters"] * 8, "the student alone counts"
    lines = (tmp_path / "models.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:3]] == ["| true probabilities"]
    assert sum(line.startswith("| ") for line in lines) == 5
