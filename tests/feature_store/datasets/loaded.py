"""Builds the training set of a loaded data set with its own schema and documented split."""

from __future__ import annotations

from pathlib import Path

from feature_store.build import BuildSummary, DataConfig, SplitConfig, build_training_set
from feature_store.datasets import DATASETS, DatasetSummary
from recsys.schema import Schema

ROOT = Path(__file__).parents[3]


def build(summary: DatasetSummary, views: Path) -> BuildSummary:
    """The documented split is the one in the summary."""
    schema = Schema.load(ROOT / DATASETS[summary.name].schema_file)
    data = DataConfig(
        views=str(views), training_set=str(views.with_name("training_set")), split=SplitConfig(**summary.split)
    )
    return build_training_set(schema, data)
