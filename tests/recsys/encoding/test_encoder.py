"""The fitted encoder: one code path for many rows and for one, and nothing lost or altered on disk."""

from __future__ import annotations

import hashlib
import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config import canonical_json, validate
from recsys.encoding import EncodedColumn, Encoder, EncoderFitter, Ragged
from recsys.errors import EncodingError, IntegrityError, SchemaError
from recsys.schema import Schema

SCHEMA: dict[str, Any] = {
    "name": "shop",
    "views": {
        "impressions": {"user": "user", "item": "item", "time": "time"},
        "events": {"user": "user", "item": "item", "time": "time"},
        "items": {"path": "items.parquet", "key": "item"},
    },
    "tables": {"item": {"encoder": {"kind": "vocabulary", "max_size": 1000}}},
    "features": [
        {"name": "item_id", "kind": "categorical", "scope": "item", "table": "item"},
        {"name": "category", "kind": "categorical", "scope": "item"},
        {"name": "tags", "kind": "multi_categorical", "scope": "item", "separator": "|", "max_values": 3},
        {"name": "bought_with", "kind": "multi_categorical", "scope": "item", "table": "item"},
        {"name": "brand", "kind": "categorical", "scope": "item", "encoder": {"kind": "hash", "num_buckets": 97}},
        {"name": "price", "kind": "categorical", "scope": "item", "encoder": {"kind": "quantile", "num_buckets": 8}},
        {"name": "views", "kind": "categorical", "scope": "item", "encoder": {"kind": "log", "base": 3.0}},
        {"name": "hour", "kind": "categorical", "scope": "context", "encoder": {"kind": "hour_of_day"}},
        {"name": "day", "kind": "categorical", "scope": "context", "encoder": {"kind": "day_of_week"}},
        {"name": "age", "kind": "dense", "scope": "item"},
        {"name": "image", "kind": "dense", "scope": "item", "dim": 3, "transform": {"kind": "keep"}},
    ],
    "histories": [
        {
            "name": "bought",
            "attributes": ["item_id"],
            "event_features": [{"name": "kind", "kind": "categorical", "scope": "event"}],
        }
    ],
    "tasks": [{"name": "click", "label": "click"}],
}
FEATURES = [
    "item_id",
    "category",
    "tags",
    "bought_with",
    "brand",
    "price",
    "views",
    "hour",
    "day",
    "age",
    "image",
    "kind",
]


def schema(**changes: Any) -> Schema:
    return validate(Schema, SCHEMA | changes, source="test")


