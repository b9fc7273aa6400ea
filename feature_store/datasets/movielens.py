"""MovieLens-1M: one million ratings of 3,706 films by 6,040 users.

Source: Harper, Konstan, "The MovieLens Datasets: History and Context", TiiS 2015;
https://grouplens.org/datasets/movielens/1m (research use). The raw folder holds ``ratings.dat``, ``users.dat`` and
``movies.dat``: fields between ``::``, Latin-1 text.

Impressions
    One row a rating, in order of time. The schema's task makes the label of it: 1 if the rating is at least 4.

Events
    The same ratings, so that a rating's history is what the user rated strictly before it, with the rating as a
    feature of each event.

Time
    Ratings have whole seconds, and users give many in one second; the rows of a user with the same second are in true
    order. So the j-th of them, from 0, is written j microseconds later: times then increase strictly within a user,
    "strictly before" sees the true order, and no rating moves to another second.

Items
    Genres as a list. The year of release is taken out of the title, ``Toy Story (1995)``.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from feature_store.datasets.folder import views_folder
from feature_store.datasets.raw import require_file, require_folder
from feature_store.datasets.summary import DatasetSummary, Progress
from recsys.errors import SourceError
from recsys.files import write_json

NAME = "movielens_1m"
MARKER = "dataset.json"
RATINGS_FILE, USERS_FILE, MOVIES_FILE = "ratings.dat", "users.dat", "movies.dat"

_SEPARATOR = "::"


def load_movielens_1m(raw_dir: Path, output_dir: Path, progress: Progress | None = None) -> DatasetSummary:
    """Reads the raw files and writes the views and ``dataset.json``.

    Args:
        raw_dir: folder of the raw files.
        output_dir: folder of the views; it appears complete or not at all.
        progress: called after each of the views.

    Raises:
        SourceError: a raw file is missing, a line has another number of fields or no number where one must be, or
            ``output_dir`` holds something else.
    """
    raw_dir = Path(raw_dir)
    require_folder(raw_dir)
    raw_ratings = _read_fields(
        raw_dir / RATINGS_FILE, {"user_id": True, "movie_id": True, "rating": True, "seconds": True}
    )
    raw_users = _read_fields(
        raw_dir / USERS_FILE, {"user_id": True, "gender": False, "age": True, "occupation": True, "zip_code": False}
    )
    raw_movies = _read_fields(raw_dir / MOVIES_FILE, {"movie_id": True, "title": False, "genres": False})

    # Repeats are dropped before the times are spread: after it no two rows would be equal.
    kept = raw_ratings.unique(maintain_order=True)
    order_in_second = pl.int_range(pl.len()).over("user_id", "seconds")
    ratings = kept.select(
        "user_id", "movie_id", (pl.col("seconds") * 1_000_000 + order_in_second).alias("time"), "rating"
    ).sort("time", "user_id")
    users = raw_users.with_columns(pl.col("zip_code").str.slice(0, 3).alias("zip_area"))
    movies = _movies(raw_movies)
    views = {"impressions": ratings, "events": ratings, "users": users, "items": movies}
    same_second = kept.select("user_id", "seconds").is_duplicated()
    findings = {
        "ratings in the same second as another of the same user, kept in the order of the file": int(same_second.sum()),
        "users with ratings and no row in users.dat": ratings.join(users, on="user_id", how="anti")[
            "user_id"
        ].n_unique(),
        "movies with ratings and no row in movies.dat": ratings.join(movies, on="movie_id", how="anti")[
            "movie_id"
        ].n_unique(),
        "movies without a rating": movies.join(ratings, on="movie_id", how="anti").height,
        "movies without a year in the title": movies["year"].null_count(),
    }
    summary = DatasetSummary(
        name=NAME,
        rows_read={RATINGS_FILE: raw_ratings.height, USERS_FILE: raw_users.height, MOVIES_FILE: raw_movies.height},
        rows_written={name: view.height for name, view in views.items()},
        repeats_dropped=raw_ratings.height - kept.height,
        findings={words: count for words, count in findings.items() if count},
    )
    with views_folder(output_dir, marker=MARKER) as folder:
        for done, (name, view) in enumerate(views.items(), start=1):
            view.write_parquet(folder / f"{name}.parquet")
            if progress is not None:
                progress(done, len(views))
        write_json(folder / MARKER, summary.to_dict())
    return summary


def _movies(raw: pl.DataFrame) -> pl.DataFrame:
    title = pl.col("title")
    return raw.select(
        "movie_id",
        "title",
        title.str.extract(r"\((\d{4})\)\s*$").cast(pl.Int64).alias("year"),
        pl.col("genres").replace({"": None, "(no genres listed)": None}).str.split("|").alias("genres"),
    )


def _read_fields(path: Path, columns: dict[str, bool]) -> pl.DataFrame:
    """Reads ``::`` separated lines; ``columns`` maps a field's name to whether it is a whole number."""
    require_file(path)
    text = path.read_bytes().decode("latin-1")
    lines = pl.DataFrame({"line": pl.Series(text.split("\n"), dtype=pl.String).str.strip_chars_end("\r")})
    lines = lines.with_row_index("number", offset=1).filter(pl.col("line") != "")
    fields = lines.with_columns(pl.col("line").str.split(_SEPARATOR))
    wrong = fields.filter(pl.col("line").list.len() != len(columns))
    if wrong.height:
        raise SourceError(
            f"{path}:{wrong['number'][0]} must have {len(columns)} fields between {_SEPARATOR}"
            f" ({', '.join(columns)}), got {len(wrong['line'][0])}; {wrong.height} such lines",
            hint="the files of other MovieLens releases have other columns: this loader reads MovieLens-1M",
        )
    table = fields.select("number", *(pl.col("line").list.get(i).alias(name) for i, name in enumerate(columns)))
    for name, is_number in columns.items():
        if not is_number:
            continue
        numbers = table[name].cast(pl.Int64, strict=False)
        if numbers.null_count():
            place = table["number"].filter(numbers.is_null())[0]
            raise SourceError(f"{path}:{place}: {name} must be a whole number; {numbers.null_count()} such lines")
        table = table.with_columns(numbers)
    return table.drop("number")
