"""Amazon reviews, 5-core, with metadata: who reviewed which product when.

Source: McAuley, Targett, Shi, van den Hengel, "Image-Based Recommendations on Styles and Substitutes", SIGIR 2015 (the
release of 2014); Ni, Li, McAuley, "Justifying Recommendations using Distantly-Labeled Reviews", EMNLP 2019 (of 2018).
The raw folder holds the files of one category of products, each as they are or with ``.gz``:

* reviews, JSON lines: ``reviews_Electronics_5.json`` (2014) or ``Electronics_5.json`` (2018);
* metadata: ``meta_Electronics.json``. Its lines are JSON in 2018, and in 2014 Python literals, which are parsed as such
  and never evaluated.

Events
    Every review, with its rating; exact repeats (user, product, time, rating) are dropped. Times are days: what a user
    reviewed on the same day is in no history of one another.

Impressions
    The set has none. Each review is a positive, whatever its rating, and products that its user never reviewed are
    drawn as its negatives (:mod:`feature_store.datasets.negatives`); a positive and its negatives are one request.

Items
    Products with a review: ``category``, the last and finest name of the last path of categories; ``categories``, all
    names of all paths; ``brand``; ``price``. Of a product with several lines of metadata the first counts. A product
    without metadata has its id and nothing else.

Split
    By time over all users: the days that leave about 8/10 of the reviews before them train, the days to 9/10 validate,
    the later ones test; the boundaries are in ``dataset.json``. (Zhou et al., DIN, 2018, instead test on the last
    review of each user, whenever that was.)
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from feature_store.datasets.folder import views_folder
from feature_store.datasets.negatives import NegativeSampler, NegativeSampling
from feature_store.datasets.raw import require_folder
from feature_store.datasets.stream import ViewWriter, open_text
from feature_store.datasets.summary import DatasetSummary, Progress
from recsys.errors import SourceError
from recsys.files import write_json

NAME = "amazon_reviews"
MARKER = "dataset.json"
DEFAULT_SAMPLING = NegativeSampling("uniform", per_positive=1)
"""Zhou et al., DIN, 2018: one negative a review, uniform over all products, never one that the user reviewed."""

_BLOCK = 1 << 20
_DAY_US = 86_400_000_000
_MAX_LINE = 16 << 20


def load_amazon_reviews(
    raw_dir: Path,
    output_dir: Path,
    progress: Progress | None = None,
    sampling: NegativeSampling = DEFAULT_SAMPLING,
) -> DatasetSummary:
    """Reads the raw files and writes the views and ``dataset.json``.

    Args:
        raw_dir: folder of one reviews file and its metadata.
        output_dir: folder of the views; it appears complete or not at all.
        progress: called after each of the views.
        sampling: how to draw negatives.

    Raises:
        SourceError: a raw file is missing or broken, or ``output_dir`` holds something else.
    """
    raw_dir = Path(raw_dir)
    reviews_path, metadata_path = _find(raw_dir)
    raw = _read_reviews(reviews_path)
    events = raw.unique().sort("time", "user_id", "item_id", "rating")
    item_ids = events["item_id"].unique().sort()
    metadata, num_lines, num_repeated = _read_metadata(metadata_path, set(item_ids.to_list()))
    items = pl.DataFrame({"item_id": item_ids}).join(metadata, on="item_id", how="left", maintain_order="left")
    # A product whose category is not known is in a category of its own kind: the unknown one.
    category = items["category"].fill_null("").rank("dense").cast(pl.Int64).to_numpy() - 1
    findings = {
        "products with reviews and no metadata": item_ids.len() - metadata.height,
        "products with several lines of metadata, the first counts": num_repeated,
        "reviews of a product that the user has reviewed before": int(
            events.height - events.select("user_id", "item_id").n_unique()
        ),
    }
    with views_folder(output_dir, marker=MARKER) as folder:
        items.write_parquet(folder / "items.parquet")
        events.write_parquet(folder / "events.parquet")
        if progress is not None:
            progress(2, 3)
        sampler, num_impressions = _write_impressions(
            folder / "impressions.parquet", events, item_ids, category, sampling
        )
        if progress is not None:
            progress(3, 3)
        summary = DatasetSummary(
            name=NAME,
            rows_read={reviews_path.name: raw.height, metadata_path.name: num_lines},
            rows_written={"impressions": num_impressions, "events": events.height, "items": items.height},
            repeats_dropped=raw.height - events.height,
            findings={words: count for words, count in findings.items() if count},
            split=split_by_day(events["time"].to_numpy()),
            sampling=sampler.record(),
        )
        write_json(folder / MARKER, summary.to_dict())
    return summary


def split_by_day(time: np.ndarray) -> dict[str, str | int]:
    """Boundaries at the ends of the days that hold the reviews at 8/10 and 9/10 of the log.

    Args:
        time: ``(E,)`` int64, UTC microseconds, non-decreasing, not empty.

    Example:
        >>> day = 86_400_000_000
        >>> split_by_day(np.arange(10) * day)["train_end"] == 8 * day
        True
    """
    n = len(time)
    ends = [(int(time[max(n * k // 10 - 1, 0)]) // _DAY_US + 1) * _DAY_US for k in (8, 9, 10)]
    # Where one day holds more than a tenth of the reviews, the later periods still begin after the earlier ones.
    ends[1] = max(ends[1], ends[0] + _DAY_US)
    ends[2] = max(ends[2], ends[1] + _DAY_US)
    return dict(zip(("train_end", "validation_end", "test_end"), ends, strict=True))


def _find(raw_dir: Path) -> tuple[Path, Path]:
    require_folder(raw_dir)
    held = sorted(p for p in raw_dir.iterdir() if p.name.endswith((".json", ".json.gz")) and p.is_file())
    metadata = [p for p in held if p.name.startswith("meta_")]
    reviews = [p for p in held if p.name.removesuffix(".gz").endswith("_5.json") and p not in metadata]
    for found, what in ((reviews, "reviews_CATEGORY_5.json[.gz]"), (metadata, "meta_CATEGORY.json[.gz]")):
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise SourceError(
                f"{raw_dir} must hold one {what}, got {names}",
                hint="give each category of products a folder of its own",
            )
    return reviews[0], metadata[0]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank."""
    try:
        with open_text(path) as packed, pa.BufferedInputStream(packed, 1 << 20) as file:
            rest, number = b"", 0
            while block := file.read(1 << 20):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    number += 1
                    if line.strip():
                        yield number, line
                if len(rest) > _MAX_LINE:
                    raise SourceError(f"{path}:{number + 1} must be a line of at most {_MAX_LINE >> 20} MiB")
            if rest.strip():
                yield number + 1, rest
    except OSError as err:
        raise SourceError(f"{path} cannot be read", hint="the file may be cut short: fetch it again") from err


