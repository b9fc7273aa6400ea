"""KuaiRand-Pure: real impressions of a short-video app with twelve kinds of feedback.

Source: Gao, Li, Zhang, Chen, Li, Lei, Jiang, He, "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly
Exposed Videos", CIKM 2022; https://kuairand.com (CC BY-SA 4.0).

The views begin on 25 April 2022; what came before is history. Raw folders of two forms are read, with the same result:

* the public download: ``log_standard_4_08_to_4_21_pure.csv`` and ``log_standard_4_22_to_5_08_pure.csv``;
* a compact form: logs from 25 April on (``log_standard*.parquet``), and in ``user_histories_until_0424.parquet`` for
  each user the last 50 videos watched, liked and watched long up to 24 April, oldest first, with how many were
  watched in all (``history_len``) and when the last was (``last_time_ms``). From the public download the same lists
  are made.

Both with ``user_features_pure.csv`` and ``video_features_basic_pure.csv``.

Impressions
    One row a log row from 25 April on, exact repeats dropped, in order of time. Only what is known before the feedback
    (user, video, time, tab) and the feedback columns themselves, which are labels. Watch time, stay times and the like
    are feedback too: they are in no view.

Events
    ======================  ==========================================  =================================
    type                    from                                        time
    ======================  ==========================================  =================================
    watch                   the watched list: clicked or not            spread, see below
    like, long_watch        the other lists                             1 and 2 us after the watch
    click, long_view, like  impressions with this feedback              of the impression
    ======================  ==========================================  =================================

    The lists' order is exact, their times were not kept. The j-th of a user's n watched videos (the list holds the
    last 50 of n) gets the time ``start + (last - start) j / n``, start being the start of the log, 8 April, and last
    the exact time of the last one. A liked video goes to its latest fitting place in the watched list; those too old
    for the watched list are spread evenly before it. All these times are before 25 April but for the clock of the log
    itself, whose dates run up to an hour ahead of its times.

``-124`` and ``UNKNOWN`` mean missing in the raw files, and are null in the views.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.datasets.folder import views_folder
from feature_store.datasets.raw import ColumnKind, read_table, require_folder
from feature_store.datasets.summary import DatasetSummary, Progress
from recsys.errors import SourceError
from recsys.files import write_json

NAME = "kuairand_pure"
MARKER = "dataset.json"
HISTORIES_FILE = "user_histories_until_0424.parquet"
USERS_FILE = "user_features_pure.csv"
VIDEOS_FILE = "video_features_basic_pure.csv"
LABELS = (
    "is_click",
    "long_view",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "is_profile_enter",
)
LIST_LENGTH = 50
"""The newest so many videos of each list."""

_KEY = ("time_ms", "user_id", "video_id")
_LAST_HISTORY_DATE = 20220424
_LOG_START_US = 1_649_347_200_000_000  # 2022-04-08T00:00+08:00
_SECOND_US = 1_000_000
LOG_COLUMNS: dict[str, ColumnKind] = dict.fromkeys(
    (
        "time_ms",
        "user_id",
        "video_id",
        "date",
        "hourmin",
        "tab",
        *LABELS,
        "play_time_ms",
        "duration_ms",
        "profile_stay_time",
        "comment_stay_time",
        "is_rand",
    ),
    "int",
)
_HISTORY_COLUMNS: dict[str, ColumnKind] = {
    "user_id": "int",
    "history_len": "int",
    "last_time_ms": "int",
    "watch_seq": "int_list",
    "like_seq": "int_list",
    "long_watch_seq": "int_list",
}
_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_COLUMNS: dict[str, ColumnKind] = {
    "user_id": "int",
    "user_active_degree": "text",
    "is_lowactive_period": "int",
    "is_live_streamer": "int",
    "is_video_author": "int",
    **dict.fromkeys(_COUNTS, "int"),
    **{f"{name}_range": "text" for name in _COUNTS},
    **{f"onehot_feat{i}": "int" for i in range(18)},
}
VIDEO_COLUMNS: dict[str, ColumnKind] = {
    "video_id": "int",
    "author_id": "int",
    "video_type": "text",
    "upload_dt": "text",
    "upload_type": "text",
    "visible_status": "int",
    "video_duration": "number",
    "server_width": "number",
    "server_height": "number",
    "music_id": "int",
    "music_type": "int",
    "tag": "text",
}
_TYPE_ORDER = {"watch": 0, "like": 1, "long_watch": 2, "click": 3, "long_view": 4}


class _Placed(NamedTuple):
    """Events of one type from a list column."""

    users: npt.NDArray[np.int64]
    videos: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]


def load_kuairand_pure(raw_dir: Path, output_dir: Path, progress: Progress | None = None) -> DatasetSummary:
    """Reads the raw files and writes the views and ``dataset.json``.

    Args:
        raw_dir: folder of the raw files, in either form.
        output_dir: folder of the views; it appears complete or not at all.
        progress: called after each of the views.

    Raises:
        SourceError: a raw file or column is missing or of the wrong type, or ``output_dir`` holds something else.
    """
    raw_dir = Path(raw_dir)
    require_folder(raw_dir)
    rows_read: dict[str, int] = {}
    findings: dict[str, int] = {}
    log = _read_log(raw_dir, rows_read)
    histories = _read_histories(raw_dir, log, rows_read)
    log = log.filter(pl.col("date") > _LAST_HISTORY_DATE)
    kept = log.unique().sort("time_ms", "user_id", "video_id", *(c for c in log.columns if c not in _KEY))
    users, videos = read_users(raw_dir / USERS_FILE, rows_read, findings), _read_videos(raw_dir, rows_read, findings)
    impressions = kept.select(
        "user_id",
        "video_id",
        (pl.col("time_ms") * 1000).alias("time"),
        "tab",
        *(pl.col(c).cast(pl.Int8) for c in LABELS),
    )
    events = _events(histories, impressions)
    _find(kept, histories, users, videos, findings)
    views = {"impressions": impressions, "events": events, "users": users, "items": videos}
    summary = DatasetSummary(
        name=NAME,
        rows_read=rows_read,
        rows_written={name: view.height for name, view in views.items()},
        repeats_dropped=log.height - kept.height,
        findings={words: count for words, count in findings.items() if count},
        num_events_by_type=dict(events["type"].value_counts().sort("type").iter_rows()),
    )
    with views_folder(output_dir, marker=MARKER) as folder:
        for done, (name, view) in enumerate(views.items(), start=1):
            view.write_parquet(folder / f"{name}.parquet")
            if progress is not None:
                progress(done, len(views))
        write_json(folder / MARKER, summary.to_dict())
    return summary


def _read_log(raw_dir: Path, rows_read: dict[str, int]) -> pl.DataFrame:
    paths = sorted(raw_dir.glob("log_standard*.parquet")) or sorted(raw_dir.glob("log_standard*.csv"))
    if not paths:
        raise SourceError(
            f"{raw_dir} must hold log_standard*.parquet or log_standard*.csv",
            hint="in the public download: log_standard_4_08_to_4_21_pure.csv, log_standard_4_22_to_5_08_pure.csv",
        )
    parts = []
    for path in paths:
        part = read_table(path, LOG_COLUMNS)
        for column in ("user_id", "video_id", "time_ms", "date"):
            if part[column].null_count():
                raise SourceError(
                    f"{path}: column {column} must have a value in every row, got {part[column].null_count()} null"
                )
        rows_read[path.name] = part.height
        parts.append(part)
    return pl.concat(parts)


def _read_histories(raw_dir: Path, log: pl.DataFrame, rows_read: dict[str, int]) -> pl.DataFrame:
    """The lists up to 24 April, from their file or from the log's earlier rows; one row a user, by user."""
    path = raw_dir / HISTORIES_FILE
    if path.is_file():
        histories = read_table(path, _HISTORY_COLUMNS)
        rows_read[path.name] = histories.height
        if histories["user_id"].n_unique() < histories.height:
            raise SourceError(f"{path}: column user_id must not repeat a user")
    else:
        earlier = log.filter(pl.col("date") <= _LAST_HISTORY_DATE)
        if earlier.height == 0:
            raise SourceError(
                f"{raw_dir} must hold {HISTORIES_FILE}, or logs from before 25 April",
                hint="log_standard_4_08_to_4_21_pure.csv of the public download has them",
            )
        video = pl.col("video_id")
        histories = (
            earlier.sort("time_ms", "video_id", maintain_order=True)
            .group_by("user_id")
            .agg(
                pl.len().cast(pl.Int64).alias("history_len"),
                pl.col("time_ms").max().alias("last_time_ms"),
                video.tail(LIST_LENGTH).alias("watch_seq"),
                video.filter(pl.col("is_like") == 1).tail(LIST_LENGTH).alias("like_seq"),
                video.filter(pl.col("long_view") == 1).tail(LIST_LENGTH).alias("long_watch_seq"),
            )
        )
    lists = pl.col("watch_seq", "like_seq", "long_watch_seq")
    return histories.with_columns(lists.fill_null([])).sort("user_id")


