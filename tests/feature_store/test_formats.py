"""One training set, whatever format, folder or address its views come from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pyarrow as pa
import pytest

from feature_store.build import build_training_set
from feature_store.files import is_address, partition_values
from feature_store.formats import DataFile, format_of, open_file
from feature_store.opening import open_source
from feature_store.profile import profile_view
from feature_store.sources import Use
from recsys.config import validate
from recsys.errors import ConfigError, SourceError
from recsys.schema import CsvFormat, Schema
from recsys.training_set import TrainingSet
from tests.feature_store.small_views import build, config, make_views, same_sets, schema_mapping, write_views

Frames = dict[str, pl.DataFrame]
Mapping = dict[str, Any]
KEY, TIME = Use("user", "key", "views.x.user"), Use("time", "time", "views.x.time")


def make_schema(views: Mapping) -> Schema:
    return validate(Schema, schema_mapping(views=views), source="test")


def as_arrow_files(folder: Path, frames: Frames, views: Mapping) -> None:
    for name, frame in frames.items():
        frame.write_ipc(folder / f"{name}.arrow")
        views[name]["path"] = f"{name}.arrow"


def as_arrow_streams(folder: Path, frames: Frames, views: Mapping) -> None:
    for name, frame in frames.items():
        table = frame.to_arrow()
        with pa.OSFile(str(folder / f"{name}.ipc"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        views[name]["path"] = f"{name}.ipc"


def as_json_lines(folder: Path, frames: Frames, views: Mapping) -> None:
    for name, frame in frames.items():
        frame.write_ndjson(folder / f"{name}.jsonl")
        views[name]["path"] = f"{name}.jsonl"


def as_zipped_json_with_iso_times(folder: Path, frames: Frames, views: Mapping) -> None:
    for name, frame in frames.items():
        rows = frame.to_dicts()
        for row in rows:
            if "time" in row:
                row["time"] = datetime.fromtimestamp(row["time"] / 1e6, UTC).isoformat(timespec="microseconds")
        lines = "".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        views[name]["path"] = f"{name}.jsonl.gz"


def as_double_colons(folder: Path, frames: Frames, views: Mapping) -> None:
    for name, frame in frames.items():
        lines = ["::".join("" if v is None else str(v) for v in row) for row in frame.rows()]
        (folder / f"{name}.dat").write_text("\r\n".join(lines) + "\r\n\r\n")
        views[name] |= {
            "path": f"{name}.dat",
            "format": {"kind": "csv", "separator": "::", "columns": frame.columns, "encoding": "latin-1"},
        }


def as_double_colons_with_header(folder: Path, frames: Frames, views: Mapping) -> None:
    for name, frame in frames.items():
        lines = ["::".join(frame.columns)] + ["::".join("" if v is None else str(v) for v in r) for r in frame.rows()]
        (folder / f"{name}.dat").write_text("\n".join(lines))
        views[name] |= {"path": f"{name}.dat", "format": {"kind": "csv", "separator": "::"}}


def as_csv_without_header(folder: Path, frames: Frames, views: Mapping) -> None:
    for name, frame in frames.items():
        frame.write_csv(folder / f"{name}.txt", include_header=False, separator=";")
        views[name] |= {
            "path": f"{name}.txt",
            "format": {"kind": "csv", "separator": ";", "columns": frame.columns},
        }


def as_zipped_tsv(folder: Path, frames: Frames, views: Mapping) -> None:
    for name, frame in frames.items():
        (folder / f"{name}.tsv.gz").write_bytes(gzip.compress(frame.write_csv(separator="\t").encode()))
        views[name]["path"] = f"{name}.tsv.gz"


def as_hive_partitions(folder: Path, frames: Frames, views: Mapping) -> None:
    """Two levels: a key and a column of text, both out of the files and into the path; a request stays in one file."""
    write_views(folder, {name: frame for name, frame in frames.items() if name != "impressions"})
    for (user, device), part in frames["impressions"].group_by(["user", "device"]):
        place = folder / "impressions" / f"user={user}" / f"device={device}"
        place.mkdir(parents=True)
        part.drop("user", "device").write_parquet(place / "part-0.parquet")
    views["impressions"]["path"] = "impressions"


def as_hive_partitions_of_csv(folder: Path, frames: Frames, views: Mapping) -> None:
    write_views(folder, {name: frame for name, frame in frames.items() if name != "impressions"})
    for (user,), part in frames["impressions"].group_by(["user"]):
        place = folder / "impressions" / f"user={user}"
        place.mkdir(parents=True)
        part.drop("user").write_csv(place / "part-0.csv")
    views["impressions"]["path"] = "impressions"


@pytest.mark.parametrize(
    "write",
    [
        as_arrow_files,
        as_arrow_streams,
        as_json_lines,
        as_zipped_json_with_iso_times,
        as_double_colons,
        as_double_colons_with_header,
        as_csv_without_header,
        as_zipped_tsv,
        as_hive_partitions,
        as_hive_partitions_of_csv,
    ],
    ids=lambda write: write.__name__,
)
def test_every_format_gives_the_same_set(tmp_path: Path, write: Callable[[Path, Frames, Mapping], None]) -> None:
    frames = make_views()
    frames["items"][0, "category"] = None
    expected = build(tmp_path / "parquet", frames)
    (tmp_path / "other" / "views").mkdir(parents=True)
    views = schema_mapping()["views"]
    write(tmp_path / "other" / "views", frames, views)
    build_training_set(make_schema(views), config(tmp_path / "other"))
    other = TrainingSet.open(tmp_path / "other" / "training_set", verify=True)
    same_sets(expected, other, but=("@source_row",) if "hive" in write.__name__ else ())
    assert other.manifest["quarantined"] == {}
    assert not (tmp_path / "other" / "training_set" / ".staging").exists()


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder in memory, by its address."""
    yield "memory://recsys-views"
    fsspec.filesystem("memory").store.clear()


