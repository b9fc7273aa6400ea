from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from feature_store.datasets.movielens import load_movielens_1m
from recsys.errors import SourceError
from recsys.schema import Schema

SCHEMA = Path(__file__).parents[3] / "configs" / "schema" / "movielens_1m.yaml"


def write_raw(folder: Path, **changes: str) -> Path:
    files = {
        # User 1 rates three films in one second, in the order 30, 10, 20; the row of film 10 comes twice.
        "ratings": "1::30::5::1000\n1::10::3::1000\n1::10::3::1000\n1::20::4::1000\n"
        "1::40::1::1001\n2::10::4::999\n2::99::2::1000\n",
        "users": "1::F::1::10::02460\n3::M::56::16::70072-1234\n",
        "movies": "10::Toy Story (1995)::Animation|Children's\n20::Mis\xe9rables, Les (1998)::Drama\n"
        "30::2001: A Space Odyssey (1968)::Sci-Fi\n40::No Year::\n50::Line\x85Break (2000)::Drama\n",
    } | changes
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.dat").write_bytes(text.encode("latin-1"))
    return folder


def test_order_within_a_second_becomes_strictly_increasing_time(tmp_path: Path) -> None:
    summary = load_movielens_1m(write_raw(tmp_path / "raw"), tmp_path / "views")
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    assert impressions.rows() == [
        (2, 10, 999_000_000, 4),
        (1, 30, 1_000_000_000, 5),
        (2, 99, 1_000_000_000, 2),
        (1, 10, 1_000_000_001, 3),
        (1, 20, 1_000_000_002, 4),
        (1, 40, 1_001_000_000, 1),
    ]
    assert impressions.columns == ["user_id", "movie_id", "time", "rating"]
    assert pl.read_parquet(tmp_path / "views" / "events.parquet").equals(impressions)
    assert summary.rows_read == {"ratings.dat": 7, "users.dat": 2, "movies.dat": 5}
    assert summary.rows_written == {"impressions": 6, "events": 6, "users": 2, "items": 5}
    assert summary.repeats_dropped == 1
    assert summary.findings == {
        "ratings in the same second as another of the same user, kept in the order of the file": 3,
        "users with ratings and no row in users.dat": 1,
        "movies with ratings and no row in movies.dat": 1,
        "movies without a rating": 1,
        "movies without a year in the title": 1,
    }


def test_films_and_users(tmp_path: Path) -> None:
    load_movielens_1m(write_raw(tmp_path / "raw"), tmp_path / "views")
    items = pl.read_parquet(tmp_path / "views" / "items.parquet")
    assert items["year"].to_list() == [1995, 1998, 1968, None, 2000]
    assert items["genres"].to_list() == [["Animation", "Children's"], ["Drama"], ["Sci-Fi"], None, ["Drama"]]
    assert items["title"][1] == "Misérables, Les (1998)"
    users = pl.read_parquet(tmp_path / "views" / "users.parquet")
    assert users["zip_code"].to_list() == ["02460", "70072-1234"]
    assert users["zip_area"].to_list() == ["024", "700"]


def test_windows_line_ends_read_the_same(tmp_path: Path) -> None:
    load_movielens_1m(write_raw(tmp_path / "a"), tmp_path / "a_views")
    raw = write_raw(tmp_path / "b")
    for path in raw.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    load_movielens_1m(raw, tmp_path / "b_views")
    for path in (tmp_path / "a_views").iterdir():
        assert path.read_bytes() == (tmp_path / "b_views" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratings": "1::2::3::4\n1,2,3,4\n"}, r"ratings\.dat:2 must have 4 fields .* got 1; 1 such lines"),
        ({"ratings": "1::2::3::4\n\n1::2::x::4\n"}, r"ratings\.dat:3: rating must be a whole number"),
        ({"users": "1::F::1::10\n"}, r"users\.dat:1 must have 5 fields"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_movielens_1m(write_raw(tmp_path / "raw", **changes), tmp_path / "views")
    assert not (tmp_path / "views").exists()


@pytest.mark.real_data
def test_the_public_files(data_root: Path, tmp_path: Path) -> None:
    summary = load_movielens_1m(data_root / "movielens_1m", tmp_path / "views")
    assert summary.rows_written == {"impressions": 1_000_209, "events": 1_000_209, "users": 6_040, "items": 3_883}
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    assert impressions["user_id"].n_unique() == 6_040
    assert impressions["movie_id"].n_unique() == 3_706
    assert impressions.group_by("user_id").len()["len"].max() == 2_314
    gaps = impressions.sort("user_id", "time").select(pl.col("time").diff().over("user_id")).to_series()
    assert gaps.min() == 1  # strictly increasing for every user
    # The order of the raw file, which is exact, is the order of the times.
    raw = [
        line.split("::")
        for line in (data_root / "movielens_1m" / "ratings.dat").read_text("latin-1").splitlines()[:200]
    ]
    first = impressions.filter(pl.col("user_id") == 1).sort("time")["movie_id"].to_list()
    assert first == [int(movie) for user, movie, _, _ in raw if user == "1"]


def test_the_schema_finds_its_columns(tmp_path: Path) -> None:
    load_movielens_1m(write_raw(tmp_path / "raw"), tmp_path / "views")
    schema = Schema.load(SCHEMA)
    views = {
        name: pl.read_parquet(tmp_path / "views" / f"{name}.parquet").columns for name in ("users", "items", "events")
    }
    for scope, view in (("user", "users"), ("item", "items"), ("event", "events")):
        assert {f.source_column for f in schema.features_of(scope)} <= set(views[view])  # type: ignore[arg-type]
