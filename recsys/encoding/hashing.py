r"""The hash of a raw value: fixed for ever, because trained tables depend on it.

All arithmetic is modulo :math:`2^{64}`; ``>>`` shifts in zeros:

.. math::

    \mathrm{mix}(z)&:\quad z \leftarrow (z \oplus (z \gg 30)) \cdot \mathtt{BF58476D1CE4E5B9};\quad
    z \leftarrow (z \oplus (z \gg 27)) \cdot \mathtt{94D049BB133111EB};\quad z \oplus (z \gg 31) \\
    \mathrm{splitmix64}(x) &= \mathrm{mix}(x + \mathtt{9E3779B97F4A7C15}) \\
    \mathrm{fnv1a}(b_1 \dots b_n) &:\quad h \leftarrow \mathtt{CBF29CE484222325};\quad
    h \leftarrow (h \oplus b_i) \cdot \mathtt{100000001B3} \text{ for each byte}

An integer :math:`v` (two's complement) hashes to ``splitmix64(v ^ mix(seed))``, text to ``mix(fnv1a(utf8) ^
mix(seed))``. With seed 0, ``mix(seed)`` is 0, and the hash of an integer is the first output of the SplitMix64
generator in that state. ``mix`` and ``splitmix64`` are bijections, so two different integers never have the same hash;
two texts may.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (mix: variant 13 of Stafford);
Fowler, Noll, Vo, "The FNV non-cryptographic hash algorithm", FNV-1a, 64 bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys.encoding.columns import Array, Column, Int64s, IntKeys, TextKeys, as_keys, text_bytes

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_FNV_OFFSET = 0xCBF29CE484222325
_FNV_PRIME = 0x100000001B3

_FNV_PRIME_64 = np.uint64(_FNV_PRIME)

_BLOCK = 1 << 15
_TEXT_BLOCK = 1 << 12
_STRIP = 16
"""Rows, and bytes of each text, hashed at a time, so that intermediate arrays stay in the cache."""
FEW = 8
"""Below so many texts, a loop over bytes in Python is faster than array operations per byte position."""

UInt64s = npt.NDArray[np.uint64]


def mix(z: int) -> int:
    """The finaliser of SplitMix64, on one number.

    Example:
        >>> mix(0), hex(mix(1))
        (0, '0x5692161d100b05e5')
    """
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def hash_integer(value: int, *, seed: int = 0) -> int:
    """Hash of one integer: :func:`hash_integers` for a single request.

    Example:
        >>> hex(hash_integer(0))
        '0xe220a8397b1dcdaf'
    """
    return mix((((value & _MASK) ^ mix(seed)) + _GAMMA) & _MASK)


def hash_text(text: str, *, seed: int = 0) -> int:
    """Hash of one text: :func:`hash_texts` for a single request."""
    return mix(_fnv1a(text.encode()) ^ mix(seed))


def _fnv1a(content: bytes | memoryview, start: int = _FNV_OFFSET) -> int:
    hashed = start
    for byte in content:
        hashed = ((hashed ^ byte) * _FNV_PRIME) & _MASK
    return hashed


def _mix_in_place(z: UInt64s) -> None:
    scratch = z >> np.uint64(30)
    z ^= scratch
    z *= np.uint64(_MIX_1)
    np.right_shift(z, np.uint64(27), out=scratch)
    z ^= scratch
    z *= np.uint64(_MIX_2)
    np.right_shift(z, np.uint64(31), out=scratch)
    z ^= scratch


def hash_integers(values: Int64s, *, seed: int = 0) -> UInt64s:
    """Hashes of integers.

    Args:
        values: int64, (n,).
        seed: chooses one of 2^64 functions.

    Returns:
        uint64, (n,).
    """
    if len(values) <= FEW:
        return np.array([hash_integer(value, seed=seed) for value in values.tolist()], np.uint64)
    seed_mix = np.uint64(mix(seed))
    hashed = np.empty(len(values), np.uint64)
    unsigned = values.view(np.uint64)
    for begin in range(0, len(values), _BLOCK):
        block = hashed[begin : begin + _BLOCK]
        np.bitwise_xor(unsigned[begin : begin + _BLOCK], seed_mix, out=block)
        block += np.uint64(_GAMMA)
        _mix_in_place(block)
    return hashed


def hash_texts(texts: Array, *, seed: int = 0) -> UInt64s:
    """Hashes of the texts of a string or large_string array.

    Args:
        texts: (n,); what stands at nulls in the result has no meaning.
        seed: chooses one of 2^64 functions.

    Returns:
        uint64, (n,).
    """
    if len(texts) <= FEW:
        return np.array([hash_text(text or "", seed=seed) for text in texts.to_pylist()], np.uint64)
    hashed = np.full(len(texts), _FNV_OFFSET, np.uint64)
    content, offsets = text_bytes(texts)
    if len(content):
        for begin in range(0, len(texts), _TEXT_BLOCK):
            end = min(begin + _TEXT_BLOCK, len(texts))
            hashed[begin:end] = _fnv1a_block(content, offsets[begin:end], np.diff(offsets[begin : end + 1]))
    hashed ^= np.uint64(mix(seed))
    for begin in range(0, len(texts), _BLOCK):
        _mix_in_place(hashed[begin : begin + _BLOCK])
    return hashed


def _fnv1a_block(content: npt.NDArray[np.uint8], starts: Int64s, lengths: Int64s) -> UInt64s:
    order = np.argsort(-lengths, kind="stable")  # longest first: the texts that reach a byte position are a prefix
    starts, lengths = starts[order], lengths[order]
    hashed = np.full(len(order), _FNV_OFFSET, np.uint64)
    longest = int(lengths[0])
    reaching = (len(order) - np.searchsorted(lengths[::-1], np.arange(longest), side="right")).tolist()
    position = 0
    while position < longest and reaching[position] >= FEW:
        count = reaching[position]
        places = starts[:count] + np.arange(position, min(position + _STRIP, longest))[:, None]
        strip = content.take(places, mode="clip").astype(np.uint64)  # past the end of a text stands what is not used
        for row in strip:
            count = reaching[position]
            prefix = hashed[:count]
            prefix ^= row[:count]
            prefix *= _FNV_PRIME_64
            position += 1
    for row in range(reaching[position] if position < longest else 0):
        rest = content[starts[row] + position : starts[row] + lengths[row]]
        hashed[row] = _fnv1a(rest.tobytes(), int(hashed[row]))
    result = np.empty_like(hashed)
    result[order] = hashed
    return result


def hash_keys(column: Column, *, seed: int = 0) -> UInt64s:
    """Hashes of a column of integers, booleans, integral floats or text; the module says which function it is.

    Repeated texts are hashed once.

    Args:
        column: (n,).
        seed: chooses one of 2^64 functions, in [0, 2^63).

    Returns:
        uint64, (n,). Null and NaN hash to 0, as some value may: ask the column which they are.

    Raises:
        EncodingError: the column holds something else.

    Example:
        >>> import pyarrow as pa
        >>> [hex(int(h)) for h in hash_keys(pa.array([0, None]))]
        ['0xe220a8397b1dcdaf', '0x0']
    """
    keys = as_keys(column, where="keys")
    if isinstance(keys, IntKeys):
        hashed = hash_integers(keys.values, seed=seed)
        if keys.valid is not None:
            hashed[~keys.valid] = 0
        return hashed
    if isinstance(keys, TextKeys):
        distinct = hash_texts(keys.values, seed=seed)
        if keys.values.null_count:
            distinct[np.asarray(keys.values.is_null())] = 0
        return distinct if keys.codes is None else np.append(distinct, np.uint64(0))[keys.codes]
    return np.zeros(len(column), np.uint64)