def read_users(path: Path, rows_read: dict[str, int], findings: dict[str, int]) -> pl.DataFrame:
    """The users view; counts what is missing in ``findings``."""
    users = read_table(path, USER_COLUMNS)
    rows_read[path.name] = users.height
    findings["users with is_live_streamer -124, read as missing"] = int((users["is_live_streamer"] == -124).sum())
    findings["users with user_active_degree UNKNOWN, read as missing"] = int(
        (users["user_active_degree"] == "UNKNOWN").sum()
    )
    return users.with_columns(
        pl.col("is_live_streamer").replace({-124: None}), pl.col("user_active_degree").replace({"UNKNOWN": None})
    )


def _read_videos(raw_dir: Path, rows_read: dict[str, int], findings: dict[str, int]) -> pl.DataFrame:
    videos = read_table(raw_dir / VIDEOS_FILE, VIDEO_COLUMNS)
    rows_read[VIDEOS_FILE] = videos.height
    for column in ("video_type", "upload_type"):
        findings[f"videos with {column} UNKNOWN, read as missing"] = int((videos[column] == "UNKNOWN").sum())
    for column in ("tag", "video_duration", "music_type"):
        findings[f"videos without {column}"] = videos[column].null_count()
    return videos.with_columns(
        pl.col("video_type", "upload_type").replace({"UNKNOWN": None}),
        pl.col("tag").str.split(",").cast(pl.List(pl.Int64), strict=False),
    )


