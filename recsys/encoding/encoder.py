"""The fitted encoder: one code path from raw values to ids and numbers, for a table of any size and for one request."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys.config import fingerprint, validate
from recsys.encoding.columns import Array, Column, Ragged, as_bags, as_vectors, key_type_of, text_bytes
from recsys.encoding.dense import DenseTransform
from recsys.encoding.key_index import KeyIndex
from recsys.encoding.tables import CalendarTable, HashTable, LogTable, QuantileTable, TableEncoder, VocabularyTable
from recsys.errors import EncodingError, IntegrityError
from recsys.files import draft_of, put_in_place, sync_tree
from recsys.schema import (
    UNKNOWN_ID,
    Categorical,
    Dense,
    EncoderSpec,
    Hash,
    HourOfDay,
    LogBuckets,
    MultiCategorical,
    QuantileBuckets,
    Schema,
    Vocabulary,
)

__all__ = ["EncodedColumn", "Encoder", "Ragged"]

EncodedColumn = npt.NDArray[Any] | Ragged
"""categorical: int64 (n,); multi_categorical: :class:`Ragged` of n bags; dense: float32 (n, dim)."""

FORMAT = "recsys.encoder"
FORMAT_VERSION = 1

_CHANGED = "a file was changed or cut short after it was written: copy the folder again, or build it again"
_ENCODER_FILE = "encoder.json"
_VOCABULARIES = "vocabularies"


def place_of(feature: str) -> str:
    """The words that name a feature's column in an error."""
    return f"feature {feature!r}"


def vocabulary_table(keys: Array) -> VocabularyTable:
    """A vocabulary of keys, most frequent first."""
    index = KeyIndex(keys)
    return VocabularyTable(index, _digest(index))


