"""Derived values of sets that were appended to, against loops over the rows that were there, and against one build."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest
from hypothesis import given

from feature_store.append import append_to_training_set
from feature_store.build import DataConfig, build_training_set
from feature_store.carried import Carried, CarriedRows, Carrier
from feature_store.derived import carried_attributes, families
from feature_store.leaks import check_leaks
from feature_store.replay import replayed
from recsys.config import validate
from recsys.derived import Count, Mean, Recency, Sum, Windowed
from recsys.errors import IntegrityError, SourceError
from recsys.schema import Schema
from recsys.training_set import SPLITS, TrainingSet
from recsys.windows import GroupedRows, WindowedValue
from tests.feature_store.derived_views import DERIVED, NUMBERS, expected, make, mapping, schema, stored
from tests.feature_store.small_views import DAY, START, same_columns

LOGS = ("impressions", "events")
HOUR = DAY // 24
Views = dict[str, pl.DataFrame]


def settings(folder: Path, name: str = "set") -> DataConfig:
    times = {"train_end": START + 4 * DAY, "validation_end": START + 5 * DAY, "test_end": START + 20 * DAY}
    found = {"views": str(folder / "views"), "training_set": str(folder / name), "split": times}
    return validate(DataConfig, found, source="test")


def generations(views: Views, cuts: Sequence[int] = (6, 8)) -> list[Views]:
    """The logs until a day, from then to the next, and so on; a request stays whole, events go by their own time."""
    by_request = pl.col("time").min().over("request")
    edges = [START + day * DAY for day in cuts]
    found = []
    for first, last in zip([0, *edges], [*edges, 2**62], strict=True):
        shown = views["impressions"].filter((by_request >= first) & (by_request < last))
        found.append(
            {"impressions": shown, "events": views["events"].filter(pl.col("time").is_between(first, last - 1))}
        )
    return found


def arrive(folder: Path, number: int, logs: Views, rest: Views) -> None:
    """Writes the files of one generation; users, items and versions whole."""
    for log in LOGS:
        (folder / "views" / f"{log}.parquet").mkdir(parents=True, exist_ok=True)
        if logs[log].height or log == "impressions":
            logs[log].write_parquet(folder / "views" / f"{log}.parquet" / f"{number}.parquet")
    for name, frame in rest.items():
        if name not in LOGS:
            frame.write_parquet(folder / "views" / f"{name}.parquet")


def grown(folder: Path, parts: Sequence[Views], rest: Sequence[Views], shape: Schema) -> TrainingSet:
    """Built from the first generation, the others appended one by one."""
    for number, (logs, others) in enumerate(zip(parts, rest, strict=True)):
        arrive(folder, number, logs, others)
        if number == 0:
            build_training_set(shape, settings(folder))
        else:
            append_to_training_set(shape, settings(folder))
    return TrainingSet.open(folder / "set", verify=True)


def truth(parts: Sequence[Views], rest: Sequence[Views]) -> dict[int, dict[str, Any]]:
    """Of each row what loops over the rows find that were there when it came; none of rows that came too late."""
    found: dict[int, dict[str, Any]] = {}
    newest, shown, begun = 0, [], 0
    for generation, logs in enumerate(parts):
        impressions = logs["impressions"].with_row_index("row", offset=begun)
        begun += impressions.height
        impressions = impressions.filter(pl.col("time") >= newest)
        newest = max([newest, *impressions.group_by("request").min()["time"].to_list()])
        # Requests of different generations are different ones, whatever their keys.
        shown.append(impressions.with_columns(pl.col("request") + 10_000 * generation))
        known = {**rest[generation], "impressions": pl.concat(shown)}
        known["events"] = pl.concat([p["events"] for p in parts[: generation + 1]])
        rows = known["impressions"]["row"].to_list()
        first = len(rows) - impressions.height
        found |= {rows[n]: values for n, values in expected(known, first=first).items()}
    return found


def assert_true(training_set: TrainingSet, wanted: dict[int, dict[str, Any]]) -> None:
    for name in NUMBERS:
        values = {row: np.float32(0 if v[name] is None else v[name]).item() for row, v in wanted.items()}
        assert stored(training_set, f"f_{name}") == values, name
        assert len(set(values.values())) > 2, f"{name} tells nothing apart"


def encoded_mapping() -> dict[str, Any]:
    """The schema with values that are also standardised, and put into quantiles, by what the first build has seen."""
    found = mapping()
    scopes = {"item_likes": "candidate", "user_events": "context", "user_category": "candidate"}
    dense = {"kind": "dense", "transform": {"kind": "standardise", "log1p": True}}
    buckets = {"kind": "categorical", "encoder": {"kind": "quantile", "num_buckets": 4}}
    for name, scope in scopes.items():
        found["features"] += [
            {"name": f"z_{name}", "column": name, "scope": scope, **dense},
            {"name": f"q_{name}", "column": name, "scope": scope, **buckets},
        ]
    return found


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_appends_equal_one_build_with_the_same_encoder(tmp_path: Path, seed: int) -> None:
    views, shape = make(seed), validate(Schema, encoded_mapping(), source="test")
    parts = generations(views, [(6, 8), (5, 9), (7, 8), (5, 6)][seed])
    after = grown(tmp_path, parts, [views] * 3, shape)
    build_training_set(shape, settings(tmp_path, "rebuilt"))
    rebuilt = TrainingSet.open(tmp_path / "rebuilt")
    first = TrainingSet.open(tmp_path / "set.versions" / "000001")
    for name in NUMBERS:
        assert stored(after, f"f_{name}") == stored(rebuilt, f"f_{name}"), name
    wanted = truth(parts, [views] * 3)
    for name in ("item_likes", "user_events", "user_category"):
        raw = {row: value[name] for row, value in wanted.items() if value[name] is not None}
        for feature in (f"z_{name}", f"q_{name}"):
            ids = first.encoder.encode(feature, pl.Series(list(raw.values()), dtype=pl.Float64).to_arrow())
            assert isinstance(ids, np.ndarray)
            found = stored(after, feature)
            assert [found[row] for row in raw] == ids.reshape(-1).tolist(), feature
    red, blue = after.encoder.encode("shade", pl.Series(["red", "blue"]).to_arrow())
    of_shade = {"red": red, "blue": blue, None: 1}
    new = [row for row in wanted if row >= parts[0]["impressions"].height]
    shades = stored(after, "shade")
    assert {row: shades[row] for row in new} == {row: of_shade[wanted[row]["shade"]] for row in new}


@pytest.mark.parametrize("seed", [4, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (5, 6))])
def test_late_and_repeated_rows_count_from_their_append_on(tmp_path: Path, seed: int) -> None:
    views = make(seed)
    parts = generations(views)
    late = [parts[0]["events"][::5], parts[0]["events"][1::9]]
    for part, events in zip(parts[1:], late, strict=True):
        part["events"] = pl.concat([part["events"], events, events[:2]])
    for part in parts[1:]:  # one impression that comes too late
        stale = parts[0]["impressions"].head(1).with_columns(request=pl.lit(5_000, pl.Int64))
        part["impressions"] = pl.concat([part["impressions"], stale])
    after = grown(tmp_path, parts, [views] * 3, schema())
    assert after.manifest["quarantined"]["impressions"] == {"earlier than what was built before": 2}
    assert_true(after, truth(parts, [views] * 3))
    num_rows = sum(part["impressions"].height for part in parts) - 2
    report = check_leaks(settings(tmp_path), num_rows=60 if seed == 4 else 10_000)
    assert (report.differences, report.late) == ((), ())
    assert report.rows_recomputed == (60 if seed == 4 else num_rows)


def test_no_file_of_before_is_read_again(tmp_path: Path) -> None:
    views = make(0)
    parts = generations(views)
    arrive(tmp_path, 0, parts[0], views)
    build_training_set(schema(), settings(tmp_path))
    for log in LOGS:
        path = tmp_path / "views" / f"{log}.parquet" / "0.parquet"
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for number in (1, 2):
        arrive(tmp_path, number, parts[number], views)
        append_to_training_set(schema(), settings(tmp_path))
    assert_true(TrainingSet.open(tmp_path / "set", verify=True), truth(parts, [views] * 3))


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Says each time that all logs are read again."""
    said = []

    def replay(*args: Any, **kwargs: Any) -> Carried:
        said.append("again")
        return replayed(*args, **kwargs)

    monkeypatch.setattr("feature_store.append.replayed", replay)
    return said


