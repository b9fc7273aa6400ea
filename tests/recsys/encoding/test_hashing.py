"""The hash: values worked from its definition and published vectors, and agreement with the slow version."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.encoding import hash_keys
from recsys.encoding.hashing import FEW, hash_integer, hash_text, mix
from recsys.errors import EncodingError
from tests.references import encoding as reference

INT64 = st.integers(-(2**63), 2**63 - 1)


def test_integers_hash_to_the_first_output_of_splitmix64() -> None:
    # First outputs of the generator's published reference code for the seeds 0 and 1234567.
    assert hash_keys(pa.array([0, 1234567])).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_integer_hash_written_out() -> None:
    z = (42 + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    assert hash_keys(pa.array([42])).tolist() == [z ^ (z >> 31)]


@pytest.mark.parametrize(
    ("text", "fnv1a"),
    # From the authors' table of test vectors.
    [("", 0xCBF29CE484222325), ("a", 0xAF63DC4C8601EC8C), ("foobar", 0x85944171F73967E8)],
)
def test_text_is_fnv1a_then_mixed(text: str, fnv1a: int) -> None:
    assert hash_text(text) == mix(fnv1a)
    for copies in (1, FEW, FEW + 1, 3000):
        assert set(hash_keys(pa.array([text] * copies)).tolist()) == {mix(fnv1a)}


def test_seed_enters_before_the_last_mix() -> None:
    assert hash_keys(pa.array([5]), seed=9).tolist() == [mix(((5 ^ mix(9)) + 0x9E3779B97F4A7C15) % 2**64)]
    assert hash_keys(pa.array(["a"]), seed=9).tolist() == [mix(0xAF63DC4C8601EC8C ^ mix(9))]


@given(st.lists(INT64, max_size=40), st.integers(0, 2**63 - 1))
def test_integers_agree_with_the_definition(values: list[int], seed: int) -> None:
    expected = [reference.hash_key(v, seed) for v in values]
    assert hash_keys(pa.array(values, pa.int64()), seed=seed).tolist() == expected
    assert [hash_integer(v, seed=seed) for v in values] == expected


@given(st.lists(st.text(max_size=40), max_size=40), st.integers(0, 2**63 - 1))
def test_texts_agree_with_the_definition(texts: list[str], seed: int) -> None:
    expected = [reference.hash_key(t, seed) for t in texts]
    assert hash_keys(pa.array(texts, pa.string()), seed=seed).tolist() == expected
    assert hash_keys(pa.array(texts, pa.large_string()), seed=seed).tolist() == expected
    assert hash_keys(pa.array(texts, pa.string()).dictionary_encode(), seed=seed).tolist() == expected


def test_texts_of_very_different_lengths_agree_with_the_definition() -> None:
    generator = np.random.default_rng(0)
    lengths = [0, 1, 15, 16, 17, 31, 32, 33, 5000, *generator.integers(0, 60, 10_000).tolist()]
    texts = ["".join(chr(c) for c in generator.integers(32, 1000, n)) for n in lengths]
    assert hash_keys(pa.array(texts)).tolist() == [reference.hash_key(t) for t in texts]


def test_neither_chunks_nor_slices_nor_width_matter() -> None:
    values = list(range(-50, 50))
    whole = hash_keys(pa.array(values)).tolist()
    assert hash_keys(pa.chunked_array([values[:7], values[7:]])).tolist() == whole
    assert hash_keys(pa.array([99, *values]).slice(1)).tolist() == whole
    for kind in (pa.int8(), pa.int16(), pa.int32(), pa.float64(), pa.decimal128(30, 2)):
        assert hash_keys(pa.array(values, pa.int64()).cast(kind)).tolist() == whole, kind
    texts = [f"é{v}" for v in values]
    whole = hash_keys(pa.array(texts)).tolist()
    assert hash_keys(pa.chunked_array([texts[:7], texts[7:]])).tolist() == whole
    assert hash_keys(pa.array(["x", *texts]).slice(1)).tolist() == whole
    assert hash_keys(pa.array(texts, pa.string_view())).tolist() == whole


@pytest.mark.parametrize("copies", [1, 500])
def test_null_hashes_to_zero(copies: int) -> None:
    assert hash_keys(pa.array([7, None] * copies))[1::2].tolist() == [0] * copies
    assert hash_keys(pa.array(["7", None] * copies))[1::2].tolist() == [0] * copies
    assert hash_keys(pa.array(["7", None] * copies).dictionary_encode())[1::2].tolist() == [0] * copies
    assert hash_keys(pa.nulls(copies)).tolist() == [0] * copies


def test_a_number_and_its_digits_differ() -> None:
    assert hash_keys(pa.array([7])).tolist() != hash_keys(pa.array(["7"])).tolist()


def test_what_has_no_identity_is_refused() -> None:
    with pytest.raises(EncodingError, match=r"keys must hold integers or text, got a column of type binary"):
        hash_keys(pa.array([b"x"]))


@settings(max_examples=20)
@given(st.integers(2, 1000))
def test_buckets_are_even(num_buckets: int) -> None:
    # Chi-squared of n hashes of consecutive integers: mean k, variance 2k for k = buckets - 1; six deviations of slack.
    n = 100 * num_buckets
    counts = np.bincount(
        (hash_keys(pa.array(np.arange(n))) % np.uint64(num_buckets)).astype(int), minlength=num_buckets
    )
    freedom = num_buckets - 1
    assert ((counts - 100) ** 2).sum() / 100 < freedom + 6 * np.sqrt(2 * freedom) + 10
