from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from feature_store.datasets.kuairand import (
    HISTORIES_FILE,
    LABELS,
    LIST_LENGTH,
    load_kuairand_pure,
    place_among,
    spread_times,
)
from recsys.errors import SourceError
from recsys.schema import Schema

SCHEMA = Path(__file__).parents[3] / "configs" / "schema" / "kuairand_pure.yaml"
START_US = 1_649_347_200_000_000  # 2022-04-08T00:00+08:00
HOUR_MS = 3_600_000
FEEDBACK = {"play_time_ms": 777, "duration_ms": 9000, "profile_stay_time": 0, "comment_stay_time": 0, "is_rand": 0}


def log_row(user: int, video: int, hours: float, **feedback: int) -> dict[str, int]:
    """A row so many hours after the start of the log, 8 April, 00:00 in Beijing."""
    date = 20220408 + int(hours // 24)
    return {
        "user_id": user,
        "video_id": video,
        "date": date if date <= 20220430 else date - 20220430 + 20220500,
        "hourmin": int(hours % 24) * 100,
        "time_ms": START_US // 1000 + int(hours * HOUR_MS),
        **dict.fromkeys(LABELS, 0),
        **FEEDBACK,
        "tab": 1,
        **feedback,
    }


APRIL_25 = 17 * 24
MAY_1 = 23 * 24


def the_log() -> list[dict[str, int]]:
    """Two users with a past, one without; one exact repeat; one row that differs from another in its hour only."""
    rows = [log_row(7, 100 + i, 2 * i, long_view=i % 3 == 0, is_like=i % 10 == 0) for i in range(60)]
    rows += [log_row(8, 100 + i % 2, 5 + i, long_view=1) for i in range(3)]
    rows += [
        log_row(7, 105, APRIL_25 + 3, is_click=1, long_view=1),
        log_row(7, 106, APRIL_25 + 1, is_like=1, is_click=1),
        log_row(7, 106, APRIL_25 + 1, is_like=1, is_click=1),
        log_row(9, 106, APRIL_25 + 1.5, is_profile_enter=1, tab=4),
        {**log_row(9, 106, APRIL_25 + 1.5, is_profile_enter=1, tab=4), "hourmin": 2300},
        log_row(8, 107, MAY_1 + 1, is_click=1),
    ]
    return rows


def write_entities(folder: Path) -> None:
    counts = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
    users: dict[str, list[Any]] = {
        "user_id": [7, 8],
        "user_active_degree": ["full_active", "UNKNOWN"],
        "is_lowactive_period": [0, 0],
        "is_live_streamer": [-124, 1],
        "is_video_author": [0, 1],
        **{name: [3, 40] for name in counts},
        **{f"{name}_range": ["(0,10]", "[10,50)"] for name in counts},
        **{f"onehot_feat{i}": [float(i), None] for i in range(18)},
    }
    pl.DataFrame(users).write_csv(folder / "user_features_pure.csv")
    pl.DataFrame(
        {
            "video_id": [105, 106],
            "author_id": [1, 2],
            "video_type": ["NORMAL", "UNKNOWN"],
            "upload_dt": ["2022-04-09", "2022-04-10"],
            "upload_type": ["Web", "UNKNOWN"],
            "visible_status": [0.0, 0.0],
            "video_duration": [12000.0, None],
            "server_width": [720.0, 720.0],
            "server_height": [1280.0, 1280.0],
            "music_id": [9155697141, 0],
            "music_type": [9.0, None],
            "tag": ["39,68", None],
        }
    ).write_csv(folder / "video_features_basic_pure.csv")


def write_public(folder: Path, rows: list[dict[str, int]]) -> Path:
    """The form of the public download."""
    folder.mkdir()
    write_entities(folder)
    log = pl.DataFrame(rows)
    early = pl.col("date") <= 20220421
    log.filter(early).write_csv(folder / "log_standard_4_08_to_4_21_pure.csv")
    log.filter(~early).write_csv(folder / "log_standard_4_22_to_5_08_pure.csv")
    return folder


def write_compact(folder: Path, rows: list[dict[str, int]]) -> Path:
    """The compact form, its lists made by a loop."""
    folder.mkdir()
    write_entities(folder)
    late = [r for r in rows if r["date"] > 20220424]
    pl.DataFrame([r for r in late if r["date"] < 20220501]).write_parquet(folder / "log_standard_0425_0430.parquet")
    pl.DataFrame([r for r in late if r["date"] >= 20220501]).write_parquet(folder / "log_standard_0501_0508.parquet")
    histories = []
    for user in sorted({r["user_id"] for r in rows}, reverse=True):
        past = sorted((r for r in rows if r["user_id"] == user and r["date"] <= 20220424), key=lambda r: r["time_ms"])
        if past:
            histories.append(
                {
                    "user_id": user,
                    "history_len": len(past),
                    "last_time_ms": past[-1]["time_ms"],
                    "watch_seq": [r["video_id"] for r in past][-50:],
                    "like_seq": [r["video_id"] for r in past if r["is_like"]][-50:],
                    "long_watch_seq": [r["video_id"] for r in past if r["long_view"]][-50:],
                }
            )
    pl.DataFrame(histories).write_parquet(folder / HISTORIES_FILE)
    return folder


def test_both_forms_of_the_raw_files_give_the_same_bytes(tmp_path: Path) -> None:
    load_kuairand_pure(write_public(tmp_path / "public", the_log()), tmp_path / "a")
    load_kuairand_pure(write_compact(tmp_path / "compact", the_log()), tmp_path / "b")
    for view in ("impressions", "events", "users", "items"):
        assert (tmp_path / "a" / f"{view}.parquet").read_bytes() == (tmp_path / "b" / f"{view}.parquet").read_bytes()


def test_order_of_the_raw_rows_does_not_matter(tmp_path: Path) -> None:
    load_kuairand_pure(write_public(tmp_path / "public", the_log()), tmp_path / "a")
    load_kuairand_pure(write_public(tmp_path / "shuffled", the_log()[::-1]), tmp_path / "b")
    for view in ("impressions", "events"):
        assert pl.read_parquet(tmp_path / "a" / f"{view}.parquet").equals(
            pl.read_parquet(tmp_path / "b" / f"{view}.parquet")
        )


def test_impressions_begin_on_25_april_without_repeats_and_without_feedback_as_features(tmp_path: Path) -> None:
    summary = load_kuairand_pure(write_public(tmp_path / "raw", the_log()), tmp_path / "views")
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    assert impressions.columns == ["user_id", "video_id", "time", "tab", *LABELS]
    assert impressions.select("user_id", "video_id", "is_click", "is_like", "is_profile_enter", "tab").rows() == [
        (7, 106, 1, 1, 0, 1),
        (9, 106, 0, 0, 1, 4),
        (9, 106, 0, 0, 1, 4),
        (7, 105, 1, 0, 0, 1),
        (8, 107, 1, 0, 0, 1),
    ]
    assert impressions["time"][0] == START_US + (APRIL_25 + 1) * HOUR_MS * 1000
    assert summary.repeats_dropped == 1
    assert summary.rows_read["log_standard_4_08_to_4_21_pure.csv"] == 63
    assert summary.rows_written == {"impressions": 5, "events": 53 + 7 + 23 + 3 + 1, "users": 2, "items": 2}
    assert summary.num_events_by_type == {
        "watch": LIST_LENGTH + 3,
        "like": 6 + 1,
        "long_watch": 20 + 3,
        "click": 3,
        "long_view": 1,
    }
    assert summary.findings == {
        "users with is_live_streamer -124, read as missing": 1,
        "users with user_active_degree UNKNOWN, read as missing": 1,
        "videos with video_type UNKNOWN, read as missing": 1,
        "videos with upload_type UNKNOWN, read as missing": 1,
        "videos without tag": 1,
        "videos without video_duration": 1,
        "videos without music_type": 1,
        "impressions that repeat user, video and time with another hour or feedback, kept": 1,
        "users with impressions and no history before 25 April": 1,
        "users with impressions and no features": 1,
        "videos shown and without features": 1,
    }


def test_events_keep_the_order_of_the_lists_and_the_times_of_the_log(tmp_path: Path) -> None:
    load_kuairand_pure(write_compact(tmp_path / "raw", the_log()), tmp_path / "views")
    events = pl.read_parquet(tmp_path / "views" / "events.parquet")
    assert events.columns == ["user_id", "video_id", "time", "type"]
    assert events["time"].is_sorted()
    of_user = events.filter(pl.col("user_id") == 7)
    watched = of_user.filter(pl.col("type") == "watch")
    assert watched["video_id"].to_list() == [100 + i for i in range(10, 60)]
    last = START_US + 118 * HOUR_MS * 1000
    # The j-th of 60 is at start + (last - start) j / 60; these are j = 11 and j = 60.
    assert watched["time"][0] == START_US + (last - START_US) * 11 // 60
    assert watched["time"][-1] == last
    long = of_user.filter(pl.col("type") == "long_watch")
    assert long["video_id"].to_list() == [100 + i for i in range(0, 60, 3)]
    joined = long.join(watched, on="video_id", how="inner", suffix="_watch")
    assert (joined["time"] - joined["time_watch"]).to_list() == [2] * 16
    too_old = long.filter(pl.col("video_id") < 110)["time"]
    assert len(too_old) == 4
    assert too_old[0] > START_US
    assert too_old[-1] < watched["time"][0]
    own = of_user.filter(pl.col("time") > last + 10)
    assert own.select("video_id", "type").rows() == [(106, "like"), (106, "click"), (105, "click"), (105, "long_view")]


def test_users_and_videos_have_sensible_types(tmp_path: Path) -> None:
    load_kuairand_pure(write_public(tmp_path / "raw", the_log()), tmp_path / "views")
    users = pl.read_parquet(tmp_path / "views" / "users.parquet")
    assert users["is_live_streamer"].to_list() == [None, 1]
    assert users["user_active_degree"].to_list() == ["full_active", None]
    assert users["onehot_feat4"].to_list() == [4, None]
    items = pl.read_parquet(tmp_path / "views" / "items.parquet")
    assert items["tag"].to_list() == [[39, 68], None]
    assert items["music_type"].to_list() == [9, None]
    assert items["video_type"].to_list() == ["NORMAL", None]


def test_spread_times_is_strictly_increasing_whatever_the_dirt() -> None:
    assert spread_times(4, 4, 8_000_000, start=0) == [2_000_000, 4_000_000, 6_000_000, 8_000_000]
    assert spread_times(0, 0, 8_000_000, start=0) == []
    for count, length, last in ((50, 50, START_US), (50, 3, START_US + 5), (2, 10**6, START_US - 10**12)):
        times = spread_times(count, length, last)
        assert len(times) == count
        assert times[-1] == last
        assert all(b > a for a, b in itertools.pairwise(times))


def test_place_among_agrees_with_a_search_over_all_embeddings() -> None:
    """The number of newest entries that are placed is the largest possible, and the order is kept."""
    generator = np.random.default_rng(5)
    for _ in range(300):
        watched = generator.integers(0, 4, generator.integers(0, 7)).tolist()
        videos = generator.integers(0, 4, generator.integers(1, 5)).tolist()
        watch_times = [START_US + 10**9 + 1000 * i for i in range(len(watched))]
        end = START_US + 10**9
        times = place_among(videos, watched, watch_times, end=end, delay=1)
        assert all(b > a for a, b in itertools.pairwise(times))
        placed = [t for t in times if t > end]
        assert len(placed) == max(n for n in range(len(videos) + 1) if is_part(videos[len(videos) - n :], watched))
        assert [watched[watch_times.index(t - 1)] for t in placed] == videos[len(videos) - len(placed) :]


def is_part(needle: list[int], hay: list[int]) -> bool:
    rest: Iterator[int] = iter(hay)
    return all(any(x == y for y in rest) for x in needle)


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    raw = write_public(tmp_path / "raw", the_log())
    (raw / "log_standard_4_08_to_4_21_pure.csv").unlink()
    with pytest.raises(
        SourceError, match=r"must hold user_histories_until_0424\.parquet, or logs from before 25 April"
    ):
        load_kuairand_pure(raw, tmp_path / "views")
    shutil.rmtree(raw)
    raw = write_compact(tmp_path / "raw", the_log())
    (raw / "user_features_pure.csv").rename(raw / "user_features.csv")
    with pytest.raises(
        SourceError, match=r"user_features_pure\.csv does not exist\n\nHint: did you mean 'user_features"
    ):
        load_kuairand_pure(raw, tmp_path / "views")
    (raw / "user_features.csv").rename(raw / "user_features_pure.csv")
    log = raw / "log_standard_0501_0508.parquet"
    pl.read_parquet(log).rename({"tab": "scenario"}).write_parquet(log)
    with pytest.raises(SourceError, match=r"log_standard_0501_0508\.parquet must have the column tab"):
        load_kuairand_pure(raw, tmp_path / "views")
    pl.read_parquet(log).rename({"scenario": "tab"}).with_columns(user_id=pl.lit(None, pl.Int64)).write_parquet(log)
    with pytest.raises(SourceError, match="column user_id must have a value in every row, got 1 null"):
        load_kuairand_pure(raw, tmp_path / "views")
    assert not (tmp_path / "views").exists()


def test_the_schema_finds_its_columns(tmp_path: Path) -> None:
    load_kuairand_pure(write_public(tmp_path / "raw", the_log()), tmp_path / "views")
    schema = Schema.load(SCHEMA)
    for scope, view in (("user", "users"), ("item", "items"), ("context", "impressions")):
        columns = pl.read_parquet_schema(tmp_path / "views" / f"{view}.parquet")
        assert {f.source_column for f in schema.features_of(scope)} <= set(columns)  # type: ignore[arg-type]
    impressions = pl.read_parquet_schema(tmp_path / "views" / "impressions.parquet")
    assert {task.label for task in schema.tasks} <= set(impressions)
    # Feedback is a label or nothing.
    used = {f.source_column for f in schema.all_features}
    assert not used & {*LABELS, "play_time_ms", "profile_stay_time", "comment_stay_time"}


@pytest.mark.real_data
def test_the_public_files(data_root: Path, tmp_path: Path) -> None:
    summary = load_kuairand_pure(data_root / "kuairand_pure", tmp_path / "views")
    assert sum(n for name, n in summary.rows_read.items() if name.startswith("log_standard")) == 94_784 + 133_545
    assert summary.repeats_dropped == 5_460
    assert summary.rows_written["impressions"] == 222_869
    assert summary.rows_written["users"] == 27_285
    assert summary.rows_written["items"] == 7_583
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    events = pl.read_parquet(tmp_path / "views" / "events.parquet")
    assert summary.num_events_by_type["click"] == impressions["is_click"].sum()
    assert summary.num_events_by_type["long_view"] == impressions["long_view"].sum()
    assert impressions["time"].is_sorted()
    assert events["time"].is_sorted()
    watched = events.filter(pl.col("type") == "watch")
    assert watched["user_id"].n_unique() == 26_469
    assert watched.group_by("user_id").len()["len"].max() == LIST_LENGTH
    # Lists end before the impressions begin, up to the hour by which the log's dates run ahead of its times.
    assert watched["time"].max() < 1_650_816_000_000_000  # type: ignore[operator]  # 2022-04-25T00:00+08:00
    raw = pl.read_parquet(data_root / "kuairand_pure" / HISTORIES_FILE).sort("user_id")
    order = watched.sort("user_id", "time").group_by("user_id", maintain_order=True)
    lists = order.agg(pl.col("video_id"), pl.col("time").max())
    assert lists["video_id"].to_list() == raw["watch_seq"].to_list()
    assert lists["time"].to_list() == (raw["last_time_ms"] * 1000).to_list()
