"""Values as bytes: what goes in comes out, and nothing else is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.online.codec import NEVER, Codec, expiry_of, ranges, take_rows
from recsys.config import validate
from recsys.encoding import Encoder, EncoderFitter, Ragged
from recsys.errors import ArtifactError, IntegrityError
from recsys.schema import Schema
from tests.feature_store.online.equal import assert_equal_columns

FEATURES = ["tiny", "small", "large", "huge", "bag", "wide_bag", "number", "vector"]


def make_encoder(**changes: Any) -> Encoder:
    """Ids of every width, bags of ids beyond 32 bits, numbers and vectors."""
    buckets = {"tiny": 200, "small": 60_000, "large": 2**31, "huge": 2**40}
    features: list[dict[str, Any]] = [
        {"name": n, "kind": "categorical", "scope": "item", "encoder": {"kind": "hash", "num_buckets": b}}
        for n, b in buckets.items()
    ]
    features += [
        {"name": "bag", "kind": "multi_categorical", "scope": "item", "table": "tiny"},
        {"name": "wide_bag", "kind": "multi_categorical", "scope": "item", "table": "huge"},
        {"name": "number", "kind": "dense", "scope": "item", "transform": {"kind": "keep"}},
        {"name": "vector", "kind": "dense", "scope": "item", "dim": 3, "transform": {"kind": "keep"}},
    ]
    schema = validate(
        Schema,
        {
            "name": "codec",
            "views": {"impressions": {"user": "u", "item": "i", "time": "t"}, "items": {"path": "i", "key": "i"}},
            "features": features,
            "tasks": [{"name": "click", "label": "c"}],
            **changes,
        },
        source="test",
    )
    return EncoderFitter(schema).finish()


ENCODER = make_encoder()


def random_columns(rng: np.random.Generator, n: int, most: int = 3) -> dict[str, Any]:
    columns: dict[str, Any] = {
        name: rng.integers(0, ENCODER.table_sizes[name], n) for name in ("tiny", "small", "large", "huge")
    }
    for bag, table in (("bag", "tiny"), ("wide_bag", "huge")):
        lengths = rng.integers(0, most + 1, n)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        columns[bag] = Ragged(rng.integers(0, ENCODER.table_sizes[table], offsets[-1]), offsets)
    columns["number"] = rng.normal(size=n).astype(np.float32)
    columns["vector"] = rng.normal(size=(n, 3)).astype(np.float32)
    return columns


@given(seed=st.integers(0, 2**32), lengths=st.lists(st.integers(0, 5), max_size=6), names=st.permutations(FEATURES))
def test_histories_come_back(seed: int, lengths: list[int], names: list[str]) -> None:
    rng = np.random.default_rng(seed)
    names = names[: 1 + seed % len(FEATURES)]
    codec = Codec(ENCODER, "history", names, name="events")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    times = rng.integers(0, 2**62, offsets[-1])
    columns = random_columns(rng, int(offsets[-1]))
    values = codec.encode(columns, offsets, times, expires=77)
    assert [len(v) % 8 for v in values] == [0] * len(lengths)
    assert [expiry_of(v) for v in values] == [77] * len(lengths)
    found = codec.decode(values)
    np.testing.assert_array_equal(found.offsets, offsets)
    np.testing.assert_array_equal(found.times, times)
    assert_equal_columns(found.columns, {name: columns[name] for name in names})
    # Each by itself, too.
    for place, value in enumerate(values):
        alone = codec.decode([value])
        np.testing.assert_array_equal(alone.times, times[offsets[place] : offsets[place + 1]])


@given(seed=st.integers(0, 2**32), n=st.integers(0, 20))
def test_entities_come_back(seed: int, n: int) -> None:
    columns = random_columns(np.random.default_rng(seed), n)
    for names in (FEATURES, ["tiny", "number"], []):
        codec = Codec(ENCODER, "item", names, name="items")
        found = codec.decode(codec.encode(columns, np.arange(n + 1)))
        assert_equal_columns(found.columns, {name: columns[name] for name in names})
        assert (found.expires == NEVER).all()


@given(seed=st.integers(0, 2**32), n=st.integers(1, 20), most=st.sampled_from([0, 1, 2, 4, 12, 40]))
def test_entities_of_one_size_and_of_several_come_back(seed: int, n: int, most: int) -> None:
    columns = random_columns(np.random.default_rng(seed), n, most)
    for names in (FEATURES, ["bag", "tiny"], ["number", "wide_bag"]):
        codec = Codec(ENCODER, "item", names, name="items")
        values = codec.encode(columns, np.arange(n + 1), expires=5)
        found = codec.decode(values)
        assert_equal_columns(found.columns, {name: columns[name] for name in names})
        assert found.offsets.tolist() == list(range(n + 1))
        assert found.expires.tolist() == [5] * n
        for place, value in enumerate(values):
            alone = {name: take_rows(columns[name], np.array([place])) for name in names}
            assert_equal_columns(codec.decode([value]).columns, alone)


@pytest.mark.parametrize("num_values", [1, 5])
def test_more_ids_than_there_is_room_for_are_an_error(num_values: int) -> None:
    codec = Codec(ENCODER, "item", ["bag"], name="items")
    values = codec.encode(random_columns(np.random.default_rng(3), num_values), np.arange(num_values + 1))
    assert {len(value) for value in values} == {24 + 8 + 32}
    values[-1] = values[-1][:24] + (9).to_bytes(4, "little") + values[-1][28:]
    with pytest.raises(IntegrityError):
        codec.decode(values)


def test_ids_take_as_few_bytes_as_their_table_needs() -> None:
    # 24 of header; 1 + 2 + 4 + 8 of ids, padded to 16.
    codec = Codec(ENCODER, "item", ["tiny", "small", "large", "huge"], name="items")
    (value,) = codec.encode(random_columns(np.random.default_rng(0), 1), np.arange(2))
    assert len(value) == 24 + 16


def values_of(encoder: Encoder, kind: str, names: list[str], n: int = 3) -> list[bytes]:
    codec = Codec(encoder, kind, names, name="items")
    times = np.arange(n) if kind == "history" else None
    return codec.encode(random_columns(np.random.default_rng(1), n), np.arange(n + 1), times)


@pytest.mark.parametrize("num_values", [1, 3])
def test_another_encoder_is_refused(num_values: int) -> None:
    other = make_encoder(tables={})
    mine = Codec(ENCODER, "item", FEATURES, name="items")
    assert mine.decode(values_of(other, "item", FEATURES, num_values)).columns.keys() == set(FEATURES)
    features = [dict(f.model_dump(mode="json")) for f in ENCODER.schema.features]
    features[0]["encoder"]["seed"] = 9
    other = make_encoder(features=features)
    with pytest.raises(ArtifactError, match="items of the online store must be encoded by the model's encoder"):
        mine.decode(values_of(other, "item", FEATURES, num_values))


def test_one_value_of_another_encoder_among_ours_is_refused() -> None:
    codec = Codec(ENCODER, "item", ["tiny"], name="items")
    ours = values_of(ENCODER, "item", ["tiny"])
    # Same size, other features.
    with pytest.raises(ArtifactError):
        codec.decode([*ours, values_of(ENCODER, "item", ["small"])[0]])


@pytest.mark.parametrize("names", [["tiny", "number"], FEATURES])
@pytest.mark.parametrize("num_values", [1, 3])
def test_broken_bytes_are_an_error_and_never_values(names: list[str], num_values: int) -> None:
    codec = Codec(ENCODER, "item", names, name="items")
    values = values_of(ENCODER, "item", names, num_values)
    for broken in (b"", b"{}", values[0][:-1], values[0][:-8], values[0] + bytes(8), bytes(len(values[0]))):
        with pytest.raises(IntegrityError):
            codec.decode([*values[1:], broken])
    with pytest.raises(IntegrityError):
        codec.decode([*values[1:], *values_of(ENCODER, "history", names, 1)])
    newer = bytearray(values[0])
    newer[1] = 3
    with pytest.raises(IntegrityError, match="format 2"):
        codec.decode([*values[1:], bytes(newer)])


def test_positions_of_ranges() -> None:
    assert ranges(np.array([5, 2, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([], np.int64), np.array([], np.int64)).tolist() == []
