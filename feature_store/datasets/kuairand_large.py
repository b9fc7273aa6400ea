"""KuaiRand-1K and KuaiRand-27K: every impression of 1,000 and of 27,285 users, over 4 and 32 million videos.

Source: see :mod:`feature_store.datasets.kuairand`, which reads the third version, KuaiRand-Pure. The raw folder
holds, of the public download (``1k`` below; ``27k`` is the same, its logs in several ``_part`` files), each also as
``.csv.gz``:

* ``log_standard_4_08_to_4_21_1k.csv``, ``log_standard_4_22_to_5_08_1k.csv``;
* ``user_features_1k.csv``, ``video_features_basic_1k.csv``.

Logs and videos are read in bounded memory: the log is first cut into buckets of users, and each bucket is then rid of
repeats and sorted by itself. 27K has 322 million impressions in 23 GB of text.

Impressions
    One row a log row, exact repeats dropped: user, video, time, tab, and the feedback that is a label. The first days
    have short histories; begin the training period later where that matters.

Events
    Impressions with feedback, at their time: ``click``, ``long_view``, ``like``. Feedback that the log knows when it
    ends is taken as known from its beginning, as everywhere in the literature; a history holds only what began strictly
    before.

``-124`` and ``UNKNOWN`` mean missing in the raw files, and are null in the views. Statistics of videos
(``video_features_statistic``) are not read: they are sums over the whole month, test period included.

Split
    Train to the end of 29 April, validate on 30 April, test in May (Beijing).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from feature_store.datasets.folder import views_folder
from feature_store.datasets.kuairand import LABELS, LOG_COLUMNS, VIDEO_COLUMNS, read_users
from feature_store.datasets.raw import require_folder
from feature_store.datasets.stream import ViewWriter, find_file, text_batches, view_writers, whole_numbers, zero_or_one
from feature_store.datasets.summary import DatasetSummary, Progress
from recsys.errors import SourceError
from recsys.files import write_json

MARKER = "dataset.json"
SPLIT = {
    "train_end": "2022-04-30T00:00:00+08:00",
    "validation_end": "2022-05-01T00:00:00+08:00",
    "test_end": "2022-05-09T00:00:00+08:00",
}

_EVENTS = (("click", "is_click"), ("long_view", "long_view"), ("like", "is_like"))
_SMALL = ("tab", "hourmin", "date", "is_rand", *LABELS)


def load_kuairand_1k(raw_dir: Path, output_dir: Path, progress: Progress | None = None) -> DatasetSummary:
    """Reads the raw files of KuaiRand-1K and writes the views and ``dataset.json``.

    Args:
        raw_dir: folder of the raw files.
        output_dir: folder of the views; it appears complete or not at all.
        progress: called after each of the steps.

    Raises:
        SourceError: a raw file is missing or broken, or ``output_dir`` holds something else.
    """
    return _load("1k", Path(raw_dir), output_dir, progress, num_buckets=4)


def load_kuairand_27k(raw_dir: Path, output_dir: Path, progress: Progress | None = None) -> DatasetSummary:
    """Reads the raw files of KuaiRand-27K and writes the views and ``dataset.json``.

    Args:
        raw_dir: folder of the raw files.
        output_dir: folder of the views; it appears complete or not at all.
        progress: called after each of the steps.

    Raises:
        SourceError: a raw file is missing or broken, or ``output_dir`` holds something else.
    """
    return _load("27k", Path(raw_dir), output_dir, progress, num_buckets=128)


def _load(
    version: str, raw_dir: Path, output_dir: Path, progress: Progress | None, *, num_buckets: int
) -> DatasetSummary:
    require_folder(raw_dir)
    logs = _find_logs(raw_dir, version)
    users_file, videos_file = (
        find_file(raw_dir, [f"{stem}_{version}.csv", f"{stem}_{version}.csv.gz"])
        for stem in ("user_features", "video_features_basic")
    )
    num_steps = len(logs) + num_buckets + 2
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, num_steps)

    rows_read: dict[str, int] = {}
    findings: dict[str, int] = {}
    with views_folder(output_dir, marker=MARKER) as folder:
        users = read_users(users_file, rows_read, findings)
        users.write_parquet(folder / "users.parquet")
        step()
        num_videos = _write_videos(videos_file, folder, rows_read, findings)
        step()
        buckets = [ViewWriter(folder / "buckets" / f"{b:03d}.parquet") for b in range(num_buckets)]
        try:
            for path in logs:
                rows_read[path.name] = _deal(path, buckets)
                step()
        finally:
            for bucket in buckets:
                bucket.close()
        counts = dict.fromkeys((kind for kind, _ in _EVENTS), 0)
        repeats = num_impressions = 0
        with view_writers(folder, ["impressions", "events"]) as writers:
            for number, bucket in enumerate(buckets):
                if bucket.num_rows:
                    log = pl.read_parquet(folder / "buckets" / f"{number:03d}.parquet", glob=False)
                    kept = log.unique().sort("time_ms", "user_id", "video_id", *_SMALL, "play_time_ms")
                    repeats += log.height - kept.height
                    impressions = _impressions(kept)
                    writers["impressions"].write(impressions)
                    events = _events(impressions)
                    writers["events"].write(events)
                    for kind, count in events["type"].value_counts().iter_rows():
                        counts[kind] += count
                step()
            num_impressions = writers["impressions"].num_rows
        shutil.rmtree(folder / "buckets")
        summary = DatasetSummary(
            name=f"kuairand_{version}",
            rows_read=rows_read,
            rows_written={
                "impressions": num_impressions,
                "events": sum(counts.values()),
                "users": users.height,
                "items": num_videos,
            },
            repeats_dropped=repeats,
            findings={words: count for words, count in findings.items() if count},
            num_events_by_type=dict(sorted(counts.items())),
            split=SPLIT,
        )
        write_json(folder / MARKER, summary.to_dict())
    return summary


def _find_logs(raw_dir: Path, version: str) -> list[Path]:
    logs: list[Path] = []
    for period in ("4_08_to_4_21", "4_22_to_5_08"):
        stem = f"log_standard_{period}_{version}"
        found = sorted(p for p in raw_dir.glob(f"{stem}*") if p.name.endswith((".csv", ".csv.gz")))
        if not found:
            raise SourceError(
                f"{raw_dir} must hold {stem}.csv or its parts",
                hint="the download has it in its folder `data`; give that folder",
            )
        logs += found
    return logs


def _deal(path: Path, buckets: Sequence[ViewWriter]) -> int:
    """Deals the rows of a log out to the buckets of their users; returns how many there are."""
    num_rows = 0
    required = ["time_ms", "user_id", "video_id", "tab", *LABELS]
    for first_row, text in text_batches(path, list(LOG_COLUMNS), separator=",", has_header=True):
        batch = whole_numbers(text, required, path, first_row, required=True)
        batch = whole_numbers(batch, [c for c in LOG_COLUMNS if c not in required], path, first_row)
        for label in LABELS:
            zero_or_one(batch, label, path, first_row)
        batch = batch.select(list(LOG_COLUMNS))
        bucket_of_row = batch["user_id"] % len(buckets)
        for number in bucket_of_row.unique().to_list():
            buckets[number].write(batch.filter(bucket_of_row == number))
        num_rows += batch.height
    return num_rows


def _impressions(log: pl.DataFrame) -> pl.DataFrame:
    return log.select(
        "user_id",
        "video_id",
        (pl.col("time_ms") * 1000).alias("time"),
        "tab",
        *(pl.col(c).cast(pl.Int8) for c in LABELS),
    )


def _events(impressions: pl.DataFrame) -> pl.DataFrame:
    keys = ("user_id", "video_id", "time")
    parts = [
        impressions.filter(pl.col(label) == 1).select(*keys, pl.lit(kind).alias("type")) for kind, label in _EVENTS
    ]
    return pl.concat(parts).sort("time", "user_id", maintain_order=True)


def _write_videos(path: Path, folder: Path, rows_read: dict[str, int], findings: dict[str, int]) -> int:
    kinds = VIDEO_COLUMNS
    whole = [name for name, kind in kinds.items() if kind == "int"]
    unknown = dict.fromkeys(("video_type", "upload_type"), 0)
    with ViewWriter(folder / "items.parquet") as writer:
        for first_row, text in text_batches(path, list(kinds), separator=",", has_header=True, is_quoted=True):
            # Columns with missing values are written as 12.0 by the tool that made the files.
            batch = text.with_columns(pl.col(whole).str.strip_suffix(".0"))
            batch = whole_numbers(batch, ["video_id"], path, first_row, required=True)
            batch = whole_numbers(batch, [n for n in whole if n != "video_id"], path, first_row)
            for name in unknown:
                unknown[name] += int((batch[name] == "UNKNOWN").sum())
            for name in (n for n, kind in kinds.items() if kind == "number"):
                number = batch[name].cast(pl.Float64, strict=False)
                broken = (number.is_null() & batch[name].is_not_null()).arg_true()
                if len(broken):
                    raise SourceError(f"{path}: row {first_row + int(broken[0]):,}: {name} must be a number")
                batch = batch.with_columns(number)
            writer.write(
                batch.select(list(kinds)).with_columns(
                    pl.col("video_type", "upload_type").replace({"UNKNOWN": None}),
                    pl.col("tag").str.split(",").cast(pl.List(pl.Int64), strict=False),
                )
            )
    rows_read[path.name] = writer.num_rows
    findings.update({f"videos with {name} UNKNOWN, read as missing": count for name, count in unknown.items()})
    return writer.num_rows