def _read_reviews(path: Path) -> pl.DataFrame:
    users: list[str] = []
    items: list[str] = []
    ratings: list[float] = []
    times: list[int] = []
    for number, line in _lines(path):
        try:
            review = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise SourceError(f"{path}:{number} must be one JSON object a line") from err
        if not isinstance(review, dict):
            raise SourceError(f"{path}:{number} must be one JSON object a line")
        user, item, rating, seconds = (review.get(key) for key in ("reviewerID", "asin", "overall", "unixReviewTime"))
        if not (isinstance(user, str) and user and isinstance(item, str) and item):
            raise SourceError(f"{path}:{number}: reviewerID and asin must be text")
        if isinstance(seconds, bool) or not isinstance(seconds, int) or not 0 <= seconds < 7_258_118_400:
            raise SourceError(f"{path}:{number}: unixReviewTime must be whole seconds from 1970 to 2200")
        if isinstance(rating, bool) or not isinstance(rating, (int, float)) or not 0 <= rating <= 5:
            raise SourceError(f"{path}:{number}: overall must be a rating from 0 to 5")
        users.append(user)
        items.append(item)
        ratings.append(float(rating))
        times.append(seconds * 1_000_000)
    if not users:
        raise SourceError(f"{path} must have rows, got an empty file")
    return pl.DataFrame({"user_id": users, "item_id": items, "time": times, "rating": ratings})


