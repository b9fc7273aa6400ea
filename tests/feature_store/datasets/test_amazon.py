from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from feature_store.datasets.amazon import load_amazon_reviews, parse_product, split_by_day
from feature_store.datasets.negatives import NegativeSampling
from recsys.errors import SourceError
from tests.feature_store.datasets.loaded import build

DAY = 86_400
START = 15_000 * DAY


def reviews() -> list[dict[str, Any]]:
    """Five users, 20 products, 60 days, two reviews a day; the text holds what breaks naive readers."""
    return [
        {
            "reviewerID": f"A{n % 5}",
            "asin": f"{n % 20:010d}",
            "reviewerName": 'J. "Q"\n{',
            "reviewText": "line\u2028separator, 'quotes' and \\backslashes",
            "overall": float(1 + n % 5),
            "unixReviewTime": START + n // 2 * DAY,
        }
        for n in range(120)
    ]


def products() -> list[str]:
    """As in 2014: Python literals. Product 19 has none, product 18 has two, one is of no review."""
    lines = [
        repr(
            {
                "asin": f"{n:010d}",
                "title": 'It\'s "the" one',
                "categories": [["Electronics", "Cables"], ["Electronics", f"Kind {n % 3}"]],
                "price": 9.5 + n,
                "salesRank": {"Electronics": n},
                "related": {"also_viewed": ["x"]},
            }
            | ({"brand": "Acme"} if n % 2 else {})
        )
        for n in range(19)
    ]
    return [*lines, repr({"asin": "0000000018", "categories": [["Other"]]}), repr({"asin": "B00", "price": 1.0})]


def write(folder: Path, review_lines: list[str], product_lines: list[str], *, packed: bool = True) -> Path:
    folder.mkdir()
    for name, lines in (("reviews_Electronics_5.json", review_lines), ("meta_Electronics.json", product_lines)):
        text = ("\n".join(lines) + "\n").encode()
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text))
        else:
            (folder / name).write_bytes(text)
    return folder


def lines() -> list[str]:
    return [json.dumps(r) for r in reviews()]


