from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from feature_store.build import build_training_set
from feature_store.files import find_files
from feature_store.opening import open_source
from feature_store.sources import Use, kind_of
from recsys.errors import QuarantineError, SourceError
from recsys.training_set import TrainingSet
from tests.feature_store.small_views import (
    build,
    config,
    make_schema,
    make_views,
    same_sets,
    schema_mapping,
    write_views,
)

KEY, TIME = Use("user", "key", "views.x.user"), Use("time", "time", "views.x.time")


def csv_schema(**changes: object) -> dict[str, object]:
    views = schema_mapping()["views"]
    for name, view in views.items():
        view["path"] = f"{name}.csv"
    return {"views": views, **changes}


def test_csv_gives_the_same_set_as_parquet(tmp_path: Path) -> None:
    views = make_views()
    views["items"][0, "category"] = None
    parquet = build(tmp_path / "parquet", views)
    csv = build(tmp_path / "csv", views, make_schema(**csv_schema()), suffix=".csv")
    same_sets(parquet, csv)
    assert not (tmp_path / "csv" / "training_set" / ".staging").exists()


def test_csv_with_text_keys_blanks_and_iso_times(tmp_path: Path) -> None:
    views = make_views()
    parquet = {**views, "users": views["users"].with_columns(pl.format("u{}", "user").alias("user"))}
    for view in ("impressions", "events"):
        parquet[view] = views[view].with_columns(pl.format("u{}", "user").alias("user"))
    expected = build(tmp_path / "parquet", parquet)
    csv = dict(parquet)
    moment = pl.from_epoch("time", "us")
    csv["impressions"] = csv["impressions"].with_columns(
        moment.dt.strftime("%Y-%m-%dT%H:%M:%S%.6f").alias("time"),
        pl.format("  {} ", "user").alias("user"),
        pl.when(pl.col("click") == 1).then(pl.lit("True")).otherwise(pl.lit("false")).alias("click"),
    )
    csv["events"] = csv["events"].with_columns(
        (moment + pl.duration(hours=8)).dt.strftime("%Y-%m-%d %H:%M:%S%.6f+08:00").alias("time")
    )
    same_sets(expected, build(tmp_path / "csv", csv, make_schema(**csv_schema()), suffix=".csv"))


