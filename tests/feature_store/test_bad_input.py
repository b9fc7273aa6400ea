"""Every kind of broken file and value that we know of, through the real build.

A kind ends in an error that names the place, in a quarantine line that counts its rows, or in a note of the summary
where the data is right but something of it is not used. None ends in a traceback, and none changes a value in silence.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from feature_store.build import BuildSummary, build_training_set
from recsys.cli import app
from recsys.config import validate
from recsys.errors import ConfigError, EncodingError, QuarantineError, RecsysError, SourceError
from recsys.schema import Schema
from recsys.training_set import TrainingSet
from tests.feature_store.small_views import SPLIT, START, config, make_views, schema_mapping, write_views

ROWS = (4, 9)
"""The rows that a broken value stands in."""


def roomy(schema: dict[str, Any]) -> dict[str, Any]:
    """Histories that hold every event there is, so that nothing has to be said about them."""
    for history in schema["histories"]:
        history["max_length"] = 1000
    return schema


@dataclass
class Place:
    """A user's folder before the build: frames and schema to break, then files to break."""

    folder: Path
    frames: dict[str, pl.DataFrame] = field(default_factory=make_views)
    schema: dict[str, Any] = field(default_factory=lambda: roomy(schema_mapping()))
    suffix: str = ".parquet"
    data: dict[str, Any] = field(default_factory=dict)
    after: list[Callable[[], object]] = field(default_factory=list)

    def file(self, view: str) -> Path:
        return self.folder / "views" / f"{view}{self.suffix}"

    def put(self, view: str, column: str, value: Any, rows: tuple[int, ...] = ROWS) -> None:
        """A value in some rows of a column; a CSV's column becomes text first."""
        frame = self.frames[view]
        if self.suffix == ".csv":
            frame = frame.with_columns(pl.col(column).cast(pl.String))
        is_broken = pl.int_range(pl.len()).is_in(rows)
        self.frames[view] = frame.with_columns(
            pl.when(is_broken).then(pl.lit(value)).otherwise(pl.col(column)).alias(column)
        )

    def cast(self, view: str, column: str, dtype: Any) -> None:
        self.frames[view] = self.frames[view].with_columns(pl.col(column).cast(dtype))

    def feature(self, name: str) -> dict[str, Any]:
        return next(f for f in self.schema["features"] if f["name"] == name)

    def view(self, name: str) -> dict[str, Any]:
        return self.schema["views"][name]

    def as_csv(self) -> None:
        self.suffix = ".csv"
        for name, view in self.schema["views"].items():
            view["path"] = f"{name}.csv"

    def later(self, action: Callable[[], object]) -> None:
        """Something to do to the files once they are written."""
        self.after.append(action)

    def bytes_of(self, view: str, change: Callable[[bytes], bytes]) -> None:
        def rewrite() -> None:
            path = self.file(view)
            path.write_bytes(change(path.read_bytes()))

        self.later(rewrite)

    def parts(self, view: str, files: Mapping[str, pl.DataFrame | bytes]) -> None:
        """The view is a folder of these files."""
        self.view(view)["path"] = view

        def write() -> None:
            self.file(view).unlink()
            for name, content in files.items():
                path = self.folder / "views" / view / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    path.write_bytes(content)
                else:
                    content.write_parquet(path)

        self.later(write)

    def write(self) -> None:
        write_views(self.folder / "views", self.frames, suffix=self.suffix)
        for action in self.after:
            action()

    def build(self) -> BuildSummary:
        schema = validate(Schema, self.schema, source="schema.yaml")
        return build_training_set(schema, config(self.folder, **self.data))


@dataclass(frozen=True)
class Kind:
    """One kind of broken input and what must come of it: exactly one of the three."""

    name: str
    break_it: Callable[[Place], None]
    error: type[RecsysError] | None = None
    says: tuple[str, ...] = ()
    quarantined: Mapping[str, Mapping[str, int]] | None = None


KINDS: list[Kind] = []


def fails(error: type[RecsysError], *says: str) -> Callable[[Callable[[Place], None]], Callable[[Place], None]]:
    """The kind must end in this error, with all of these words in it."""

    def register(break_it: Callable[[Place], None]) -> Callable[[Place], None]:
        KINDS.append(Kind(break_it.__name__, break_it, error=error, says=says))
        return break_it

    return register