def _read_metadata(path: Path, wanted: set[str]) -> tuple[pl.DataFrame, int, int]:
    """Metadata of some products, how many lines there are, and how many repeat a product."""
    found: dict[str, dict[str, Any]] = {}
    num_lines = num_repeated = 0
    for number, line in _lines(path):
        num_lines += 1
        product = parse_product(line, f"{path}:{number}")
        item = product.get("asin")
        if not isinstance(item, str):
            raise SourceError(f"{path}:{number}: asin must be text")
        if item not in wanted:
            continue
        if item in found:
            num_repeated += 1
            continue
        found[item] = {"item_id": item, **_attributes(product)}
    types: dict[str, pl.DataType] = {
        "item_id": pl.String(),
        "category": pl.String(),
        "categories": pl.List(pl.String()),
        "brand": pl.String(),
        "price": pl.Float64(),
    }
    return pl.DataFrame(list(found.values()), schema=types), num_lines, num_repeated


def parse_product(line: bytes, place: str) -> dict[str, Any]:
    """A line of metadata, JSON or a Python literal; a literal is parsed and nothing in it is run.

    Example:
        >>> parse_product(b"{'asin': '0001', 'price': 4.5}", "meta.json:1")
        {'asin': '0001', 'price': 4.5}

    Raises:
        SourceError: the line is neither.
    """
    try:
        product = json.loads(line)
    except (ValueError, RecursionError):
        try:
            product = ast.literal_eval(line.decode("utf-8").strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as err:
            raise SourceError(f"{place} must be a JSON object or a Python dictionary of constants") from err
    if not isinstance(product, dict):
        raise SourceError(f"{place} must be a JSON object or a Python dictionary of constants")
    return product


def _attributes(product: dict[str, Any]) -> dict[str, Any]:
    paths = product.get("categories")
    if not isinstance(paths, list):
        paths = [product.get("category")]
    names = [[n for n in path if isinstance(n, str) and n] for path in paths if isinstance(path, list)]
    names = [path for path in names if path]
    brand = product.get("brand")
    return {
        "category": names[-1][-1] if names else None,
        "categories": list(dict.fromkeys(n for path in names for n in path)) or None,
        "brand": brand if isinstance(brand, str) and brand.strip() else None,
        "price": _price(product.get("price")),
    }


def _price(value: Any) -> float | None:
    """A number, or text such as ``$1,299.00`` (2018); ranges and other text are missing."""
    if isinstance(value, str):
        try:
            value = float(value.strip().removeprefix("$").replace(",", ""))
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value < 1e9 else None


def _write_impressions(
    path: Path, events: pl.DataFrame, item_ids: pl.Series, category: np.ndarray, sampling: NegativeSampling
) -> tuple[NegativeSampler, int]:
    user_code = events["user_id"].rank("dense").cast(pl.Int64).to_numpy() - 1
    item_code = item_ids.search_sorted(events["item_id"]).cast(pl.Int64).to_numpy()
    sampler = NegativeSampler(sampling, user_code, item_code, num_items=len(item_ids), category=category)
    with ViewWriter(path) as writer:
        for block, start in enumerate(range(0, events.height, _BLOCK)):
            part = slice(start, min(start + _BLOCK, events.height))
            drawn = sampler.draw(user_code[part], item_code[part], block=block)
            shown = np.concatenate([item_code[part][:, None], drawn], axis=1)
            request, place = np.nonzero(shown >= 0)
            chosen = events[request + start]
            writer.write(
                pl.DataFrame(
                    {
                        "request": request + start,
                        "user_id": chosen["user_id"],
                        "item_id": item_ids.gather(shown[request, place]),
                        "time": chosen["time"],
                        "label": (place == 0).astype(np.int8),
                    }
                )
            )
        return sampler, writer.num_rows
