"""One small training set for all tests of training, and experiments over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recsys.config import validate
from recsys.training_set import TrainingSet
from tests.synthetic import SPLIT
from tests.training_sets import build_synthetic
from training.experiment import ExperimentConfig

MakeExperiment = Callable[..., ExperimentConfig]


@pytest.fixture(scope="session")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """About 1,800 impressions in 600 requests."""
    return build_synthetic(tmp_path_factory.mktemp("set"), num_requests=600)


@pytest.fixture(scope="session")
def make_experiment(training_set: TrainingSet) -> MakeExperiment:
    """Builds an experiment over the small training set; keywords replace settings of training."""

    def make(
        *, tracking: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **training: Any
    ) -> ExperimentConfig:
        folder = training_set.folder
        settings = {"epochs": 2, "batch_size": 64, "num_threads": 1, "device": "cpu", **training}
        return validate(
            ExperimentConfig,
            {
                "name": "tiny",
                "schema_file": "schema.yaml",
                "data": {"views": str(folder.parent / "views"), "training_set": str(folder), "split": SPLIT},
                "model": {"kind": "din", "embedding_dim": 4, "hidden": [8], "attention_hidden": [4], **(model or {})},
                "training": settings,
                "tracking": tracking or {"enabled": False},
            },
            source="tiny",
        )

    return make


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny"