@pytest.mark.parametrize(
    "change", ["given late", "parted", *(pytest.param(c, marks=pytest.mark.slow) for c in ("one group", "renamed"))]
)
def test_groups_follow_attributes_that_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    views, said = (
        make(
            3,
        ),
        counting(monkeypatch),
    )
    category = {
        "given late": pl.col("category").fill_null("news"),
        "one group": pl.col("category").replace("comedy", "drama"),
        "renamed": pl.col("category").replace("comedy", "farce"),
        "parted": pl.when(pl.col("item") % 2 == 0).then(pl.lit("even")).otherwise(pl.col("category")),
    }[change]
    then = {**views, "items": views["items"].with_columns(category.alias("category"))}
    rest = [views, then, then]
    parts = generations(views)
    after = grown(tmp_path, parts, rest, schema())
    assert said == (["again"] if change == "parted" else [])
    assert_true(after, truth(parts, rest))


def test_a_set_that_carries_nothing_reads_its_logs_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views, said = make(2), counting(monkeypatch)
    parts = generations(views, (5, 6, 8))
    rest = [views] * 4
    parts[1]["events"] = pl.concat([parts[1]["events"], parts[0]["events"][::4]])
    stale = parts[0]["impressions"].head(1).with_columns(request=pl.lit(5_000, pl.Int64))
    parts[1]["impressions"] = pl.concat([parts[1]["impressions"], stale])
    grown(tmp_path, parts[:2], rest[:2], schema())
    before = Carried.open(tmp_path / "set", *stored_names(schema()))
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    manifest["files"] = {n: f for n, f in manifest["files"].items() if not n.startswith("derived/")}
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "set" / "derived")
    assert before is not None
    for number in (2, 3):
        arrive(tmp_path, number, parts[number], views)
        append_to_training_set(schema(), settings(tmp_path))
    assert said == ["again"]
    assert_true(TrainingSet.open(tmp_path / "set", verify=True), truth(parts, rest))


