"""Scoring one request: the scorer against an eager model that copies the history to every candidate.

Both start from the same ids, with the same weights and one thread, and give the same probabilities. They are timed in
turns, so that whatever else the machine does falls on both; the ratio of the medians is the figure to trust. The bar
is a quarter.

The model is DIN as its defaults make it, on the simulator's schema: an event is an item, its category and its tags.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine_record
from recsys.batch import Batch
from recsys.embedded import Embedded
from recsys.models import RankingModel, build_model
from recsys.models.din import DIN, DINConfig
from recsys.predictor import Predictor
from recsys.schema import Schema
from recsys.training_set import TrainingSet
from serving.scorer import Scorer, sigmoid

ROOT = Path(__file__).resolve().parents[1]
BAR = 0.25
"""The scorer may take at most so much of the eager model's time."""


def run(
    num_candidates: int = 500, history_length: int = 100, *, rounds: int = 9, calls: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Exports a DIN and times one request.

    Args:
        num_candidates: of the request.
        history_length: events of its history.
        rounds: turns of each contender; the median over them counts.
        calls: in each turn; their median counts.
        seed: of the simulator and the weights.

    Returns:
        Figures by name: milliseconds a request of each contender, their ratios, seconds of export and compilation,
        the machine.
    """
    from training.export import export_artifact

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="recsys-bench-") as scratch:
            training_set = _training_set(Path(scratch), max(num_candidates, history_length), history_length, seed)
            torch.manual_seed(seed)
            model = build_model(DINConfig(), training_set.schema, training_set.encoder.table_sizes).eval()
            with torch.no_grad():
                for table in model.lookup.parameters():
                    table.normal_(0.0, 0.1)
            artifact = Path(scratch) / "artifact"
            summary = export_artifact(model, training_set, artifact, name="din", snapshot="all")
            scorer = Scorer.load(artifact)
            portable = Scorer.load(artifact, engine="portable")
            request = _request(scorer, num_candidates, history_length)
            batch = scorer.assembler.batch([scorer.parser.parse(request)]).batch
            tiled = TiledDIN(model, scorer.predictor)
            difference = float(np.abs(scorer.score(batch) - tiled.score(batch)).max())
            if difference > 1e-5:
                raise AssertionError(f"the contenders must agree, got probabilities {difference:.1e} apart")
            times = alternate(
                {
                    "scorer": lambda: scorer.score(batch),
                    "tiled_eager": lambda: tiled.score(batch),
                    "portable": lambda: portable.score(batch),
                    "rank": lambda: scorer.rank(request),
                },
                rounds=rounds,
                calls=calls,
            )
    finally:
        torch.set_num_threads(threads)
    ratio = times["scorer"] / times["tiled_eager"]
    return {
        "candidates": num_candidates,
        "history": history_length,
        "engine": summary.engine,
        "scorer_ms": round(times["scorer"], 3),
        "tiled_eager_ms": round(times["tiled_eager"], 3),
        "ratio": round(ratio, 4),
        "bar": BAR,
        "within_bar": ratio <= BAR,
        "portable_ms": round(times["portable"], 3),
        "portable_ratio": round(times["portable"] / times["tiled_eager"], 4),
        "rank_from_json_ms": round(times["rank"], 3),
        "largest_difference": difference,
        "export_s": summary.seconds,
        "compile_s": summary.compile_s,
        "machine": machine_record(),
    }


def alternate(contenders: dict[str, Callable[[], object]], *, rounds: int, calls: int) -> dict[str, float]:
    """Milliseconds a call of each contender: the median over rounds of the median over calls; in turns."""
    for contender in contenders.values():
        contender()
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            taken = []
            for _ in range(calls):
                began = time.perf_counter()
                contender()
                taken.append(time.perf_counter() - began)
            medians[name].append(float(np.median(taken)) * 1e3)
    return {name: float(np.median(values)) for name, values in medians.items()}


class TiledDIN:
    """DIN as it is usually written: every candidate a row of its own, with its own copy of the user and the history.

    Args:
        model: a DIN; its weights are used as they are.
        predictor: looks ids up, as the scorer does.
    """

    def __init__(self, model: RankingModel, predictor: Predictor) -> None:
        assert isinstance(model.network, DIN)
        self._network = model.network
        self._predictor = predictor

    def score(self, batch: Batch) -> np.ndarray:
        """Probabilities ``(N, T)``."""
        with torch.inference_mode():
            embedded = self._predictor.embed(batch.exploded())
            logits: Tensor = self._network.output(self._hidden(embedded))
        return sigmoid(logits.numpy())

    def _hidden(self, embedded: Embedded) -> Tensor:
        network = self._network
        pooled = [
            self._pooled(attention.unit, *parts)
            for attention, parts in zip(network.attention, network._histories(embedded), strict=True)
        ]
        request, rows = network._mlp_inputs(embedded, pooled)
        hidden: Tensor = network.mlp(request, rows, torch.arange(len(rows)))
        return hidden

    def _pooled(self, unit: Any, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """The activation unit on N x L of [q; k; q - k; q * k]; query (N, D), keys (N, L, D + E), lengths (N,)."""
        query_ND, keys_NLD, lengths_N = query, keys, lengths
        num_rows, longest, _ = keys_NLD.shape
        valid_NL = torch.arange(longest) < lengths_N.unsqueeze(1)
        query_NLD = query_ND.unsqueeze(1).expand(-1, longest, -1)
        shared_NLD = keys_NLD[..., : query_ND.shape[1]]
        x = torch.cat([query_NLD, keys_NLD, query_NLD - shared_NLD, query_NLD * shared_NLD], dim=2).flatten(0, 1)
        x = unit.activations[0](unit.first(x), valid_NL.flatten())
        for layer, activation in zip(unit.hidden, list(unit.activations)[1:], strict=True):
            x = activation(layer(x), valid_NL.flatten())
        scores_NL = unit.output(x).view(num_rows, longest).masked_fill(~valid_NL, 0.0)
        return torch.bmm(scores_NL.unsqueeze(1), keys_NLD).squeeze(1)


def _training_set(folder: Path, num_items: int, history_length: int, seed: int) -> TrainingSet:
    from feature_store.build import DataConfig, build_training_set
    from feature_store.datasets.simulator import SimulatorConfig, simulate
    from recsys.config import load_yaml, validate

    raw = load_yaml(ROOT / "configs" / "schema" / "simulated.yaml")
    for history in raw["histories"]:
        history["max_length"] = history_length
    schema = validate(Schema, raw, source="simulated.yaml")
    simulated = simulate(
        SimulatorConfig(num_impressions=20_000, num_items=max(2 * num_items, 1000), seed=seed), folder / "views"
    )
    span = simulated.last_time - simulated.first_time
    split = {
        "train_end": simulated.first_time + span * 8 // 10,
        "validation_end": simulated.first_time + span * 9 // 10,
        "test_end": simulated.last_time + 1,
    }
    data = validate(
        DataConfig,
        {"views": str(folder / "views"), "training_set": str(folder / "training_set"), "split": split},
        source="benchmark",
    )
    build_training_set(schema, data)
    return TrainingSet.open(folder / "training_set")


def _request(scorer: Scorer, num_candidates: int, history_length: int) -> dict[str, Any]:
    """A request of a known user, with a history of its own so that its length is exact."""
    features: Any = scorer.assembler.features
    items = features.some_items(max(num_candidates, history_length))
    return {
        "user_id": features.some_users(1)[0],
        "candidates": items[:num_candidates],
        "histories": {h.name: items[-history_length:] for h in scorer.artifact.schema.histories},
    }


if __name__ == "__main__":
    import json

    print(json.dumps(run(), indent=2))  # noqa: T201
