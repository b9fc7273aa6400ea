"""Fitting an encoder on the training period, chunk by chunk."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys.encoding.columns import (
    Array,
    Column,
    Float64s,
    Int64s,
    IntKeys,
    NoKeys,
    TextKeys,
    as_bags,
    as_keys,
    as_numbers,
    as_times,
    as_vectors,
)
from recsys.encoding.dense import squash
from recsys.encoding.encoder import Encoder, dense_transform, place_of, table_encoder, vocabulary_table
from recsys.encoding.tables import TableEncoder
from recsys.errors import EncodingError
from recsys.schema import (
    Categorical,
    DayOfWeek,
    Dense,
    HourOfDay,
    LogBuckets,
    MultiCategorical,
    QuantileBuckets,
    Schema,
    Standardise,
    Vocabulary,
)

MAX_QUANTILE_CELLS = 1 << 20
"""Quantiles are exact up to so many distinct numbers; beyond, numbers merge into cells: see :class:`QuantileSketch`."""

_COMPACT_EVERY = 1 << 20
_STD_BITS = 30
_BLOCK = 1 << 16
_DIGIT_BITS = 10
"""2^16 products of 27 and 10 bits sum up to less than 2^53."""


class DistinctCounts:
    """Distinct keys with the sum of their weights, in memory that grows with the distinct keys only."""

    def __init__(self) -> None:
        self._keys: Array | None = None
        self._counts = np.empty(0, np.int64)
        self._pending: list[tuple[Array, Int64s]] = []
        self._num_pending = 0

    def add(self, keys: Array, counts: Int64s) -> None:
        """Adds keys (m,), none null, each with its count (m,); repeated keys add up."""
        kept = counts > 0
        if not kept.all():
            keys, counts = keys.filter(pa.array(kept)), counts[kept]
        if len(keys) == 0:
            return
        self._pending.append((keys, counts))
        self._num_pending += len(keys)
        if self._num_pending > max(_COMPACT_EVERY, len(self._counts)):
            self._compact()

    def _compact(self) -> None:
        if not self._pending:
            return
        parts = [keys for keys, _ in self._pending]
        counts = [counts for _, counts in self._pending]
        if self._keys is not None:
            parts.append(self._keys)
            counts.append(self._counts)
        self._keys, self._counts = _sum_by_key(pa.concat_arrays(parts), np.concatenate(counts))
        self._pending, self._num_pending = [], 0

    def result(self) -> tuple[Array | None, Int64s]:
        """Keys (k,) in no particular order, ``None`` if nothing was added, and their counts (k,)."""
        self._compact()
        return self._keys, self._counts


def _sum_by_key(keys: Array, counts: Int64s) -> tuple[Array, Int64s]:
    encoded = keys.dictionary_encode()
    codes = encoded.indices.to_numpy()
    # Sums of whole numbers below 2^53: float64 adds them exactly, in any order.
    return encoded.dictionary, np.bincount(codes, counts, len(encoded.dictionary)).astype(np.int64)


class QuantileSketch:
    """Weighted quantiles: exact up to ``max_cells`` distinct numbers, then of numbers merged into cells.

    A cell is all float64 numbers that agree in sign, exponent and the first :math:`p` bits of the mantissa, :math:`p`
    being the largest at which at most ``max_cells`` cells are occupied. Every number counts in its cell, so a boundary
    is wrong by at most one cell: a relative error of :math:`2^{-p}` in value. What comes out does not depend on the
    order or the chunks in which numbers came in, and there is no chance in it.

    Args:
        max_cells: bound on memory, at least 8192.
    """

    def __init__(self, max_cells: int = MAX_QUANTILE_CELLS) -> None:
        if max_cells < 8192:
            raise ValueError(f"max_cells must be at least 8192 (float64 has 4096 exponents and signs), got {max_cells}")
        self._max_cells = max_cells
        self._dropped_bits = 0
        self._cells = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)

    def add(self, numbers: Float64s, weights: Int64s | None) -> None:
        """Adds numbers (n,) with weights (n,), one each if not given; those not finite are skipped."""
        seen = np.isfinite(numbers)
        if weights is not None:
            seen &= weights > 0
        if not seen.all():
            numbers = numbers[seen]
            weights = None if weights is None else weights[seen]
        for begin in range(0, len(numbers), self._max_cells):
            part = slice(begin, begin + self._max_cells)
            cells = _ordered(numbers[part]) >> self._dropped_bits
            counts = np.ones(len(cells), np.int64) if weights is None else weights[part]
            self._merge(np.concatenate([self._cells, cells]), np.concatenate([self._counts, counts]))

    def _merge(self, cells: Int64s, counts: Int64s) -> None:
        order = np.argsort(cells)
        cells, counts = _join_neighbours(cells[order], counts[order])
        while len(cells) > self._max_cells:
            self._dropped_bits += 1
            cells, counts = _join_neighbours(cells >> 1, counts)  # a shift keeps the order
        self._cells, self._counts = cells, counts

    def boundaries(self, num_buckets: int) -> Float64s:
        r"""The distinct numbers :math:`\min\{v : F(v) \ge i / n\}` for :math:`0 < i < n`, less the maximum.

        :math:`F` is the weighted distribution function and :math:`n` the number of buckets. A boundary at the maximum
        would bound a bucket that no training row falls into. Of a cell, the largest number stands for all.

        Returns:
            float64, at most ``num_buckets - 1``, increasing; none if nothing was added.
        """
        if len(self._cells) == 0:
            return np.empty(0)
        below = np.cumsum(self._counts)
        total = int(below[-1])
        wanted = [-(-i * total // num_buckets) for i in range(1, num_buckets)]
        places = np.unique(np.searchsorted(below, wanted, side="left"))
        cells = self._cells[places[places < len(self._cells) - 1]]
        return _unordered((cells << self._dropped_bits) | ((1 << self._dropped_bits) - 1))


def _join_neighbours(cells: Int64s, counts: Int64s) -> tuple[Int64s, Int64s]:
    """Distinct cells of a sorted list (m,), m > 0, and the sums of their counts."""
    starts = np.flatnonzero(np.append(True, cells[1:] != cells[:-1]))
    return cells[starts], np.add.reduceat(counts, starts)


def _ordered(numbers: Float64s) -> Int64s:
    """int64 with the order of the float64 numbers; both zeros are 0."""
    bits = (numbers + 0.0).view(np.int64)
    return np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)


def _unordered(ordered: Int64s) -> Float64s:
    return np.where(ordered < 0, ordered ^ np.int64(2**63 - 1), ordered).view(np.float64)


class Moments:
    r"""Weighted mean and standard deviation (of the population) of vectors, whatever their size and number.

    Kept as fractions, per component: the weight :math:`W = \sum w`, the sum :math:`T = \sum w x`, which is exact, and
    :math:`Q = \sum w x^2`, to which a chunk with the sums :math:`W_c, T_c` adds

    .. math:: S_c + 2 p T_c - W_c p^2, \qquad S_c = \sum w (x - p)^2

    where :math:`p` is the mean of the chunk as float64, and :math:`S_c`, summed in float64, has no cancellation. Then
    the mean is :math:`T / W` and the variance :math:`Q / W - (T / W)^2`. Float64 alone loses the variance of numbers
    such as microseconds since 1970, and gives statistics that change with the order of rows.

    Args:
        dim: components; each has moments of its own, over the rows where it is not missing.
    """

    def __init__(self, dim: int) -> None:
        self._components = [_ComponentMoments() for _ in range(dim)]

    def add(self, vectors: Float64s, weights: Int64s | None) -> None:
        """Adds vectors (n, dim), NaN or infinite where missing, with weights (n,), one each if not given."""
        for component, numbers in zip(self._components, vectors.T, strict=True):
            seen = np.isfinite(numbers)
            if weights is not None:
                seen &= weights > 0
            if seen.any():
                counts = np.ones(np.count_nonzero(seen), np.int64) if weights is None else weights[seen]
                component.add(numbers[seen], counts)

    @property
    def state(self) -> dict[str, Any]:
        """``mean`` (dim,) and ``std`` (dim,); the latter is 1 for a component that is constant or was never seen.

        The mean is the float64 nearest to the exact one. The standard deviation is rounded to 30 bits, more than the
        float32 that comes out of the transform has, so that the rounding of sums within chunks does not show.
        """
        results = [component.result() for component in self._components]
        return {"mean": [mean for mean, _ in results], "std": [std for _, std in results]}


class _ComponentMoments:
    def __init__(self) -> None:
        self._weight = 0
        self._sum = Fraction(0)
        self._squares = Fraction(0)
        self._lowest = math.inf
        self._highest = -math.inf

    def add(self, numbers: Float64s, counts: Int64s) -> None:
        """Adds finite numbers (n,), n > 0, with counts (n,) of at least 1."""
        weight = int(counts.sum())
        total = _exact_sum(numbers, counts)
        # Scaled by a power of two to below 1, so that squares neither overflow nor vanish.
        exponent = math.frexp(float(np.abs(numbers).max()))[1]
        scale = Fraction(2) ** exponent
        centre = float(total / weight / scale)
        centred = np.ldexp(numbers, -exponent) - centre
        squares = Fraction(float((centred * centred * counts).sum()))
        self._squares += (squares - weight * Fraction(centre) ** 2) * scale**2 + 2 * Fraction(centre) * scale * total
        self._weight += weight
        self._sum += total
        self._lowest = min(self._lowest, float(numbers.min()))
        self._highest = max(self._highest, float(numbers.max()))

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        if self._weight == 0:
            return 0.0, 1.0
        mean = self._sum / self._weight
        variance = self._squares / self._weight - mean * mean
        if self._lowest == self._highest or variance <= 0:
            return float(mean), 1.0
        exponent = (variance.numerator.bit_length() - variance.denominator.bit_length()) // 2
        mantissa, more = math.frexp(math.sqrt(variance / Fraction(4) ** exponent))
        return float(mean), math.ldexp(round(mantissa * 2**_STD_BITS), exponent + more - _STD_BITS)


def _exact_sum(numbers: Float64s, counts: Int64s) -> Fraction:
    """Sum of numbers (n,), each so many times, without rounding.

    A number is split into two integers of at most 27 bits and a power of two, a count into digits. Products are
    summed per power of two in float64, which is exact while sums stay below 2^53, and then as Python integers.
    """
    sums: Counter[int] = Counter()
    for begin in range(0, len(numbers), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        mantissas, exponents = np.frexp(numbers[block])
        lowest = int(exponents.min())
        powers = exponents - lowest
        high = np.floor(mantissas * 2.0**26)
        low = (mantissas * 2.0**26 - high) * 2.0**27
        for shift in range(0, int(counts[block].max()).bit_length(), _DIGIT_BITS):
            digits = (counts[block] >> shift) & (2**_DIGIT_BITS - 1)
            for part, place in ((high, 27), (low, 0)):
                summed = np.bincount(powers, part * digits)
                for power in np.flatnonzero(summed).tolist():
                    sums[lowest + power] += int(summed[power]) << (place + shift)
    return sum((value * Fraction(2) ** (power - 53) for power, value in sums.items()), Fraction(0))


class EncoderFitter:
    """Fits an :class:`Encoder` on what the training period shows it, in chunks of any size and order.

    Features that share a table share its values: each adds to the counts. Memory grows with the distinct values of
    vocabularies; quantiles and moments are bounded.

    Args:
        schema: what to encode.

    Example:
        >>> fitter = EncoderFitter(schema)  # doctest: +SKIP
        >>> fitter.update("item_id", pa.array([7, 7, 9]))  # doctest: +SKIP
        >>> fitter.finish().encode("item_id", pa.array([9, 7, 8]))  # doctest: +SKIP
        array([3, 2, 1])
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._specs = schema.table_encoders
        self._vocabularies = {t: DistinctCounts() for t, spec in self._specs.items() if isinstance(spec, Vocabulary)}
        self._sketches = {t: QuantileSketch() for t, spec in self._specs.items() if isinstance(spec, QuantileBuckets)}
        self._moments = {
            f.name: Moments(f.dim)
            for f in schema.all_features
            if f.kind == "dense" and isinstance(f.transform, Standardise)
        }
        self._vocabulary_types: dict[str, tuple[str, str]] = {}
        self._hash_types: dict[str, tuple[str, str]] = {}

    def update(self, feature: str, column: Column, weights: npt.ArrayLike | None = None) -> None:
        """Shows the fitter some raw values of a feature.

        Args:
            feature: name of a feature.
            column: (n,).
            weights: whole numbers >= 0, (n,): how many training-period occurrences each row stands for. A value
                counts the sum of the weights of its rows; rows of weight 0 are not seen. One each if not given.

        Raises:
            EncodingError: the column is not of a type that the feature can have, or features that share a vocabulary
                have integers here and text there.
            SchemaError: there is no such feature.
        """
        spec = self._schema.feature(feature)
        where = place_of(feature)
        counts = None if weights is None else _checked(weights, len(column), where)
        if not isinstance(spec, Categorical):
            vectors = as_vectors(column, spec.dim, where=where)
            if isinstance(spec.transform, Standardise):
                self._moments[feature].add(squash(vectors, spec.transform), counts)
            return
        if not isinstance(spec, MultiCategorical):
            self._see(spec, column, counts, where)
            return
        bags = as_bags(column, separator=spec.separator, max_values=spec.max_values, where=where)
        if bags.codes is not None:
            counts = _sums(bags.codes, counts, len(bags.offsets) - 1)
        if counts is not None:
            counts = np.repeat(counts, np.diff(bags.offsets))
        self._see(spec, bags.elements, counts, where)

    def _see(self, spec: Categorical, column: Column, counts: Int64s | None, where: str) -> None:
        table = spec.table_name
        encoder = self._specs[table]
        if isinstance(encoder, QuantileBuckets):
            self._sketches[table].add(as_numbers(column, where=where), counts)
        elif isinstance(encoder, LogBuckets):
            as_numbers(column, where=where)
        elif isinstance(encoder, HourOfDay | DayOfWeek):
            as_times(column, where=where)
        else:
            keys = as_keys(column, where=where)
            if isinstance(keys, NoKeys):
                return
            key_type = "integer" if isinstance(keys, IntKeys) else "text"
            if isinstance(encoder, Vocabulary):
                _hold_to_first(self._vocabulary_types, table, key_type, where)
                self._vocabularies[table].add(*_counted(keys, counts))
            else:
                _hold_to_first(self._hash_types, spec.name, key_type, where)

    def finish(self) -> Encoder:
        """The encoder fitted on everything shown so far; the fitter may go on.

        Values of a vocabulary are ordered by count, highest first, and equal counts by value (numbers by size, text by
        its UTF-8 bytes). Those below ``min_count``, then those past ``max_size``, are left out.
        """
        tables: dict[str, TableEncoder] = {}
        for name, spec in self._specs.items():
            if isinstance(spec, Vocabulary):
                tables[name] = vocabulary_table(_frequent(*self._vocabularies[name].result(), spec))
            elif isinstance(spec, QuantileBuckets):
                tables[name] = table_encoder(
                    spec, {"boundaries": self._sketches[name].boundaries(spec.num_buckets).tolist()}
                )
            else:
                tables[name] = table_encoder(spec, {})
        transforms = {}
        for feature in self._schema.all_features:
            if isinstance(feature, Dense):
                state = self._moments[feature.name].state if feature.name in self._moments else {}
                transforms[feature.name] = dense_transform(feature, state)
        hash_key_types = {feature: key_type for feature, (key_type, _) in self._hash_types.items()}
        return Encoder(self._schema, tables=tables, transforms=transforms, hash_key_types=hash_key_types)