def columns(rows: int, seed: int = 0) -> dict[str, pa.Array]:
    """Raw values of every feature, a tenth of them null."""
    generator = np.random.default_rng(seed)
    ids = np.array([3, 4, 2**24, 2**24 + 1, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1])
    words = np.array(["a", "b", "é", "日本", "", "\U0001f600", "a b"])

    def some(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array([None if generator.random() < 0.1 else v for v in values], kind)

    return {
        "item_id": some(generator.choice(ids, rows).tolist(), pa.int64()),
        "category": some(generator.choice(words, rows).tolist(), pa.string()),
        "tags": some(["|".join(generator.choice(words, generator.integers(0, 5))) for _ in range(rows)], pa.string()),
        "bought_with": some(
            [generator.choice(ids, generator.integers(0, 4)).tolist() for _ in range(rows)], pa.list_(pa.int64())
        ),
        "brand": some(generator.choice(words, rows).tolist(), pa.large_string()),
        "price": some(generator.exponential(size=rows).tolist(), pa.float64()),
        "views": some(generator.integers(0, 10**6, rows).tolist(), pa.int32()),
        "hour": some(generator.integers(-(10**15), 10**15, rows).tolist(), pa.int64()),
        "day": some(generator.integers(-(10**15), 10**15, rows).tolist(), pa.int64()).cast(pa.timestamp("us", "UTC")),
        "age": some(generator.normal(size=rows).tolist(), pa.float32()),
        "image": some(generator.normal(size=(rows, 3)).tolist(), pa.list_(pa.float32(), 3)),
        "kind": some(generator.integers(0, 3, rows).tolist(), pa.int8()),
    }


def fitted(rows: int = 200, **changes: Any) -> Encoder:
    fitter = EncoderFitter(schema(**changes))
    for name, column in columns(rows).items():
        fitter.update(name, column)
    return fitter.finish()


def lists(encoded: EncodedColumn) -> list[Any]:
    """Rows of an encoded column."""
    if isinstance(encoded, Ragged):
        assert encoded.values.dtype == encoded.offsets.dtype == np.int64
        return (
            [part.tolist() for part in np.split(encoded.values, encoded.offsets[1:-1])]
            if len(encoded.offsets) > 1
            else []
        )
    assert encoded.dtype in (np.int64, np.float32)
    return encoded.tolist()


ENCODER = fitted()


def test_table_sizes_are_in_the_order_of_the_schema() -> None:
    assert list(ENCODER.table_sizes) == list(ENCODER.schema.table_encoders)
    assert list(ENCODER.table_sizes) == ["item", "category", "tags", "brand", "price", "views", "hour", "day", "kind"]
    assert ENCODER.table_sizes["item"] == 2 + 8
    assert ENCODER.table_sizes["category"] == 2 + 7
    assert ENCODER.table_sizes["brand"] == 2 + 97
    assert ENCODER.table_sizes["price"] == 2 + 8


@pytest.mark.parametrize("feature", FEATURES)
def test_ids_lie_within_the_table(feature: str) -> None:
    encoded = ENCODER.encode(feature, columns(3000, seed=1)[feature])
    if feature in ("age", "image"):
        assert np.isfinite(encoded).all()
        return
    values = encoded.values if isinstance(encoded, Ragged) else encoded
    assert values.min() >= 1
    assert values.max() < ENCODER.table_sizes[ENCODER.schema.feature(feature).table_name]  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 40, 3000])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_batch_is_its_rows_one_by_one(feature: str, rows: int) -> None:
    column = columns(rows, seed=2)[feature]
    whole = lists(ENCODER.encode(feature, column))
    assert len(whole) == rows
    step = max(1, rows // 40)
    for row in range(0, rows, step):
        assert lists(ENCODER.encode(feature, column.slice(row, 1))) == [whole[row]]
        assert lists(ENCODER.encode(feature, pa.array([column[row].as_py()], column.type))) == [whole[row]]
    chunks = pa.chunked_array([column.slice(0, rows // 3), column.slice(rows // 3)], column.type)
    assert lists(ENCODER.encode(feature, chunks)) == whole


@pytest.mark.parametrize("rows", [1, 3000])
@pytest.mark.parametrize("feature", FEATURES)
def test_null_is_unknown(feature: str, rows: int) -> None:
    kind = columns(1)[feature].type
    for column in (pa.nulls(rows, kind), pa.nulls(rows), pa.chunked_array([pa.nulls(rows, kind)])):
        assert lists(ENCODER.encode(feature, column)) == lists(ENCODER.unknown_column(feature, rows))


def test_unknown_columns() -> None:
    assert lists(ENCODER.unknown_column("item_id", 2)) == [1, 1]
    assert lists(ENCODER.unknown_column("tags", 2)) == [[], []]
    assert lists(ENCODER.unknown_column("image", 2)) == [[0.0] * 3] * 2
    for feature in FEATURES:
        assert lists(ENCODER.unknown_column(feature, 0)) == []


def test_values_by_hand() -> None:
    fitter = EncoderFitter(schema())
    fitter.update("item_id", pa.array([7, 7, 7, 9]))
    fitter.update("bought_with", pa.array([[9, 5], [9]]))
    fitter.update("tags", pa.array(["x|y", "x|y|z|w"]))
    encoder = fitter.finish()
    assert lists(encoder.encode("item_id", pa.array([9, 7, 5, 8, None]))) == [3, 2, 4, 1, 1]  # 7 and 9 three times each
    assert lists(encoder.encode("bought_with", pa.array([[5, None, 5, 6], None, []]))) == [[4, 1, 4, 1], [], []]
    assert lists(encoder.encode("tags", pa.array(["y||x|y", "|", "w|z"]))) == [[3, 2, 3], [], [1, 4]]


def test_what_is_decoded_is_what_was_encoded() -> None:
    raw = columns(200)
    for name in ("item_id", "category", "kind"):
        assert ENCODER.decode(name, ENCODER.encode(name, raw[name])) == raw[name].to_pylist(), name
    bags = ENCODER.decode("bought_with", ENCODER.encode("bought_with", raw["bought_with"]))
    assert bags == [values or [] for values in raw["bought_with"].to_pylist()]
    assert ENCODER.decode("category", ENCODER.encode("category", pa.array(["never seen", None]))) == [None, None]
    ages = ENCODER.decode("age", ENCODER.encode("age", raw["age"]))
    known = [(a, b) for a, b in zip(ages, raw["age"].to_pylist(), strict=True) if b is not None]
    np.testing.assert_allclose(*zip(*known, strict=True), rtol=1e-4, atol=1e-5)
    assert ENCODER.decode("image", np.array([[1.0, -2.5, 0.1]], np.float32)) == [[1.0, -2.5, 0.1]]


def test_a_hashed_feature_is_held_to_the_type_it_was_fitted_on() -> None:
    with pytest.raises(EncodingError, match=r"feature 'brand' must hold text, as when it was fitted[\s\S]*Hint: cast"):
        ENCODER.encode("brand", pa.array([1]))
    fitter = EncoderFitter(schema())
    fitter.update("brand", pa.array([1.0]))
    encoder = fitter.finish()
    assert lists(encoder.encode("brand", pa.array([1]))) == lists(encoder.encode("brand", pa.array([1], pa.int8())))
    with pytest.raises(EncodingError, match="feature 'brand' must hold integers, as when it was fitted"):
        encoder.encode("brand", pa.array(["1"]).dictionary_encode())


def test_a_vocabulary_is_held_to_the_type_it_was_fitted_on() -> None:
    with pytest.raises(EncodingError, match="feature 'item_id' must hold integers"):
        ENCODER.encode("item_id", pa.array(["7"]))
    with pytest.raises(EncodingError, match="feature 'bought_with' must hold integers"):
        ENCODER.encode("bought_with", pa.array([["7"]]))
    with pytest.raises(EncodingError, match="feature 'category' must hold text"):
        ENCODER.encode("category", pa.array([7]))


def test_unknown_features_are_refused() -> None:
    for call in (lambda: ENCODER.encode("categry", pa.array([1])), lambda: ENCODER.unknown_column("categry", 1)):
        with pytest.raises(SchemaError, match="did you mean 'category'"):
            call()


def test_the_caller_may_change_what_it_gets() -> None:
    column = pa.array([1.5, 2.5])
    for feature, given_column in (("views", column), ("hour", pa.array([1, 2])), ("item_id", pa.array([3, 4]))):
        before = given_column.to_pylist()
        encoded = ENCODER.encode(feature, given_column)
        assert isinstance(encoded, np.ndarray)
        encoded += 1
        assert given_column.to_pylist() == before


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.none() | st.text(), max_size=20), st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=20)
)
def test_saved_and_loaded_is_the_same(tmp_path_factory: pytest.TempPathFactory, texts: list, numbers: list) -> None:
    fitter = EncoderFitter(schema())
    fitter.update("category", pa.array(texts, pa.string()))
    fitter.update("item_id", pa.array(numbers, pa.int64()))
    fitter.update("brand", pa.array(texts, pa.string()))
    encoder = fitter.finish()
    folder = tmp_path_factory.mktemp("encoder")
    encoder.save(folder / "e")
    loaded = Encoder.load(folder / "e")
    assert loaded.fingerprint == encoder.fingerprint
    assert loaded.table_sizes == encoder.table_sizes
    for feature, column in (("category", pa.array(texts, pa.string())), ("item_id", pa.array(numbers, pa.int64()))):
        assert lists(loaded.encode(feature, column)) == lists(encoder.encode(feature, column))


def test_saved_and_loaded_encodes_alike(tmp_path: Path) -> None:
    ENCODER.save(tmp_path / "deep" / "encoder")
    loaded = Encoder.load(str(tmp_path / "deep" / "encoder"))
    assert loaded.schema == ENCODER.schema
    for feature, column in columns(500, seed=5).items():
        assert lists(loaded.encode(feature, column)) == lists(ENCODER.encode(feature, column))
    with pytest.raises(EncodingError, match="feature 'brand' must hold text"):
        loaded.encode("brand", pa.array([1]))
    assert sorted(p.relative_to(tmp_path / "deep").as_posix() for p in (tmp_path / "deep").rglob("*")) == [
        "encoder",
        "encoder/encoder.json",
        "encoder/vocabularies",
        "encoder/vocabularies/category.arrow",
        "encoder/vocabularies/item.arrow",
        "encoder/vocabularies/kind.arrow",
        "encoder/vocabularies/tags.arrow",
    ]


def test_save_replaces(tmp_path: Path) -> None:
    fitted(20).save(tmp_path / "e")
    ENCODER.save(tmp_path / "e")
    assert Encoder.load(tmp_path / "e").fingerprint == ENCODER.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_an_interrupted_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ENCODER.save(tmp_path / "e")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recsys.encoding.encoder.json.dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(20).save(tmp_path / "e")
    assert Encoder.load(tmp_path / "e").fingerprint == ENCODER.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_an_encoder_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(ENCODER))
    assert copy.fingerprint == ENCODER.fingerprint
    for feature, column in columns(50, seed=6).items():
        assert lists(copy.encode(feature, column)) == lists(ENCODER.encode(feature, column))


