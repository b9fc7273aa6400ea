"""Floor and ceiling: by the formula, in the order of the split, from the training period only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.errors import SchemaError, SourceError
from recsys.training_set import ITEM_ROW, SOURCE_ROW, TrainingSet, label_column
from tests.training_sets import build_synthetic
from training.baselines import item_popularity, true_probabilities


@pytest.fixture(scope="module")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build_synthetic(tmp_path_factory.mktemp("baselines"))


def test_popularity_is_the_smoothed_rate_of_the_training_period(training_set: TrainingSet) -> None:
    task = training_set.schema.tasks[0].name
    shown = training_set.split("train").impressions
    clicks: dict[int, float] = {}
    count: dict[int, int] = {}
    for item, label in zip(shown.array(ITEM_ROW).tolist(), shown.array(label_column(task)).tolist(), strict=True):
        if label == label:
            clicks[item], count[item] = clicks.get(item, 0.0) + label, count.get(item, 0) + 1
    rate = sum(clicks.values()) / sum(count.values())
    given = item_popularity(training_set, "test", task, prior_impressions=5.0)
    items = training_set.split("test").impressions.array(ITEM_ROW).tolist()
    expected = [
        rate if item == 0 else (clicks.get(item, 0.0) + 5.0 * rate) / (count.get(item, 0) + 5.0) for item in items
    ]
    assert len(given) == training_set.split("test").num_rows > 0
    np.testing.assert_allclose(given, expected, rtol=1e-12)
    assert len(set(given.tolist())) > 5


def test_popularity_of_an_unknown_task_names_the_known(training_set: TrainingSet) -> None:
    with pytest.raises(SchemaError, match=r"did you mean|known names"):
        item_popularity(training_set, "test", "no_such_task")


def truth_file(folder: Path, num_rows: int) -> np.ndarray:
    """Writes ``truth.parquet`` as a folder of two parts whose names sort against the order of writing."""
    values = np.random.default_rng(5).random(num_rows)
    parts = folder / "truth.parquet"
    parts.mkdir()
    cut = num_rows // 3
    pq.write_table(pa.table({"probability": values[cut:]}), parts / "part-00001.parquet")
    pq.write_table(pa.table({"probability": values[:cut]}), parts / "part-00000.parquet")
    return values


def test_true_probabilities_follow_the_source_rows(training_set: TrainingSet, tmp_path: Path) -> None:
    rows = {s: training_set.split(s).impressions.array(SOURCE_ROW) for s in ("train", "validation", "test")}
    values = truth_file(tmp_path, 1 + max(int(r.max()) for r in rows.values()))
    for split, source_row in rows.items():
        given = true_probabilities(tmp_path / "truth.parquet", training_set, split)
        np.testing.assert_array_equal(given, [values[row] for row in source_row.tolist()])


def test_a_truth_of_another_simulation_is_refused(training_set: TrainingSet, tmp_path: Path) -> None:
    truth_file(tmp_path, 10)
    with pytest.raises(SourceError, match="a row for each impression"):
        true_probabilities(tmp_path / "truth.parquet", training_set, "test")


def test_a_truth_without_probabilities_is_refused(training_set: TrainingSet, tmp_path: Path) -> None:
    pq.write_table(pa.table({"p": [0.5]}), tmp_path / "truth.parquet")
    with pytest.raises(SourceError, match="column 'probability'"):
        true_probabilities(tmp_path / "truth.parquet", training_set, "test")


def test_a_missing_truth_is_named(training_set: TrainingSet, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"truth\.parquet does not exist"):
        true_probabilities(tmp_path / "truth.parquet", training_set, "test")
