"""Taobao UserBehavior: what one million users of a shop looked at, put in the cart, marked and bought in nine days.

Source: https://tianchi.aliyun.com/dataset/649 (Zhu, Li, Zhang, Li, He, Li, Gai, "Learning Tree-based Deep Model for
Recommender Systems", KDD 2018). The raw folder holds ``UserBehavior.csv`` without a header: user, item, category,
behaviour (``pv``, ``cart``, ``fav``, ``buy``), seconds; a part of the file is read the same way.

Events
    Every row, exact repeats dropped, with its type. Times have whole seconds; what a user did in the same second is in
    no history of one another.

Impressions
    The set has none. Each page view (``pv``) is a positive, and items that its user never touched are drawn as its
    negatives (:mod:`feature_store.datasets.negatives`); a positive and its negatives are one request.

Items
    The category, as of the item's first row: a few items have rows of several.

Times outside of the nine days (25 November to 3 December 2017, Beijing) are errors of the log; these rows are dropped.

Split
    Train to the end of 1 December, validate on 2 December, test on 3 December.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from feature_store.datasets.folder import views_folder
from feature_store.datasets.negatives import NegativeSampler, NegativeSampling
from feature_store.datasets.stream import ViewWriter, find_file, text_batches, whole_numbers
from feature_store.datasets.summary import DatasetSummary, Progress
from recsys.errors import SourceError
from recsys.files import write_json

NAME = "taobao_userbehavior"
MARKER = "dataset.json"
FILE = "UserBehavior.csv"
BEHAVIOURS = ("pv", "cart", "fav", "buy")
FIRST_SECOND, END_SECOND = 1_511_539_200, 1_512_316_800
"""2017-11-25 and 2017-12-04, 00:00 in Beijing."""
SPLIT = {
    "train_end": "2017-12-02T00:00:00+08:00",
    "validation_end": "2017-12-03T00:00:00+08:00",
    "test_end": "2017-12-04T00:00:00+08:00",
}
DEFAULT_SAMPLING = NegativeSampling("popularity", per_positive=2)
"""Feng et al., DARE, 2025: two negatives a positive, in proportion to frequency, never one that the user touched."""

_BLOCK = 1 << 20


def load_taobao_userbehavior(
    raw_dir: Path,
    output_dir: Path,
    progress: Progress | None = None,
    sampling: NegativeSampling = DEFAULT_SAMPLING,
) -> DatasetSummary:
    """Reads the raw file and writes the views and ``dataset.json``.

    Args:
        raw_dir: folder of the raw file.
        output_dir: folder of the views; it appears complete or not at all.
        progress: called after each of the views.
        sampling: how to draw negatives.

    Raises:
        SourceError: the raw file is missing or broken, or ``output_dir`` holds something else.
    """
    raw = _read(find_file(Path(raw_dir), [FILE, f"{FILE}.gz"]))
    in_period = raw.filter(pl.col("seconds").is_between(FIRST_SECOND, END_SECOND, closed="left"))
    # The file's order within a second of a user is unknown, so rows are put in an order of their own: shuffling the
    # file changes nothing.
    kept = in_period.unique().sort("seconds", "user_id", "item_id", "type", "category_id")
    if kept.height == 0:
        raise SourceError(f"{raw_dir}: {FILE} must hold rows from 25 November to 3 December 2017, got none")
    items = kept.group_by("item_id", maintain_order=True).agg(pl.col("category_id").first()).sort("item_id")
    num_categories = kept.select("item_id", "category_id").unique().group_by("item_id").len()
    events = kept.select("user_id", "item_id", (pl.col("seconds").cast(pl.Int64) * 1_000_000).alias("time"), "type")
    findings = {
        "rows with a time outside of the nine days, dropped": raw.height - in_period.height,
        "items with rows of several categories, the first counts": num_categories.filter(pl.col("len") > 1).height,
    }
    with views_folder(output_dir, marker=MARKER) as folder:
        items.write_parquet(folder / "items.parquet")
        events.write_parquet(folder / "events.parquet")
        if progress is not None:
            progress(2, 3)
        sampler, num_impressions = _write_impressions(folder / "impressions.parquet", events, items, sampling)
        if progress is not None:
            progress(3, 3)
        summary = DatasetSummary(
            name=NAME,
            rows_read={FILE: raw.height},
            rows_written={"impressions": num_impressions, "events": events.height, "items": items.height},
            repeats_dropped=in_period.height - kept.height,
            findings={words: count for words, count in findings.items() if count},
            num_events_by_type=dict(events["type"].cast(pl.String).value_counts().sort("type").iter_rows()),
            split=SPLIT,
            sampling=sampler.record(),
        )
        write_json(folder / MARKER, summary.to_dict())
    return summary


def _read(path: Path) -> pl.DataFrame:
    """The file in 17 bytes a row."""
    parts = []
    names = ["user_id", "item_id", "category_id", "type", "seconds"]
    numbers = ["user_id", "item_id", "category_id", "seconds"]
    for first_row, text in text_batches(path, names, separator=",", has_header=False):
        table = whole_numbers(text, numbers, path, first_row, required=True)
        unknown = ~table["type"].is_in(BEHAVIOURS).fill_null(value=False)
        if unknown.any():
            row = first_row + int(unknown.arg_true()[0])
            raise SourceError(f"{path}: row {row:,}: behaviour must be one of {', '.join(BEHAVIOURS)}")
        for name in numbers[:3]:
            too_large = ~table[name].is_between(0, 2**31 - 1)
            if too_large.any():
                row = first_row + int(too_large.arg_true()[0])
                raise SourceError(f"{path}: row {row:,}: {name} must be from 0 to 2^31 - 1")
        clipped = pl.col("seconds").clip(-1, 2**31 - 1)  # far outside stays outside
        parts.append(
            table.select(
                *(pl.col(n).cast(pl.Int32) for n in numbers[:3]),
                pl.col("type").cast(pl.Enum(BEHAVIOURS)),
                clipped.cast(pl.Int32),
            )
        )
    return pl.concat(parts)


def _write_impressions(
    path: Path, events: pl.DataFrame, items: pl.DataFrame, sampling: NegativeSampling
) -> tuple[NegativeSampler, int]:
    item_ids = items["item_id"].to_numpy()
    category = items["category_id"].rank("dense").cast(pl.Int64).to_numpy() - 1
    user_code = events["user_id"].rank("dense").cast(pl.Int64).to_numpy() - 1
    item_code = np.searchsorted(item_ids, events["item_id"].to_numpy())
    sampler = NegativeSampler(sampling, user_code, item_code, num_items=len(item_ids), category=category)
    positives = np.flatnonzero((events["type"] == "pv").to_numpy())
    with ViewWriter(path) as writer:
        for block, start in enumerate(range(0, max(len(positives), 1), _BLOCK)):
            rows = positives[start : start + _BLOCK]
            drawn = sampler.draw(user_code[rows], item_code[rows], block=block)
            shown = np.concatenate([item_code[rows][:, None], drawn], axis=1).reshape(-1)
            of_row = np.repeat(np.arange(len(rows)), drawn.shape[1] + 1)
            label = np.tile(np.arange(drawn.shape[1] + 1) == 0, len(rows)).astype(np.int8)
            exists = shown >= 0
            chosen = events[rows[of_row[exists]]]
            writer.write(
                pl.DataFrame(
                    {
                        "request": start + of_row[exists],
                        "user_id": chosen["user_id"],
                        "item_id": item_ids[shown[exists]],
                        "time": chosen["time"],
                        "click": label[exists],
                    }
                )
            )
        return sampler, writer.num_rows
