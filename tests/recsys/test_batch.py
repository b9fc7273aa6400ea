"""The batch: request-major gathers agree with a slow loop over the stored rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recsys.batch import Bags, Batch, Column, concatenated_ranges
from recsys.training_set import SOURCE_ROW, TIME, USER_ROW, TrainingSet, end_column
from tests.synthetic import random_batch
from tests.training_sets import build_synthetic


@pytest.fixture(scope="module")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build_synthetic(tmp_path_factory.mktemp("set"))


def rows_of(column: Column) -> list[list[float]]:
    if isinstance(column, Bags):
        pairs = zip(column.offsets[:-1], column.offsets[1:], strict=True)
        return [column.values[a:b].tolist() for a, b in pairs]
    return [np.atleast_1d(r).tolist() for r in column.numpy()]


def test_concatenated_ranges_equals_a_loop() -> None:
    generator = np.random.default_rng(0)
    starts, lengths = generator.integers(0, 50, 20), generator.integers(0, 4, 20)
    expected = [s + i for s, n in zip(starts, lengths, strict=True) for i in range(n)]
    np.testing.assert_array_equal(concatenated_ranges(starts, lengths), expected)


def test_gather_equals_a_loop_over_stored_rows(training_set: TrainingSet) -> None:
    split = training_set.split("train")
    positions = np.random.default_rng(1).permutation(split.num_requests)[:17]

    batch = Batch.from_training_set(training_set, "train", positions)

    row = 0
    for place, position in enumerate(positions):
        first, last = split.row_offsets[position], split.row_offsets[position + 1]
        user = split.requests.array(USER_ROW)[position]
        assert int(batch.time[place]) == split.requests.array(TIME)[position]
        assert rows_of(batch.user["user_id"])[place] == [training_set.users.array("user_id")[user]]
        for stored in range(first, last):
            assert int(batch.request_of_row[row]) == place
            assert batch.source_row is not None
            assert int(batch.source_row[row]) == split.impressions.array(SOURCE_ROW)[stored]
            row += 1
        for history in training_set.schema.histories:
            end = split.requests.array(end_column(history.name))[position]
            log = training_set.events[history.name]
            gathered = batch.histories[history.name]
            times = gathered.times[gathered.offsets[place] : gathered.offsets[place + 1]].tolist()
            assert len(times) <= history.max_length
            assert times == log.array(TIME)[end - len(times) : end].tolist()
            assert all(t < int(batch.time[place]) for t in times), "an event at or after the request leaked"
            if len(times) < history.max_length and end - len(times) > 0:
                before = end - len(times) - 1
                assert split.requests.array(f"@start.{history.name}")[position] > before
    assert row == batch.num_rows


def test_a_slice_of_requests_equals_their_positions(training_set: TrainingSet) -> None:
    by_slice = Batch.from_training_set(training_set, "train", slice(3, 11))
    by_position = Batch.from_training_set(training_set, "train", np.arange(3, 11))
    assert_equal(by_slice, by_position)


def test_a_slice_of_requests_copies_nothing_of_what_is_stored_in_order(training_set: TrainingSet) -> None:
    batch = Batch.from_training_set(training_set, "train", slice(0, 20))
    stored = training_set.split("train").requests.array(TIME)
    assert batch.time.data_ptr() == stored.__array_interface__["data"][0]


def test_max_length_keeps_the_newest_events(training_set: TrainingSet) -> None:
    full = Batch.from_training_set(training_set, "train", slice(0, 40))
    short = Batch.from_training_set(training_set, "train", slice(0, 40), max_length=2)
    a, b = full.histories["clicked"], short.histories["clicked"]
    assert int(a.lengths.max()) > 2
    for r in range(full.num_requests):
        assert (
            b.times[b.offsets[r] : b.offsets[r + 1]].tolist() == a.times[a.offsets[r] : a.offsets[r + 1]].tolist()[-2:]
        )


@pytest.mark.parametrize("seed", range(3))
def test_exploded_repeats_each_request_for_each_of_its_rows(seed: int) -> None:
    batch = random_batch(seed=seed)
    exploded = batch.exploded()
    assert exploded.num_requests == exploded.num_rows == batch.num_rows
    for row in range(batch.num_rows):
        request = int(batch.request_of_row[row])
        for name in batch.user:
            assert rows_of(exploded.user[name])[row] == rows_of(batch.user[name])[request]
        for name in batch.item:
            assert rows_of(exploded.item[name])[row] == rows_of(batch.item[name])[row]
        for name, history in batch.histories.items():
            other = exploded.histories[name]
            for feature in history.features:
                whole = rows_of(history.features[feature])[history.offsets[request] : history.offsets[request + 1]]
                assert rows_of(other.features[feature])[other.offsets[row] : other.offsets[row + 1]] == whole


def test_select_requests_reorders_and_keeps_rows_together() -> None:
    batch = random_batch(5, seed=4)
    order = torch.tensor([3, 0, 4])
    selected = batch.select_requests(order)
    expected = [row for r in order.tolist() for row in range(batch.num_rows) if int(batch.request_of_row[row]) == r]
    assert selected.source_row is not None
    assert selected.source_row.tolist() == expected
    assert_equal(batch.select_requests(torch.arange(5)), batch)


def assert_equal(a: Batch, b: Batch) -> None:
    for name in ("request_of_row", "time", "labels", "user_row", "source_row"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)
    for side in ("user", "context", "item", "candidate"):
        for name in getattr(a, side):
            assert rows_of(getattr(a, side)[name]) == rows_of(getattr(b, side)[name]), name
    for name, history in a.histories.items():
        assert history.offsets.tolist() == b.histories[name].offsets.tolist()
        for feature in history.features:
            assert rows_of(history.features[feature]) == rows_of(b.histories[name].features[feature])


def test_moving_to_the_same_device_changes_nothing() -> None:
    batch = random_batch(seed=2)
    assert_equal(batch, batch.to("cpu"))
    assert replace(batch, labels=None).to("cpu").labels is None
