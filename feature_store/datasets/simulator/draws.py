"""Random numbers that depend on what they are for, never on the order in which they are asked for.

Two kinds: a generator for each block of work (:func:`block_generator`), and hashes of counters (:func:`uniform`), by
which any user's interests at any time can be looked up without simulating what came before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# Streams: what a draw is for. A number is never used for two purposes.
WORLD, REQUEST_SIZES, LOG, WARM_UP, USERS, INTEREST, NEW_USER, MISSING, ATTRIBUTES, SAMPLE = range(1, 11)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def block_generator(seed: int, stream: int, block: int = 0) -> np.random.Generator:
    """A generator of its own for one block of one stream."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream, block])))


def uniform(seed: int, stream: int, *counters: Ints | int) -> Floats:
    """Uniform numbers in [0, 1), one for each tuple of counters: a splitmix64 chain, 53 bits.

    Args:
        counters: arrays that broadcast against each other, or numbers.
    """
    word = _mix(np.array([seed], dtype=np.uint64) + _GOLDEN * np.array([stream], dtype=np.uint64))
    for counter in counters:
        word = _mix(word + _GOLDEN * (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)))
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(word: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    word = word ^ (word >> np.uint64(30))
    word *= _MIX_1
    word ^= word >> np.uint64(27)
    word *= _MIX_2
    word ^= word >> np.uint64(31)
    return word


def sample_cumulative(cumulative: Floats, uniforms: Floats) -> Ints:
    """Positions drawn with the probabilities behind ``cumulative`` (increasing, last value = total)."""
    positions = np.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    within: Ints = np.minimum(positions, len(cumulative) - 1)
    return within
