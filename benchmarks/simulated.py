"""Simulated training sets for benchmarks, with histories as long as a benchmark asks for."""

from __future__ import annotations

from pathlib import Path

from recsys.config import load_yaml, validate
from recsys.schema import Schema
from recsys.training_set import TrainingSet

ROOT = Path(__file__).resolve().parents[1]


def simulated_training_set(
    scratch: Path, *, num_impressions: int, history_length: int, max_candidates: int, seed: int
) -> TrainingSet:
    """Simulates users with about ``history_length`` clicks before their first request, and builds their training set.

    Args:
        scratch: folder for views and training set.
        num_impressions: about so many.
        history_length: mean over users.
        max_candidates: of a request, at least a fifth of it each; 1 makes a plain impression log.
        seed: of the simulator.
    """
    from feature_store.build import DataConfig, build_training_set
    from feature_store.datasets.simulator import SimulatorConfig, simulate

    config = SimulatorConfig(
        num_impressions=num_impressions,
        num_users=max(num_impressions // 200, 10),
        warm_up_clicks_per_user=float(history_length),
        min_candidates=max(max_candidates // 5, 1),
        max_candidates=max_candidates,
        seed=seed,
    )
    simulated = simulate(config, scratch / "views")
    path = ROOT / "configs" / "schema" / "simulated.yaml"
    schema = validate(Schema, load_yaml(path), source=str(path))
    first, last = simulated.first_time, simulated.last_time
    span = last + 1 - first
    split = {"train_end": first + span * 8 // 10, "validation_end": first + span * 9 // 10, "test_end": last + 1}
    settings = {"views": str(scratch / "views"), "training_set": str(scratch / "training_set"), "split": split}
    build_training_set(schema, validate(DataConfig, settings, source="benchmark"))
    return TrainingSet.open(scratch / "training_set")


def with_max_length(training_set: TrainingSet, length: int) -> TrainingSet:
    """The same files, read with another maximum history length: a history on disk is a reference."""
    histories = tuple(h.model_copy(update={"max_length": length}) for h in training_set.schema.histories)
    schema = training_set.schema.model_copy(update={"histories": histories})
    return TrainingSet(training_set.folder, training_set.manifest, schema, training_set.encoder)