def sets_aside(
    view: str, reason: str, num_rows: int = 2
) -> Callable[[Callable[[Place], None]], Callable[[Place], None]]:
    """The kind must end in so many quarantined rows of a view with this reason, and none other."""

    def register(break_it: Callable[[Place], None]) -> Callable[[Place], None]:
        KINDS.append(Kind(break_it.__name__, break_it, quarantined={view: {reason: num_rows}}))
        return break_it

    return register


def notes(*says: str) -> Callable[[Callable[[Place], None]], Callable[[Place], None]]:
    """The kind must build, with these words in one note of the summary."""

    def register(break_it: Callable[[Place], None]) -> Callable[[Place], None]:
        KINDS.append(Kind(break_it.__name__, break_it, says=says))
        return break_it

    return register


# ---- files -------------------------------------------------------------------------------------------------


@fails(SourceError, "events.parquet cannot be read as Parquet: it is cut short", "Hint:", "write or copy it again")
def a_truncated_parquet(place: Place) -> None:
    place.bytes_of("events", lambda content: content[:-100])


@fails(SourceError, "items.parquet cannot be read as Parquet: it is empty", "Hint:", "write or copy it again")
def an_empty_parquet_file(place: Place) -> None:
    place.bytes_of("items", lambda _: b"")


@fails(SourceError, "items.parquet cannot be read as Parquet: it does not begin as", "Hint: name the file by what it")
def text_named_parquet(place: Place) -> None:
    place.bytes_of("items", lambda _: b"item,category,tags\n1,a,b\n")


@fails(SourceError, "events.parquet cannot be read as Parquet: it is damaged (", "Hint: write or copy it again")
def a_parquet_with_damaged_pages(place: Place) -> None:
    place.bytes_of("events", lambda content: content[:40] + b"\xff" * 900 + content[940:])


@fails(SourceError, "events/b.parquet cannot be read as Parquet: it is damaged (", "Hint: write or copy it again")
def one_damaged_part_of_many(place: Place) -> None:
    good = place.frames["events"]
    place.parts("events", {"a.parquet": good[:100], "b.parquet": good[100:], "c.parquet": good[:5]})

    def damage() -> None:
        path = place.folder / "views" / "events" / "b.parquet"
        content = path.read_bytes()
        path.write_bytes(content[:40] + b"\xff" * 600 + content[640:])

    place.later(damage)


@fails(SourceError, "impressions.parquet", "'click'", "twice")
def duplicate_columns_in_parquet(place: Place) -> None:
    def rewrite() -> None:
        table = pq.read_table(place.file("impressions"))
        pq.write_table(table.append_column("click", table["click"]), place.file("impressions"))

    place.later(rewrite)


@fails(SourceError, "impressions.csv", "'user'", "twice")
def duplicate_columns_in_csv(place: Place) -> None:
    place.as_csv()
    place.bytes_of("impressions", lambda content: content.replace(b"request,user,item", b"user,user,item", 1))


@fails(SourceError, "users.csv", "column 'user' must exist", "';'")
def a_wrong_delimiter(place: Place) -> None:
    place.as_csv()
    place.bytes_of("users", lambda content: content.replace(b",", b";"))


@fails(SourceError, "users.csv", "row 14", "2 fields", "got 5")
def a_csv_row_with_too_many_fields(place: Place) -> None:
    place.as_csv()
    place.bytes_of("users", lambda content: content + b"1,2,3,4,5\n")


@fails(SourceError, "events.csv", "row 302", "5 fields", "got 2")
def a_csv_cut_in_the_middle_of_its_last_line(place: Place) -> None:
    place.as_csv()
    place.bytes_of("events", lambda content: content + b"3,1")


@fails(SourceError, "users.csv: row 2 must have 3 fields", "got 2; more such rows follow", "cut short")
def a_csv_whose_header_has_a_field_more(place: Place) -> None:
    place.as_csv()
    place.bytes_of("users", lambda content: content.replace(b"user,age", b"user,age,", 1))


@notes("items.csv", "no rows")
def a_csv_of_a_header_without_a_line_end(place: Place) -> None:
    place.as_csv()
    place.bytes_of("items", lambda content: content.split(b"\n")[0])


@fails(SourceError, "items.csv", "quote")
def a_quote_that_is_never_closed(place: Place) -> None:
    place.as_csv()
    place.bytes_of("items", lambda content: content + b'119,drama,"a|b\n120,drama,\n')


