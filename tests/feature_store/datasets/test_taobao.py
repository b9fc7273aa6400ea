from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from feature_store.datasets.negatives import NegativeSampling
from feature_store.datasets.taobao import END_SECOND, FIRST_SECOND, load_taobao_userbehavior
from recsys.errors import SourceError
from tests.feature_store.datasets.loaded import build

DAY = 86_400
LAST = FIRST_SECOND + 8 * DAY  # 3 December


def rows() -> list[str]:
    """Nine days of four users over 30 items; item 5 has rows of two categories."""
    lines = []
    for n in range(160):
        user, item = 1 + n % 4, 1 + (n * 7) % 30
        kind = ["pv", "pv", "pv", "cart", "pv", "fav", "pv", "buy"][n % 8]
        lines.append(f"{user},{item},{100 + item % 5},{kind},{FIRST_SECOND + n * (9 * DAY // 160)}")
    return [*lines, f"2,5,999,pv,{END_SECOND - 1}"]


def write(folder: Path, lines: list[str]) -> Path:
    folder.mkdir()
    (folder / "UserBehavior.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_views_and_the_summary(tmp_path: Path) -> None:
    dirt = [
        rows()[3],  # an exact repeat
        f"3,2,102,pv,{FIRST_SECOND - 1}",
        f"3,2,102,pv,{END_SECOND}",
        "3,2,102,pv,-2134949234",
        "3,2,102,pv,99999999999",
    ]
    summary = load_taobao_userbehavior(write(tmp_path / "raw", rows() + dirt), tmp_path / "views")
    events = pl.read_parquet(tmp_path / "views" / "events.parquet")
    assert summary.rows_read == {"UserBehavior.csv": 166}
    assert events.height == summary.rows_written["events"] == 161
    assert summary.repeats_dropped == 1
    assert summary.findings == {
        "rows with a time outside of the nine days, dropped": 4,
        "items with rows of several categories, the first counts": 1,
    }
    assert summary.num_events_by_type == {"buy": 20, "cart": 20, "fav": 20, "pv": 101}
    assert events["time"].is_sorted()
    items = pl.read_parquet(tmp_path / "views" / "items.parquet")
    assert items.filter(pl.col("item_id") == 5).rows() == [(5, 100)]
    written = json.loads((tmp_path / "views" / "dataset.json").read_text())
    assert written["sampling"] == {
        "negatives": "popularity",
        "per_positive": 2,
        "seed": 0,
        "pool_items": 30,
        "positives": 101,
        "drawn": int((pl.read_parquet(tmp_path / "views" / "impressions.parquet")["click"] == 0).sum()),
        "positives_with_fewer": summary.sampling["positives_with_fewer"],
    }


def test_a_request_is_a_page_view_and_items_that_its_user_never_touched(tmp_path: Path) -> None:
    load_taobao_userbehavior(
        write(tmp_path / "raw", rows()), tmp_path / "views", sampling=NegativeSampling("in_category", 3, seed=5)
    )
    events = pl.read_parquet(tmp_path / "views" / "events.parquet")
    category = dict(pl.read_parquet(tmp_path / "views" / "items.parquet").iter_rows())
    touched = {user: set(items) for user, items in events.group_by("user_id").agg("item_id").iter_rows()}
    viewed = events.filter(pl.col("type") == "pv").select("user_id", "item_id", "time").rows()
    found = []
    for _, request in pl.read_parquet(tmp_path / "views" / "impressions.parquet").group_by("request"):
        (positive,) = request.filter(pl.col("click") == 1).rows(named=True)
        found.append((positive["user_id"], positive["item_id"], positive["time"]))
        for row in request.filter(pl.col("click") == 0).rows(named=True):
            assert (row["user_id"], row["time"]) == (positive["user_id"], positive["time"])
            assert row["item_id"] not in touched[row["user_id"]]
            assert category[row["item_id"]] == category[positive["item_id"]]
    assert sorted(found) == sorted(viewed)


def test_the_order_of_the_file_and_packing_change_nothing(tmp_path: Path) -> None:
    load_taobao_userbehavior(write(tmp_path / "a", rows()), tmp_path / "a_views")
    shuffled = rows()
    random.Random(0).shuffle(shuffled)
    raw = tmp_path / "b"
    raw.mkdir()
    (raw / "UserBehavior.csv.gz").write_bytes(gzip.compress("\r\n".join(shuffled).encode()))
    load_taobao_userbehavior(raw, tmp_path / "b_views")
    for path in (tmp_path / "a_views").glob("*.parquet"):
        assert pl.read_parquet(path).equals(pl.read_parquet(tmp_path / "b_views" / path.name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3,pv", r"UserBehavior\.csv:3 must have 5 fields, got 4"),
        ("1,2,3,click,1511600000", r"row 3: behaviour must be one of pv, cart, fav, buy"),
        ("1,2,3,,1511600000", r"row 3: behaviour must be one of"),
        ("1,x,3,pv,1511600000", r"row 3: item_id must be a whole number"),
        ("1,2,,pv,1511600000", r"row 3: category_id must be a whole number"),
        ("1,-2,3,pv,1511600000", r"row 3: item_id must be from 0 to 2\^31 - 1"),
        ("1,2,3,pv,1511600000.5", r"row 3: seconds must be a whole number"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    lines = rows()
    lines[2] = line
    with pytest.raises(SourceError, match=message):
        load_taobao_userbehavior(write(tmp_path / "raw", lines), tmp_path / "views")
    assert not (tmp_path / "views").exists()


def test_a_file_of_other_years_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="from 25 November to 3 December 2017, got none"):
        load_taobao_userbehavior(write(tmp_path / "raw", ["1,2,3,pv,1400000000"]), tmp_path / "views")


def test_a_training_set_is_built(tmp_path: Path) -> None:
    summary = load_taobao_userbehavior(write(tmp_path / "raw", rows()), tmp_path / "views")
    built = build(summary, tmp_path / "views")
    assert built.outside_split == built.num_quarantined == 0
    assert built.num_rows == summary.rows_written["impressions"]
    assert min(built.rows.values()) > 0
    assert built.events == {"viewed": 101, "wanted": 60}


def test_the_public_file(dataset: Callable[[str], Path], tmp_path: Path) -> None:
    summary = load_taobao_userbehavior(dataset("taobao_userbehavior"), tmp_path / "views")
    assert summary.rows_read == {"UserBehavior.csv": 94_436}
    assert summary.repeats_dropped == 0
    assert summary.num_events_by_type == {"buy": 1_956, "cart": 5_033, "fav": 2_568, "pv": 84_879}
    assert summary.rows_written == {"impressions": 3 * 84_879, "events": 94_436, "items": 61_304}
    built = build(summary, tmp_path / "views")
    assert (built.users, built.items) == (929, 61_304)
    assert built.num_rows == 3 * 84_879