def changed_feature(name: str, **changes: Any) -> dict[str, Any]:
    return {"features": [f | changes if f["name"] == name else f for f in SCHEMA["features"]]}


@pytest.mark.parametrize(
    "changes",
    [
        changed_feature("tags", max_values=2),
        changed_feature("tags", separator=","),
        changed_feature("brand", encoder={"kind": "hash", "num_buckets": 98}),
        changed_feature("brand", encoder={"kind": "hash", "num_buckets": 97, "seed": 1}),
        changed_feature("price", encoder={"kind": "quantile", "num_buckets": 9}),
        changed_feature("views", encoder={"kind": "log", "base": 3.5}),
        changed_feature("hour", encoder={"kind": "hour_of_day", "utc_offset_minutes": 60}),
        changed_feature("age", transform={"kind": "standardise", "clip": 9.0}),
        changed_feature("age", transform={"kind": "keep"}),
        {"tables": {"item": {"encoder": {"kind": "vocabulary", "max_size": 5}}}},
    ],
)
def test_the_fingerprint_changes_with_what_decides_the_output(changes: dict[str, Any]) -> None:
    assert fitted(**changes).fingerprint != ENCODER.fingerprint


def test_the_fingerprint_changes_with_what_was_fitted() -> None:
    assert fitted(199).fingerprint != ENCODER.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": [{"name": "like", "label": "liked"}]},
        {"name": "other"},
        changed_feature("age", column="age_in_days"),
        {"histories": [SCHEMA["histories"][0] | {"max_length": 7}]},
    ],
)
def test_the_fingerprint_keeps_with_what_does_not(changes: dict[str, Any]) -> None:
    assert fitted(**changes).fingerprint == ENCODER.fingerprint


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ENCODER.save(tmp_path / "e")
    return tmp_path / "e"


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(IntegrityError, match=message) as caught:
        Encoder.load(folder)
    assert caught.value.hint


