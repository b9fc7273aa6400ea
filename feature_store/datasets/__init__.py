"""Data sets: the simulator, and loaders of public data sets in their original files.

:data:`DATASETS` lists the loaders. Adding one is one file, one import and one entry here. A loader reads raw files and
writes a folder of views (``impressions.parquet``, ``events.parquet``, ``users.parquet``, ``items.parquet``) that the
schema named in its entry describes.
"""

from feature_store.datasets import amazon, taobao
from feature_store.datasets.aliccp import load_ali_ccp
from feature_store.datasets.amazon import load_amazon_reviews
from feature_store.datasets.avazu import load_avazu
from feature_store.datasets.criteo import load_criteo
from feature_store.datasets.frappe import load_frappe
from feature_store.datasets.kuairand import load_kuairand_pure
from feature_store.datasets.kuairand_large import load_kuairand_1k, load_kuairand_27k
from feature_store.datasets.movielens import load_movielens_1m
from feature_store.datasets.negatives import NegativeSampling
from feature_store.datasets.summary import Dataset, DatasetSummary, Progress
from feature_store.datasets.taobao import load_taobao_userbehavior

DATASETS: dict[str, Dataset] = {
    "ali_ccp": Dataset(
        name="ali_ccp",
        description="Ali-CCP: 85 million shown products, click and purchase, 18 fields and 5 sets",
        source="https://tianchi.aliyun.com/dataset/408",
        licence="research use, see the page of the download",
        raw_files=(
            "sample_skeleton_train.csv",
            "common_features_train.csv",
            "sample_skeleton_test.csv",
            "common_features_test.csv",
        ),
        schema_file="configs/schema/ali_ccp.yaml",
        load=load_ali_ccp,
    ),
    "amazon_reviews": Dataset(
        name="amazon_reviews",
        description="Amazon reviews, 5-core, one category of products; negatives are drawn",
        source="https://jmcauley.ucsd.edu/data/amazon, https://nijianmo.github.io/amazon",
        licence="research use, see the page of the download",
        raw_files=("reviews_CATEGORY_5.json.gz or CATEGORY_5.json.gz", "meta_CATEGORY.json.gz"),
        schema_file="configs/schema/amazon_reviews.yaml",
        load=load_amazon_reviews,
        sampling=amazon.DEFAULT_SAMPLING,
        load_sampled=load_amazon_reviews,
    ),
    "avazu": Dataset(
        name="avazu",
        description="Avazu: 40 million shown advertisements, ten days, 22 columns",
        source="https://www.kaggle.com/c/avazu-ctr-prediction",
        licence="competition use, see the rules on the page",
        raw_files=("train.csv or train.gz",),
        schema_file="configs/schema/avazu.yaml",
        load=load_avazu,
    ),
    "criteo": Dataset(
        name="criteo",
        description="Criteo display advertising: 46 million shown advertisements, 13 counts and 26 hashed values",
        source="https://ailab.criteo.com/ressources",
        licence="CC BY-NC-SA 4.0, see the page of the download",
        raw_files=("train.txt or train.txt.gz",),
        schema_file="configs/schema/criteo.yaml",
        load=load_criteo,
    ),
    "frappe": Dataset(
        name="frappe",
        description="Frappe: 289 thousand uses and non-uses of apps in context, with a published split",
        source="https://huggingface.co/datasets/reczoo/Frappe_x1",
        licence="research use, see the page of the download",
        raw_files=("train.csv, valid.csv, test.csv or train.libfm, validation.libfm, test.libfm",),
        schema_file="configs/schema/frappe.yaml",
        load=load_frappe,
    ),
    "kuairand_1k": Dataset(
        name="kuairand_1k",
        description="KuaiRand-1K: 11.7 million impressions of short videos, every one of a thousand users",
        source="https://kuairand.com",
        licence="CC BY-SA 4.0",
        raw_files=("log_standard_*_1k.csv", "user_features_1k.csv", "video_features_basic_1k.csv"),
        schema_file="configs/schema/kuairand_1k.yaml",
        load=load_kuairand_1k,
    ),
    "kuairand_27k": Dataset(
        name="kuairand_27k",
        description="KuaiRand-27K: 322 million impressions of 32 million short videos, every one of 27 thousand users",
        source="https://kuairand.com",
        licence="CC BY-SA 4.0",
        raw_files=("log_standard_*_27k_part*.csv", "user_features_27k.csv", "video_features_basic_27k.csv"),
        schema_file="configs/schema/kuairand_27k.yaml",
        load=load_kuairand_27k,
    ),
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
    "taobao_userbehavior": Dataset(
        name="taobao_userbehavior",
        description="Taobao UserBehavior: 100 million views, carts, marks and purchases; negatives are drawn",
        source="https://tianchi.aliyun.com/dataset/649",
        licence="research use, see the page of the download",
        raw_files=("UserBehavior.csv",),
        schema_file="configs/schema/taobao_userbehavior.yaml",
        load=load_taobao_userbehavior,
        sampling=taobao.DEFAULT_SAMPLING,
        load_sampled=load_taobao_userbehavior,
    ),
}

__all__ = ["DATASETS", "Dataset", "DatasetSummary", "NegativeSampling", "Progress"]
