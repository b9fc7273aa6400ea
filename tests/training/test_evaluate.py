from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from recsys.batch import Batch
from recsys.metrics import evaluate_scores
from recsys.models import RankingModel, build_model
from recsys.models.din import DINConfig
from recsys.training_set import TrainingSet, label_column
from tests.synthetic import schema
from training.evaluate import Predictions, evaluate, predict
from training.strategy import SingleProcess


@pytest.fixture(scope="module")
def model(training_set: TrainingSet) -> RankingModel:
    torch.manual_seed(0)
    config = DINConfig(embedding_dim=4, hidden=(8,), attention_hidden=(4,))
    return build_model(config, schema(), training_set.encoder.table_sizes)


def predictions(**columns: Any) -> Predictions:
    n = len(columns["labels"])
    given = {"user_row": np.ones(n, np.int64), "history_length": np.zeros(n, np.int64)} | columns
    return Predictions(
        tasks=("click",),
        logits=np.asarray(given["logits"], np.float32).reshape(-1, 1),
        labels=np.asarray(given["labels"], np.float32).reshape(-1, 1),
        user_row=np.asarray(given["user_row"]),
        request=np.arange(n),
        source_row=np.arange(n),
        history_length=np.asarray(given["history_length"]),
    )


def test_rows_come_in_the_order_of_the_split_and_scored_as_one_by_one(
    model: RankingModel, training_set: TrainingSet
) -> None:
    found = predict(model, training_set, "test", batch_size=50)
    part = training_set.split("test")
    model.eval()
    with torch.no_grad():
        expected = [
            model(Batch.from_training_set(training_set, "test", np.array([r]))) for r in range(part.num_requests)
        ]
    np.testing.assert_allclose(found.logits, torch.cat(expected).numpy(), rtol=1e-5, atol=1e-6)
    assert np.array_equal(found.labels[:, 1], part.impressions.array(label_column("like")), equal_nan=True)
    assert np.array_equal(found.source_row, part.impressions.array("@source_row"))
    longest = np.maximum(
        part.requests.array("@end.clicked") - part.requests.array("@start.clicked"),
        part.requests.array("@end.seen") - part.requests.array("@start.seen"),
    )
    assert np.array_equal(found.history_length, np.repeat(longest, np.diff(part.row_offsets)))
    assert longest.max() > 8, "lengths are those before max_length cuts"


def test_scoring_leaves_mode_and_weights_alone(model: RankingModel, training_set: TrainingSet) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    first = predict(model, training_set, "validation").logits
    assert model.training
    assert np.array_equal(first, predict(model, training_set, "validation").logits)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Ranks:
    """Two ranks as threads of one process."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._slots: list[Any] = [None] * world
        self._barrier = threading.Barrier(world)

    def rank(self, number: int) -> Any:
        ranks = self

        class Rank(SingleProcess):
            rank = number
            world = ranks.world

            def all_gather(self, rows: np.ndarray) -> list[np.ndarray]:
                ranks._slots[number] = rows
                ranks._barrier.wait()
                gathered = list(ranks._slots)
                ranks._barrier.wait()
                return gathered

        return Rank("cpu")


@pytest.mark.parametrize("batch_size", [1, 40])
def test_ranks_score_a_split_as_one_process_does(
    model: RankingModel, training_set: TrainingSet, batch_size: int
) -> None:
    model.eval()
    single = predict(model, training_set, "validation", batch_size)
    ranks = Ranks(2)
    found: dict[int, Predictions] = {}

    def score(number: int) -> None:
        found[number] = predict(model, training_set, "validation", batch_size, strategy=ranks.rank(number))

    threads = [threading.Thread(target=score, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        np.testing.assert_allclose(found[number].logits, single.logits, rtol=1e-5, atol=1e-6)


def test_metrics_are_over_the_whole_split(model: RankingModel, training_set: TrainingSet) -> None:
    found = predict(model, training_set, "validation", batch_size=16)
    for column, task in enumerate(("click", "like")):
        expected = evaluate_scores(found.labels[:, column], logits=found.logits[:, column], groups=found.user_row)
        assert evaluate(found)[task] == expected


def test_strangers_are_not_one_user() -> None:
    """Users unknown to the training set share row 0; as one group they would be one user with both classes."""
    found = predictions(logits=[1, 2, 3, 4], labels=[0, 1, 1, 0], user_row=[0, 0, 5, 5])
    metrics = evaluate(found)["click"]
    assert metrics.gauc_users == 1
    assert metrics.gauc == 0.0  # of user 5 alone
