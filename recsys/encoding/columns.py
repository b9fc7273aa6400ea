"""Arrow columns in, numpy arrays out: which types a feature may have, and what null means in each.

Every function takes ``where``, the words that name the column in an error, and raises :class:`EncodingError` for a type
or value that the feature cannot have. Small columns (one request) and large ones take the same way through, and no work
is done that does not shrink with the column.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys.errors import EncodingError

Array: TypeAlias = Any
"""A :class:`pyarrow.Array`, whose annotations lack what its subclasses add: dictionaries, lists."""
Column: TypeAlias = "pa.Array[Any] | pa.ChunkedArray[Any]"
Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_DICTIONARY_FROM = 1024
"""Text columns of at least so many rows are dictionary-encoded, so that each distinct text is looked at once."""

_FEW = 8
"""Up to so many texts are split one by one: array operations cost more than they save."""
_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)

_INTEGERS = {
    t.id: np.dtype(t.to_pandas_dtype())
    for t in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
}
_FLOATS = {t.id: np.dtype(t.to_pandas_dtype()) for t in (pa.float16(), pa.float32(), pa.float64())}
_EXACT_BELOW = {np.dtype(np.float16): 2**11, np.dtype(np.float32): 2**24, np.dtype(np.float64): 2**53}
_NULL, _BOOL, _STRING, _LARGE_STRING = pa.null().id, pa.bool_().id, pa.string().id, pa.large_string().id
_STRING_VIEW, _DICTIONARY = pa.string_view().id, pa.dictionary(pa.int32(), pa.string()).id
_DECIMALS = {t.id for t in (pa.decimal32(1), pa.decimal64(1), pa.decimal128(1), pa.decimal256(1))}
_TIMESTAMP, _DATES = pa.timestamp("us").id, {pa.date32().id, pa.date64().id}
_LIST, _LARGE_LIST = pa.list_(pa.null()).id, pa.large_list(pa.null()).id
_OTHER_LISTS = {t.id for t in (pa.list_(pa.null(), 1), pa.list_view(pa.null()), pa.large_list_view(pa.null()))}
_LISTS = {_LIST, _LARGE_LIST} | _OTHER_LISTS
_TEXTS = {_STRING, _LARGE_STRING, _STRING_VIEW}


class Ragged(NamedTuple):
    """Bags of ids: bag ``i`` is ``values[offsets[i]:offsets[i + 1]]``.

    Attributes:
        values: int64, (total,).
        offsets: int64, (n + 1,), non-decreasing, from 0 to total.
    """

    values: Int64s
    offsets: Int64s

    def take(self, rows: npt.NDArray[np.integer]) -> Ragged:
        """The bags of ``rows``, in that order; a row may be taken many times.

        Example:
            >>> bags = Ragged(np.array([5, 6, 7]), np.array([0, 2, 2, 3]))
            >>> bags.take(np.array([2, 0]))
            Ragged(values=array([7, 5, 6]), offsets=array([0, 1, 3]))
        """
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = offsets_of(lengths)
        places = np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values[places], offsets)


class IntKeys(NamedTuple):
    """A column of integers.

    Attributes:
        values: int64, (n,); 0 where missing.
        valid: bool, (n,), false where missing; ``None`` if nothing is.
    """

    values: Int64s
    valid: Bools | None


class TextKeys(NamedTuple):
    """A column of text, each row a place in a list of texts.

    Attributes:
        values: string or large_string, (m,); may hold nulls, and a text more than once.
        codes: (n,), the place of each row in ``values``, -1 where missing; ``None`` if row ``i`` is ``values[i]``.
    """

    values: Array
    codes: npt.NDArray[np.integer] | None


class NoKeys(NamedTuple):
    """A column of Arrow's null type: ``length`` missing values."""

    length: int


Keys = IntKeys | TextKeys | NoKeys


def offsets_of(lengths: npt.NDArray[np.integer]) -> Int64s:
    """Offsets (n + 1,) of bags with these lengths (n,)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.add.accumulate(lengths, out=offsets[1:], dtype=np.int64)
    return offsets


def as_array(column: Column) -> Array:
    """One contiguous array; text that would overflow 32-bit offsets becomes large_string."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    if column.type.id == _STRING:
        column = column.cast(pa.large_string())
    chunks: list[Array]
    if column.type.id == _DICTIONARY and column.type.value_type.id not in _TEXTS:
        decoded: Any = column.chunks  # Arrow unifies dictionaries of plain values only
        chunks = [chunk.dictionary_decode() for chunk in decoded]
    else:
        chunks = column.unify_dictionaries().chunks
    return pa.concat_arrays(chunks) if chunks else pa.array([], column.type)


