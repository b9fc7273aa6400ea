"""Criteo display advertising: 45,840,617 shown advertisements of seven days, with 13 counts and 26 hashed values.

Source: Criteo Labs, Kaggle Display Advertising Challenge, 2014; https://ailab.criteo.com/ressources. The raw folder
holds ``train.txt`` (or ``train.txt.gz``) of the download, without a header: the label, 13 whole numbers, 26 values of
up to eight hexadecimal digits, between tabs; an empty field is missing. The 24 days of the terabyte set have the same
columns: give one day as ``train.txt``. The file is read in bounded memory.

Impressions
    Every row, repeats included, in the order of the file, which is that of time. The hashed values become integers.
    What the columns mean was not published, so all are features of the candidate. Users and items are unknown: both
    keys are 0, a history cannot be had, and GAUC over users is the AUC.

Time
    Only the order is known: row ``i``, from 0, has the time of ``i`` seconds after 1970. A feature that reads the time
    would be without meaning.

Split
    By order: the first 8/10 of the rows train, the next 1/10 validate, the last 1/10 test (rounded down); the
    boundaries for the file at hand are in ``dataset.json``. Papers that split at random get higher figures:
    neighbouring rows share campaigns.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from feature_store.datasets.folder import views_folder
from feature_store.datasets.stream import find_file, text_batches, view_writers, whole_numbers, zero_or_one
from feature_store.datasets.summary import DatasetSummary, Progress
from recsys.files import write_json

NAME = "criteo"
MARKER = "dataset.json"
COUNTS = tuple(f"I{i}" for i in range(1, 14))
VALUES = tuple(f"C{i}" for i in range(1, 27))

_SECOND_US = 1_000_000


def load_criteo(raw_dir: Path, output_dir: Path, progress: Progress | None = None) -> DatasetSummary:
    """Reads the raw file and writes the impressions and ``dataset.json``.

    Args:
        raw_dir: folder of the raw file.
        output_dir: folder of the view; it appears complete or not at all.
        progress: called at the end.

    Raises:
        SourceError: the raw file is missing or broken, or ``output_dir`` holds something else.
    """
    path = find_file(Path(raw_dir), ["train.txt", "train.txt.gz"])
    with views_folder(output_dir, marker=MARKER) as folder:
        with view_writers(folder, ["impressions"]) as writers:
            columns = ("label", *COUNTS, *VALUES)
            for first_row, text in text_batches(path, columns, separator="\t", has_header=False):
                batch = whole_numbers(text, ["label"], path, first_row, required=True)
                zero_or_one(batch, "label", path, first_row)
                batch = whole_numbers(batch, COUNTS, path, first_row)
                batch = whole_numbers(batch, VALUES, path, first_row, base=16)
                row = pl.int_range(batch.height, dtype=pl.Int64) + (first_row - 1)
                zero = pl.lit(0, dtype=pl.Int8)
                writers["impressions"].write(
                    batch.select(
                        zero.alias("user"),
                        zero.alias("item"),
                        (row * _SECOND_US).alias("time"),
                        pl.col("label").cast(pl.Int8),
                        *COUNTS,
                        *VALUES,
                    )
                )
        num_rows = writers["impressions"].num_rows
        summary = DatasetSummary(
            name=NAME,
            rows_read={path.name: num_rows},
            rows_written={"impressions": num_rows},
            repeats_dropped=0,
            findings={},
            split=split_by_order(num_rows),
        )
        write_json(folder / MARKER, summary.to_dict())
    if progress is not None:
        progress(1, 1)
    return summary


def split_by_order(num_rows: int) -> dict[str, str | int]:
    """Boundaries in microseconds that cut rows one second apart at 8/10 and 9/10.

    Example:
        >>> split_by_order(25)
        {'train_end': 20000000, 'validation_end': 22000000, 'test_end': 25000000}
    """
    train, validation = num_rows * 8 // 10, num_rows * 9 // 10
    return {
        "train_end": train * _SECOND_US,
        "validation_end": validation * _SECOND_US,
        "test_end": num_rows * _SECOND_US,
    }