def _digest(index: KeyIndex) -> str:
    """sha256 of the keys, whatever file they lie in: integers, or lengths of texts, then their bytes; little-endian."""
    digest = hashlib.sha256(f"{index.key_type}:{len(index)}:".encode())
    keys = index.keys
    if index.key_type == "text":
        content, offsets = text_bytes(keys)
        digest.update(np.diff(offsets).astype("<i8").tobytes())
        digest.update(content[offsets[0] : offsets[-1]].data)
    elif index.key_type == "integer":
        digest.update(keys.to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def table_encoder(spec: EncoderSpec, state: Mapping[str, Any]) -> TableEncoder:
    """The encoder of a table that is no vocabulary, from its configuration and what was fitted."""
    if isinstance(spec, Hash):
        return HashTable(spec.num_buckets, spec.seed)
    if isinstance(spec, QuantileBuckets):
        return QuantileTable(np.array(state["boundaries"], np.float64))
    if isinstance(spec, LogBuckets):
        return LogTable(spec)
    assert not isinstance(spec, Vocabulary)
    if isinstance(spec, HourOfDay):
        return CalendarTable.hour_of_day(spec.utc_offset_minutes)
    return CalendarTable.day_of_week(spec.utc_offset_minutes)


def dense_transform(feature: Dense, state: Mapping[str, Any]) -> DenseTransform:
    """The transform of a dense feature, from what was fitted."""
    mean = np.array(state.get("mean", np.zeros(feature.dim)), np.float64)
    std = np.array(state.get("std", np.ones(feature.dim)), np.float64)
    return DenseTransform(feature.transform, mean.reshape(feature.dim), std.reshape(feature.dim))


class Encoder:
    """Turns raw columns into what models take. Not changed after construction, so threads may share it.

    Made by :class:`~recsys.encoding.EncoderFitter`, or loaded.

    Args:
        schema: what the features are.
        tables: fitted encoder of every table of ``schema.table_encoders``.
        transforms: fitted transform of every dense feature.
        hash_key_types: ``"integer"`` or ``"text"`` for the hashed features whose type was seen when fitting.

    Attributes:
        schema: what the features are.
        fingerprint: sha256 of everything that decides the output of :meth:`encode`.
        table_sizes: rows of each embedding table, padding and unknown included; order of ``schema.table_encoders``.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        tables: Mapping[str, TableEncoder],
        transforms: Mapping[str, DenseTransform],
        hash_key_types: Mapping[str, str],
    ) -> None:
        self.schema = schema
        self.table_sizes = {name: tables[name].size for name in schema.table_encoders}
        self._tables = dict(tables)
        self._transforms = dict(transforms)
        self._hash_key_types = dict(hash_key_types)
        self._features = {f.name: f for f in schema.all_features}
        self._where = {name: place_of(name) for name in self._features}
        self.fingerprint = fingerprint(self._identity())

    def _identity(self) -> dict[str, Any]:
        features = []
        for feature in self.schema.all_features:
            entry = feature.model_dump(mode="json", exclude={"scope", "column", "table", "encoder"})
            if isinstance(feature, Categorical):
                entry["table"] = feature.table_name
                entry["key_type"] = self._hash_key_types.get(feature.name)
            else:
                entry["fitted"] = self._transforms[feature.name].state
            features.append(entry)
        tables = [
            {"name": name, "encoder": spec.model_dump(mode="json"), "fitted": self._tables[name].state}
            for name, spec in self.schema.table_encoders.items()
        ]
        return {"format_version": FORMAT_VERSION, "features": features, "tables": tables}

    def grown(self, newer: Encoder) -> Encoder:
        """This encoder with the values of a newer one's vocabularies that it lacks, behind its own.

        No id that it gives changes, save that what was unknown may get one. All else that was fitted stays.
        Vocabularies stop at their ``max_size``.

        Args:
            newer: of the same schema.
        """
        tables = dict(self._tables)
        for name, spec in self.schema.table_encoders.items():
            old, new = self._tables[name], newer._tables[name]
            if not isinstance(old, VocabularyTable) or not isinstance(new, VocabularyTable):
                continue
            assert isinstance(spec, Vocabulary)
            added = new.index.keys
            if len(added) and len(old.index):
                added = added.filter(pa.array(old.index.positions(added, where=f"table {name!r}") < 0))
            added = added[: None if spec.max_size is None else max(spec.max_size - len(old.index), 0)]
            if len(added):
                tables[name] = vocabulary_table(pa.concat_arrays([old.index.keys, added]) if len(old.index) else added)
        return Encoder(
            self.schema,
            tables=tables,
            transforms=self._transforms,
            hash_key_types={**newer._hash_key_types, **self._hash_key_types},
        )

    def encode(self, feature: str, column: Column) -> EncodedColumn:
        """Encodes raw values of a feature.

        Args:
            feature: name of a feature.
            column: (n,), its raw values.

        Returns:
            categorical: int64 (n,), unknown where null. multi_categorical: n bags of ids, empty where null, unknown
            where an element is. dense: float32 (n, dim), 0 where missing.

        Raises:
            EncodingError: the column is not of a type that the feature can have.
            SchemaError: there is no such feature.
        """
        spec = self._features.get(feature) or self.schema.feature(feature)
        where = self._where[feature]
        if isinstance(spec, Dense):
            return self._transforms[feature].encode(as_vectors(column, spec.dim, where=where))
        table = self._tables[spec.table_name]
        if not isinstance(spec, MultiCategorical):
            self._check_type(feature, column)
            return table.encode(column, where=where)
        bags = as_bags(column, separator=spec.separator, max_values=spec.max_values, where=where)
        self._check_type(feature, bags.elements)
        ids = Ragged(table.encode(bags.elements, where=where), bags.offsets)
        return ids if bags.codes is None else ids.take(bags.codes)

    def decode(self, feature: str, column: EncodedColumn) -> list[Any]:
        """What encoded values stand for, for people to read.

        Args:
            feature: name of a feature.
            column: of n rows, as :meth:`encode` gives it.

        Returns:
            n values that JSON can say. Of a vocabulary the raw values, of numbers in buckets their interval, of hashed
            features the bucket; None where unknown, lists of these for bags. Of dense features the number before the
            transform, to six digits: what was missing reads as the mean.

        Raises:
            SchemaError: there is no such feature.
        """
        spec = self._features.get(feature) or self.schema.feature(feature)
        if isinstance(spec, Dense):
            assert isinstance(column, np.ndarray)
            numbers = self._transforms[feature].decode(column.reshape(len(column), spec.dim))
            rounded = [[float(f"{x:.6g}") for x in row] for row in numbers.tolist()]
            return [row[0] for row in rounded] if spec.dim == 1 else rounded
        table = self._tables[spec.table_name]
        if not isinstance(column, Ragged):
            return table.decode(column)
        words, offsets = table.decode(column.values), column.offsets.tolist()
        return [words[start:end] for start, end in pairwise(offsets)]

    def vocabulary(self, feature: str) -> Array | None:
        """The values of a feature's vocabulary, in the order of their ids, the first of which is 2.

        Returns:
            None for a feature without one: a dense one, or one whose ids come by rule.

        Raises:
            SchemaError: there is no such feature.
        """
        spec = self._features.get(feature) or self.schema.feature(feature)
        table = None if isinstance(spec, Dense) else self._tables[spec.table_name]
        return table.index.keys if isinstance(table, VocabularyTable) else None

    def _check_type(self, feature: str, column: Column) -> None:
        """Holds a hashed feature to the type that it was fitted on: 7 and "7" have different hashes."""
        expected = self._hash_key_types.get(feature)
        if expected is not None and key_type_of(column) not in (expected, None):
            raise EncodingError(
                f"{place_of(feature)} must hold {'text' if expected == 'text' else 'integers'}, as when it was fitted, "
                f"got a column of type {column.type}",
                hint=f"cast the column to {'text' if expected == 'text' else 'int64'}",
            )

    def unknown_column(self, feature: str, n: int) -> EncodedColumn:
        """The encoding of ``n`` entities of which nothing is known: unknown ids, empty bags, zeros.

        Raises:
            SchemaError: there is no such feature.
        """
        spec = self._features.get(feature) or self.schema.feature(feature)
        if isinstance(spec, Dense):
            return np.zeros((n, spec.dim), np.float32)
        if isinstance(spec, MultiCategorical):
            return Ragged(np.empty(0, np.int64), np.zeros(n + 1, np.int64))
        return np.full(n, UNKNOWN_ID, np.int64)

    def save(self, folder: str | Path) -> None:
        """Writes ``encoder.json`` and ``vocabularies/<table>.arrow`` into a new folder that replaces any of that name.

        The folder appears complete or not at all.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = draft_of(folder)
        try:
            (draft / _VOCABULARIES).mkdir(parents=True)
            for name, table in self._tables.items():
                if isinstance(table, VocabularyTable):
                    _write_keys(draft / _VOCABULARIES / f"{name}.arrow", table.index.keys)
            content: dict[str, Any] = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "fingerprint": self.fingerprint,
                "schema": self.schema.model_dump(mode="json"),
                "tables": {name: self._tables[name].state for name in self.schema.table_encoders},
                "transforms": {name: transform.state for name, transform in self._transforms.items()},
                "hash_key_types": self._hash_key_types,
            }
            content["sha256"] = fingerprint(content)
            with (draft / _ENCODER_FILE).open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
            sync_tree(draft)
            put_in_place(draft, folder, retired=draft_of(folder))
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path) -> Encoder:
        """Reads what :meth:`save` wrote, and checks that it is complete and unchanged.

        Raises:
            IntegrityError: a file is missing, truncated or changed, or was written by another version.
        """
        folder = Path(folder)
        content = _read_content(folder / _ENCODER_FILE)
        try:
            schema = validate(Schema, content["schema"], source=f"{folder / _ENCODER_FILE}: schema")
            tables: dict[str, TableEncoder] = {}
            for name, spec in schema.table_encoders.items():
                state = content["tables"][name]
                if isinstance(spec, Vocabulary):
                    tables[name] = _load_vocabulary(folder / _VOCABULARIES / f"{name}.arrow", state)
                else:
                    tables[name] = table_encoder(spec, state)
            transforms = {
                feature.name: dense_transform(feature, content["transforms"][feature.name])
                for feature in schema.all_features
                if isinstance(feature, Dense)
            }
            encoder = cls(schema, tables=tables, transforms=transforms, hash_key_types=content["hash_key_types"])
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise IntegrityError(
                f"{folder / _ENCODER_FILE} must be as it was written, got other content", hint=_CHANGED
            ) from err
        if encoder.fingerprint != content["fingerprint"]:
            raise IntegrityError(
                f"{folder} must have fingerprint {content['fingerprint']}, got {encoder.fingerprint}", hint=_CHANGED
            )
        return encoder


