"""The training set's files: mapped without a copy, refused when incomplete."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys.encoding.encoder import Ragged
from recsys.errors import IntegrityError
from recsys.files import sha256_of, write_json
from recsys.training_set import open_table, write_table


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
    before = pa.total_allocated_bytes()

    column = open_table(tmp_path / "t.arrow").array("id")

    assert pa.total_allocated_bytes() - before < 1000
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