@fails(SourceError, "items.csv", "column 'category'", "UTF-8", "latin-1")
def a_csv_in_latin_1(place: Place) -> None:
    place.as_csv()
    place.bytes_of("items", lambda content: content.replace(b"drama", b"com\xe9die", 1))


@fails(SourceError, "users.csv", "UTF-16")
def a_csv_in_utf_16(place: Place) -> None:
    place.as_csv()
    place.bytes_of("users", lambda content: content.decode().encode("utf-16"))


@fails(SourceError, "users.csv", "empty")
def an_empty_csv_file(place: Place) -> None:
    place.as_csv()
    place.bytes_of("users", lambda _: b"")


@fails(SourceError, "impressions.csv", "training period must hold an impression")
def a_csv_with_nothing_but_its_header(place: Place) -> None:
    place.as_csv()
    place.bytes_of("impressions", lambda content: content.split(b"\n")[0] + b"\n")


@fails(SourceError, "users.csv", "column 'user' must exist", "feature 'age'")
def a_csv_without_its_header(place: Place) -> None:
    place.as_csv()
    place.bytes_of("users", lambda content: content.split(b"\n", 1)[1])


@fails(SourceError, "users.csv.gz cannot be read as CSV: it is cut short", "Hint:", "write or copy it again")
def a_truncated_gzip(place: Place) -> None:
    place.as_csv()
    place.view("users")["path"] = "users.csv.gz"
    target = place.folder / "views" / "users.csv.gz"
    place.later(lambda: target.write_bytes(gzip.compress(place.file("users").read_bytes())[:-12]))


@fails(SourceError, "users.csv.gz cannot be read as CSV: it is damaged (", "Hint: write or copy it again")
def a_damaged_gzip(place: Place) -> None:
    place.as_csv()
    place.view("users")["path"] = "users.csv.gz"
    target = place.folder / "views" / "users.csv.gz"

    def damage() -> None:
        content = gzip.compress(place.file("users").read_bytes())
        target.write_bytes(content[:-8] + b"\xff" * 4 + content[-4:])  # another checksum

    place.later(damage)


@fails(SourceError, "views.impressions.path", "impressions.parquet does not exist", "did you mean 'impression.parquet'")
def a_missing_file(place: Place) -> None:
    place.later(lambda: place.file("impressions").rename(place.folder / "views" / "impression.parquet"))


@fails(SourceError, "views.items.path", "items holds no")
def an_empty_folder(place: Place) -> None:
    place.parts("items", {"_SUCCESS": b""})


@fails(SourceError, "views.events.path", "date=2020-09-14", "holds no")
def an_empty_partition(place: Place) -> None:
    place.parts("events", {"date=2020-09-13/a.parquet": place.frames["events"], "date=2020-09-14/_SUCCESS": b""})


@notes("events/b.parquet", "no rows")
def a_part_without_rows(place: Place) -> None:
    place.parts("events", {"a.parquet": place.frames["events"], "b.parquet": place.frames["events"][:0]})


@notes("users.parquet", "no rows")
def users_without_rows(place: Place) -> None:
    """Nobody has an age then."""
    place.frames["users"] = place.frames["users"][:0]


@fails(SourceError, "views.users.path", "users.parquet", "link to nothing")
def a_view_that_is_a_link_to_nothing(place: Place) -> None:
    place.later(lambda: place.file("users").rename(place.folder / "gone.parquet"))
    place.later(lambda: place.file("users").symlink_to(place.folder / "elsewhere.parquet"))


@fails(SourceError, "views.events.path", "b.parquet", "link")
def a_link_to_nothing(place: Place) -> None:
    place.parts("events", {"a.parquet": place.frames["events"]})
    place.later(lambda: (place.folder / "views" / "events" / "b.parquet").symlink_to(place.folder / "gone.parquet"))


@fails(SourceError, "views.items.path", "Parquet", "CSV")
def two_formats_in_one_folder(place: Place) -> None:
    place.parts("items", {"a.parquet": place.frames["items"], "b.csv": b"item,category,tags\n"})


@fails(SourceError, "b.parquet: column 'dwell' must exist", "feature 'dwell'")
def a_part_that_lacks_a_column(place: Place) -> None:
    frame = place.frames["events"]
    place.parts("events", {"a.parquet": frame, "b.parquet": frame.drop("dwell")})


@fails(SourceError, "b.parquet: column 'category' must hold text as in a.parquet, got integers")
def parts_of_different_types(place: Place) -> None:
    frame = place.frames["items"]
    place.parts("items", {"a.parquet": frame, "b.parquet": frame.with_columns(category=pl.lit(3))})