def _hold_to_first(seen: dict[str, tuple[str, str]], owner: str, key_type: str, where: str) -> None:
    """Notes the type of the values of a table or feature, and who brought it; refuses another type."""
    known, first = seen.setdefault(owner, (key_type, where))
    if known != key_type:
        words = {"integer": "integers", "text": "text"}
        raise EncodingError(
            f"{where} must hold {words[known]}, as the earlier values of {first}, got {words[key_type]}",
            hint="cast one of the columns, or give the feature a table of its own",
        )


def _checked(weights: npt.ArrayLike, num_rows: int, where: str) -> Int64s:
    given = np.asarray(weights)
    if given.shape != (num_rows,):
        raise EncodingError(f"weights of {where} must have shape ({num_rows},), got {given.shape}")
    with np.errstate(invalid="ignore"):
        whole = given.astype(np.int64)
    if np.any(whole != given) or np.any(whole < 0):
        raise EncodingError(f"weights of {where} must be whole numbers >= 0, got others")
    return whole


def _sums(codes: npt.NDArray[np.integer], counts: Int64s | None, length: int) -> Int64s:
    return np.bincount(codes, counts, length).astype(np.int64)


def _counted(keys: IntKeys | TextKeys, counts: Int64s | None) -> tuple[Array, Int64s]:
    """Distinct keys of a chunk, none null, with their counts."""
    if isinstance(keys, IntKeys):
        values = keys.values
        if keys.valid is not None:
            values = values[keys.valid]
            counts = None if counts is None else counts[keys.valid]
        if len(values) == 0:
            return pa.array(values), np.empty(0, np.int64)
        lowest, highest = int(values.min()), int(values.max())
        if lowest >= 0 and highest < 4 * len(values):
            lowest = 0  # counted as they are, without a copy
        if highest - lowest < 4 * len(values):
            sums = _sums(values - lowest if lowest else values, counts, 0)
            seen = np.flatnonzero(sums)
            return pa.array(seen + lowest), sums[seen]
        return _sum_by_key(pa.array(values), np.ones(len(values), np.int64) if counts is None else counts)
    texts = keys.values.cast(pa.large_string())
    if keys.codes is None:
        sums = np.ones(len(texts), np.int64) if counts is None else counts
    else:
        seen_rows = keys.codes >= 0
        codes = keys.codes if seen_rows.all() else keys.codes[seen_rows]
        if counts is not None and len(codes) < len(counts):
            counts = counts[seen_rows]
        sums = _sums(codes, counts, len(texts))
    if texts.null_count:
        valid = texts.is_valid()
        sums, texts = sums[valid.to_numpy(zero_copy_only=False)], texts.filter(valid)
    return _sum_by_key(texts, sums)


def _frequent(keys: Array | None, counts: Int64s, spec: Vocabulary) -> Array:
    if keys is None:
        return pa.nulls(0)
    kept = counts >= spec.min_count
    table = pa.table({"key": keys.filter(pa.array(kept)), "count": pa.array(counts[kept])})
    order = pc.sort_indices(table, sort_keys=[("count", "descending"), ("key", "ascending")])
    return table["key"].combine_chunks().take(order[: spec.max_size])
