r"""Ali-CCP: 85 million shown products of a shop's recommendations, with click and purchase.

Source: Ma, Zhao, Huang, Wang, Hu, Zhu, Gai, "Entire Space Multi-Task Model", SIGIR 2018;
https://tianchi.aliyun.com/dataset/408. The raw folder holds ``sample_skeleton_train.csv``,
``common_features_train.csv`` and the same two of ``test`` (each also as ``.gz``), without a header, read in bounded
memory:

* skeleton: row id, click, purchase, key of the common features, number of features, features;
* common features: key, number of features, features.

A feature is ``field \x02 value \x03 weight``; features are separated by ``\x01``.

Users
    One row a key of common features: a user as they were when the products were shown. So the same person (``101``)
    has several rows, and GAUC over users is one over visits. A key that comes again, in the other file too, keeps its
    first row. Fields ``109_14``, ``110_14``, ``127_14``, ``150_14`` (past categories, shops, brands, intentions) and
    ``210`` hold sets; their weights are not read.

Impressions
    One row a skeleton row, with its fields; a purchase without a click contradicts itself, and its row is dropped, as
    in the literature. The rows of one key are one request. A conversion is a purchase among all impressions.

Time
    The set has no times; the test files come after the training files. A row's time says its part and its place: row
    ``i`` of a part is ``i`` microseconds after 1 January 1970 in training, 2 January in validation, 3 January in test.

Split
    The published files; validation is the tenth of the training keys whose hash (64-bit FNV-1a, finalised) is a
    multiple of 10, so that no visit is on both sides.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from feature_store.datasets.folder import views_folder
from feature_store.datasets.stream import (
    ViewWriter,
    find_file,
    text_batches,
    view_writers,
    whole_numbers,
    zero_or_one,
)
from feature_store.datasets.summary import DatasetSummary, Progress
from recsys.encoding.hashing import hash_keys
from recsys.errors import SourceError
from recsys.files import write_json

NAME = "ali_ccp"
MARKER = "dataset.json"
USER_FIELDS = ("101", "121", "122", "124", "125", "126", "127", "128", "129")
USER_SETS = ("109_14", "110_14", "127_14", "150_14")
ITEM_FIELDS = ("205", "206", "207", "216", "508", "509", "702", "853", "301")
ITEM_SETS = ("210",)
SPLIT = {
    "train_end": "1970-01-02T00:00:00Z",
    "validation_end": "1970-01-03T00:00:00Z",
    "test_end": "1970-01-04T00:00:00Z",
}

_DAY_US = 86_400_000_000


def load_ali_ccp(raw_dir: Path, output_dir: Path, progress: Progress | None = None) -> DatasetSummary:
    """Reads the raw files and writes the views and ``dataset.json``.

    Args:
        raw_dir: folder of the raw files.
        output_dir: folder of the views; it appears complete or not at all.
        progress: called after each of the four files.

    Raises:
        SourceError: a raw file is missing or broken, or ``output_dir`` holds something else.
    """
    raw_dir = Path(raw_dir)
    names = [f"{kind}_{part}.csv" for part in ("train", "test") for kind in ("common_features", "sample_skeleton")]
    paths = {name: find_file(raw_dir, [name, f"{name}.gz"]) for name in names}
    loader = _Loader()
    with views_folder(output_dir, marker=MARKER) as folder:
        with view_writers(folder, ["users", "impressions"]) as writers:
            for done, (name, path) in enumerate(paths.items(), start=1):
                if name.startswith("common"):
                    loader.read_users(path, writers["users"])
                else:
                    loader.read_impressions(path, writers["impressions"], is_test="test" in name)
                if progress is not None:
                    progress(done, len(paths))
        summary = DatasetSummary(
            name=NAME,
            rows_read=loader.rows_read,
            rows_written={name: writer.num_rows for name, writer in writers.items()},
            repeats_dropped=0,
            findings={words: count for words, count in loader.findings.items() if count},
            split=SPLIT,
        )
        write_json(folder / MARKER, summary.to_dict())
    return summary


class _Loader:
    """Reads the four files in order; remembers which keys were seen."""

    def __init__(self) -> None:
        self.rows_read: dict[str, int] = {}
        self.findings: dict[str, int] = {}
        self._keys: set[str] = set()

    def read_users(self, path: Path, writer: ViewWriter) -> None:
        """Common features: a row a key that was not seen before."""
        columns = ("key", "count", "features")
        for first_row, text in text_batches(path, columns, separator=",", has_header=False):
            batch = whole_numbers(text, ["count"], path, first_row, required=True)
            keys = _required(batch, "key", path, first_row).to_list()
            is_new = []
            for key in keys:
                is_new.append(key not in self._keys)
                self._keys.add(key)
            self._count(path, batch, keys_again=len(is_new) - sum(is_new))
            writer.write(batch.select("key", *_fields(USER_FIELDS, USER_SETS)).filter(pl.Series(is_new)))

    def read_impressions(self, path: Path, writer: ViewWriter, *, is_test: bool) -> None:
        """Skeleton rows."""
        columns = ("id", "click", "purchase", "key", "count", "features")
        for first_row, text in text_batches(path, columns, separator=",", has_header=False, chosen=columns[1:]):
            batch = whole_numbers(text, ["click", "purchase", "count"], path, first_row, required=True)
            for label in ("click", "purchase"):
                zero_or_one(batch, label, path, first_row)
            keys = _required(batch, "key", path, first_row)
            day = np.full(batch.height, 2) if is_test else (hash_keys(keys.to_arrow()) % 10 == 0).astype(np.int64)
            place = np.arange(first_row - 1, first_row - 1 + batch.height)
            table = batch.with_columns(pl.Series("time", day * _DAY_US + place)).select(
                "key",
                "time",
                pl.col("click", "purchase").cast(pl.Int8),
                *_fields(ITEM_FIELDS, ITEM_SETS),
            )
            contradicts = (table["click"] == 0) & (table["purchase"] == 1)
            self._count(path, batch)
            self._find("rows with a purchase and no click, dropped", int(contradicts.sum()))
            self._find("rows without an item", table["205"].null_count())
            unknown = sum(key not in self._keys for key in keys.to_list())
            self._find("rows whose key has no common features", unknown)
            writer.write(table.filter(~contradicts))

    def _count(self, path: Path, batch: pl.DataFrame, *, keys_again: int = 0) -> None:
        self.rows_read[path.name] = self.rows_read.get(path.name, 0) + batch.height
        held = batch["features"].str.count_matches("\x02", literal=True).fill_null(0)
        self._find("rows with another number of features than they say", int((held != batch["count"]).sum()))
        self._find("keys of common features that come again, the first counts", keys_again)

    def _find(self, words: str, count: int) -> None:
        self.findings[words] = self.findings.get(words, 0) + count


def _required(batch: pl.DataFrame, column: str, path: Path, first_row: int) -> pl.Series:
    missing = batch[column].is_null().arg_true()
    if len(missing):
        raise SourceError(f"{path}: row {first_row + int(missing[0]):,}: {column} must have a value")
    return batch[column]


def _fields(single: tuple[str, ...], sets: tuple[str, ...]) -> list[pl.Expr]:
    """Ids of fields: the first of a single one, all of a set in the order of the file; null where there is none."""
    text = pl.col("features")
    found = [text.str.extract(rf"(?:^|\x01){f}\x02(\d+)\x03").cast(pl.Int64).alias(f) for f in single]
    for field in sets:
        ids = text.str.extract_all(rf"(?:^|\x01){field}\x02\d+").list.eval(
            pl.element().str.extract(r"(\d+)$").cast(pl.Int64)
        )
        found.append(pl.when(ids.list.len() > 0).then(ids).alias(field))
    return found
