"""What is shown of an online store is what a request at that time gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from feature_store.online.fetched import fetch
from feature_store.online.location import open_backend
from feature_store.online.materialize import materialize
from feature_store.online.pushing import Event
from feature_store.online.store import Limits, OnlineStore
from recsys.batch import Bags, Batch, Column
from recsys.cli import app
from recsys.training_set import TrainingSet
from tests.feature_store.derived_views import make
from tests.feature_store.small_views import DAY, START, build
from tests.serving.test_online_derived import assemble, derived_schema, filled
from tests.training_sets import build_synthetic

LATER = 1_800_000_000_000_000


@pytest.fixture(scope="module")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build_synthetic(tmp_path_factory.mktemp("fetch"), num_requests=120, seed=5)


@pytest.fixture(scope="module")
def derived_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build(tmp_path_factory.mktemp("derived"), make(2), derived_schema())


@pytest.fixture
def run() -> Callable[..., Any]:
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    return lambda *arguments, **more: runner.invoke(app, ["fetch", *(str(a) for a in arguments)], **more)


def store_of(training_set: TrainingSet, location: str, **limits: Any) -> OnlineStore:
    return OnlineStore(open_backend(location, is_writable=True), training_set.encoder, limits=Limits(**limits))


def plain(column: Column, row: int = 0) -> Any:
    """One row of a batch's column, as fetch shows what is encoded."""
    if isinstance(column, Bags):
        return column.values[column.offsets[row] : column.offsets[row + 1]].tolist()
    values = column[row].reshape(-1).tolist()
    return values[0] if len(values) == 1 else values


def known_keys(training_set: TrainingSet) -> tuple[list[int], list[int]]:
    users, items = training_set.users.keys, training_set.items.keys
    assert users is not None
    assert items is not None
    return users[1:].to_pylist(), items[1:].to_pylist()


def test_what_is_shown_is_what_a_request_gets(training_set: TrainingSet, location: str) -> None:
    store = store_of(training_set, location, keep_events=1000)
    materialize(store, training_set)
    users, items = known_keys(training_set)
    times = training_set.events["clicked"].array("@time")
    num_events = 0
    for place, user in enumerate([*users[:8], 987654]):
        at = int(np.quantile(times, 0.1 + place / 10, method="nearest"))
        asked = [*items[place : place + 3], 123456]
        found = fetch(store, user, asked, at)
        batch: Batch = assemble(store, {"user_id": user, "time": at, "candidates": asked})
        assert found.user is not None
        assert found.user.is_known == (user != 987654)
        assert [item.is_known for item in found.items] == [True, True, True, False]
        assert found.user.encoded == ({n: plain(c) for n, c in batch.user.items()} if found.user.is_known else {})
        assert (found.items[3].features, found.items[3].encoded) == ({}, {})
        for row, item in enumerate(found.items[:3]):
            assert item.encoded == {name: plain(column, row) for name, column in batch.item.items()}
        for name, history in found.user.histories.items():
            assert history.times == batch.histories[name].times.tolist()
            assert all(time < at for time in history.times)
            for row, event in enumerate(history.events):
                for feature, value in event.items():
                    # Words are those that the ids stand for: encoded again, they give the ids.
                    expected = plain(batch.histories[name].features[feature], row)
                    if feature in ("item_id", "category"):
                        assert store.encoder.encode(feature, pa.array([value])).tolist() == [expected]  # type: ignore[union-attr]
            num_events += len(history.times)
    assert num_events > 20
    store.close()


def test_derived_values_are_those_of_the_request(derived_set: TrainingSet, location: str) -> None:
    store = store_of(derived_set, location)
    filled(derived_set, store, START + 6 * DAY)
    users, items = known_keys(derived_set)
    store.push(Event(users[0], items[0], START + 6 * DAY, "click", {"dwell": 30, "created": START + 6 * DAY}))
    schema = derived_set.schema
    derived = [f for f in schema.features if schema.derived_of(f) is not None]
    for at in (START + 6 * DAY, START + 6 * DAY + 1):
        for user in users[:4]:
            found = fetch(store, user, items[:3], at)
            batch = assemble(store, {"user_id": user, "time": at, "candidates": items[:3]})
            assert found.user is not None
            for feature in derived:
                if feature.scope == "context":
                    assert found.user.encoded[feature.name] == plain(batch.context[feature.name])
                else:
                    shown = [item.encoded[feature.name] for item in found.items]
                    assert shown == [plain(batch.candidate[feature.name], row) for row in range(3)]
    # The number itself, not its bucket; and without a user, nothing that depends on one.
    before, after = (fetch(store, users[0], items[:1], START + 6 * DAY + later) for later in (0, 1))
    assert before.user is not None
    assert after.user is not None
    assert after.user.derived["f_user_events"] == before.user.derived["f_user_events"] + 1
    assert after.user.derived["activity"] == after.user.derived["f_user_events"]
    assert after.user.num_rows == before.user.num_rows != {}
    alone = fetch(store, None, items[:1], START + 6 * DAY)
    assert alone.user is None
    assert "f_item_dwell" in alone.items[0].derived
    assert not {"f_user_category", "f_pair_dwell", "f_mixed"} & set(alone.items[0].derived)
    # Numbers as of a later time are not given, and it says so.
    early = fetch(store, users[0], items[:1], START + 5 * DAY)
    assert early.items[0].refused["f_item_dwell"] == "is kept as of a time after the request's"
    store.close()