def _events(histories: pl.DataFrame, impressions: pl.DataFrame) -> pl.DataFrame:
    order = list(_TYPE_ORDER)
    parts = [
        pl.DataFrame({"user_id": p.users, "video_id": p.videos, "time": p.times}).with_columns(
            pl.lit(kind).alias("type")
        )
        for kind, p in _placed_lists(histories).items()
    ]
    for kind, label in (("click", "is_click"), ("long_view", "long_view"), ("like", "is_like")):
        happened = impressions.filter(pl.col(label) == 1).select("user_id", "video_id", "time")
        parts.append(happened.with_columns(pl.lit(kind).alias("type")))
    by_type = pl.col("type").replace_strict(order, range(len(order)))
    return pl.concat(parts).sort(pl.col("time"), pl.col("user_id"), by_type, pl.col("video_id"), maintain_order=True)


def _placed_lists(histories: pl.DataFrame) -> dict[str, _Placed]:
    """Gives every list entry a time; see the module's text for the rule."""
    lists = {name: histories[name].to_list() for name in ("watch_seq", "like_seq", "long_watch_seq")}
    placed: dict[str, list[tuple[int, int, int]]] = {"watch": [], "like": [], "long_watch": []}
    for row, (user, length, last_ms) in enumerate(
        histories.select("user_id", "history_len", "last_time_ms").iter_rows()
    ):
        watched = lists["watch_seq"][row]
        watch_times = spread_times(len(watched), length, last_ms * 1000)
        placed["watch"].extend(zip([user] * len(watched), watched, watch_times, strict=True))
        for kind, column, delay in (("like", "like_seq", 1), ("long_watch", "long_watch_seq", 2)):
            videos = lists[column][row]
            if videos:
                end = watch_times[0] if watch_times else last_ms * 1000
                times = place_among(videos, watched, watch_times, end=end, delay=delay)
                placed[kind].extend(zip([user] * len(videos), videos, times, strict=True))
    empty = np.zeros((0, 3), dtype=np.int64)
    return {
        kind: _Placed(*np.ascontiguousarray((np.array(rows, dtype=np.int64) if rows else empty).T))
        for kind, rows in placed.items()
    }


def spread_times(count: int, length: int, last: int, *, start: int = _LOG_START_US) -> list[int]:
    """Times of the last ``count`` of ``length`` events in microseconds, even steps from ``start`` to ``last``.

    Steps are at least a second: where there is too little time, the steps begin before ``start``.

    Example:
        >>> spread_times(2, 4, 8_000_000, start=0)
        [6000000, 8000000]
    """
    length = max(length, count)
    span = max(last - start, length * _SECOND_US)
    return [last - span * (length - rank) // length for rank in range(length - count + 1, length + 1)]


def place_among(videos: list[int], watched: list[int], watch_times: list[int], *, end: int, delay: int) -> list[int]:
    """Times of a list whose newer part is a part of the watched list, in the same order.

    From the newest back, each video goes ``delay`` microseconds after its latest watch that keeps the order. The
    first that finds none, and all older ones, are spread evenly between the start of the log and ``end``, the first
    watch.

    Example:
        >>> place_among([7, 5], [5, 6, 5], [10, 20, 30], end=10, delay=1)[-1]
        31
    """
    times: list[int] = []
    place = len(watched)
    for video in reversed(videos):
        place -= 1
        while place >= 0 and watched[place] != video:
            place -= 1
        if place < 0:
            break
        times.append(watch_times[place] + delay)
    num_older = len(videos) - len(times)
    span = max(end - _LOG_START_US, (num_older + 1) * _SECOND_US)
    older = [end - span * (num_older - i) // (num_older + 1) + (delay - 1) for i in range(num_older)]
    return older + times[::-1]


def _find(
    kept: pl.DataFrame, histories: pl.DataFrame, users: pl.DataFrame, videos: pl.DataFrame, findings: dict[str, int]
) -> None:
    shown = kept.group_by("user_id").agg(pl.col("time_ms").min())
    findings["impressions that repeat user, video and time with another hour or feedback, kept"] = int(
        kept.select(*_KEY).is_duplicated().sum() - kept.filter(kept.select(*_KEY).is_duplicated()).n_unique(_KEY)
    )
    findings["users with impressions and no history before 25 April"] = shown.join(
        histories, on="user_id", how="anti"
    ).height
    findings["users with impressions and no features"] = shown.join(users, on="user_id", how="anti").height
    findings["videos shown and without features"] = (
        kept.select("video_id").unique().join(videos, on="video_id", how="anti").height
    )
    findings["users whose last watch is not before their first impression"] = (
        shown.join(histories, on="user_id").filter(pl.col("last_time_ms") >= pl.col("time_ms")).height
    )
