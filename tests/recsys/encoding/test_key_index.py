"""Look-up of keys: agreement with a dictionary for any keys, of any type, in any number."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.encoding import KeyIndex, key_index
from recsys.errors import EncodingError

INT64 = st.integers(-(2**63), 2**63 - 1)


def expected(keys: list[int | str | None], asked: list[int | str | None]) -> list[int]:
    places = {key: place for place, key in enumerate(keys) if key is not None}
    return [-1 if value is None else places.get(value, -1) for value in asked]


@given(
    st.one_of(
        st.tuples(st.lists(INT64, unique=True, max_size=60), st.lists(st.none() | INT64, max_size=60)),
        st.tuples(
            st.lists(st.integers(-30, 60), unique=True, max_size=60),
            st.lists(st.none() | st.integers(-40, 80) | INT64, max_size=60),
        ),
        st.tuples(
            st.lists(st.text(max_size=5), unique=True, max_size=60),
            st.lists(st.none() | st.text(max_size=5), max_size=60),
        ),
    ),
    st.data(),
)
def test_agrees_with_a_dictionary(lists: tuple[list, list], data: st.DataObject) -> None:
    keys, others = lists
    kind = pa.string() if any(isinstance(v, str) for v in keys + others) else pa.int64()
    asked = others + data.draw(st.lists(st.sampled_from(keys), max_size=60) if keys else st.just([]))
    index = KeyIndex(pa.array(keys, kind))
    column = pa.array(asked, kind)
    want = expected(keys, asked)
    assert index.positions(column).tolist() == want
    assert [index.positions(column.slice(i, 1))[0] for i in range(len(asked))] == want
    assert index.positions(column.dictionary_encode()).tolist() == want
    assert index.positions(pa.chunked_array([column.slice(0, 3), column.slice(3)], kind)).tolist() == want
    assert len(index) == len(keys)
    assert index.keys.to_pylist() == keys


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("spread", [1, 2**40])
def test_many_keys_and_many_questions(spread: int, as_text: bool) -> None:
    generator = np.random.default_rng(3)
    numbers = generator.permutation(20_000) * spread - 7
    keys, asked = numbers[:10_000], generator.choice(numbers, 200_000)
    place_of = {int(k): i for i, k in enumerate(keys)}
    want = [place_of.get(int(a), -1) for a in asked]
    convert = (lambda a: pa.array(a).cast(pa.string())) if as_text else pa.array
    assert KeyIndex(convert(keys)).positions(convert(asked)).tolist() == want


@pytest.mark.parametrize("base", [2**24, 2**53, 2**63 - 4, -(2**53) - 4, -(2**63)])
@pytest.mark.parametrize("num_asked", [2, 100])
def test_neighbouring_large_ids_stay_apart(base: int, num_asked: int) -> None:
    near = KeyIndex(pa.array([base, base + 1, base + 3]))
    far = KeyIndex(pa.array([base, base + 1, base + 3, 0]))
    asked = pa.array([base + i % 4 for i in range(num_asked)])
    want = [[0, 1, -1, 2][i % 4] for i in range(num_asked)]
    assert near.positions(asked).tolist() == want
    assert far.positions(asked).tolist() == want


def test_nulls_keep_their_place_and_are_never_found() -> None:
    for keys in (pa.array([None, 30, None, 10]), pa.array([None, "30", None, "10"])):
        index = KeyIndex(keys)
        assert len(index) == 4
        assert index.positions(keys).tolist() == [-1, 1, -1, 3]
        assert index.positions(pa.concat_arrays([keys] * 500)).tolist() == [-1, 1, -1, 3] * 500


def test_no_keys_find_nothing() -> None:
    for keys in (pa.nulls(0), pa.nulls(3), pa.array([], pa.int64()), pa.nulls(2, pa.string())):
        index = KeyIndex(keys)
        assert index.positions(pa.nulls(2)).tolist() == [-1, -1]
        assert index.positions(pa.array([0, -1] * 20)).tolist() == [-1] * 40
        assert index.positions(pa.array(["", "0"] * 20)).tolist() == [-1] * 40


def test_texts_with_the_same_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two short texts with one hash are known, so every text is given one of three."""
    monkeypatch.setattr(key_index, "hash_text", lambda text: [0, 7 << 60, 2**64 - 1][len(text) % 3])
    monkeypatch.setattr(
        key_index,
        "hash_texts",
        lambda texts: np.array([[0, 7 << 60, 2**64 - 1][len(t or "") % 3] for t in texts.to_pylist()], np.uint64),
    )
    keys = ["x" * (i % 7) + str(i) for i in range(50)]
    asked = keys[::-1] + ["no", "", "xx", None] * 5 + keys
    index = KeyIndex(pa.array(keys))
    want = expected(keys, asked)
    assert index.positions(pa.array(asked)).tolist() == want
    assert [int(index.positions(pa.array([a], pa.string()))[0]) for a in asked] == want


@pytest.mark.parametrize("keys", [[3, 1, 3], [2**60, 0, 2**60], ["a", "b", "a"]])
def test_repeated_keys_are_refused(keys: list) -> None:
    with pytest.raises(EncodingError, match="keys must be unique"):
        KeyIndex(pa.array(keys))


def test_the_other_type_is_refused_and_named() -> None:
    with pytest.raises(EncodingError, match=r"feature 'item' must hold integers.*got a column of type string"):
        KeyIndex(pa.array([1])).positions(pa.array(["1"]), where="feature 'item'")
    with pytest.raises(EncodingError, match=r"keys must hold text.*got a column of type int64"):
        KeyIndex(pa.array(["1"])).positions(pa.array([1]))


def test_survives_pickling() -> None:
    index = pickle.loads(pickle.dumps(KeyIndex(pa.array(["b", "a"]))))
    assert index.positions(pa.array(["a", "b", "c"])).tolist() == [1, 0, -1]
