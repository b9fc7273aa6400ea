"""Training sets built from the synthetic views, for tests of everything above the build."""

from __future__ import annotations

from pathlib import Path

from feature_store.build import DataConfig, build_training_set
from recsys.config import validate
from recsys.training_set import TrainingSet
from tests.synthetic import SPLIT, schema, write_views


def build_synthetic(folder: Path, *, num_requests: int = 200, seed: int = 0) -> TrainingSet:
    """Writes the synthetic views under ``folder`` and builds their training set."""
    write_views(folder / "views", num_requests=num_requests, seed=seed)
    data = validate(
        DataConfig,
        {"views": str(folder / "views"), "training_set": str(folder / "training_set"), "split": SPLIT},
        source="test",
    )
    build_training_set(schema(), data)
    return TrainingSet.open(folder / "training_set")
