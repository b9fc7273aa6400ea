"""The training set's files: mapped without a copy, refused when incomplete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.encoding.encoder import Ragged
from recsys.errors import IntegrityError
from recsys.files import sha256_of, write_json
from recsys.training_set import TrainingSet, open_table, write_table
from tests.training_sets import build_synthetic


def test_a_table_round_trips_every_kind_of_column(tmp_path: Path) -> None:
    ids = np.array([0, 2**53 + 1, -1], dtype=np.int64)
    bags = Ragged(np.array([5, 6, 7], dtype=np.int64), np.array([0, 2, 2, 3], dtype=np.int64))
    dense = np.arange(6, dtype=np.float32).reshape(3, 2)
    write_table(
        tmp_path / "t.arrow",
        {"id": ids, "bag": bags, "dense": dense, "one": dense[:, 0]},
        keys=pa.array([None, "a", "ü"]),
    )

    table = open_table(tmp_path / "t.arrow")

    assert table.num_rows == 3
    np.testing.assert_array_equal(table.array("id"), ids)
    ragged = table.columns["bag"]
    assert isinstance(ragged, Ragged)
    np.testing.assert_array_equal(ragged.values, bags.values)
    np.testing.assert_array_equal(ragged.offsets, bags.offsets)
    np.testing.assert_array_equal(table.array("dense"), dense)
    np.testing.assert_array_equal(table.array("one"), dense[:, 0])
    assert table.keys is not None
    assert table.keys.to_pylist() == [None, "a", "ü"]


def test_columns_are_read_only_views_of_the_mapped_file(tmp_path: Path) -> None:
    write_table(tmp_path / "t.arrow", {"id": np.arange(1000, dtype=np.int64)})
    column = open_table(tmp_path / "t.arrow").array("id")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("/t.arrow")]
    spans = [[int(edge, 16) for edge in fields[0].split("-")] for fields in maps]
    assert any(start <= column.ctypes.data and column.ctypes.data + column.nbytes <= end for start, end in spans)
    assert not column.flags.writeable
    assert not column.flags.owndata


def test_an_empty_table_round_trips(tmp_path: Path) -> None:
    empty = np.empty(0, dtype=np.int64)
    write_table(tmp_path / "t.arrow", {"id": empty, "bag": Ragged(empty, np.zeros(1, dtype=np.int64))})
    table = open_table(tmp_path / "t.arrow")
    assert table.num_rows == 0
    assert len(table.array("id")) == 0


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "t.arrow"
    write_table(path, {"id": np.arange(500, dtype=np.int64)})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(IntegrityError, match=r"t\.arrow"):
        open_table(path)


def test_a_wrong_type_is_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be int64 or float32"):
        write_table(tmp_path / "t.arrow", {"id": np.arange(3, dtype=np.int32)})
    assert list(tmp_path.iterdir()) == []


def test_writers_replace_whole_files_and_leave_nothing_behind(tmp_path: Path) -> None:
    write_table(tmp_path / "t.arrow", {"id": np.arange(3, dtype=np.int64)})
    first = sha256_of(tmp_path / "t.arrow")
    write_table(tmp_path / "t.arrow", {"id": np.arange(4, dtype=np.int64)})
    write_json(tmp_path / "a.json", {"a": "ü"})
    assert sha256_of(tmp_path / "t.arrow") != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "t.arrow"]


def test_files_are_compared_once_until_they_are_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_set = build_synthetic(tmp_path, num_requests=40)
    assert training_set.verify_once()
    assert not training_set.verify_once()
    assert not TrainingSet.open(training_set.folder).verify_once()

    table = training_set.folder / "items.arrow"
    status = table.stat()
    content = bytearray(table.read_bytes())
    content[-200] ^= 1
    table.write_bytes(content)
    os.utime(table, ns=(status.st_atime_ns, status.st_mtime_ns))  # what an archive or a copy would restore
    with pytest.raises(IntegrityError, match=r"items\.arrow was changed after it was written: its sha256 must be"):
        training_set.verify_once()
    with pytest.raises(IntegrityError, match=r"items\.arrow"):
        training_set.verify_once()
    content[-200] ^= 1
    table.write_bytes(content)
    assert training_set.verify_once()
    assert not training_set.verify_once()


def test_without_a_place_for_the_stamp_every_call_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_set = build_synthetic(tmp_path, num_requests=40)

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("recsys.training_set.write_json", refused)
    assert training_set.verify_once()
    assert training_set.verify_once()


def test_a_broken_stamp_is_none(tmp_path: Path) -> None:
    training_set = build_synthetic(tmp_path, num_requests=40)
    training_set.folder.with_name(f"{training_set.folder.name}.verified").write_bytes(b"\xff{")
    assert training_set.verify_once()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "must hold an object"),
        ({"format_version": 1}, "must say schema"),
        ({"files": []}, "files must be an object"),
        ({"schema": {"name": 1}}, "problem"),
        ({"format": "recsys.artifact"}, "must be the manifest of a training set"),
    ],
)
def test_a_manifest_of_other_types_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    folder = build_synthetic(tmp_path, num_requests=20).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    whole = isinstance(change, dict) and "format_version" not in change
    (folder / "manifest.json").write_text(json.dumps(manifest | change if whole else change))
    with pytest.raises(IntegrityError, match=rf"manifest\.json.* {message}"):
        TrainingSet.open(folder)
