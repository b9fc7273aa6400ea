"""Data sets: the simulator, and loaders of public data sets in their original files.

:data:`DATASETS` lists the loaders. Adding one is one file, one import and one entry here. A loader reads raw files and
writes a folder of views (``impressions.parquet``, ``events.parquet``, ``users.parquet``, ``items.parquet``) that the
schema named in its entry describes.
"""

from feature_store.datasets.kuairand import load_kuairand_pure
from feature_store.datasets.movielens import load_movielens_1m
from feature_store.datasets.summary import Dataset, DatasetSummary, Progress

DATASETS: dict[str, Dataset] = {
    "kuairand_pure": Dataset(
        name="kuairand_pure",
        description="KuaiRand-Pure: 223 thousand impressions of short videos, 8 kinds of feedback, 27 thousand users",
        source="https://kuairand.com",
        licence="CC BY-SA 4.0",
        raw_files=("log_standard*.csv or .parquet", "user_features_pure.csv", "video_features_basic_pure.csv"),
        schema_file="configs/schema/kuairand_pure.yaml",
        load=load_kuairand_pure,
    ),
    "movielens_1m": Dataset(
        name="movielens_1m",
        description="MovieLens-1M: one million ratings of films by 6 thousand users, with long histories",
        source="https://grouplens.org/datasets/movielens/1m",
        licence="research use, see the README of the download",
        raw_files=("ratings.dat", "users.dat", "movies.dat"),
        schema_file="configs/schema/movielens_1m.yaml",
        load=load_movielens_1m,
    ),
}

__all__ = ["DATASETS", "Dataset", "DatasetSummary", "Progress"]
