"""Derived values in serving: brought by the request, or refused; never quietly another than in training."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from recsys.batch import Batch
from recsys.errors import RequestError
from recsys.training_set import TrainingSet
from serving.assembler import Assembler
from serving.features import SnapshotFeatures
from serving.request import RequestParser
from tests.feature_store.derived_views import CONTEXT, NUMBERS, expected, make, schema
from tests.feature_store.small_views import build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build(tmp_path_factory.mktemp("derived"), make(0), schema())


@cache
def world() -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """The impressions, and their derived values."""
    views = make(0)
    return views["impressions"].to_dicts(), expected(views)


def request_of(training_set: TrainingSet, number: int) -> dict[str, Any]:
    """A request of the test period, with its derived values as a client would compute them."""
    split = training_set.split("test")
    rows = np.array(split.impressions.array("@source_row"))
    rows = rows[split.row_offsets[number] : split.row_offsets[number + 1]].tolist()
    shown, truth = world()
    own = ("device", "position", "price")
    return {
        "user_id": shown[rows[0]]["user"],
        "time": int(split.requests.array("@time")[number]),
        "context": {"device": shown[rows[0]]["device"]} | {n: truth[rows[0]][n] for n in CONTEXT},
        "candidates": [
            {"item": shown[r]["item"]}
            | {n: shown[r][n] for n in own[1:]}
            | {n: truth[r][n] for n in (*NUMBERS, "shade") if n not in CONTEXT}
            for r in rows
        ],
    }


def assemble(training_set: TrainingSet, body: dict[str, Any]) -> Batch:
    encoder = training_set.encoder
    features = SnapshotFeatures(training_set.folder, encoder)
    return Assembler(encoder, features).batch([RequestParser(training_set.schema).parse(body)]).batch


def test_values_that_come_with_a_request_are_those_of_training(built: TrainingSet) -> None:
    for number in range(built.split("test").num_requests):
        batch = assemble(built, request_of(built, number))
        stored = Batch.from_training_set(built, "test", np.array([number]))
        for part in ("context", "candidate"):
            for name, column in getattr(stored, part).items():
                assert getattr(batch, part)[name].tolist() == column.tolist(), name


@pytest.mark.parametrize(("part", "column"), [("context", "since_click"), ("candidates", "item_rate")])
def test_a_request_without_them_is_refused(built: TrainingSet, part: str, column: str) -> None:
    body = request_of(built, 0)
    for given in [body["context"]] if part == "context" else body["candidates"]:
        del given[column]
    with pytest.raises(RequestError, match=rf"{part}\.{column} must be given: feature 'f_{column}' reads a derived"):
        assemble(built, body)


def test_one_candidate_without_them_is_enough(built: TrainingSet) -> None:
    body = request_of(built, 0)
    body["candidates"] = [*body["candidates"], {"item": 101}]
    with pytest.raises(RequestError, match=r"candidates\.item_shown must be given"):
        assemble(built, body)