def test_views_at_an_address(tmp_path: Path, memory: str) -> None:
    frames = make_views()
    expected = build(tmp_path / "here", frames)
    for name, frame in frames.items():
        if name == "events":
            continue
        with fsspec.open(f"{memory}/{name}.parquet", "wb") as file:
            frame.write_parquet(file)
    for number, part in enumerate((frames["events"][:100], frames["events"][100:])):
        with fsspec.open(f"{memory}/events/part-{number}.csv", "wb") as file:
            file.write(part.write_csv().encode())
    with fsspec.open(f"{memory}/events/_SUCCESS", "wb") as file:
        file.write(b"")
    views = schema_mapping()["views"]
    views["events"]["path"] = "events"
    data = config(tmp_path, views=memory)
    assert not build_training_set(make_schema(views), data).skipped
    there = TrainingSet.open(tmp_path / "training_set", verify=True)
    same_sets(expected, there)
    assert {entry["file"] for entry in there.manifest["inputs"]["files"]} >= {
        "memory:///recsys-views/events/part-0.csv",
        "memory:///recsys-views/users.parquet",
    }
    assert build_training_set(make_schema(views), data).skipped
    with fsspec.open(f"{memory}/users.parquet", "wb") as file:
        frames["users"][:5].write_parquet(file)
    assert not build_training_set(make_schema(views), data).skipped
    views["events"]["path"] = "events/part-*.csv"
    build_training_set(make_schema(views), data, force=True)
    assert (
        TrainingSet.open(tmp_path / "training_set").manifest["summary"]["events"]
        == expected.manifest["summary"]["events"]
    )


def test_what_is_wrong_at_an_address_is_named_by_it(tmp_path: Path, memory: str) -> None:
    views = schema_mapping()["views"]
    with pytest.raises(SourceError, match=r"views\.impressions\.path: memory://recsys-views/impressions\.parquet must"):
        build_training_set(make_schema(views), config(tmp_path, views=memory))
    for name, frame in make_views().items():
        with fsspec.open(f"{memory}/{name}.parquet", "wb") as file:
            frame.write_parquet(file)
    with fsspec.open(f"{memory}/items.parquet", "wb") as file:
        file.write(b"PAR1")
    with pytest.raises(SourceError, match=r"^memory:///recsys-views/items\.parquet cannot be read as Parquet"):
        build_training_set(make_schema(views), config(tmp_path, views=memory))
    with pytest.raises(SourceError, match=r"nosuch://x/impressions\.parquet must be an address that fsspec knows"):
        build_training_set(make_schema(views), config(tmp_path, views="nosuch://x"))


def test_addresses_and_paths() -> None:
    assert is_address("s3://bucket/x")
    assert is_address("simplecache::https://host/x")
    assert not is_address("data/x")
    assert not is_address(r"C:\data")
    assert not is_address(Path("s3://bucket"))


