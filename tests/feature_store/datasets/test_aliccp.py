from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from feature_store.datasets.aliccp import ITEM_FIELDS, USER_FIELDS, load_ali_ccp
from recsys.errors import SourceError
from recsys.training_set import SOURCE_ROW, TrainingSet
from tests.feature_store.datasets.loaded import build


def features(pairs: list[tuple[str, int]]) -> str:
    return "\x01".join(f"{field}\x02{value}\x03{1.0 + n / 7:.5f}" for n, (field, value) in enumerate(pairs))


def user_line(key: str, n: int) -> str:
    pairs = [(field, int(field) * 10 + n) for field in USER_FIELDS if not (field == "122" and n == 1)]
    pairs += [("109_14", 900 + n), ("109_14", 901 + n), ("110_14", 7), ("150_14", 3)]
    return f"{key},{len(pairs)},{features(pairs)}"


def row_line(number: int, click: int, purchase: int, key: str, *, item: int | None = None) -> str:
    pairs = [(field, int(field) * 10) for field in ITEM_FIELDS if field != "205"]
    pairs += [] if item is None else [("205", item)]
    pairs += [("210", 61), ("210", 62)]
    return f"{number},{click},{purchase},{key},{len(pairs)},{features(pairs)}"


KEYS = [f"{n:016x}" for n in range(40)]


def write(folder: Path, **changes: list[str]) -> Path:
    train = [row_line(i, i % 3 == 0, i % 6 == 0, KEYS[i % 40], item=i % 9) for i in range(160)]
    files = {
        "common_features_train": [user_line(key, n) for n, key in enumerate(KEYS)],
        "sample_skeleton_train": [*train, row_line(500, 0, 1, KEYS[0], item=1)],
        # The first key of training comes again with other features; one key is new.
        "common_features_test": [user_line(KEYS[0], 77), user_line("feed", 50)],
        "sample_skeleton_test": [
            row_line(0, 1, 0, "feed", item=3),
            row_line(1, 0, 0, "feed", item=4),
            row_line(2, 0, 0, "nowhere", item=2),
        ],
    } | changes
    folder.mkdir()
    for name, lines in files.items():
        (folder / f"{name}.csv").write_text("\n".join(int_labels(line) for line in lines) + "\n")
    return folder


def int_labels(line: str) -> str:
    return line.replace("True", "1").replace("False", "0")


def test_views_and_the_summary(tmp_path: Path) -> None:
    summary = load_ali_ccp(write(tmp_path / "raw"), tmp_path / "views")
    assert summary.rows_read == {
        "common_features_train.csv": 40,
        "sample_skeleton_train.csv": 161,
        "common_features_test.csv": 2,
        "sample_skeleton_test.csv": 3,
    }
    assert summary.rows_written == {"users": 41, "impressions": 163}
    assert summary.findings == {
        "keys of common features that come again, the first counts": 1,
        "rows with a purchase and no click, dropped": 1,
        "rows whose key has no common features": 1,
    }
    users = pl.read_parquet(tmp_path / "views" / "users.parquet").rows(named=True)
    assert users[1]["key"] == KEYS[1]
    assert (users[1]["101"], users[1]["122"], users[1]["129"]) == (1011, None, 1291)
    assert (users[1]["109_14"], users[1]["110_14"], users[1]["127_14"]) == ([901, 902], [7], None)
    assert users[0]["101"] == 1010  # not the 1087 of the test file
    first = pl.read_parquet(tmp_path / "views" / "impressions.parquet").rows(named=True)[0]
    assert (first["key"], first["click"], first["purchase"]) == (KEYS[0], 1, 1)
    assert (first["205"], first["206"], first["301"], first["210"]) == (0, 2060, 3010, [61, 62])


def test_the_published_test_part_is_kept_and_no_visit_is_on_both_sides(tmp_path: Path) -> None:
    summary = load_ali_ccp(write(tmp_path / "raw"), tmp_path / "views")
    built = build(summary, tmp_path / "views")
    assert built.rows["test"] == 3
    assert built.rows["train"] + built.rows["validation"] == 160
    assert built.outside_split == built.num_quarantined == 0
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    training_set = TrainingSet.open(tmp_path / "training_set")
    keys = {
        split: set(impressions[training_set.split(split).impressions.array(SOURCE_ROW)]["key"])
        for split in ("train", "validation", "test")
    }
    assert keys["train"] & keys["validation"] == set()
    assert keys["validation"]
    assert keys["test"] == {"feed", "nowhere"}


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("sample_skeleton_train", "1,0,0,k,1", r"sample_skeleton_train\.csv:1 must have 6 fields, got 5"),
        ("sample_skeleton_train", "1,2,0,k,0,", r"row 1: click must be 0 or 1"),
        ("sample_skeleton_test", "1,0,,k,0,", r"row 1: purchase must be a whole number"),
        ("sample_skeleton_test", "1,0,0,,0,", r"row 1: key must have a value"),
        ("common_features_train", ",0,", r"row 1: key must have a value"),
        ("common_features_test", "k,x,", r"row 1: count must be a whole number"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, name: str, line: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_ali_ccp(write(tmp_path / "raw", **{name: [line]}), tmp_path / "views")
    assert not (tmp_path / "views").exists()


def test_rows_without_an_item_or_with_a_wrong_count_are_found(tmp_path: Path) -> None:
    lines = [row_line(0, 0, 0, KEYS[0]), row_line(1, 0, 0, KEYS[1], item=5).replace(",11,", ",12,")]
    summary = load_ali_ccp(write(tmp_path / "raw", sample_skeleton_test=lines), tmp_path / "views")
    assert summary.findings["rows without an item"] == 1
    assert summary.findings["rows with another number of features than they say"] == 1