def valid_mask(array: Array) -> Bools | None:
    """True where not null; ``None`` if nothing is null."""
    return None if array.null_count == 0 else array.is_valid().to_numpy(zero_copy_only=False)


def _view(array: Array, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The numbers of a fixed-width array without a copy; what stands at nulls has no meaning."""
    if len(array) == 0:
        return np.empty(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def text_bytes(texts: Array) -> tuple[npt.NDArray[np.uint8], Int64s]:
    """Bytes of a string or large_string array (m,), and the offsets (m + 1,) of each text in them."""
    _, offset_buffer, content_buffer = texts.buffers()
    if len(texts) == 0 or content_buffer is None:
        return np.empty(0, np.uint8), np.zeros(len(texts) + 1, np.int64)
    width = _INT32 if texts.type.id == _STRING else _INT64
    offsets = np.frombuffer(offset_buffer, width, len(texts) + 1, texts.offset * width.itemsize)
    return np.frombuffer(content_buffer, np.uint8), offsets.astype(np.int64, copy=False)


def key_type_of(column: Column) -> str | None:
    """What :func:`as_keys` reads a column as: ``"integer"`` or ``"text"``; ``None`` if it has no values."""
    kind: Any = column.type
    if kind.id == _DICTIONARY:
        kind = kind.value_type
    if kind.id == _NULL:
        return None
    return "text" if kind.id in _TEXTS else "integer"


def _refuse(where: str, wanted: str, got: pa.DataType, hint: str | None) -> NoReturn:
    raise EncodingError(f"{where} must hold {wanted}, got a column of type {got}", hint=hint)


def as_keys(column: Column, *, where: str) -> Keys:
    """Values whose identity matters: ids, names, categories.

    Integers, booleans (0 and 1), floats that hold whole numbers, decimals likewise, text, and dictionaries of these.
    Missing are null and NaN.

    Raises:
        EncodingError: another type; an unsigned integer of 2^63 or more; a float with a fraction, or so large (2^53 for
            float64, 2^24 for float32) that its type cannot tell neighbouring integers apart.
    """
    array = as_array(column)
    kind = array.type.id
    if kind in _INTEGERS:
        return _integer_keys(array, where)
    if kind in _TEXTS:
        if kind == _STRING_VIEW:
            array = array.cast(pa.large_string())
        if len(array) < _DICTIONARY_FROM:
            return TextKeys(array, None)
        encoded = array.dictionary_encode(null_encoding="encode")
        return TextKeys(encoded.dictionary, _view(encoded.indices, _INT32))
    if kind in _FLOATS:
        return _integral_float_keys(array, where)
    if kind == _BOOL:
        return _integer_keys(array.cast(pa.int8()), where)
    if kind == _NULL:
        return NoKeys(len(array))
    if kind == _DICTIONARY:
        return _dictionary_keys(array, where)
    if kind in _DECIMALS:
        try:
            return _integer_keys(array.cast(pa.int64()), where)
        except pa.ArrowInvalid as err:
            raise EncodingError(
                f"{where} must hold whole numbers below 2^63, got decimals that are not",
                hint="cast the column to text, or give the feature the encoder 'quantile' or 'log'",
            ) from err
    hint = "cast the column to int64 or to text"
    if kind == _TIMESTAMP or kind in _DATES:
        hint = "encode times with 'hour_of_day' or 'day_of_week', or " + hint
    elif kind in _LISTS:
        hint = "declare the feature as multi_categorical"
    _refuse(where, "integers or text", array.type, hint)


def _integer_keys(array: Array, where: str) -> IntKeys:
    dtype = _INTEGERS[array.type.id]
    values = _view(array, dtype)
    valid = valid_mask(array)
    if valid is not None:
        values = np.where(valid, values, dtype.type(0))
    if dtype == np.uint64 and len(values) and values.max() >= np.uint64(2**63):
        raise EncodingError(
            f"{where} must hold integers below 2^63, got larger ones in a uint64 column", hint="cast the column to text"
        )
    return IntKeys(values.astype(np.int64, copy=False), valid)


def _integral_float_keys(array: Array, where: str) -> IntKeys:
    dtype = _FLOATS[array.type.id]
    values = _view(array, dtype)
    limit = _EXACT_BELOW[dtype]
    valid = ~np.isnan(values)
    mask = valid_mask(array)
    if mask is not None:
        valid &= mask
    values = np.where(valid, values, dtype.type(0)).astype(np.float64)
    if np.any(values != np.floor(values)):
        raise EncodingError(
            f"{where} must hold whole numbers or text, got a {array.type} column with fractions",
            hint="give the feature the encoder 'quantile' or 'log', or declare it dense",
        )
    if np.any(np.abs(values) >= limit):
        raise EncodingError(
            f"{where} must hold whole numbers below {limit}, the exact range of its type {array.type}, got larger ones",
            hint="write the column as int64 from the start: a float has already merged neighbouring ids",
        )
    return IntKeys(values.astype(np.int64), None if valid.all() else valid)


def _dictionary_keys(array: Array, where: str) -> Keys:
    texts = array.dictionary
    if texts.type.id not in _TEXTS or len(array) < min(len(texts), _DICTIONARY_FROM):
        return as_keys(array.dictionary_decode(), where=where)
    codes = as_keys(array.indices, where=where)
    assert isinstance(codes, IntKeys)
    places = codes.values if codes.valid is None else np.where(codes.valid, codes.values, -1)
    return TextKeys(texts.cast(pa.large_string()) if texts.type.id == _STRING_VIEW else texts, places)


def as_numbers(column: Column, *, where: str) -> Float64s:
    """Values whose size matters, as float64 (n,), NaN where null. Integers beyond 2^53 are rounded.

    Raises:
        EncodingError: the column does not hold numbers.
    """
    array = as_array(column)
    kind = array.type.id
    if kind == _DICTIONARY:
        return as_numbers(array.dictionary_decode(), where=where)
    if kind == _NULL:
        return np.full(len(array), np.nan)
    if kind == _BOOL:
        array = array.cast(pa.int8())
    elif kind in _DECIMALS:
        array = array.cast(pa.float64())
    elif kind not in _INTEGERS and kind not in _FLOATS:
        hint = "cast the column to float64"
        if kind in _LISTS:
            hint = "declare the feature's dim for a vector, or as multi_categorical for a set"
        elif kind in _TEXTS:
            hint = "cast the column to float64, or declare the feature categorical with a vocabulary or a hash"
        _refuse(where, "numbers", array.type, hint)
    values = _view(array, _INTEGERS.get(array.type.id) or _FLOATS[array.type.id]).astype(np.float64, copy=False)
    valid = valid_mask(array)
    return values if valid is None else np.where(valid, values, np.nan)


def as_vectors(column: Column, dim: int, *, where: str) -> Float64s:
    """Vectors of numbers as float64 (n, dim), NaN where a vector or a component is null.

    With ``dim`` 1, a column of plain numbers will do as well as one of lists.

    Raises:
        EncodingError: the column does not hold numbers or lists of numbers, or a vector has another length.
    """
    array = as_array(column)
    kind = array.type.id
    if kind == _NULL:
        return np.full((len(array), dim), np.nan)
    if kind not in _LISTS:
        if dim > 1:
            _refuse(where, f"lists of {dim} numbers", array.type, "declare dim: 1 for a plain number")
        return as_numbers(array, where=where)[:, None]
    elements, offsets = flatten_lists(array)
    lengths = np.diff(offsets)
    valid = valid_mask(array)
    given = lengths if valid is None else lengths[valid]
    if (given != dim).any():
        wrong = int(given[given != dim][0])
        raise EncodingError(
            f"{where} must hold lists of {dim} numbers, got one of {wrong}",
            hint="change the feature's dim or mend the column",
        )
    vectors = as_numbers(elements, where=where).reshape(-1, dim)
    if valid is None:
        return vectors
    spread = np.full((len(array), dim), np.nan)
    spread[valid] = vectors
    return spread


def as_times(column: Column, *, where: str) -> IntKeys:
    """UTC microseconds: whole numbers as they are, timestamps and dates converted (rounded down; without a zone: UTC).

    Raises:
        EncodingError: the column does not hold times, or one lies beyond what int64 microseconds can hold.
    """
    array = as_array(column)
    kind = array.type.id
    if kind == _DICTIONARY:
        return as_times(array.dictionary_decode(), where=where)
    if kind == _NULL:
        return IntKeys(np.zeros(len(array), np.int64), np.zeros(len(array), np.bool_))
    if kind in _DATES:
        array = array.cast(pa.timestamp("ms"))
        kind = _TIMESTAMP
    if kind == _TIMESTAMP:
        unit = array.type.unit
        keys = _integer_keys(array.view(pa.int64()), where)
        if unit == "ns":
            return IntKeys(keys.values // 1000, keys.valid)
        if unit == "us":
            return keys
        factor = {"s": 1_000_000, "ms": 1000}[unit]
        if len(keys.values) and max(int(keys.values.max()), -int(keys.values.min())) > (2**63 - 1) // factor:
            raise EncodingError(f"{where} must hold times within 292,000 years of 1970, got others")
        return IntKeys(keys.values * factor, keys.valid)
    if kind in _INTEGERS or kind in _FLOATS:
        keys_of_numbers = as_keys(array, where=where)
        assert isinstance(keys_of_numbers, IntKeys)
        return keys_of_numbers
    _refuse(where, "times", array.type, "cast the column to timestamp[us] or to int64 microseconds since 1970, UTC")


def flatten_lists(array: Array) -> tuple[Array, Int64s]:
    """Elements of a list array (m,) of any kind, and the offsets (m + 1,) of its lists. A null list counts as empty."""
    if array.type.id in (_LIST, _LARGE_LIST) and array.null_count == 0 and len(array):
        width = _INT32 if array.type.id == _LIST else _INT64
        offsets = np.frombuffer(array.buffers()[1], width, len(array) + 1, array.offset * width.itemsize)
        first, last = int(offsets[0]), int(offsets[-1])
        elements = array.values
        if first > 0 or last < len(elements):
            elements = elements.slice(first, last - first)
        return elements, offsets.astype(np.int64) - first
    lengths = np.asarray(pc.call_function("list_value_length", [array]).fill_null(0))
    return array.flatten(), offsets_of(lengths)


class Bags(NamedTuple):
    """Bags of raw values.

    Attributes:
        elements: the values of all bags, one after the other.
        offsets: int64, (m + 1,).
        codes: (n,), the bag of each row; ``None`` if row ``i`` is bag ``i``.
    """

    elements: Array
    offsets: Int64s
    codes: npt.NDArray[np.integer] | None


def as_bags(column: Column, *, separator: str | None, max_values: int | None, where: str) -> Bags:
    """Bags of values: a list column as it is, or text split at ``separator`` less empty pieces. Null is the empty bag.

    Args:
        column: (n,).
        separator: splits text; list columns do not need it.
        max_values: only the first so many values of each bag are kept.
        where: names the column in errors.

    Raises:
        EncodingError: the column holds neither lists nor text, or text and there is no separator.
    """
    array = as_array(column)
    kind = array.type.id
    if kind == _NULL:
        return Bags(array.slice(0, 0), np.zeros(len(array) + 1, np.int64), None)
    codes: npt.NDArray[np.integer] | None = None
    if kind in _LISTS:
        elements, offsets = flatten_lists(array)
    elif kind == _DICTIONARY and array.type.value_type.id not in _TEXTS:
        return as_bags(array.dictionary_decode(), separator=separator, max_values=max_values, where=where)
    elif kind in _TEXTS or kind == _DICTIONARY:
        if separator is None:
            _refuse(where, "lists", array.type, "give the feature a separator to split text at")
        keys = as_keys(array, where=where)
        assert isinstance(keys, TextKeys)
        codes = keys.codes
        texts = keys.values
        if codes is not None:  # one more text, the null, for the rows without
            texts = pa.concat_arrays([texts, pa.nulls(1, texts.type)])
            codes = np.where(codes < 0, len(texts) - 1, codes)
        elements, offsets = _split(texts, separator)
    else:
        _refuse(where, "lists or text", array.type, "declare the feature categorical if it has one value")
    if max_values is not None and len(elements) > max_values:
        lengths = np.diff(offsets)
        if lengths.max() > max_values:
            place = np.arange(len(elements), dtype=np.int64) - np.repeat(offsets[:-1], lengths)
            elements = elements.filter(pa.array(place < max_values))
            offsets = offsets_of(np.minimum(lengths, max_values))
    return Bags(elements, offsets, codes)


def _split(texts: Array, separator: str) -> tuple[Array, Int64s]:
    """Pieces of texts (m,) that are not empty, and the offsets (m + 1,) of each text's."""
    if len(texts) <= _FEW:
        split = [[piece for piece in (text or "").split(separator) if piece] for text in texts.to_pylist()]
        pieces = pa.array([piece for bag in split for piece in bag], pa.large_string())
        return pieces, offsets_of(np.array([len(bag) for bag in split], np.int64))
    pieces, offsets = flatten_lists(pc.call_function("split_pattern", [texts], pc.SplitPatternOptions(separator)))
    is_kept = np.asarray(pc.binary_length(pieces)) > 0
    if is_kept.all():
        return pieces, offsets
    num_kept_before = np.append(0, np.cumsum(is_kept))
    return pieces.filter(pa.array(is_kept)), num_kept_before[offsets]
