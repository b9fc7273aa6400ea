from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from feature_store.datasets.raw import read_table
from recsys.errors import SourceError


def test_csv_whole_numbers_written_as_floats_become_integers_and_gaps_become_null(tmp_path: Path) -> None:
    path = tmp_path / "users.csv"
    path.write_text('id,score,tag,other\n1,1.0,"3,4",x\n2,,7,y\n')
    table = read_table(path, {"id": "int", "score": "int", "tag": "text"})
    assert table.to_dict(as_series=False) == {"id": [1, 2], "score": [1, None], "tag": ["3,4", "7"]}


def test_a_text_column_of_digits_keeps_its_zeros(tmp_path: Path) -> None:
    path = tmp_path / "users.csv"
    path.write_text("zip\n02460\n48067\n")
    assert read_table(path, {"zip": "text"})["zip"].to_list() == ["02460", "48067"]


def test_lists_and_empty_columns(tmp_path: Path) -> None:
    path = tmp_path / "h.parquet"
    pl.DataFrame({"seq": [[1, 2], None, []], "none": [None, None, None]}).write_parquet(path)
    table = read_table(path, {"seq": "int_list", "none": "int"})
    assert table.schema == pl.Schema({"seq": pl.List(pl.Int64), "none": pl.Int64})


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (
            "user,b\n1,2\n",
            {"user_id": "int"},
            r"users\.csv must have the column user_id\n\nHint: user_id: did you mean 'user'",
        ),
        ("a\n1.5\n", {"a": "int"}, r"users\.csv: column a must hold whole numbers, got Float64"),
        ("a\nx\n", {"a": "number"}, r"users\.csv: column a must hold numbers, got String"),
        ("a\n1\n", {"a": "int_list"}, r"users\.csv: column a must hold lists of whole numbers, got Int64"),
    ],
)
def test_errors_name_file_and_column(tmp_path: Path, text: str, columns: dict[str, str], message: str) -> None:
    (tmp_path / "users.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_table(tmp_path / "users.csv", columns)  # type: ignore[arg-type]


def test_a_missing_file_lists_the_nearest_and_a_broken_one_says_so(tmp_path: Path) -> None:
    (tmp_path / "user_features.csv").write_text("a\n1\n")
    with pytest.raises(SourceError, match=r"does not exist\n\nHint: did you mean 'user_features\.csv'"):
        read_table(tmp_path / "users_features.csv", {"a": "int"})
    with pytest.raises(SourceError, match=r"raw folder .* does not exist"):
        read_table(tmp_path / "nowhere" / "a.csv", {"a": "int"})
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SourceError, match=r"cut\.parquet cannot be read as Parquet"):
        read_table(tmp_path / "cut.parquet", {"a": "int"})