def test_partition_columns_are_text_unless_all_are_integers(tmp_path: Path) -> None:
    for day, city in (("3", "Z%C3%BCrich"), ("12", "__HIVE_DEFAULT_PARTITION__"), ("-1", "7")):
        place = tmp_path / "x" / f"day={day}" / f"city={city}"
        place.mkdir(parents=True)
        pl.DataFrame({"user": [1], "time": [int(day) + 5]}).write_parquet(place / "a.parquet")
    uses = [KEY, TIME, Use("day", "value", "feature 'day'"), Use("city", "value", "feature 'city'")]
    source = open_source("x", tmp_path, "x", uses, staging=tmp_path / "s")
    assert source.column(uses[2]).to_list() == [-1, 12, 3]
    assert source.column(uses[3]).to_list() == ["7", None, "Zürich"]
    assert partition_values(DataFile(tmp_path / "plain.parquet", "")) == {}


def test_a_partition_column_is_in_every_path_and_in_no_file(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [1], "time": [5]})
    (tmp_path / "x" / "day=1").mkdir(parents=True)
    frame.write_parquet(tmp_path / "x" / "day=1" / "a.parquet")
    frame.write_parquet(tmp_path / "x" / "b.parquet")
    uses = [KEY, TIME, Use("day", "value", "feature 'day'")]
    with pytest.raises(SourceError, match=r"b\.parquet: column 'day' must be in the path as in that of .*a\.parquet"):
        open_source("x", tmp_path, "x", uses, staging=tmp_path / "s")
    (tmp_path / "x" / "b.parquet").unlink()
    frame.with_columns(day=1).write_parquet(tmp_path / "x" / "day=1" / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: column 'day' must be in the file or in its path, got both"):
        open_source("x", tmp_path, "x", uses, staging=tmp_path / "s")


def test_libfm(tmp_path: Path) -> None:
    """In libfm, entry j of every line is one field; the order of lines may stand for time."""
    (tmp_path / "x.libfm").write_text("1 5:1 9223372036854775807:1\n-1  7:1 12:0.5 \n\n0 5:1 12:1\n")
    uses = [
        Use("x1", "key", "user"),
        Use("row", "time", "time", "s"),
        Use("x2", "value", "item"),
        Use("v2", "number", "value"),
        Use("label", "label", "label"),
    ]
    source = open_source("x", tmp_path, "x.libfm", uses, staging=tmp_path / "s")
    read = {use.column: source.column(use).to_list() for use in uses}
    assert read["row"] == [0, 1_000_000, 2_000_000]
    assert read["x2"] == ["9223372036854775807", "12", "12"]
    assert read["v2"] == [1.0, 0.5, 1.0]
    assert read["label"] == [1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.libfm", "1 5:1 6:1\n0 5:1\n", "line 2 must have 3 entries .*, got 2"),
        ("a.libfm", "1 5:1\n\n0 5=1\n", "line 3 must hold a label and entries index:value"),
        ("a.libfm", "\n\n", "must hold at least one line, got none"),
        (
            "a.jsonl",
            '{"user": 1, "time": 2}\n{"user": "x", "time": 2}\n',
            "column 'user' must hold one type in all lines",
        ),
        ("a.jsonl", '{"user": 1, "user": 1, "time": 2}\n', "column 'user' must exist once in a line"),
        ("a.jsonl", '{"user": 1, "time": 2}\n{"user": \n', "must hold one JSON object a line"),
        ("a.jsonl", "", "must hold at least one line, but is empty"),
        ("a.jsonl", '{"user": {"id": 1}, "time": 2}\n', "column 'user' .* must hold integers or text, got struct"),
        ("a.jsonl", '{"user": 1e400, "time": 2}\n', "row 1 must hold one JSON object a line.* too big"),
        ("a.jsonl", '{"user": 18446744073709551616, "time": 2}\n', "'user' .* must hold integers or text, got float64"),
        ("a.jsonl", '{"user": 1, "time": 2}\n{"user": \n', "if it is the last row, the file is cut short"),
        ("a.arrow", "ARROW1 and no more", "cannot be read as Arrow: it is cut short: its end is missing"),
        ("a.arrow", "no Arrow at all", "cannot be read as Arrow: it does not begin as such a file does"),
        ("a.arrow", "", "cannot be read as Arrow: it is empty"),
    ],
)
def test_broken_files_of_other_formats(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    uses = [KEY, TIME] if name != "a.libfm" else [Use("x1", "key", "user")]
    with pytest.raises(SourceError, match=message) as error:
        open_source("x", tmp_path, name, uses, staging=tmp_path / "s")
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Arrow, which would quote the row
def test_a_row_of_other_bytes_is_named_and_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"user,time\n1,2\n" + b"\xc6\xff\x9e" * 9 + b"\n3,4\n")
    with pytest.raises(SourceError, match="row 3 must have 2 fields of text, got 1 and other bytes") as error:
        open_source("x", tmp_path, "a.csv", [KEY, TIME], staging=tmp_path / "s")
    assert "the file may be damaged: write or copy it again" in str(error.value)
    assert "\ufffd" not in str(error.value)


