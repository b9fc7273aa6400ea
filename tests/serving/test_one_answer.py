"""The same rows get the same probabilities, whoever is asked: evaluation, scorer, batch scoring, HTTP, MLflow."""

from __future__ import annotations

import asyncio
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.batch import Batch
from recsys.training_set import SOURCE_ROW
from serving.batch import score_parquet
from serving.scorer import Scorer, sigmoid
from serving.service import Model, RankingApp, ServiceConfig
from tests.serving.asgi import ask
from tests.serving.conftest import World
from training.evaluate import predict
from training.export import export_artifact

SPLIT = "test"
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def evaluated(world: World) -> np.ndarray:
    """Probabilities by evaluation, in the order of the split."""
    predictions = predict(world.model, world.training_set, SPLIT, batch_size=64)
    probabilities = sigmoid(predictions.logits)
    assert len(probabilities) > 50
    assert probabilities.std() > 0.05, "scores must differ for this comparison to say anything"
    return probabilities


@pytest.fixture(scope="module")
def rows(world: World) -> np.ndarray:
    """Row of the view of each row of the split."""
    return np.array(world.training_set.split(SPLIT).impressions.array(SOURCE_ROW))


def test_scorer(world: World, scorer: Scorer, evaluated: np.ndarray) -> None:
    np.testing.assert_allclose(scorer.score(world.whole(SPLIT)), evaluated, atol=TOLERANCE, rtol=0)


def test_scorer_one_request_at_a_time(world: World, scorer: Scorer, evaluated: np.ndarray) -> None:
    part = world.training_set.split(SPLIT)
    each = [
        scorer.score(Batch.from_training_set(world.training_set, SPLIT, np.array([r])))
        for r in range(part.num_requests)
    ]
    np.testing.assert_allclose(np.concatenate(each), evaluated, atol=TOLERANCE, rtol=0)


def test_batch_scoring(world: World, scorer: Scorer, evaluated: np.ndarray, rows: np.ndarray, tmp_path: Path) -> None:
    score_parquet(scorer, world.impressions, tmp_path / "scored.parquet", batch_size=17)
    scored = pl.read_parquet(tmp_path / "scored.parquet")
    assert scored.drop("score_click", "score_like").equals(pl.read_parquet(world.impressions))
    np.testing.assert_allclose(
        scored.select("score_click", "score_like").to_numpy()[rows], evaluated, atol=TOLERANCE, rtol=0
    )


def http_scores(app: RankingApp, shown: pl.DataFrame) -> np.ndarray:
    """Probabilities of every task, in the order of the rows, one HTTP request for each request of the view."""
    shown = shown.with_row_index("place")
    found = np.full((len(shown), 2), np.nan)
    for _, group in shown.group_by("request_id", maintain_order=True):
        # Answers name items: where one is shown twice in a request, its rows are asked for one by one.
        asked = group.iter_slices(1) if group["item_id"].is_duplicated().any() else [group]
        for part in asked:
            body: dict[str, Any] = {
                "user_id": part["user_id"][0],
                "time": part["time"][0],
                "candidates": [{"item_id": i, "source": s} for i, s in part.select("item_id", "source").iter_rows()],
            }
            status, reply = asyncio.run(ask(app, "POST", "/rank", body))
            assert status == 200, reply
            scores = [c["score"] for c in reply["ranked"]]
            assert scores == sorted(scores, reverse=True)
            of_item = {c["item"]: [c["scores"]["click"], c["scores"]["like"]] for c in reply["ranked"]}
            found[part["place"].to_numpy()] = [of_item[i] for i in part["item_id"].to_list()]
    return found


def test_http(world: World, evaluated: np.ndarray, rows: np.ndarray) -> None:
    config = ServiceConfig(artifact=str(world.artifact), threads=1)
    app = RankingApp(config, Model.load(config))
    order = np.argsort(rows)
    shown = pl.read_parquet(world.impressions)[rows[order]]
    np.testing.assert_allclose(http_scores(app, shown), evaluated[order], atol=TOLERANCE, rtol=0)


def test_mlflow_pyfunc(world: World, evaluated: np.ndarray, rows: np.ndarray, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own deprecations
        import mlflow.pyfunc

        from serving.pyfunc import ARTIFACT, ENTRY, input_example, signature

        artifact = Scorer.load(world.artifact).artifact
        mlflow.pyfunc.save_model(
            str(tmp_path / "model"),
            python_model=ENTRY,
            artifacts={ARTIFACT: str(world.artifact)},
            signature=signature(artifact),
            input_example=input_example(artifact),
            pip_requirements=[],
        )
        loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
        frame = pl.read_parquet(world.impressions)[rows].to_pandas().set_index(np.arange(len(rows)) + 7)
        answer = loaded.predict(frame.drop(columns=["is_click", "is_like"]))
        assert list(answer.columns) == ["click", "like"]
        assert list(answer.index) == list(frame.index)
        np.testing.assert_allclose(answer.to_numpy(), evaluated, atol=TOLERANCE, rtol=0)
        # Rows may come in any order: the answer must not depend on it.
        mixed = frame.sample(frac=1.0, random_state=0)
        again = loaded.predict(mixed)
    np.testing.assert_allclose(again.loc[frame.index].to_numpy(), evaluated, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_compiled_program(world: World, evaluated: np.ndarray, tmp_path: Path) -> None:
    """The program that a service runs where a compiler was at hand, one request at a time."""
    summary = export_artifact(world.model, world.training_set, tmp_path / "artifact", name="tiny", compile="auto")
    if summary.engine != "compiled":
        pytest.skip(f"nothing was compiled: {summary.note}")
    compiled = Scorer.load(tmp_path / "artifact", engine="compiled")
    part = world.training_set.split(SPLIT)
    each = [
        compiled.score(Batch.from_training_set(world.training_set, SPLIT, np.array([r])))
        for r in range(part.num_requests)
    ]
    np.testing.assert_allclose(np.concatenate(each), evaluated, atol=TOLERANCE, rtol=0)
    requests = [Batch.from_training_set(world.training_set, SPLIT, np.array([r])) for r in range(part.num_requests)]
    pool = ThreadPoolExecutor(8)
    futures = [pool.submit(compiled.score, batch) for _ in range(20) for batch in requests]
    together = [future.result(timeout=60) for future in futures]  # callers side by side once waited for ever
    pool.shutdown()
    for place, scores in enumerate(together):
        np.testing.assert_array_equal(scores, each[place % len(each)])