@pytest.mark.parametrize("form", ["s", "ms", "us", "ns", "naive ms", "naive us", "naive ns", "zoned"])
def test_times_in_every_form(tmp_path: Path, form: str) -> None:
    """Times on whole seconds, so that every unit holds them exactly."""
    views = make_views()
    for view in ("impressions", "events"):
        views[view] = views[view].with_columns(pl.col("time") // 1_000_000 * 1_000_000)
    expected = build(tmp_path / "us", views)
    mapping = schema_mapping()["views"]
    for view in ("impressions", "events"):
        time = pl.col("time")
        if form in ("s", "ms", "us", "ns"):
            mapping[view]["time_unit"] = form
            changed = time * 1000 if form == "ns" else time // {"s": 1_000_000, "ms": 1000, "us": 1}[form]
        else:
            changed = pl.from_epoch(time, "us")
            if form == "zoned":
                changed = changed.dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Shanghai")
            else:
                changed = changed.dt.cast_time_unit(form.split()[1])  # type: ignore[arg-type]
        views[view] = views[view].with_columns(changed.alias("time"))
    got = build(tmp_path / "other", views, make_schema(views=mapping))
    same_sets(expected, got)


def test_folders_and_patterns_of_parts_are_one_view(tmp_path: Path) -> None:
    views = make_views()
    expected = build(tmp_path / "one", views)
    for path in ("impressions", "impressions/part-*.parquet"):
        folder = tmp_path / path.replace("/", "-").replace("*", "x")
        write_views(folder / "views", {n: f for n, f in views.items() if n != "impressions"})
        parts = folder / "views" / "impressions"
        parts.mkdir()
        frame = views["impressions"]
        frame[:10].with_columns(pl.col("user").cast(pl.Int16)).write_parquet(parts / "part-00000.parquet")
        frame[10:11].select(reversed(frame.columns)).write_parquet(parts / "part-00001.parquet")
        frame[11:].with_columns(pl.col("price").cast(pl.Float32)).write_parquet(parts / "part-00002.parquet")
        (parts / "_SUCCESS").touch()
        (parts / ".part-00003.parquet").write_bytes(b"half-written")
        mapping = schema_mapping()["views"]
        mapping["impressions"]["path"] = path
        build_training_set(make_schema(views=mapping), config(folder))
        same_sets(expected, TrainingSet.open(folder / "training_set", verify=True))


def test_a_missing_column_names_file_column_reader_and_the_nearest(tmp_path: Path) -> None:
    views = make_views()
    views["impressions"] = views["impressions"].rename({"click": "clicks", "device": "divice"})
    with pytest.raises(SourceError) as error:
        build(tmp_path, views)
    message = str(error.value)
    assert str(tmp_path / "views" / "impressions.parquet") in message
    assert "column 'click' must exist (task 'click' reads it)" in message
    assert "column 'device' must exist (feature 'device' reads it)" in message
    assert "did you mean 'clicks'?" in message
    assert "did you mean 'divice'?" in message


@pytest.mark.parametrize(
    ("view", "column", "values", "expected"),
    [
        ("impressions", "time", pl.lit(1.5), "must hold integers or timestamps, got float64"),
        ("impressions", "time", pl.lit("2020-01-01"), "must hold integers or timestamps, got string"),
        (
            "events",
            "time",
            pl.lit(datetime(2020, 1, 1, tzinfo=UTC).date()),
            "must hold integers or timestamps, got date",
        ),
        ("impressions", "user", pl.lit(1.0), "must hold integers or text, got float64"),
        ("impressions", "click", pl.lit("yes"), "must hold integers or floating-point numbers or booleans, got string"),
        ("impressions", "price", pl.lit("7"), "must hold integers or floating-point numbers or booleans, got string"),
        ("items", "tags", pl.lit(7), "must hold lists of values, got int32"),
        ("items", "category", pl.lit(b"x"), "must hold integers or text"),
    ],
)
def test_a_wrong_type_names_file_column_and_type(
    tmp_path: Path, view: str, column: str, values: pl.Expr, expected: str
) -> None:
    views = make_views()
    views[view] = views[view].with_columns(values.alias(column))
    with pytest.raises(SourceError) as error:
        build(tmp_path, views)
    message = str(error.value)
    assert f"{view}.parquet" in message
    assert f"column {column!r}" in message
    assert expected in message


def test_keys_of_two_types_name_both_files(tmp_path: Path) -> None:
    views = make_views()
    views["items"] = views["items"].with_columns(pl.col("item").cast(pl.String))
    with pytest.raises(SourceError, match=r"items\.parquet.* must hold integers as .*impressions\.parquet.*, got text"):
        build(tmp_path, views)


def test_parts_of_two_types_name_the_part(tmp_path: Path) -> None:
    views = make_views()
    folder = write_views(tmp_path / "views", views)
    (folder / "items.parquet").unlink()
    (folder / "items").mkdir()
    views["items"].write_parquet(folder / "items" / "a.parquet")
    views["items"].with_columns(category=pl.lit(3)).write_parquet(folder / "items" / "b.parquet")
    mapping = schema_mapping()["views"]
    mapping["items"]["path"] = "items"
    with pytest.raises(
        SourceError, match=r"b\.parquet: column 'category' must hold text as in a\.parquet, got integers"
    ):
        build_training_set(make_schema(views=mapping), config(tmp_path))


def test_text_in_a_bag_without_a_separator(tmp_path: Path) -> None:
    features = [{**f} for f in schema_mapping()["features"]]
    for feature in features:
        feature.pop("separator", None)
    with pytest.raises(SourceError, match=r"'tags'.* must be a list, or its feature must give a separator, got text"):
        build(tmp_path, make_views(), make_schema(features=features))


def test_a_missing_file_lists_the_nearest(tmp_path: Path) -> None:
    folder = write_views(tmp_path / "views", make_views())
    (folder / "impressions.parquet").rename(folder / "impression.parquet")
    with pytest.raises(SourceError, match=r"views\.impressions\.path.*does not exist") as error:
        build_training_set(make_schema(), config(tmp_path))
    assert "did you mean 'impression.parquet'" in str(error.value)


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    folder = write_views(tmp_path / "views", make_views())
    path = folder / "events.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"events\.parquet cannot be read as Parquet"):
        build_training_set(make_schema(), config(tmp_path))


def test_a_csv_line_with_too_many_fields(tmp_path: Path) -> None:
    folder = write_views(tmp_path / "views", make_views(), suffix=".csv")
    with (folder / "users.csv").open("a") as file:
        file.write("1,2,3,4,5\n")
    with pytest.raises(SourceError, match=r"users\.csv: row 14 must have 2 fields, .*, got 5"):
        build_training_set(make_schema(**csv_schema()), config(tmp_path))


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.csv").touch()
    (tmp_path / "x" / "b.parquet").touch()
    with pytest.raises(SourceError, match="Parquet or CSV, got both"):
        find_files("users", tmp_path, "x")
    (tmp_path / "a.txt").touch()
    with pytest.raises(SourceError, match="must end in"):
        find_files("users", tmp_path, "a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no Parquet, CSV, Arrow, JSON lines or libfm file"):
        find_files("users", tmp_path, "empty")


def test_times_outside_the_years_are_not_wrapped_around(tmp_path: Path) -> None:
    """A value whose product with the unit overflows int64 must be seen as broken, not as some other time."""
    wraps = 2**64 // 1_000_000 + 1_600_000_000  # times 10^6, modulo 2^64, is a time in 2020
    frame = pl.DataFrame({"user": [1, 2, 3, 4], "time": [wraps, -5, 1_600_000_000, 7_258_118_400]})
    frame.write_parquet(tmp_path / "x.parquet")
    use = Use("time", "time", "views.x.time", "s")
    source = open_source("x", tmp_path, "x.parquet", [KEY, use], staging=tmp_path)
    broken = {reason: source.read({"x": e})["x"].to_list() for reason, e in source.problems(use)}
    assert broken["time is not before 2200"] == [True, False, False, True]
    assert broken["time is negative"] == [False, True, False, False]
    assert source.column(use)[2] == 1_600_000_000_000_000


def test_timestamps_before_1970_and_after_2200(tmp_path: Path) -> None:
    times = pl.Series(["1969-12-31T23:59:59", "2199-12-31T23:59:59", "2200-01-01T00:00:00"]).str.to_datetime()
    pl.DataFrame({"user": [1, 2, 3], "time": times}).write_parquet(tmp_path / "x.parquet")
    source = open_source("x", tmp_path, "x.parquet", [KEY, TIME], staging=tmp_path)
    broken = {reason: source.read({"x": e})["x"].to_list() for reason, e in source.problems(TIME)}
    assert broken["time is negative"] == [True, False, False]
    assert broken["time is not before 2200"] == [False, False, True]


def test_nanoseconds_round_down(tmp_path: Path) -> None:
    """Rounding up could move an event past the request that it came before, or a request past the event it led to."""
    use = Use("time", "time", "views.x.time", "ns")
    pl.DataFrame({"user": [1, 1], "time": [1999, 2000]}).write_parquet(tmp_path / "x.parquet")
    source = open_source("x", tmp_path, "x.parquet", [KEY, use], staging=tmp_path)
    assert source.column(use).to_list() == [1, 2]


def test_csv_times_with_offsets(tmp_path: Path) -> None:
    expected = datetime(2022, 4, 30, 16, 0, 0, 250_000, tzinfo=UTC)
    offset = expected.astimezone(timezone(timedelta(hours=8)))
    text = [
        "2022-04-30T16:00:00.25",
        "2022-04-30 16:00:00.250",
        offset.isoformat(),
        "2022-04-30T16:00:00.25Z",
        "1651334400250000",
    ]
    (tmp_path / "x.csv").write_text("user,time\n" + "".join(f"1,{t}\n" for t in text))
    source = open_source("x", tmp_path, "x.csv", [KEY, TIME], staging=tmp_path / "s")
    assert source.column(TIME).to_list() == [int(expected.timestamp() * 1e6)] * len(text)


def test_csv_keys_are_integers_when_nearly_all_are(tmp_path: Path) -> None:
    """A few broken keys must not turn a column of integers into text."""
    views = make_views()
    views["impressions"] = views["impressions"].with_columns(pl.col("user").cast(pl.String))
    views["impressions"][3, "user"] = "oops"
    training_set = build(tmp_path, views, make_schema(**csv_schema()), suffix=".csv")
    assert training_set.manifest["quarantined"]["impressions"] == {"user is not a signed 64-bit integer": 1}
    assert training_set.users.keys.type == "int64"  # type: ignore[union-attr]
    with pytest.raises(QuarantineError):
        build(tmp_path, views, make_schema(**csv_schema()), suffix=".csv", max_quarantined_fraction=0.001)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (pl.UInt8(), "integer"),
        (pl.Decimal(10, 2), "number"),
        (pl.Categorical(), "text"),
        (pl.Datetime("ns", "UTC"), "timestamp"),
        (pl.List(pl.String), "list"),
        (pl.Array(pl.Float32, 3), "list"),
        (pl.List(pl.Struct({"a": pl.Int8})), "other"),
        (pl.Duration("us"), "other"),
        (pl.Null(), "null"),
    ],
)
def test_kinds_of_types(dtype: pl.DataType, expected: str) -> None:
    assert kind_of(dtype) == expected


