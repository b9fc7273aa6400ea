"""Avazu: 40,428,967 shown advertisements of ten days in October 2014, on sites and in apps.

Source: Kaggle Click-Through Rate Prediction, 2014; https://www.kaggle.com/c/avazu-ctr-prediction. The raw folder holds
``train`` of the download, as ``train.csv``, ``train``, ``train.gz`` or ``train.csv.gz``; the file ``test`` has no
clicks and is not read. The file is read in bounded memory.

Impressions
    Every row, repeats included, without the row id. The user is the device (``device_id``); four of five rows have the
    value that stands for an unknown one, so GAUC over users says little. The item is ``C14``, the finest of the
    anonymous columns that describe the advertisement. A history is not offered: the events of an unknown device would
    be those of everybody.

Time
    ``hour`` is ``YYMMDDHH`` in UTC: the rows of an hour have the time of its beginning.

Split
    Train on 21 to 28 October, validate on 29, test on 30. Papers that split at random get higher figures.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from feature_store.datasets.folder import views_folder
from feature_store.datasets.stream import find_file, text_batches, view_writers, whole_numbers, zero_or_one
from feature_store.datasets.summary import DatasetSummary, Progress
from recsys.errors import SourceError
from recsys.files import write_json

NAME = "avazu"
MARKER = "dataset.json"
NUMBERS = ("C1", "banner_pos", "device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22)))
TEXTS = (
    "site_id",
    "site_domain",
    "site_category",
    "app_id",
    "app_domain",
    "app_category",
    "device_id",
    "device_ip",
    "device_model",
)
SPLIT = {
    "train_end": "2014-10-29T00:00:00Z",
    "validation_end": "2014-10-30T00:00:00Z",
    "test_end": "2014-10-31T00:00:00Z",
}


def load_avazu(raw_dir: Path, output_dir: Path, progress: Progress | None = None) -> DatasetSummary:
    """Reads the raw file and writes the impressions and ``dataset.json``.

    Args:
        raw_dir: folder of the raw file.
        output_dir: folder of the view; it appears complete or not at all.
        progress: called at the end.

    Raises:
        SourceError: the raw file is missing or broken, or ``output_dir`` holds something else.
    """
    path = find_file(Path(raw_dir), ["train.csv", "train", "train.gz", "train.csv.gz"])
    columns = ("click", "hour", *NUMBERS, *TEXTS)
    missing = 0
    with views_folder(output_dir, marker=MARKER) as folder:
        with view_writers(folder, ["impressions"]) as writers:
            for first_row, text in text_batches(path, columns, separator=",", has_header=True):
                batch = whole_numbers(text, ["click", "C14"], path, first_row, required=True)
                zero_or_one(batch, "click", path, first_row)
                batch = whole_numbers(batch, [n for n in NUMBERS if n != "C14"], path, first_row)
                # A device must have a key; an empty one is as unknown as the value that stands for it.
                missing += batch["device_id"].null_count()
                writers["impressions"].write(
                    batch.select(
                        _time(batch["hour"], path, first_row),
                        pl.col("click").cast(pl.Int8),
                        pl.col("device_id").fill_null(""),
                        *(n for n in (*NUMBERS, *TEXTS) if n != "device_id"),
                    )
                )
        num_rows = writers["impressions"].num_rows
        summary = DatasetSummary(
            name=NAME,
            rows_read={path.name: num_rows},
            rows_written={"impressions": num_rows},
            repeats_dropped=0,
            findings={"rows without device_id, kept with an empty one": missing} if missing else {},
            split=SPLIT,
        )
        write_json(folder / MARKER, summary.to_dict())
    if progress is not None:
        progress(1, 1)
    return summary


def _time(hour: pl.Series, path: Path, first_row: int) -> pl.Series:
    """``YYMMDDHH`` as UTC microseconds."""
    has_form = hour.str.contains(r"^\d{8}$").fill_null(value=False)
    moment = ("20" + hour + "00").str.to_datetime("%Y%m%d%H%M", time_unit="us", strict=False)
    broken = (~has_form | moment.is_null()).arg_true()
    if len(broken):
        raise SourceError(f"{path}: row {first_row + int(broken[0]):,}: hour must be written as YYMMDDHH")
    return moment.to_physical().alias("time")