def _write_keys(path: Path, keys: Array) -> None:
    batch = pa.record_batch({"key": keys})
    with path.open("wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def _load_vocabulary(path: Path, state: Mapping[str, Any]) -> VocabularyTable:
    try:
        with pa.OSFile(str(path), "rb") as file, pa.ipc.open_file(file) as reader:
            keys = reader.get_batch(0).column("key")
            keys.validate(full=True)
    except FileNotFoundError as err:
        raise IntegrityError(f"{path} must exist, got no such file", hint=_CHANGED) from err
    except (pa.ArrowException, OSError, KeyError, IndexError) as err:
        raise IntegrityError(f"{path} must be a complete Arrow file, got a broken one", hint=_CHANGED) from err
    try:
        table = vocabulary_table(keys)
    except EncodingError as err:
        raise IntegrityError(f"{path} must hold a vocabulary, got other content", hint=_CHANGED) from err
    if table.state != state:
        raise IntegrityError(f"{path} must hold the vocabulary that was fitted, got another", hint=_CHANGED)
    return table


def _read_content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise IntegrityError(
            f"{path} must exist, got no such file", hint="give the folder that an encoder was saved to"
        ) from err
    except (OSError, ValueError) as err:
        raise IntegrityError(f"{path} must be a complete JSON file, got a broken one", hint=_CHANGED) from err
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise IntegrityError(
            f"{path} must be an encoder, got something else", hint="give the folder that an encoder was saved to"
        )
    if content.get("format_version") != FORMAT_VERSION:
        raise IntegrityError(
            f"{path} must be of format version {FORMAT_VERSION}, got {content.get('format_version')!r}",
            hint="build it again with this version, or use the version that wrote it",
        )
    if content.pop("sha256", None) != fingerprint(content):
        raise IntegrityError(f"{path} must be as it was written, got other content", hint=_CHANGED)
    return content