def stored_names(shape: Schema) -> tuple[list[str], list[str]]:
    return [specs[0].name for specs in families(shape).values()], carried_attributes(shape)


def test_what_is_carried_is_the_longest_window_and_the_groups(tmp_path: Path) -> None:
    views = make(1)
    parts = generations(views)
    after = grown(tmp_path, parts, [views] * 3, schema())
    carried = Carried.open(after.folder, *stored_names(schema()))
    assert carried is not None
    newest = max(int(after.split(s).requests.array("@time").max(initial=0)) for s in SPLITS)
    assert carried.newest == newest
    windows = {"item_dwell": 3, "item_shown": 5, "user_known": 2}
    for name, days in windows.items():
        rows = carried.rows[name]
        counted = rows.counts[name] > 0
        assert counted.any()
        assert (rows.time[counted] >= newest - days * DAY).all()
    items = carried.rows["item_dwell"]  # likes are of the same groups
    likes = items.counts["item_likes"]
    past = (likes > 0) & (items.time < newest)
    assert len(np.unique(items.item_row[past])) == past.sum() < after.items.num_rows < likes.sum()
    assert likes.sum() == views["events"].height
    assert (items.user_row == 0).all()
    groups = carried.rows["user_category"]
    categories = carried.groups["category"]
    assert np.isin(groups.item_row[groups.counts["user_category"] > 1], np.unique(categories)).all()
    assert list(carried.groups) == ["category"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    views = make(1)
    parts = generations(views)
    grown(tmp_path, parts[:2], [views] * 2, schema())
    path = tmp_path / "set" / "derived" / "item_dwell.arrow"
    content = path.read_bytes()
    path.write_bytes(b"\0" * len(content))
    arrive(tmp_path, 2, parts[2], views)
    with pytest.raises(IntegrityError, match=r"derived/item_dwell\.arrow"):
        append_to_training_set(schema(), settings(tmp_path))


@pytest.mark.parametrize("order", ["integers first", pytest.param("fractions first", marks=pytest.mark.slow)])
def test_integers_and_fractions_are_read_as_a_build_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    said = counting(monkeypatch)
    views = make(5)
    # Of integers, a quotient is an integer; a build of both files takes both for fractions.
    changes = {"value": "dwell / 3", "where": "dwell > 20", "decimals": 6}
    derived = [d | changes if d["name"] == "item_dwell" else d for d in DERIVED]
    histories = [{k: v for k, v in h.items() if k != "event_features"} for h in mapping()["histories"]]
    shape = schema(derived=derived, histories=histories)
    parts = generations(views)
    whole = [p["events"].with_columns(pl.col("dwell").cast(pl.Int64)) for p in parts]
    numbers = (0,) if order == "integers first" else (1,)
    for number in numbers:
        parts[number]["events"] = whole[number]
    after = grown(tmp_path, parts, [views] * 3, shape)
    assert said == (["again"] if order == "integers first" else [])
    build_training_set(shape, settings(tmp_path, "rebuilt"))
    mine, theirs = (stored(s, "f_item_dwell") for s in (after, TrainingSet.open(tmp_path / "rebuilt")))
    assert {r: v for r, v in mine.items() if r >= parts[0]["impressions"].height} == {
        r: v for r, v in theirs.items() if r >= parts[0]["impressions"].height
    }
    arrive(tmp_path, 3, {n: f.with_columns(pl.col("time") + 10 * DAY) for n, f in parts[2].items()}, views)
    path = tmp_path / "views" / "events.parquet" / "3.parquet"
    pl.read_parquet(path).with_columns(pl.col("dwell").cast(pl.String)).write_parquet(path)
    with pytest.raises(
        SourceError, match="column 'dwell' must hold floating-point numbers as in the files that the set"
    ):
        append_to_training_set(shape, settings(tmp_path))


def test_sums_that_would_not_be_exact_are_refused(tmp_path: Path) -> None:
    views = make(5)
    changes = {"value": "dwell * 1e10 + 1", "where": "dwell >= 0", "window": None}
    shape = schema(derived=[d | changes if d["name"] == "item_dwell" else d for d in DERIVED])
    parts = generations(views)
    for part in parts:  # 2^62 millionths are 4.6e12: each file holds less by itself
        dwell = pl.when(pl.int_range(pl.len()) == 0).then(300.0).otherwise(0.0)
        part["events"] = part["events"].with_columns(dwell.alias("dwell"))
    with pytest.raises(SourceError, match=r"derived value 'item_dwell': value must add up to less than 4\.6e\+12"):
        grown(tmp_path, parts, [views] * 3, shape)
    assert len(TrainingSet.open(tmp_path / "set").manifest.get("appends", [])) == 0


def test_new_rows_may_be_impressions_alone(tmp_path: Path) -> None:
    views = make(6)
    parts = generations(views)
    parts[1]["events"] = parts[1]["events"].clear()
    after = grown(tmp_path, parts, [views] * 3, schema())
    assert_true(after, truth(parts, [views] * 3))


@pytest.mark.slow
def test_versions_alone_carry_nothing(tmp_path: Path) -> None:
    views = make(7)
    derived = [d for d in DERIVED if d["kind"] == "as_of"]
    names = {d["name"] for d in derived}
    features = [f for f in mapping()["features"] if f.get("column", f["name"]) in names or "f_" not in f["name"]]
    shape = schema(derived=derived, features=[f for f in features if f["name"] != "activity"])
    parts = generations(views)
    after = grown(tmp_path, parts, [views] * 3, shape)
    assert not (after.folder / "derived").exists()
    wanted = truth(parts, [views] * 3)
    for name in ("level", "cost"):
        values = {row: np.float32(0 if v[name] is None else v[name]).item() for row, v in wanted.items()}
        assert stored(after, f"f_{name}") == values


@pytest.mark.slow
def test_an_older_version_keeps_what_it_carried(tmp_path: Path) -> None:
    views = make(8)
    parts = generations(views)
    after = grown(tmp_path, parts, [views] * 3, schema())
    tables = {name: after.split(name).impressions for name in SPLITS}
    shutil.move(tmp_path / "set", tmp_path / "aside")
    shutil.copytree(tmp_path / "set.versions" / "000002", tmp_path / "set")
    append_to_training_set(schema(), settings(tmp_path))
    again = TrainingSet.open(tmp_path / "set", verify=True)
    for name in SPLITS:
        same_columns(again.split(name).impressions, tables[name])


SPECS: list[Windowed] = [
    Count(name="plain", by=("user",)),
    Count(name="near", by=("user",), window="3s"),
    Count(name="told", by=("user",), created="c", known_after="2s"),
    Sum(name="total", by=("user",), value="x", known_after="1s"),
    Sum(name="near_total", by=("user",), value="x", window="4s", known_after="1s"),
    Mean(name="rate", by=("user",), value="x", prior=0.5, prior_count=2.0),
    Mean(name="bare", by=("user",), value="x", created="c", window="5s"),
    Recency(name="since", by=("user",)),
    Recency(name="since_near", by=("user",), window="2s", known_after="1s"),
    Recency(name="since_told", by=("user",), created="c"),
]
SECOND = 1_000_000
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 6), st.integers(-9, 9)), max_size=30)


