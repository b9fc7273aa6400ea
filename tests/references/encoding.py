"""Encoders as their definitions read, one value at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction

MODULUS = 2**64


def mix(z: int) -> int:
    """Finaliser of SplitMix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULUS
    return z ^ (z >> 31)


def fnv1a(content: bytes) -> int:
    """FNV-1a, 64 bits."""
    hashed = 0xCBF29CE484222325
    for byte in content:
        hashed = (hashed ^ byte) * 0x100000001B3 % MODULUS
    return hashed


def hash_key(value: int | str, seed: int = 0) -> int:
    """Hash of an integer or a text."""
    if isinstance(value, str):
        return mix(fnv1a(value.encode("utf-8")) ^ mix(seed))
    return mix(((value % MODULUS) ^ mix(seed)) + 0x9E3779B97F4A7C15 & (MODULUS - 1))


def vocabulary(
    values: Iterable[int | str | None],
    weights: Iterable[int] | None = None,
    *,
    min_count: int = 1,
    max_size: int | None = None,
) -> list[int | str]:
    """Values by falling weight, ties by value (text by its UTF-8 bytes)."""
    counts: Counter[int | str] = Counter()
    values = list(values)
    for value, weight in zip(values, weights or [1] * len(values), strict=True):
        if value is not None and weight > 0:
            counts[value] += weight
    kept = [value for value, count in counts.items() if count >= min_count]
    kept.sort(key=lambda v: (-counts[v], v.encode() if isinstance(v, str) else v))
    return kept[:max_size]


def vocabulary_id(known: Sequence[int | str], value: int | str | None) -> int:
    """2 + place, 1 for unknown."""
    return 2 + known.index(value) if value in known else 1


def split_bag(text: str | None, separator: str, max_values: int | None) -> list[str]:
    """Pieces of a text, none empty."""
    pieces: list[str] = []
    rest = text or ""
    while rest:
        piece, _, rest = rest.partition(separator)
        if piece and (max_values is None or len(pieces) < max_values):
            pieces.append(piece)
    return pieces


def quantile_boundaries(values: Sequence[float], weights: Sequence[int], num_buckets: int) -> list[float]:
    """Distinct weighted quantiles of the inverse distribution function, without the maximum."""
    seen = sorted((v, w) for v, w in zip(values, weights, strict=True) if w > 0 and math.isfinite(v))
    total = sum(w for _, w in seen)
    boundaries: list[float] = []
    for i in range(1, num_buckets):
        below = 0
        for value, weight in seen:
            below += weight
            if Fraction(below, total) >= Fraction(i, num_buckets):
                if value < seen[-1][0] and value not in boundaries:
                    boundaries.append(value)
                break
    return boundaries


def quantile_id(boundaries: Sequence[float], value: float | None) -> int:
    """2 + number of boundaries below the value."""
    if value is None or math.isnan(value):
        return 1
    return 2 + sum(boundary < value for boundary in boundaries)


def log_id(value: float | None, base: float, num_buckets: int) -> int:
    """2 + floor(log_base(1 + max(x, 0))), in exact arithmetic."""
    if value is None or math.isnan(value):
        return 1
    if value == math.inf:
        return 2 + num_buckets - 1
    bucket = 0
    power = Fraction(base)
    while bucket < num_buckets - 1 and power <= 1 + Fraction(max(value, 0.0)):
        bucket += 1
        power *= Fraction(base)
    return 2 + bucket


def calendar_ids(time: int | None, utc_offset_minutes: int) -> tuple[int, int]:
    """Ids of hour of day and day of week of UTC microseconds."""
    if time is None:
        return 1, 1
    local = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time, minutes=utc_offset_minutes)
    return 2 + local.hour, 2 + local.weekday()


def mean_and_std(values: Iterable[float | None], weights: Iterable[int]) -> tuple[float, float]:
    """Weighted mean and standard deviation of the population in exact arithmetic; 1 for a constant."""
    seen = [
        (Fraction(v), w) for v, w in zip(values, weights, strict=True) if v is not None and math.isfinite(v) and w > 0
    ]
    if not seen:
        return 0.0, 1.0
    total = sum(w for _, w in seen)
    mean = sum(v * w for v, w in seen) / total
    variance = sum((v - mean) ** 2 * w for v, w in seen) / total
    return float(mean), math.sqrt(variance) if variance else 1.0
