"""Requests to batches: where each value comes from, and that histories are what was known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from recsys.batch import Bags, Batch, Column
from recsys.encoding.encoder import Ragged
from recsys.errors import ArtifactError, RequestError
from serving.assembler import Assembled, Assembler, overlay, recent
from serving.features import Events, NoFeatures, SnapshotFeatures
from serving.request import RequestParser
from tests.serving.conftest import World

ITEM = 2**53 + 1  # key of the first item
USER = 1000  # key of the first user
NEVER_SEEN = 77


@pytest.fixture(scope="module")
def assembler(world: World) -> Assembler:
    encoder = world.training_set.encoder
    return Assembler(encoder, SnapshotFeatures(world.training_set.folder, encoder))


@pytest.fixture(scope="module")
def parser(world: World) -> RequestParser:
    return RequestParser(world.training_set.schema)


def assemble(assembler: Assembler, parser: RequestParser, *bodies: Mapping[str, Any]) -> Assembled:
    return assembler.batch([parser.parse({"time": 1_700_900_000_000_000, **body}) for body in bodies])


def bags(column: Column) -> list[list[int]]:
    assert isinstance(column, Bags)
    return [column.values[a:b].tolist() for a, b in zip(column.offsets[:-1], column.offsets[1:], strict=True)]


def ids(column: Column) -> list[int]:
    assert isinstance(column, torch.Tensor)
    return column.tolist()


def equal(left: Batch, right: Batch) -> None:
    """Every column of two batches is the same."""
    pairs = [(left.request_of_row, right.request_of_row), (left.time, right.time)]
    for part in ("user", "context", "item", "candidate"):
        a, b = getattr(left, part), getattr(right, part)
        assert list(a) == list(b)
        pairs += [(a[n], b[n]) for n in a]
    for name in right.histories:
        a, b = left.histories[name], right.histories[name]
        assert list(a.features) == list(b.features)
        pairs += [(a.offsets, b.offsets), (a.times, b.times), *((a.features[n], b.features[n]) for n in a.features)]
    for x, y in pairs:
        for s, t in zip(x if isinstance(x, Bags) else [x], y if isinstance(y, Bags) else [y], strict=True):
            assert s.dtype == t.dtype
            assert s.shape == t.shape
            assert torch.equal(s, t)


def test_keys_alone_give_the_batch_of_the_training_set(
    world: World, assembler: Assembler, parser: RequestParser
) -> None:
    shown = pl.read_parquet(world.impressions)
    split = world.training_set.split("test")
    source_row = split.impressions.columns["@source_row"]
    offsets = split.row_offsets
    bodies = []
    for request in range(split.num_requests):
        rows = shown[np.array(source_row[offsets[request] : offsets[request + 1]])]
        candidates = [{"item_id": i, "source": s} for i, s in rows.select("item_id", "source").iter_rows()]
        bodies.append({"user_id": rows["user_id"][0], "time": rows["time"][0], "candidates": candidates})
    assembled = assemble(assembler, parser, *bodies)
    equal(assembled.batch, Batch.from_training_set(world.training_set, "test", slice(None)))
    assert assembled.is_known_user.all()
    assert assembled.is_known_item.all()


def test_histories_are_strictly_before_the_request(world: World, assembler: Assembler, parser: RequestParser) -> None:
    events = pl.read_parquet(world.folder / "views" / "events.parquet").with_row_index("row")
    of_user = events.filter(pl.col("user_id") == USER + 4).sort("time", "row")
    assert len(of_user) > 8
    moments = of_user["time"].to_list()
    for time in (moments[0], moments[0] + 1, moments[5], moments[5] + 1, moments[-1] + 1):
        batch = assemble(assembler, parser, {"user_id": USER + 4, "time": time, "candidates": [ITEM]}).batch
        expected = [t for t in moments if t < time][-5:]  # the history 'seen' keeps the newest five of every type
        assert batch.histories["seen"].times.tolist() == expected


def test_unknown_user_and_candidates(assembler: Assembler, parser: RequestParser) -> None:
    assembled = assemble(assembler, parser, {"user_id": NEVER_SEEN, "candidates": [NEVER_SEEN, ITEM, NEVER_SEEN]})
    assert assembled.is_known_user.tolist() == [False]
    assert assembled.is_known_item.tolist() == [False, True, False]
    batch = assembled.batch
    assert ids(batch.user["user_id"]) == [1]
    assert ids(batch.user["age"]) == [[0.0]]
    assert bags(batch.user["interests"]) == [[]]
    assert ids(batch.item["item_id"])[0] == 1
    assert ids(batch.item["item_id"])[1] >= 2
    assert ids(batch.candidate["source"]) == [1, 1, 1]
    assert [h.offsets.tolist() for h in batch.histories.values()] == [[0, 0], [0, 0]]
    nobody = assemble(assembler, parser, {"user_id": None, "candidates": [ITEM]})
    assert nobody.is_known_user.tolist() == [False]


def test_raw_values_take_the_place_of_stored_ones(world: World, assembler: Assembler, parser: RequestParser) -> None:
    encoder = world.training_set.encoder
    stored = assemble(assembler, parser, {"user_id": USER, "candidates": [ITEM, ITEM + 1, ITEM + 2]}).batch
    given = assemble(
        assembler,
        parser,
        {
            "user_id": USER,
            "user": {"age": 61.0, "interests": ["c1", "c2", "never seen"]},
            "candidates": [
                ITEM,
                {"item_id": ITEM + 1, "price": 7.5, "tags": "t1,t2"},
                {"item_id": ITEM + 2, "category": None},
            ],
        },
    ).batch
    age = encoder.encode("age", pa.array([61.0]))
    assert not isinstance(age, Ragged)
    assert ids(given.user["age"]) == age.tolist()
    interests = encoder.encode("interests", pa.array([["c1", "c2", "never seen"]]))
    assert isinstance(interests, Ragged)
    assert bags(given.user["interests"]) == [interests.values.tolist()]
    assert ids(given.user["user_id"]) == ids(stored.user["user_id"])
    price = encoder.encode("price", pa.array([7.5]))
    assert not isinstance(price, Ragged)
    assert ids(given.item["price"]) == [ids(stored.item["price"])[0], price[0].tolist(), ids(stored.item["price"])[2]]
    tags = encoder.encode("tags", pa.array(["t1,t2"]))
    assert isinstance(tags, Ragged)
    assert bags(given.item["tags"]) == [
        bags(stored.item["tags"])[0],
        tags.values.tolist(),
        bags(stored.item["tags"])[2],
    ]
    assert ids(given.item["category"]) == [*ids(stored.item["category"])[:2], 1]


def test_the_time_of_the_request_is_a_context_value_unless_one_is_given(
    assembler: Assembler, parser: RequestParser
) -> None:
    time = "2024-05-05T13:20:00Z"
    first = assemble(assembler, parser, {"candidates": [ITEM], "time": time}).batch
    assert ids(first.context["hour"]) == [2 + 13]
    second = assemble(
        assembler, parser, {"candidates": [ITEM], "time": time, "context": {"time": "2024-05-05T02:00:00Z"}}
    )
    assert ids(second.batch.context["hour"]) == [2 + 2]


def test_events_of_a_request(assembler: Assembler, parser: RequestParser) -> None:
    now = 1_700_900_000_000_000
    events = [
        {"item_id": ITEM + 3, "time": now - 10, "dwell": 100},
        {"item_id": ITEM + 1, "time": now - 30},
        {"item_id": ITEM + 2, "time": now},  # not before the request
        {"item_id": NEVER_SEEN, "time": now - 20, "category": "c1"},
        {"item_id": ITEM + 4, "time": now + 5},
    ]
    assembled = assemble(assembler, parser, {"user_id": USER, "candidates": [ITEM], "histories": {"clicked": events}})
    assert assembled.num_ignored_events == 2
    clicked = assembled.batch.histories["clicked"]
    assert clicked.times.tolist() == [now - 30, now - 20, now - 10]
    item = assemble(assembler, parser, {"candidates": [ITEM + 1, NEVER_SEEN, ITEM + 3]}).batch.item
    assert ids(clicked.features["item_id"]) == ids(item["item_id"])
    category = assembler._encoder.encode("category", pa.array(["c1"]))
    assert not isinstance(category, Ragged)
    assert ids(clicked.features["category"])[1] == category[0]
    assert ids(clicked.features["dwell"])[:2] == [1, 1]
    assert ids(clicked.features["dwell"])[2] > 1
    # The other history is still the stored one.
    stored = assemble(assembler, parser, {"user_id": USER, "candidates": [ITEM]}).batch.histories["seen"]
    assert assembled.batch.histories["seen"].times.tolist() == stored.times.tolist()


def test_events_without_times_keep_their_order_and_the_newest_count(
    assembler: Assembler, parser: RequestParser
) -> None:
    keys = [ITEM + i for i in (5, 3, 9, 1, 7, 2, 8)]
    batch = assemble(assembler, parser, {"candidates": keys, "histories": {"seen": keys}}).batch
    seen = batch.histories["seen"]
    assert ids(seen.features["item_id"]) == ids(batch.item["item_id"])[-5:]
    assert seen.times.tolist() == [1_700_900_000_000_000 - 1] * 5


def test_equal_times_keep_the_order_of_the_request(assembler: Assembler, parser: RequestParser) -> None:
    keys = [ITEM + i for i in (5, 3, 9)]
    events = [{"item_id": k, "time": 1_000_000} for k in keys]
    batch = assemble(assembler, parser, {"candidates": keys, "histories": {"seen": events}}).batch
    assert ids(batch.histories["seen"].features["item_id"]) == ids(batch.item["item_id"])


def test_requests_with_and_without_events_in_one_batch(assembler: Assembler, parser: RequestParser) -> None:
    bodies = [
        {"user_id": USER, "candidates": [ITEM, ITEM + 1]},
        {
            "user_id": USER + 1,
            "candidates": [ITEM + 2],
            "histories": {"clicked": [ITEM + 7, ITEM + 8]},
            "user": {"age": 20},
        },
        {"user_id": USER + 2, "candidates": [{"item_id": ITEM, "price": 1.0}], "context": {"time": 7_200_000_000}},
        {
            "user_id": USER + 3,
            "candidates": [ITEM],
            "histories": {"clicked": [], "seen": [{"item_id": ITEM, "time": 5}]},
        },
    ]
    together = assemble(assembler, parser, *bodies).batch
    for position, body in enumerate(bodies):
        alone = assemble(assembler, parser, body).batch
        equal(together.select_requests(torch.tensor([position])), alone)


def test_values_that_cannot_be_encoded_are_all_named(assembler: Assembler, parser: RequestParser) -> None:
    body = {
        "candidates": [{"item_id": ITEM, "price": "cheap", "category": 3}],
        "user": {"age": "old"},
        "histories": {"clicked": [{"item_id": ITEM, "dwell": "long"}]},
    }
    with pytest.raises(RequestError) as caught:
        assemble(assembler, parser, body)
    for place in ("candidates.price", "candidates.category", "user.age", "histories.clicked.dwell"):
        assert place in str(caught.value)
    assert "cheap" not in str(caught.value)


def test_values_of_several_types_in_one_column(assembler: Assembler, parser: RequestParser) -> None:
    candidates = [{"item_id": ITEM, "price": 3}, {"item_id": ITEM, "price": "3"}]
    with pytest.raises(RequestError, match=r"candidates\.price must have values of one type"):
        assemble(assembler, parser, {"candidates": candidates})


@pytest.mark.parametrize("body", [{"user_id": "u1", "candidates": [ITEM]}, {"user_id": USER, "candidates": ["i1"]}])
def test_keys_of_the_wrong_type(assembler: Assembler, parser: RequestParser, body: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="must hold integers"):
        assemble(assembler, parser, body)


@pytest.mark.parametrize("stored", [True, False])
def test_event_keys_of_the_wrong_type_are_named_as_the_history_s(
    world: World, parser: RequestParser, stored: bool
) -> None:
    encoder = world.training_set.encoder
    source = SnapshotFeatures(world.training_set.folder, encoder) if stored else NoFeatures(encoder)
    body = {"candidates": [ITEM], "histories": {"clicked": ["a"]}}
    with pytest.raises(RequestError) as caught:
        assemble(Assembler(encoder, source), parser, body)
    assert str(caught.value).startswith("histories.clicked.item_id must hold integers, as when it was fitted, got ")
    assert "candidates" not in str(caught.value)


def test_without_stored_features_keys_are_still_values(world: World, parser: RequestParser) -> None:
    encoder = world.training_set.encoder
    bare = Assembler(encoder, NoFeatures(encoder))
    assembled = assemble(bare, parser, {"user_id": USER, "candidates": [ITEM, NEVER_SEEN]})
    assert not assembled.is_known_item.any()
    whole = Assembler(encoder, SnapshotFeatures(world.training_set.folder, encoder))
    known = assemble(whole, parser, {"user_id": USER, "candidates": [ITEM, NEVER_SEEN]})
    assert ids(assembled.batch.item["item_id"]) == ids(known.batch.item["item_id"])
    assert ids(assembled.batch.user["user_id"]) == ids(known.batch.user["user_id"])
    assert ids(assembled.batch.item["category"]) == [1, 1]


def test_features_of_another_encoder_are_refused(world: World, tmp_path: Any) -> None:
    (tmp_path / "manifest.json").write_text('{"encoder_fingerprint": "0"}')
    with pytest.raises(ArtifactError, match="another one's"):
        SnapshotFeatures(tmp_path, world.training_set.encoder)
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        SnapshotFeatures(tmp_path / "nowhere", world.training_set.encoder)


def test_overlay_of_bags() -> None:
    base = Ragged(np.array([5, 6, 7]), np.array([0, 2, 2, 3]))
    values = Ragged(np.array([8, 9, 9]), np.array([0, 3, 3]))
    result = overlay(base, np.array([1, 0]), values)
    assert isinstance(result, Ragged)
    assert result.offsets.tolist() == [0, 0, 3, 4]
    assert result.values.tolist() == [8, 9, 9, 7]
    assert base.values.tolist() == [5, 6, 7]


def test_recent_events_are_those_from_a_time_on() -> None:
    tags = Ragged(np.array([1, 2, 3, 4]), np.array([0, 1, 1, 3, 4, 4]))
    events = Events(np.array([0, 3, 3, 5]), np.array([5, 6, 9, 1, 2]), {"item": np.arange(5), "tags": tags})
    got = recent(events, np.array([6, 0, 2]))
    assert got.offsets.tolist() == [0, 2, 2, 3]
    assert got.times.tolist() == [6, 9, 2]
    assert got.columns["item"].tolist() == [1, 2, 4]
    assert [c.tolist() for c in got.columns["tags"]] == [[2, 3], [0, 0, 2, 2]]
    assert recent(events, np.array([5, 0, 1])) is events
