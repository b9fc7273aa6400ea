from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from feature_store.tables import TableWriter, describe_file
from recsys.files import sha256_of
from recsys.training_set import open_table


def test_tables_written_beside_the_work_are_whole_and_described(tmp_path: Path) -> None:
    columns = {tmp_path / f"{n}.arrow": {"id": np.arange(n, dtype=np.int64)} for n in (0, 3, 100_000)}
    with TableWriter() as writer:
        for path, table in columns.items():
            writer.write(path, table)
    assert list(writer.described) == list(columns)
    for path, table in columns.items():
        np.testing.assert_array_equal(open_table(path).array("id"), table["id"])
        expected = {"bytes": path.stat().st_size, "sha256": sha256_of(path), "rows": len(table["id"])}
        assert writer.described[path] == describe_file(path) == expected


@pytest.mark.parametrize("num_after", [0, 2])
def test_a_table_that_cannot_be_written_is_an_error_of_the_writer(tmp_path: Path, num_after: int) -> None:
    message = "column 'wrong' must be int64 or float32"
    with pytest.raises(TypeError, match=message), TableWriter() as writer:  # noqa: PT012
        writer.write(tmp_path / "a.arrow", {"wrong": np.arange(3, dtype=np.int32)})
        for number in range(num_after):
            writer.write(tmp_path / f"{number}.arrow", {"id": np.arange(3, dtype=np.int64)})
    assert list(tmp_path.glob("*.arrow")) == []


def test_an_error_of_the_work_is_not_hidden_by_one_of_the_writer(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="the work"), TableWriter() as writer:  # noqa: PT012
        writer.write(tmp_path / "a.arrow", {"wrong": np.arange(3, dtype=np.int32)})
        raise KeyError("the work")