def test_a_damaged_file_is_named_when_it_is_profiled(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in ("a", "b"):
        pl.DataFrame({"user": [f"user {i}" for i in range(500)]}).write_parquet(tmp_path / "parts" / f"{name}.parquet")
    content = (tmp_path / "parts" / "b.parquet").read_bytes()
    (tmp_path / "parts" / "b.parquet").write_bytes(content[:20] + b"\xff" * 300 + content[320:])
    with pytest.raises(SourceError, match=r"parts/b\.parquet cannot be read as Parquet: it is damaged \(") as error:
        profile_view(tmp_path, "parts")
    assert error.value.hint == "write or copy it again, and compare its checksum with that of the original"


def test_a_line_of_double_colons_with_another_number_of_fields(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text("1::2\n\n3\n4::5::6\n")
    spec = CsvFormat(separator="::", columns=("user", "time"))
    with pytest.raises(
        SourceError, match=r"a\.dat: line 3 must have 2 fields between ::, got 1; more such lines follow"
    ):
        open_source("x", tmp_path, "a.dat", [KEY, TIME], staging=tmp_path / "s", declared=spec)


def test_declared_columns_must_be_as_many_as_the_fields(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text("1,2,3\n4,5,6\n")
    spec = CsvFormat(columns=("user", "time"))
    with pytest.raises(SourceError, match=r"a\.dat: row 1 must have 2 fields, as format\.columns has, got 3"):
        open_source("x", tmp_path, "a.dat", [KEY, TIME], staging=tmp_path / "s", declared=spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "csv", "columns": ["a", "a"]}, "columns must have different names"),
        ({"kind": "csv", "separator": "\n"}, "separator must hold no quote and no line end"),
        ({"kind": "parquett"}, "did you mean 'parquet'"),
    ],
)
def test_formats_that_make_no_sense(spec: Mapping, message: str) -> None:
    views = schema_mapping()["views"]
    views["items"]["format"] = spec
    with pytest.raises(ConfigError, match=message) as error:
        make_schema(views)
    assert "views.items.format" in str(error.value)


def test_only_the_columns_in_use_are_staged(tmp_path: Path) -> None:
    file = DataFile(tmp_path / "a.csv", "a.csv")
    file.path.write_text("a,b,c\n1,2,3\n")
    spec = format_of("a.csv")
    assert spec is not None
    opened = open_file(file, spec, tmp_path / "staged.parquet", {"b"})
    assert opened.names == ("a", "b", "c")
    assert opened.scan.collect().to_dicts() == [{"b": "2"}]


def test_a_csv_of_several_blocks_counts_its_rows_over_all(tmp_path: Path) -> None:
    """Blocks are read side by side; the number of a broken row must still be that of the file."""
    rows = 700_000
    text = "user,time\n" + "1234567890,1600000000000000\n" * rows
    (tmp_path / "a.csv").write_text(text + "7\n" + text.split("\n", 1)[1])
    with pytest.raises(SourceError, match=rf"a\.csv: row {rows + 2} must have 2 fields"):
        open_source("x", tmp_path, "a.csv", [KEY, TIME], staging=tmp_path / "s")


def test_local_times_are_converted_in_their_zone(tmp_path: Path) -> None:
    expected = datetime(2022, 4, 30, 16, 0, tzinfo=UTC)
    use = Use("time", "time", "views.x.time", time_zone="Asia/Shanghai")
    frame = pl.DataFrame({"user": [1], "time": [datetime(2022, 5, 1)]})  # noqa: DTZ001 - a naive time is the point
    frame.write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("user,time\n1,2022-05-01 00:00:00\n1,2022-04-30T16:00:00Z\n1,1651334400000000\n")
    for name in ("a.parquet", "a.csv"):
        source = open_source("x", tmp_path, name, [KEY, use], staging=tmp_path / "s")
        assert set(source.column(use).to_list()) == {int(expected.timestamp() * 1e6)}
