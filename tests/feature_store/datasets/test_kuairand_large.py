from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from feature_store.datasets import stream
from feature_store.datasets.kuairand import LABELS
from feature_store.datasets.kuairand_large import load_kuairand_1k, load_kuairand_27k
from feature_store.datasets.summary import DatasetSummary
from recsys.errors import SourceError
from tests.feature_store.datasets.loaded import build

START_MS = 1_649_347_200_000  # 2022-04-08T00:00+08:00
HOUR_MS = 3_600_000
VERSIONS: dict[str, Callable[..., DatasetSummary]] = {"1k": load_kuairand_1k, "27k": load_kuairand_27k}


def log_row(user: int, video: int, hours: int, **feedback: int) -> dict[str, int]:
    return {
        "user_id": user,
        "video_id": video,
        "date": 20220408 + hours // 24,
        "hourmin": hours % 24 * 100,
        "time_ms": START_MS + hours * HOUR_MS,
        **dict.fromkeys(LABELS, 0),
        "play_time_ms": 5,
        "duration_ms": 900,
        "profile_stay_time": 0,
        "comment_stay_time": 0,
        "is_rand": 0,
        "tab": hours % 15,
        **feedback,
    }


def the_log() -> list[dict[str, int]]:
    """31 days of seven users; three exact repeats, one of them far from its original."""
    rows = [
        log_row(n % 7, n % 11, n, is_click=n % 2, long_view=int(n % 3 == 0), is_like=int(n % 10 == 0))
        for n in range(31 * 24)
    ]
    return [*rows, rows[5], rows[5], rows[700]]


def write(folder: Path, version: str) -> Path:
    folder.mkdir()
    rows = the_log()
    cut = 14 * 24
    parts: dict[str, list[dict[str, int]]] = {"4_08_to_4_21": rows[:cut], "4_22_to_5_08": rows[cut:]}
    for period, part in parts.items():
        if version == "1k":
            pl.DataFrame(part).write_csv(folder / f"log_standard_{period}_1k.csv")
        else:
            half = len(part) // 2
            pl.DataFrame(part[:half]).write_csv(folder / f"log_standard_{period}_27k_part1.csv")
            pl.DataFrame(part[half:]).write_csv(folder / f"log_standard_{period}_27k_part2.csv")
    pl.DataFrame([log_row(0, 1, 20 * 24, is_rand=1)]).write_csv(folder / f"log_random_4_22_to_5_08_{version}.csv")
    counts = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
    users: dict[str, list[Any]] = {
        "user_id": list(range(7)),
        "user_active_degree": ["full_active"] * 6 + ["UNKNOWN"],
        "is_lowactive_period": [0] * 7,
        "is_live_streamer": [-124] + [1] * 6,
        "is_video_author": [0] * 7,
        **{name: [3] * 7 for name in counts},
        **{f"{name}_range": ["(0,10]"] * 7 for name in counts},
        **{f"onehot_feat{i}": [float(i)] * 6 + [None] for i in range(18)},
    }
    pl.DataFrame(users).write_csv(folder / f"user_features_{version}.csv")
    pl.DataFrame(
        {
            "video_id": list(range(10)),
            "author_id": [1.0] * 9 + [None],
            "video_type": ["NORMAL"] * 9 + ["UNKNOWN"],
            "upload_dt": ["2022-04-01"] * 10,
            "upload_type": ["ShortImport"] * 10,
            "visible_status": [1.0] * 10,
            "video_duration": [1234.5] * 9 + [None],
            "server_width": [720] * 10,
            "server_height": [1280] * 10,
            "music_id": list(range(10)),
            "music_type": [9.0] * 9 + [None],
            "tag": ["12", "3,40"] * 4 + [None, "5"],
        }
    ).write_csv(folder / f"video_features_basic_{version}.csv")
    return folder


@pytest.mark.parametrize("version", VERSIONS)
def test_every_row_once_in_the_views(tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 4000)
    summary = VERSIONS[version](write(tmp_path / "raw", version), tmp_path / "views")
    columns = ["user_id", "video_id", "time", "tab", *LABELS]
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    expected = {
        (r["user_id"], r["video_id"], r["time_ms"] * 1000, r["tab"], *(r[c] for c in LABELS)) for r in the_log()
    }
    assert impressions.columns == columns
    assert impressions.height == len(expected)
    assert set(impressions.rows()) == expected
    events = pl.read_parquet(tmp_path / "views" / "events.parquet")
    assert sorted(events.rows()) == sorted(
        (row["user_id"], row["video_id"], row["time"], kind)
        for row in impressions.rows(named=True)
        for kind, label in (("click", "is_click"), ("long_view", "long_view"), ("like", "is_like"))
        if row[label]
    )
    assert summary.repeats_dropped == 3
    assert sum(rows for name, rows in summary.rows_read.items() if name.startswith("log")) == len(the_log())
    assert not any("random" in name for name in summary.rows_read)
    assert summary.num_events_by_type == dict(events["type"].value_counts().sort("type").iter_rows())
    assert sorted(p.name for p in (tmp_path / "views").iterdir()) == [
        "dataset.json",
        "events.parquet",
        "impressions.parquet",
        "items.parquet",
        "users.parquet",
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_training_set_is_built(tmp_path: Path, version: str) -> None:
    summary = VERSIONS[version](write(tmp_path / "raw", version), tmp_path / "views")
    built = build(summary, tmp_path / "views")
    assert built.rows == {"train": 22 * 24, "validation": 24, "test": 8 * 24}
    assert built.items_without_attributes == 1
    assert built.num_quarantined == 0


def test_missing_values_are_null(tmp_path: Path) -> None:
    summary = load_kuairand_1k(write(tmp_path / "raw", "1k"), tmp_path / "views")
    items = pl.read_parquet(tmp_path / "views" / "items.parquet")
    assert items["author_id"].to_list() == [1] * 9 + [None]
    assert items["tag"].to_list() == [[12], [3, 40]] * 4 + [None, [5]]
    assert items["video_type"].null_count() == items["video_duration"].null_count() == 1
    users = pl.read_parquet(tmp_path / "views" / "users.parquet")
    assert users["is_live_streamer"].to_list() == [None] + [1] * 6
    assert summary.findings == {
        "users with is_live_streamer -124, read as missing": 1,
        "users with user_active_degree UNKNOWN, read as missing": 1,
        "videos with video_type UNKNOWN, read as missing": 1,
    }


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", "1k")
    with pytest.raises(SourceError, match=r"must hold log_standard_4_08_to_4_21_27k"):
        load_kuairand_27k(raw, tmp_path / "views")
    videos = (raw / "video_features_basic_1k.csv").read_text()
    (raw / "video_features_basic_1k.csv").write_text(videos.replace("1234.5", "long", 1))
    with pytest.raises(SourceError, match=r"row 1: video_duration must be a number"):
        load_kuairand_1k(raw, tmp_path / "views")
    (raw / "video_features_basic_1k.csv").write_text(videos)
    log = raw / "log_standard_4_22_to_5_08_1k.csv"
    text = log.read_text()
    for broken, message in (
        (text.replace("is_click", "clicked", 1), r"must have the column is_click"),
        (text[: len(text) // 2].rpartition(",")[0], r"must have 19 fields"),
        (text.replace(f",{START_MS + 14 * 24 * HOUR_MS},", ",,", 1), r"row 1: time_ms must be a whole number"),
    ):
        log.write_text(broken)
        with pytest.raises(SourceError, match=message):
            load_kuairand_1k(raw, tmp_path / "views")
        assert not (tmp_path / "views").exists()
