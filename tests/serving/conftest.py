"""A small training set, a model whose tables are far from zero, and its artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.batch import Batch
from recsys.models import DINConfig, RankingModel, build_model
from recsys.training_set import TrainingSet
from serving.scorer import Scorer, sigmoid
from tests.training_sets import build_synthetic
from training.export import export_artifact

MODEL = DINConfig(embedding_dim=8, attention_hidden=(12,), hidden=(16, 8))


@dataclass(frozen=True)
class World:
    """Everything that the tests of serving read; none of them writes to it."""

    folder: Path
    training_set: TrainingSet
    model: RankingModel
    artifact: Path

    @property
    def impressions(self) -> Path:
        return self.folder / "views" / "impressions.parquet"

    def whole(self, split: str) -> Batch:
        return Batch.from_training_set(self.training_set, split, slice(None))

    def expected(self, split: str) -> np.ndarray:
        """Probabilities (N, T) that the trained model gives, in the order of the split."""
        with torch.inference_mode():
            return sigmoid(self.model(self.whole(split)).numpy())


def make_model(training_set: TrainingSet, seed: int = 0) -> RankingModel:
    """An untrained model whose every weight matters to the score: scores differ by far more than rounding."""
    torch.manual_seed(seed)
    model = build_model(MODEL, training_set.schema, training_set.encoder.table_sizes).eval()
    with torch.no_grad():
        for parameter in model.lookup.parameters():
            parameter.normal_(0.0, 0.5)
    return model


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    training_set = build_synthetic(folder, num_requests=120, seed=3)
    model = make_model(training_set)
    export_artifact(model, training_set, folder / "artifact", name="tiny", compile=False, snapshot="all")
    return World(folder, training_set, model, folder / "artifact")


@pytest.fixture(scope="session")
def scorer(world: World) -> Scorer:
    return Scorer.load(world.artifact)
