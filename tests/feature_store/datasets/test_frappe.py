from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from feature_store.datasets.frappe import FIELDS, load_frappe
from recsys.errors import SourceError
from recsys.training_set import SOURCE_ROW, TrainingSet
from tests.feature_store.datasets.loaded import build

# Ids of each field have a range of their own; two rows of the training part are equal.
ROWS = {
    "train": [(1, 0), (0, 1), (0, 1), (1, 2)],
    "valid": [(1, 1), (0, 2)],
    "test": [(0, 0)],
}


def ids(n: int) -> list[int]:
    return [100 * place + n for place in range(len(FIELDS))]


def write_csv(folder: Path) -> Path:
    folder.mkdir()
    for part, rows in ROWS.items():
        lines = [",".join(("label", *FIELDS)), *(",".join(map(str, (label, *ids(n)))) for label, n in rows)]
        (folder / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_libfm(folder: Path, names: tuple[str, str, str]) -> Path:
    folder.mkdir()
    for name, rows in zip(names, ROWS.values(), strict=True):
        lines = [f"{1 if label else -1} " + " ".join(f"{i}:1" for i in ids(n)) for label, n in rows]
        (folder / name).write_text(" \r\n".join(lines) + "\r\n\r\n")
    return folder


def test_the_published_split_is_kept_row_by_row(tmp_path: Path) -> None:
    summary = load_frappe(write_csv(tmp_path / "raw"), tmp_path / "views")
    assert summary.findings == {"rows equal to another, kept: the split is as published": 2}
    assert build(summary, tmp_path / "views").rows == {"train": 4, "validation": 2, "test": 1}
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    training_set = TrainingSet.open(tmp_path / "training_set")
    for split, part in (("train", "train"), ("validation", "valid"), ("test", "test")):
        rows = impressions[training_set.split(split).impressions.array(SOURCE_ROW)]
        assert list(zip(rows["label"], rows["user"], strict=True)) == ROWS[part]


@pytest.mark.parametrize(
    "names",
    [
        ("train.libfm", "validation.libfm", "test.libfm"),
        ("frappe.train.libfm", "frappe.validation.libfm", "frappe.test.libfm"),
    ],
)
def test_libfm_gives_the_same_views(tmp_path: Path, names: tuple[str, str, str]) -> None:
    load_frappe(write_csv(tmp_path / "csv"), tmp_path / "csv_views")
    load_frappe(write_libfm(tmp_path / "libfm", names), tmp_path / "libfm_views")
    assert pl.read_parquet(tmp_path / "csv_views" / "impressions.parquet").equals(
        pl.read_parquet(tmp_path / "libfm_views" / "impressions.parquet")
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 0:1 100:1", r"train\.libfm:2 must have a label and 10 features, got 3 words"),
        ("1 " + " ".join(f"{i}:0.5" for i in ids(0)), r"train\.libfm:2: feature 1 must be written as ID:1"),
        ("2 " + " ".join(f"{i}:1" for i in ids(0)), r"train\.libfm: row 2: label must be -1 or 1"),
        ("1 " + " ".join(f"{i}:1" for i in reversed(ids(0))), r"must have no id in common"),
    ],
)
def test_a_broken_libfm_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    raw = write_libfm(tmp_path / "raw", ("train.libfm", "validation.libfm", "test.libfm"))
    lines = (raw / "train.libfm").read_text().splitlines()
    (raw / "train.libfm").write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(SourceError, match=message):
        load_frappe(raw, tmp_path / "views")
    assert not (tmp_path / "views").exists()


def test_broken_csvs_are_named(tmp_path: Path) -> None:
    raw = write_csv(tmp_path / "raw")
    good = (raw / "valid.csv").read_text()
    for text, message in (
        (good.replace("label", "labl"), r"valid\.csv must have the column label"),
        (good.replace("0,2,102", "3,2,102"), r"valid\.csv: row 2: label must be 0 or 1"),
        (good.replace("0,2,102", "0,,102"), r"valid\.csv: row 2: user must have a value"),
        (good.replace("0,2,102", "0,me,102"), r"column user must hold whole numbers"),
    ):
        (raw / "valid.csv").write_text(text)
        with pytest.raises(SourceError, match=message):
            load_frappe(raw, tmp_path / "views")
    (raw / "valid.csv").unlink()
    with pytest.raises(SourceError, match=r"valid\.csv is missing"):
        load_frappe(raw, tmp_path / "views")


def test_the_map_must_agree_with_the_columns(tmp_path: Path) -> None:
    raw = write_csv(tmp_path / "raw")
    known = [f"{i},{field},x" for n in range(3) for i, field in zip(ids(n), FIELDS, strict=True)]
    (raw / "feature_map.csv").write_text("\n".join(["id,field,value", *known]))
    assert load_frappe(raw, tmp_path / "views").rows_read["feature_map.csv"] == 30
    (raw / "feature_map.csv").write_text("\n".join(["id,field,value", *known[:-1]]))
    with pytest.raises(SourceError, match=r"row 4 of all: city must hold ids"):
        load_frappe(raw, tmp_path / "views")


def test_the_public_files(dataset: Callable[[str], Path], tmp_path: Path) -> None:
    raw = dataset("frappe")
    summary = load_frappe(raw, tmp_path / "views")
    assert build(summary, tmp_path / "views").rows == {"train": 202_027, "validation": 57_722, "test": 28_860}
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    training_set = TrainingSet.open(tmp_path / "training_set")
    for split, part in (("train", "train"), ("validation", "valid"), ("test", "test")):
        rows = impressions[training_set.split(split).impressions.array(SOURCE_ROW)]
        published = pl.read_csv(raw / f"{part}.csv")
        assert rows.select("label", *FIELDS).cast(pl.Int64).equals(published)