@fails(SourceError, "impressions.parquet", "training period must hold an impression", "there is no valid impression")
def a_view_without_rows(place: Place) -> None:
    place.frames["impressions"] = place.frames["impressions"][:0]


@fails(SourceError, "training_set must be a training set or not exist")
def a_result_folder_that_holds_other_files(place: Place) -> None:
    place.later((place.folder / "training_set").mkdir)
    place.later(lambda: (place.folder / "training_set" / "thesis.tex").write_text("years of work"))


# ---- columns and types -------------------------------------------------------------------------------------


@fails(SourceError, "impressions.parquet", "column 'click' must exist (task 'click' reads it)", "did you mean 'Click'")
def a_column_in_other_case(place: Place) -> None:
    place.frames["impressions"] = place.frames["impressions"].rename({"click": "Click"})


@fails(SourceError, "impressions.parquet", "column 'user'", "must hold integers or text, got float64")
def float_ids(place: Place) -> None:
    place.cast("impressions", "user", pl.Float64)


@fails(SourceError, "items.parquet", "must hold integers as", "got text")
def keys_of_two_types(place: Place) -> None:
    place.cast("items", "item", pl.String)


@fails(SourceError, "impressions.parquet", "column 'time'", "got float64")
def nan_times_in_parquet(place: Place) -> None:
    place.cast("impressions", "time", pl.Float64)
    place.put("impressions", "time", float("nan"))


@fails(SourceError, "impressions.parquet", "column 'time'", "got string")
def text_times_in_parquet(place: Place) -> None:
    place.cast("impressions", "time", pl.String)


@fails(SourceError, "items.parquet", "column 'category'", "feature 'category'", "got binary")
def bytes_for_text(place: Place) -> None:
    place.cast("items", "category", pl.Binary)


@fails(SourceError, "items.parquet", "column 'category'", "got struct")
def a_struct_column(place: Place) -> None:
    place.frames["items"] = place.frames["items"].with_columns(pl.struct("category").alias("category"))


@fails(EncodingError, "feature 'position'", "whole numbers", "fractions")
def fractions_in_a_categorical_column(place: Place) -> None:
    place.cast("impressions", "position", pl.Float64)
    place.put("impressions", "position", 1.5)


@fails(EncodingError, "feature 'position'", "9007199254740992")
def ids_that_a_float_has_merged(place: Place) -> None:
    place.cast("impressions", "position", pl.Float64)
    place.put("impressions", "position", 2.0**53 + 2)


@fails(EncodingError, "feature 'price'", "lists of 3 numbers", "got one of 2")
def vectors_of_different_lengths(place: Place) -> None:
    place.feature("price")["dim"] = 3
    n = len(place.frames["impressions"])
    vectors = [[1.0, 2.0, 3.0]] * (n - 1) + [[1.0, 2.0]]
    place.frames["impressions"] = place.frames["impressions"].with_columns(pl.Series("price", vectors))


@fails(SourceError, "'tags'", "must be a list, or its feature must give a separator, got text")
def text_bags_without_a_separator(place: Place) -> None:
    del place.feature("tags")["separator"]


@fails(SourceError, "items.parquet", "column 'tags'", "got int")
def a_number_for_a_bag(place: Place) -> None:
    place.frames["items"] = place.frames["items"].with_columns(tags=pl.lit(7))


@notes("users.parquet", "column 'age'", "feature 'age'", "empty in every row")
def a_column_of_nulls(place: Place) -> None:
    place.frames["users"] = place.frames["users"].with_columns(age=pl.lit(None, pl.Float64))


# ---- values ------------------------------------------------------------------------------------------------


@sets_aside("impressions", "user is negative")
def negative_ids(place: Place) -> None:
    place.put("impressions", "user", -7)


@sets_aside("events", "item is negative")
def negative_ids_in_csv(place: Place) -> None:
    place.as_csv()
    place.put("events", "item", "-1")


@sets_aside("events", "item is not a signed 64-bit integer")
def ids_above_63_bits_in_csv(place: Place) -> None:
    place.as_csv()
    place.put("events", "item", "9223372036854775808")


@sets_aside("events", "item is not a signed 64-bit integer")
def ids_in_scientific_notation(place: Place) -> None:
    """What a spreadsheet makes of long ids: the digits are gone."""
    place.as_csv()
    place.put("events", "item", "1.23457E+18")


