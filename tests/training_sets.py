"""Training sets built from the synthetic views, for tests of everything above the build."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from feature_store.append import append_to_training_set
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


def write_days(folder: Path, *, num_requests: int = 200) -> Path:
    """The synthetic views with a file a day and log under ``folder / "days"``; users and items as they are.

    Returns:
        The folder of views, whose logs are empty folders yet.
    """
    whole, views = folder / "whole", folder / "views"
    write_views(whole, num_requests=num_requests)
    for log in ("impressions", "events"):
        rows = pl.read_parquet(whole / f"{log}.parquet")
        number = (rows["time"] - 1_700_000_000_000_000) // 86_400_000_000
        (views / f"{log}.parquet").mkdir(parents=True)
        (folder / "days" / log).mkdir(parents=True)
        for day in range(10):
            rows.filter(number == day).write_parquet(folder / "days" / log / f"day-{day}.parquet")
    for entity in ("users", "items"):
        (whole / f"{entity}.parquet").rename(views / f"{entity}.parquet")
    return views


def arrive(folder: Path, days: range) -> None:
    """Moves days that :func:`write_days` wrote into the views."""
    for log in ("impressions", "events"):
        for day in days:
            file = folder / "days" / log / f"day-{day}.parquet"
            file.rename(folder / "views" / f"{log}.parquet" / file.name)


def append_synthetic(folder: Path, *, num_requests: int = 200) -> TrainingSet:
    """A training set of the first eight days, to which the last two were appended one by one."""
    views = write_days(folder, num_requests=num_requests)
    mapping = {"views": str(views), "training_set": str(folder / "training_set"), "split": SPLIT}
    data = validate(DataConfig, mapping, source="test")
    arrive(folder, range(8))
    build_training_set(schema(), data)
    for day in (8, 9):
        arrive(folder, range(day, day + 1))
        append_to_training_set(schema(), data)
    return TrainingSet.open(folder / "training_set")