@given(ROWS, ROWS, ROWS, st.lists(st.integers(0, 12), min_size=2, max_size=2), st.sampled_from(SPECS))
def test_carried_rows_give_what_all_rows_give(
    first: list[tuple[int, int, int, int]],
    second: list[tuple[int, int, int, int]],
    third: list[tuple[int, int, int, int]],
    newest: list[int],
    spec: Windowed,
) -> None:
    """Rows of any time come in three lots; what is asked at or after the newest request is as if all came at once."""
    group, at = np.divmod(np.arange(5 * 16), 16)
    carried: CarriedRows | None = None
    for number, lot in enumerate([first, second, third]):
        rows = np.array([row for each in (first, second, third)[: number + 1] for row in each]).reshape(-1, 4)
        begin = [0, *sorted(newest)][number]
        time = np.maximum(at, begin) * SECOND
        found = looked_up(spec, columns_of(spec, rows), group, time)
        new = columns_of(spec, np.array(lot).reshape(-1, 4))
        given_rows = new if carried is None else joined(carried, new)
        np.testing.assert_array_equal(looked_up(spec, given_rows, group, time), found)
        if number < 2:
            carrier = Carrier(
                given_rows.user_row,
                given_rows.item_row,
                given_rows.time,
                given_rows.created,
                scopes={"user"},
                first_of_group={},
                newest=sorted(newest)[number] * SECOND,
            )
            carrier.add(spec, given_rows.counts[spec.name], given_rows.units.get(spec.name))
            carried = carrier.finish()


def columns_of(spec: Windowed, rows: np.ndarray) -> CarriedRows:
    """Rows of ``(user, time, lateness, value)``; an odd value does not count."""
    user, time, late, value = rows.astype(np.int64).T
    is_counted = (value % 2 == 0).astype(np.int64)
    units = {spec.name: value * is_counted} if isinstance(spec, Sum | Mean) else {}
    created = None if spec.created is None else (time + late - 2) * SECOND
    return CarriedRows(user, np.zeros_like(user), time * SECOND, created, {spec.name: is_counted}, units)


def joined(before: CarriedRows, new: CarriedRows) -> CarriedRows:
    both = (before.columns, new.columns)
    assert both[0].keys() == both[1].keys()
    return CarriedRows.of({name: np.concatenate([b[name] for b in both]) for name in both[0]})


def looked_up(spec: Windowed, rows: CarriedRows, group: np.ndarray, time: np.ndarray) -> np.ndarray:
    grouped = GroupedRows(rows.user_row, rows.time, rows.created)
    value = WindowedValue.build(spec, grouped, rows.counts[spec.name], rows.units.get(spec.name))
    return value.at(group, time)