@sets_aside("events", "item is not a signed 64-bit integer")
def ids_with_leading_zeros_among_integers(place: Place) -> None:
    """007 is not 7: one of them would get the other's history."""
    place.as_csv()
    place.put("events", "item", "00101")


@sets_aside("impressions", "user is not a signed 64-bit integer")
def mixed_types_in_a_key(place: Place) -> None:
    place.as_csv()
    place.put("impressions", "user", "guest")


@sets_aside("impressions", "item is null")
def missing_ids(place: Place) -> None:
    place.put("impressions", "item", None)


@sets_aside("impressions", "user is null")
def empty_ids_in_csv(place: Place) -> None:
    place.as_csv()
    place.put("impressions", "user", "  ")


@sets_aside("impressions", "user is empty")
def empty_text_ids_in_parquet(place: Place) -> None:
    for view in ("impressions", "events", "users"):
        place.cast(view, "user", pl.String)
    place.put("impressions", "user", "")


@sets_aside("events", "item is not a signed 64-bit integer")
def unsigned_ids_above_63_bits(place: Place) -> None:
    place.cast("events", "item", pl.UInt64)
    place.put("events", "item", 2**63 + 5)


@sets_aside("impressions", "time is not a time")
def nan_times_in_csv(place: Place) -> None:
    place.as_csv()
    place.put("impressions", "time", "NaN")


@sets_aside("events", "time is not a time")
def times_in_words(place: Place) -> None:
    place.as_csv()
    place.put("events", "time", "yesterday")


@fails(QuarantineError, "events.csv", "time is not a time: 300 rows", "text such as 2020-09-13T12:26:40Z")
def times_as_people_write_them(place: Place) -> None:
    place.as_csv()
    place.frames["events"] = place.frames["events"].with_columns(time=pl.lit("09/15/2020 10:00"))


@sets_aside("events", "time is not a time")
def a_day_that_no_calendar_has(place: Place) -> None:
    place.as_csv()
    place.put("events", "time", "2020-09-31T00:00:00Z")


@sets_aside("events", "time is negative")
def times_before_1970(place: Place) -> None:
    place.put("events", "time", -1)


@fails(QuarantineError, "events.parquet", "time is not before 2200: 300 rows, first row 0")
def nanoseconds_declared_as_microseconds(place: Place) -> None:
    place.frames["events"] = place.frames["events"].with_columns(pl.col("time") * 1000)