def test_unsigned_keys_past_63_bits_are_broken_rows_not_others_keys(tmp_path: Path) -> None:
    keys = pl.Series("user", np.array([2**63 + 5, 5], dtype=np.uint64))
    pl.DataFrame({"user": keys, "time": [1, 2]}).write_parquet(tmp_path / "x.parquet")
    source = open_source("x", tmp_path, "x.parquet", [KEY, TIME], staging=tmp_path)
    broken = dict(source.problems(KEY))["user is not a signed 64-bit integer"]
    assert source.read({"x": broken})["x"].to_list() == [True, False]


def test_some_rows_of_many_files_are_those_of_all(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    for number, size in enumerate([4, 0, 1, 5]):
        begin = 10 * number
        pl.DataFrame({"time": range(begin, begin + size)}, schema={"time": pl.Int64}).write_parquet(
            folder / f"{number}.parquet"
        )
    source = open_source("x", tmp_path, "x", [TIME], staging=tmp_path)
    everything = source.column(TIME).to_list()
    assert (source.num_rows, len(everything)) == (10, 10)
    for rows in ([], [0], [9], [3, 4, 5], [8, 4, 4, 6], list(range(10)), [0, 9]):
        found = source.read_in(np.array(rows, dtype=np.int64), source.typed(TIME) + 1)
        assert found.to_list() == [everything[row] + 1 for row in rows]