def test_views_and_the_summary(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", [*lines(), lines()[0], ""], products())
    summary = load_amazon_reviews(raw, tmp_path / "views")
    assert summary.rows_read == {"reviews_Electronics_5.json.gz": 121, "meta_Electronics.json.gz": 21}
    assert summary.rows_written == {
        "impressions": 240 - summary.sampling["positives_with_fewer"],
        "events": 120,
        "items": 20,
    }
    assert summary.repeats_dropped == 1
    assert summary.findings == {
        "products with reviews and no metadata": 1,
        "products with several lines of metadata, the first counts": 1,
        "reviews of a product that the user has reviewed before": 100,
    }
    items = pl.read_parquet(tmp_path / "views" / "items.parquet").rows(named=True)
    assert items[4] == {
        "item_id": "0000000004",
        "category": "Kind 1",
        "categories": ["Electronics", "Cables", "Kind 1"],
        "brand": None,
        "price": 13.5,
    }
    assert items[18]["category"] == "Kind 0"
    assert items[19] == {"item_id": "0000000019", "category": None, "categories": None, "brand": None, "price": None}
    events = pl.read_parquet(tmp_path / "views" / "events.parquet")
    assert set(events.rows()) == {
        (r["reviewerID"], r["asin"], r["unixReviewTime"] * 1_000_000, r["overall"]) for r in reviews()
    }


@pytest.mark.parametrize("kind", ["uniform", "popularity", "in_category"])
def test_negatives_are_products_that_the_user_never_reviewed(tmp_path: Path, kind: Any) -> None:
    raw = write(tmp_path / "raw", lines(), products(), packed=False)
    summary = load_amazon_reviews(raw, tmp_path / "views", None, NegativeSampling(kind, 2, seed=3))
    assert (summary.sampling["negatives"], summary.sampling["seed"]) == (kind, 3)
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    reviewed = {(r["reviewerID"], r["asin"]) for r in reviews()}
    for user, item, label in impressions.select("user_id", "item_id", "label").iter_rows():
        assert ((user, item) in reviewed) == bool(label)
    assert impressions["label"].sum() == 120
    assert impressions.group_by("request").agg(pl.col("label").sum())["label"].to_list() == [1] * 120


def test_the_release_of_2018_is_read(tmp_path: Path) -> None:
    meta = [
        json.dumps({"asin": f"{n:010d}", "category": ["Games", f"G{n % 2}"], "price": p, "brand": " "})
        for n, p in zip(range(20), ["$1,299.00", "$5.00 - $9.00", "", ".a-box{}", None] * 4, strict=True)
    ]
    raw = write(tmp_path / "raw", lines(), meta)
    (raw / "reviews_Electronics_5.json.gz").rename(raw / "Electronics_5.json.gz")
    load_amazon_reviews(raw, tmp_path / "views")
    items = pl.read_parquet(tmp_path / "views" / "items.parquet")
    assert items["price"].to_list() == [1299.0, None, None, None, None] * 4
    assert items["category"].to_list() == ["G0", "G1"] * 10
    assert items["brand"].null_count() == 20


@pytest.mark.parametrize(
    "line",
    [
        b"__import__('os').system('true')",
        b"{'asin': open('/etc/hostname').read()}",
        b"{'asin': [].__class__}",
        b"{'asin': '1' * 10}",
        b"{'asin': 'x'",
        b"[1, 2]",
        b"{[]: 1}",
        b"(" * 5000,
        b"\xff{}",
    ],
)
def test_metadata_is_parsed_and_never_run(line: bytes) -> None:
    with pytest.raises(SourceError, match=r"meta\.json:7 must be a JSON object or a Python dictionary of constants"):
        parse_product(line, "meta.json:7")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"reviewerID": None}, "5_5|:3: reviewerID and asin must be text"),
        ({"asin": 7}, ":3: reviewerID and asin must be text"),
        ({"unixReviewTime": "1400000000"}, ":3: unixReviewTime must be whole seconds"),
        ({"unixReviewTime": -5}, ":3: unixReviewTime must be whole seconds"),
        ({"overall": "five"}, ":3: overall must be a rating"),
        ({"overall": float("nan")}, ":3: overall must be a rating"),
    ],
)
def test_a_broken_review_is_named(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    changed = lines()
    changed[2] = json.dumps(reviews()[2] | broken)
    with pytest.raises(SourceError, match=message):
        load_amazon_reviews(write(tmp_path / "raw", changed, products()), tmp_path / "views")
    assert not (tmp_path / "views").exists()


def test_broken_files_are_named(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", [*lines()[:3], "{'asin': 'python'}"], products())
    with pytest.raises(SourceError, match=r"5\.json\.gz:4 must be one JSON object a line"):
        load_amazon_reviews(raw, tmp_path / "views")
    raw = write(tmp_path / "cut", lines(), products())
    whole = (raw / "meta_Electronics.json.gz").read_bytes()
    (raw / "meta_Electronics.json.gz").write_bytes(whole[:-20])
    with pytest.raises(SourceError, match=r"meta_Electronics\.json\.gz"):
        load_amazon_reviews(raw, tmp_path / "views")
    raw = write(tmp_path / "two", lines(), products())
    (raw / "meta_Books.json").write_text("{}")
    with pytest.raises(SourceError, match="must hold one meta_CATEGORY"):
        load_amazon_reviews(raw, tmp_path / "views")


def test_a_training_set_is_built_and_the_split_is_eight_to_one_to_one(tmp_path: Path) -> None:
    summary = load_amazon_reviews(write(tmp_path / "raw", lines(), products()), tmp_path / "views")
    # 60 days of two reviews each: 48 train, 6 validate, 6 test.
    day = DAY * 1_000_000
    assert summary.split == {
        "train_end": START * 1_000_000 + 48 * day,
        "validation_end": START * 1_000_000 + 54 * day,
        "test_end": START * 1_000_000 + 60 * day,
    }
    built = build(summary, tmp_path / "views")
    assert built.requests == {"train": 96, "validation": 12, "test": 12}
    assert built.num_quarantined == 0


def test_the_split_stays_in_order_when_one_day_holds_everything() -> None:
    import numpy as np

    split = split_by_day(np.full(10, 5 * DAY * 1_000_000))
    assert list(split.values()) == [6 * DAY * 1_000_000, 7 * DAY * 1_000_000, 8 * DAY * 1_000_000]