FILES = ["encoder.json", "vocabularies/category.arrow", "vocabularies/item.arrow"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert_refused(saved, rf"{name} must exist")


def test_a_missing_folder_is_noticed(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nothing", r"encoder\.json must exist")
    (tmp_path / "file").write_text("x")
    assert_refused(tmp_path / "file", r"encoder\.json must exist")


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_noticed(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        (saved / name).write_bytes(content[:length])
        assert_refused(saved, str(name))


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_noticed_or_harmless(saved: Path, name: str) -> None:
    """A byte in the padding of an Arrow file may change nothing; then the encoder is the same."""
    content = bytearray((saved / name).read_bytes())
    num_refused = 0
    for place in range(0, len(content), 7):
        changed = content.copy()
        changed[place] ^= 0x15
        (saved / name).write_bytes(changed)
        try:
            loaded = Encoder.load(saved)
        except IntegrityError:
            num_refused += 1
        else:
            assert loaded.fingerprint == ENCODER.fingerprint
            assert loaded.schema == ENCODER.schema
            column = columns(50)["category"]
            assert lists(loaded.encode("category", column)) == lists(ENCODER.encode("category", column))
    assert num_refused > 10


def test_a_vocabulary_of_another_encoder_is_noticed(saved: Path, tmp_path: Path) -> None:
    fitted(3).save(tmp_path / "other")
    name = "vocabularies/category.arrow"
    (saved / name).write_bytes((tmp_path / "other" / name).read_bytes())
    assert_refused(saved, "category.arrow must hold the vocabulary that was fitted, got another")


def rewritten(saved: Path, change: Any) -> None:
    """Changes encoder.json and its checksum with it."""
    content = json.loads((saved / "encoder.json").read_text())
    del content["sha256"]
    change(content)
    content["sha256"] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    (saved / "encoder.json").write_text(json.dumps(content))


def test_the_checksum_of_the_description_is_as_documented(saved: Path) -> None:
    rewritten(saved, lambda content: None)
    assert Encoder.load(saved).fingerprint == ENCODER.fingerprint


def test_another_version_is_refused(saved: Path) -> None:
    rewritten(saved, lambda content: content.update(format_version=2))
    assert_refused(saved, r"must be of format version 1, got 2[\s\S]*Hint: build it again")


def test_another_format_is_refused(saved: Path) -> None:
    (saved / "encoder.json").write_text("[]")
    assert_refused(saved, "must be an encoder")
    rewritten_content = {"format": "something"}
    (saved / "encoder.json").write_text(json.dumps(rewritten_content))
    assert_refused(saved, "must be an encoder")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["transforms"]["age"].update(mean=[0.5]),
        lambda content: content["tables"]["price"]["boundaries"].pop(),
        lambda content: content["hash_key_types"].clear(),
        lambda content: content["schema"]["features"][2].update(max_values=1),
        lambda content: content["transforms"].pop("age"),
        lambda content: content["transforms"]["age"].update(mean=[1.0, 2.0]),
        lambda content: content["tables"].pop("price"),
        lambda content: content["tables"]["item"].update(num_keys=1),
        lambda content: content["schema"].update(features=[]),
        lambda content: content.update(fingerprint="0" * 64),
        lambda content: content.pop("schema"),
        lambda content: content.update(tables=None),
    ],
)
def test_content_that_does_not_fit_its_fingerprint_is_refused(saved: Path, change: Any) -> None:
    rewritten(saved, change)
    assert_refused(saved, "must")


def test_one_value_costs_no_more_in_a_large_vocabulary() -> None:
    """A thousand look-ups in a million keys take well under what a single pass over the keys per look-up would."""
    fitter = EncoderFitter(schema(tables={"item": {"encoder": {"kind": "vocabulary"}}}))
    keys = np.arange(1_000_000) * 2**40
    fitter.update("item_id", pa.array(keys))
    encoder = fitter.finish()
    asked = [pa.array([int(key)]) for key in keys[:: len(keys) // 1000]]
    begin = time.process_time()
    ids = [int(encoder.encode("item_id", column)[0]) for column in asked]  # type: ignore[index]
    assert time.process_time() - begin < 0.2  # a pass over 8 MB takes about a millisecond: a second in all
    assert ids == list(range(2, 1_000_002, 1000))