@fails(SourceError, "impressions.parquet", "must hold times in us", "views.impressions.time_unit: s")
def seconds_declared_as_microseconds(place: Place) -> None:
    place.frames["impressions"] = place.frames["impressions"].with_columns(pl.col("time") // 1_000_000)
    place.data["split"] = {**SPLIT, "train_start": START}


def _with_created(place: Place, created: pl.Expr) -> None:
    place.frames["events"] = place.frames["events"].with_columns(created=created)
    place.schema["derived"] = [
        {"name": "clicks", "kind": "count", "by": ["user"], "event_types": ["click"], "created": "created"}
    ]
    place.schema["features"].append(
        {"name": "clicks", "kind": "dense", "scope": "context", "transform": {"kind": "keep"}}
    )


@fails(
    SourceError, "events.parquet: views.events.created", "must hold times in us", "'created'", "1970", "time_unit: s"
)
def seconds_since_when_events_are_known(place: Place) -> None:
    _with_created(place, pl.col("time") // 1_000_000)


@fails(SourceError, "events.parquet: views.events.created", "1,000,000 times as long")
def moments_of_1970_since_when_events_are_known(place: Place) -> None:
    _with_created(place, pl.from_epoch(pl.col("time") // 1_000_000, "us").dt.replace_time_zone("UTC"))


@fails(SourceError, "prices.parquet: views.versions: 'prices'.time", "must hold times in us", "time_unit: s")
def seconds_since_when_versions_hold(place: Place) -> None:
    items = place.frames["items"]["item"]
    place.frames["prices"] = pl.DataFrame(
        {"item": items, "since": [START // 1_000_000] * len(items), "cost": [1.0] * len(items)}
    )
    place.schema["views"]["versions"] = [
        {"name": "prices", "of": "item", "path": "prices.parquet", "key": "item", "time": "since"}
    ]
    place.schema["derived"] = [{"name": "cost", "kind": "as_of", "view": "prices"}]
    place.schema["features"].append(
        {"name": "cost", "kind": "dense", "scope": "candidate", "transform": {"kind": "keep"}}
    )


@fails(SourceError, "derived value 'clicks'", "as they are written, got 'Click'", "did you mean 'click'")
def a_derived_value_of_a_type_written_otherwise(place: Place) -> None:
    _with_created(place, pl.col("time"))
    place.schema["derived"][0]["event_types"] = ["Click"]


@fails(SourceError, "derived value 'clicks'", "must find events of type clcik, got none", "click")
def a_derived_value_of_a_type_that_never_occurs(place: Place) -> None:
    _with_created(place, pl.col("time"))
    place.schema["derived"][0]["event_types"] = ["clcik"]


@fails(SourceError, "impressions.parquet", "column 'clicks' must not exist", "name of a derived value", "rename one")
def a_column_with_the_name_of_a_derived_value(place: Place) -> None:
    """A log of what was served, say: nothing tells which of the two is meant."""
    _with_created(place, pl.col("time"))
    place.frames["impressions"] = place.frames["impressions"].with_columns(clicks=pl.lit(3))


@fails(SourceError, "a.parquet", "column 'clicks' must not exist", "name of a derived value", "rename one")
def a_partition_with_the_name_of_a_derived_value(place: Place) -> None:
    _with_created(place, pl.col("time"))
    place.parts("impressions", {"clicks=3/a.parquet": place.frames["impressions"]})


@sets_aside("events", "time does not exist in Europe/Berlin")
def local_times_that_the_clock_skipped(place: Place) -> None:
    place.view("events")["time_zone"] = "Europe/Berlin"
    place.frames["events"] = place.frames["events"].with_columns(pl.from_epoch("time", "us"))
    place.put("events", "time", datetime(2020, 3, 29, 2, 30))  # noqa: DTZ001 - a naive time is the point


@sets_aside("events", "time is ambiguous in Europe/Berlin")
def local_times_that_the_clock_showed_twice(place: Place) -> None:
    place.as_csv()
    place.view("events")["time_zone"] = "Europe/Berlin"
    place.put("events", "time", "2020-10-25 02:30:00")


@fails(ConfigError, "views.events.time_zone", "'Europe/Berlim'", "did you mean 'Europe/Berlin'")
def an_unknown_time_zone(place: Place) -> None:
    place.view("events")["time_zone"] = "Europe/Berlim"


@sets_aside("impressions", "click is neither 0 nor 1")
def labels_other_than_0_and_1(place: Place) -> None:
    place.put("impressions", "click", 2)


@sets_aside("impressions", "click is not a number")
def labels_in_words(place: Place) -> None:
    place.as_csv()
    place.put("impressions", "click", "yes")


@sets_aside("impressions", "watched is infinite")
def infinite_labels(place: Place) -> None:
    place.cast("impressions", "watched", pl.Float64)
    place.put("impressions", "watched", float("inf"))


@sets_aside("impressions", "every label is missing")
def rows_without_a_label(place: Place) -> None:
    place.put("impressions", "click", None)
    place.put("impressions", "watched", None)


@notes("task 'click'", "column 'click'", "empty in all", "rows of train")
def a_task_without_a_label(place: Place) -> None:
    place.frames["impressions"] = place.frames["impressions"].with_columns(click=pl.lit(None, pl.Int64))


@fails(SourceError, "history 'clicked' must find events of type click, got none", "no event has a type")
def events_without_a_type(place: Place) -> None:
    place.frames["events"] = place.frames["events"].with_columns(type=pl.lit(None, pl.String))


@sets_aside("impressions", "price is infinite")
def infinite_numbers(place: Place) -> None:
    place.put("impressions", "price", float("-inf"))


@sets_aside("users", "age is infinite", 1)
def numbers_too_large_for_a_float(place: Place) -> None:
    place.as_csv()
    place.data["max_quarantined_fraction"] = 0.2
    place.put("users", "age", "1e999", (4,))


@sets_aside("events", "dwell is not a number")
def decimal_commas(place: Place) -> None:
    place.as_csv()
    place.put("events", "dwell", "1,5")


@sets_aside("users", "user repeats that of an earlier row", 1)
def a_user_given_twice(place: Place) -> None:
    users = place.frames["users"]
    place.frames["users"] = pl.concat([users, users[3:4].with_columns(age=pl.lit(99.0))])


@sets_aside("impressions", "device differs within the request", 3)
def a_request_that_contradicts_itself(place: Place) -> None:
    frame = place.frames["impressions"].with_row_index("@n")
    rows = frame.group_by("request", maintain_order=True).agg("@n").filter(pl.col("@n").list.len() == 3)["@n"][0]
    place.put("impressions", "device", "fridge", (rows[0],))


@fails(
    QuarantineError, "events.parquet", "at most 10.0% of the rows may be broken", "item is null: 50 rows, first row 0"
)
def too_many_broken_rows(place: Place) -> None:
    place.put("events", "item", None, tuple(range(50)))


@notes("history 'seen'", "longer than max_length 2", "newest 2")
def a_history_longer_than_the_limit(place: Place) -> None:
    place.schema["histories"][1]["max_length"] = 2


# ---- schema ------------------------------------------------------------------------------------------------


@fails(ConfigError, "views.events.time_unti: is not a known key", "did you mean 'time_unit'")
def a_misspelt_key(place: Place) -> None:
    place.view("events")["time_unti"] = "s"


@fails(ConfigError, "'categorial' is not known", "did you mean 'categorical'")
def a_misspelt_kind(place: Place) -> None:
    place.feature("device")["kind"] = "categorial"


@fails(ConfigError, "history 'clicked': attribute 'catgory' is not a feature, did you mean 'category'")
def a_misspelt_attribute(place: Place) -> None:
    place.schema["histories"][0]["attributes"] = ["item_id", "catgory"]


@fails(SourceError, "impressions.parquet", "column 'devise' must exist (feature 'device' reads it)", "'device'")
def a_misspelt_column(place: Place) -> None:
    place.feature("device")["column"] = "devise"


@fails(
    SourceError, "events.parquet", "history 'clicked' must find events of type clik, got none", "did you mean 'click'"
)
def a_misspelt_event_type(place: Place) -> None:
    place.schema["histories"][0]["event_types"] = ["clik"]


@notes("history 'clicked'", "no event of type 'shared'", "'share'")
def one_misspelt_event_type_of_two(place: Place) -> None:
    place.schema["histories"][0]["event_types"] = ["click", "shared"]


@fails(ConfigError, "feature 'age' is declared twice")
def a_feature_declared_twice(place: Place) -> None:
    place.schema["features"].append(place.feature("age"))


@fails(ConfigError, "histories.0.max_length", "1000000")
def a_limit_beyond_the_limit(place: Place) -> None:
    place.schema["histories"][0]["max_length"] = 2_000_000


@fails(ConfigError, "split.train_end: must have an offset")
def a_split_without_a_zone(place: Place) -> None:
    place.data["split"] = {**SPLIT, "train_end": "2020-09-19T00:00:00"}


@fails(ConfigError, "must give train_end before validation_end")
def splits_in_the_wrong_order(place: Place) -> None:
    place.data["split"] = {**SPLIT, "validation_end": START}


# ---- the tests ---------------------------------------------------------------------------------------------


def test_there_are_at_least_forty_kinds_and_each_has_one_name() -> None:
    assert len(KINDS) >= 40
    assert len({kind.name for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bad_input(tmp_path: Path, kind: Kind) -> None:
    place = Place(tmp_path)
    kind.break_it(place)
    place.write()
    if kind.error is not None:
        with pytest.raises(kind.error) as raised:
            place.build()
        message = str(raised.value)
        assert [words for words in kind.says if words not in message] == [], message
        assert not (tmp_path / "training_set" / "manifest.json").exists()
        assert not list(tmp_path.glob("training_set.tmp-*"))
        return
    summary = place.build()
    training_set = TrainingSet.open(tmp_path / "training_set", verify=True)
    if kind.quarantined is None:
        assert summary.quarantined == {}
        assert any(all(words in note for words in kind.says) for note in summary.notes), summary.notes
        assert training_set.manifest["summary"]["notes"] == list(summary.notes)
        return
    assert summary.quarantined == kind.quarantined
    assert training_set.manifest["quarantined"] == kind.quarantined
    ((view, reasons),) = kind.quarantined.items()
    kept = pl.read_parquet(tmp_path / "training_set" / "quarantine" / f"{view}.parquet")
    assert kept["@reason"].to_list() == [r for r, n in reasons.items() for _ in range(n)]
    if sum(reasons.values()) == len(ROWS) and "repeats" not in str(reasons):
        assert kept["@source_row"].to_list() == list(ROWS)


def test_untouched_views_have_nothing_to_report(tmp_path: Path) -> None:
    """So that a kind's line is its own."""
    place = Place(tmp_path)
    place.write()
    summary = place.build()
    assert summary.quarantined == {}
    assert list(summary.notes) == []


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_ids_above_2_to_the_53_stay_apart(tmp_path: Path, suffix: str) -> None:
    """Neighbours that a float64 would merge."""
    place = Place(tmp_path)
    if suffix == ".csv":
        place.as_csv()
    for view in ("impressions", "events", "items"):
        place.frames[view] = place.frames[view].with_columns(pl.col("item") + 2**53)
    keys = set(place.frames["items"]["item"])
    place.write()
    place.build()
    stored = TrainingSet.open(tmp_path / "training_set").items.keys
    assert stored is not None
    assert set(stored.to_pylist()) == {None, *keys}


def test_unicode_stays_as_it_is(tmp_path: Path) -> None:
    """Composed and decomposed, right to left, beyond the basic plane, invisible: different values stay different."""
    names = ["caf\u00e9", "cafe\u0301", "\u0634\u0627\u064a", "\U0001f4f1", "a\u200bb", "ab", "\uff41"]
    place = Place(tmp_path)
    place.as_csv()
    n = len(place.frames["impressions"])
    device = np.array(names)[place.frames["impressions"]["request"].to_numpy() % len(names)]
    place.frames["impressions"] = place.frames["impressions"].with_columns(pl.Series("device", device))
    assert len(set(device)) == len(names) <= n
    place.bytes_of("users", lambda content: b"\xef\xbb\xbf" + content)  # a byte order mark is no part of a name
    place.write()
    summary = place.build()
    assert summary.quarantined == {}
    split = TrainingSet.open(tmp_path / "training_set")
    encoded = split.encoder.encode("device", pa.array(names))
    assert len(set(np.asarray(encoded).tolist())) == len(names)


def test_windows_line_ends_quotes_and_blank_lines_are_no_fault(tmp_path: Path) -> None:
    plain, odd = Place(tmp_path / "plain"), Place(tmp_path / "odd")
    for place in (plain, odd):
        place.as_csv()
        place.frames["items"] = place.frames["items"].with_columns(category=pl.format('say "{}",\n', "category"))
    odd.bytes_of("events", lambda content: content.replace(b"\n", b"\r\n"))
    odd.bytes_of("users", lambda content: content.replace(b"\n", b"\n\n") + b"\n")
    fingerprints = set()
    for place in (plain, odd):
        place.write()
        assert place.build().quarantined == {}
        fingerprints.add(TrainingSet.open(place.folder / "training_set").encoder.fingerprint)
    assert len(fingerprints) == 1


def test_signed_hashes_are_keys_where_the_schema_says_so(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for view in ("impressions", "events", "users"):
        place.frames[view] = place.frames[view].with_columns(pl.col("user") - 7)
    place.schema["views"]["negative_keys"] = "keep"
    place.write()
    assert place.build().quarantined == {}
    keys = TrainingSet.open(tmp_path / "training_set").users.keys
    assert keys is not None
    assert set(keys.to_pylist()) == {None, *(user - 7 for user in range(12))}


@pytest.mark.parametrize(
    "name",
    [
        "a_truncated_parquet",
        "a_wrong_delimiter",
        "a_csv_cut_in_the_middle_of_its_last_line",
        "too_many_broken_rows",
        "a_misspelt_key",
        "negative_ids",
        "a_history_longer_than_the_limit",
    ],
)
def test_bad_input_at_the_command_line(tmp_path: Path, name: str) -> None:
    kind = next(k for k in KINDS if k.name == name)
    place = Place(tmp_path)
    kind.break_it(place)
    place.write()
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(place.schema), encoding="utf-8")
    data = {"views": str(tmp_path / "views"), "training_set": str(tmp_path / "set"), "split": SPLIT, **place.data}
    experiment = {"name": "bad", "schema_file": "schema.yaml", "data": data, "model": {"kind": "din"}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    done = runner.invoke(app, ["build", str(tmp_path / "bad.yaml"), "--json"])
    assert "Traceback" not in done.stderr
    assert "Unexpected" not in done.stderr
    if kind.error is not None:
        assert done.exit_code == 2
        assert [words for words in kind.says if words not in done.stderr] == [], done.stderr
        assert done.stdout == ""
    else:
        assert done.exit_code == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["quarantined"] == (kind.quarantined or {})
        assert kind.quarantined or any(all(words in note for words in kind.says) for note in answer["notes"])
