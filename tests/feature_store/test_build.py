from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_store.build import build_training_set
from feature_store.leaks import check_leaks
from feature_store.sources import to_arrow
from recsys.encoding import Ragged
from recsys.errors import ConfigError, EncodingError, IntegrityError, SourceError
from recsys.files import sha256_of
from recsys.training_set import SPLITS, TrainingSet
from tests.feature_store.small_views import (
    DAY,
    SPLIT,
    START,
    build,
    config,
    impressions_of,
    make_schema,
    make_views,
    same_sets,
    schema_mapping,
    shuffled,
    write_views,
)
from tests.references.point_in_time import expected_impressions


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("history", "types"), [("clicked", ["click"]), ("seen", None)])
def test_agrees_with_a_double_loop(tmp_path: Path, history: str, types: list[str] | None) -> None:
    views = make_views()
    training_set = build(tmp_path, views)
    found = impressions_of(training_set, history)
    events = views["events"].to_dicts()
    rows = views["impressions"].to_dicts()
    assert sorted(found) == list(range(len(rows)))
    for number, expected in enumerate(expected_impressions(rows, events, types, ["item", "dwell"])):
        got = found[number]
        assert (got["user"], got["item"], got["time"]) == (expected.user, expected.item, expected.time)
        assert got["history"] == [(events[e]["item"], events[e]["time"]) for e in expected.history]
        limits = {"train": (0, SPLIT["train_end"]), "validation": (SPLIT["train_end"], SPLIT["validation_end"])}
        low, high = limits.get(got["split"], (SPLIT["validation_end"], SPLIT["test_end"]))
        assert low <= got["time"] < high
        assert got["labels"] == {
            "@label.click": rows[number]["click"],
            "@label.long": float(rows[number]["watched"] >= 10),
        }


LOG_ROW = st.fixed_dictionaries({"user": st.integers(0, 3), "item": st.integers(0, 4), "time": st.integers(0, 9)})
EVENT = st.fixed_dictionaries(
    {
        "user": st.integers(0, 2),
        "item": st.integers(0, 3),
        "time": st.integers(0, 4),
        "number": st.sampled_from([None, 1, 2, 3]),
        "source": st.sampled_from([None, "a", "b", "B"]),
        "dwell": st.sampled_from([-1.0, 0.0, 0.5]),
        "words": st.lists(st.sampled_from(["x", "y", "z"]), max_size=2),
    }
)
EVENT_COLUMNS = {
    "user": pl.Int64,
    "item": pl.Int64,
    "time": pl.Int64,
    "number": pl.Int64,
    "source": pl.String,
    "dwell": pl.Float64,
    "words": pl.List(pl.String),
}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    impressions=st.lists(LOG_ROW, min_size=1, max_size=25),
    events=st.lists(EVENT, max_size=40),
    is_grouped=st.booleans(),
    is_numbered=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_ties_duplicates_and_any_row_order(
    tmp_path_factory: pytest.TempPathFactory,
    impressions: list[dict[str, int]],
    events: list[dict[str, Any]],
    is_grouped: bool,
    is_numbered: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("build")
    rng = np.random.default_rng(seed)
    rows = [{**r, "click": int(rng.integers(0, 2))} for r in impressions]
    if is_grouped:  # the rows of a request have one user, and times of their own
        rows = [{**r, "request": f"r{r['user']}-{int(rng.integers(0, 3))}"} for r in rows]
    views = {
        "impressions": pl.DataFrame(rows),
        "events": pl.DataFrame(events, schema=EVENT_COLUMNS),
    }
    log = {"user": "user", "item": "item", "time": "time"}
    mapping = {
        "name": "ties",
        "views": {
            "impressions": {**log, **({"request": "request"} if is_grouped else {})},
            "events": {**log, **({"sequence": "number"} if is_numbered else {})},
        },
        "features": [
            {"name": "user_id", "kind": "categorical", "scope": "user", "column": "user"},
            {"name": "item_id", "kind": "categorical", "scope": "item", "column": "item"},
        ],
        "histories": [
            {
                "name": "past",
                "attributes": ["item_id"],
                "event_features": [
                    {"name": "source", "kind": "categorical", "scope": "event"},
                    {"name": "dwell", "kind": "dense", "scope": "event", "transform": {"kind": "keep"}},
                    {"name": "words", "kind": "multi_categorical", "scope": "event"},
                ],
            }
        ],
        "tasks": [{"name": "click", "label": "click"}],
    }
    schema = make_schema(**mapping)
    split = {"train_end": 100, "validation_end": 200, "test_end": 300}
    training_set = build(folder, views, schema, split=split)
    found = impressions_of(training_set, "past")
    stored, encoder = training_set.events["past"], training_set.encoder
    stored_words = stored.columns["words"]
    sources, words = (encoder.encode(name, to_arrow(views["events"][name])) for name in ("source", "words"))
    order = [*(["number"] if is_numbered else []), "item", "source", "dwell", "words"]
    for number, expected in enumerate(expected_impressions(rows, events, None, order)):
        got = found[number]
        assert (got["user"], got["item"], got["time"]) == (expected.user, expected.item, expected.time)
        assert got["history"] == [(events[e]["item"], events[e]["time"]) for e in expected.history]
        past, mine = np.arange(*got["slice"]), np.array(expected.history, dtype=np.int64)
        assert stored.array("source")[past].tolist() == np.asarray(sources)[mine].tolist()
        assert stored.array("dwell")[past].tolist() == [events[e]["dwell"] for e in mine]
        assert isinstance(words, Ragged)
        assert isinstance(stored_words, Ragged)
        for ours, theirs in zip(stored_words.take(past), words.take(mine), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert check_leaks(config(folder, split=split), schema=schema).differences == ()

    kept = ["request", "item"] if is_grouped else list(log)
    again = {
        "impressions": shuffled(views["impressions"], rng, keeping=kept),
        "events": shuffled(views["events"], rng),
    }
    same_sets(training_set, build(folder / "again", again, schema, split=split), but=("@source_row",))


def test_row_order_changes_nothing_but_source_rows(tmp_path: Path) -> None:
    views, rng = make_views(), np.random.default_rng(1)
    again = {
        "impressions": shuffled(views["impressions"], rng, keeping=["request", "item"]),
        **{name: shuffled(views[name], rng) for name in ("events", "users", "items")},
    }
    first, second = build(tmp_path / "a", views), build(tmp_path / "b", again)
    same_sets(first, second, but=("@source_row",))
    rows = [s.split("train").impressions.array("@source_row") for s in (first, second)]
    assert not np.array_equal(*rows)
    prices = [v["impressions"]["price"].to_numpy()[r] for v, r in zip((views, again), rows, strict=True)]
    np.testing.assert_array_equal(*prices)


def test_history_length_changes_no_byte_of_requests_and_impressions(tmp_path: Path) -> None:
    views, sets = make_views(), {}
    for length in (50, 1000):
        histories = [{**h, "max_length": length} for h in schema_mapping()["histories"]]
        build(tmp_path / str(length), views, make_schema(histories=histories))
        sets[length] = tree(tmp_path / str(length) / "training_set")
    logs = [f"{split}/{table}.arrow" for split in SPLITS for table in ("requests", "impressions")]
    for name in [*logs, "users.arrow", "items.arrow", "events/clicked.arrow", "events/seen.arrow"]:
        assert sets[50][name] == sets[1000][name], name
    assert all(sets[50][name] for name in logs)


def test_lifelong_histories_take_no_more_room_in_requests_and_impressions(tmp_path: Path) -> None:
    sizes, longest = {}, {}
    for num_events in (100, 10_000):
        views = make_views(num_requests=20, num_users=2)
        rng = np.random.default_rng(0)
        times = START - DAY + np.arange(num_events) * 1_000
        types = pl.Series("type", ["click"] * num_events)
        items = rng.integers(100, 120, num_events)
        views["events"] = pl.DataFrame({"user": 0, "item": items, "time": times, "type": types, "dwell": 1.0})
        training_set = build(tmp_path / str(num_events), views)
        folder = tmp_path / str(num_events) / "training_set"
        sizes[num_events] = {s: [p.stat().st_size for p in sorted((folder / s).iterdir())] for s in SPLITS}
        requests = training_set.split("train").requests
        longest[num_events] = int((requests.array("@end.clicked") - requests.array("@start.clicked")).max())
    assert longest == {100: 100, 10_000: 10_000}
    assert sizes[100] == sizes[10_000]


@pytest.mark.parametrize("hours", [1e-9, 6.0, 30.0])
def test_events_older_than_max_age_are_left_out(tmp_path: Path, hours: float) -> None:
    views = make_views()
    histories = [{**h, "max_age_hours": hours} for h in schema_mapping()["histories"]]
    found = impressions_of(build(tmp_path, views, make_schema(histories=histories)), "clicked")
    events, rows = views["events"].to_dicts(), views["impressions"].to_dicts()
    age, num_left_out, num_edges = round(hours * 3_600_000_000), 0, 0
    for number, expected in enumerate(expected_impressions(rows, events, ["click"])):
        recent = [e for e in expected.history if events[e]["time"] >= expected.time - age]
        assert found[number]["history"] == [(events[e]["item"], events[e]["time"]) for e in recent]
        num_left_out += len(expected.history) - len(recent)
        num_edges += len(recent) > 0
    assert num_left_out > 100
    assert num_edges > 0 or hours < 1


def test_an_event_exactly_as_old_as_may_be_counts(tmp_path: Path) -> None:
    views = make_views(num_requests=30)
    hour = 3_600_000_000
    at = views["impressions"].group_by("request").agg(pl.col("user").first(), pl.col("time").min())
    at = at.group_by("user").agg(pl.col("time").first())
    parts = [at.with_columns(time=pl.col("time") - hour - extra, dwell=pl.lit(float(extra))) for extra in (0, 1)]
    views["events"] = pl.concat(parts).with_columns(item=pl.lit(101), type=pl.lit("click"))
    histories = [{**h, "max_age_hours": 1.0} for h in schema_mapping()["histories"]]
    found = impressions_of(build(tmp_path, views, make_schema(histories=histories)), "clicked")
    ages = [row["time"] - time for row in found.values() for _, time in row["history"]]
    assert hour in ages
    assert max(ages) == hour


def test_two_builds_of_the_same_views_are_the_same_bytes(tmp_path: Path) -> None:
    views = make_views()
    for name in "ab":
        build(tmp_path / name, views)
    a, b = (tree(tmp_path / name / "training_set") for name in "ab")
    assert {n: c for n, c in a.items() if n != "manifest.json"} == {n: c for n, c in b.items() if n != "manifest.json"}


def test_entities_that_only_logs_name_have_a_row_with_their_key(tmp_path: Path) -> None:
    views = make_views()
    first_user, first_item = views["impressions"]["user"][0], views["impressions"]["item"][0]
    views["users"] = views["users"].filter(pl.col("user") != first_user)
    views["items"] = views["items"].filter(pl.col("item") != first_item)
    training_set = build(tmp_path, views)
    row = training_set.users.keys.to_pylist().index(first_user)  # type: ignore[union-attr]
    assert row > 0
    assert training_set.users.array("age")[row] == 0
    assert training_set.users.array("user_id")[row] >= 2
    row = training_set.items.keys.to_pylist().index(first_item)  # type: ignore[union-attr]
    assert training_set.items.array("category")[row] == 1
    assert training_set.items.array("item_id")[row] >= 2
    tags = training_set.items.columns["tags"]
    assert tags.offsets[row] == tags.offsets[row + 1]  # type: ignore[union-attr]
    summary = training_set.manifest["summary"]
    assert (summary["users_without_attributes"], summary["items_without_attributes"]) == (1, 1)


def test_row_0_is_the_unknown_entity(tmp_path: Path) -> None:
    training_set = build(tmp_path, make_views())
    for table in (training_set.users, training_set.items):
        assert table.keys is not None
        assert table.keys[0].as_py() is None
        assert table.keys.null_count == 1
    assert training_set.users.array("user_id")[0] == 1
    assert training_set.users.array("age")[0] == 0
    assert training_set.items.array("category")[0] == 1
    assert training_set.items.columns["tags"].offsets[:2].tolist() == [0, 0]  # type: ignore[union-attr]


def test_users_have_their_slice_of_every_event_log(tmp_path: Path) -> None:
    views = make_views()
    training_set = build(tmp_path, views)
    users, log = training_set.users, training_set.events["clicked"]
    keys = users.keys.to_pylist()  # type: ignore[union-attr]
    items = training_set.items.keys.to_pylist()  # type: ignore[union-attr]
    assert users.array("@end.clicked")[0] == users.array("@start.clicked")[0]
    for row, key in enumerate(keys[1:], start=1):
        start, end = users.array("@start.clicked")[row], users.array("@end.clicked")[row]
        mine = views["events"].filter(pl.col("user") == key, pl.col("type") == "click").sort("time", "item", "dwell")
        assert [items[i] for i in log.array("@item_row")[start:end]] == mine["item"].to_list()
        assert log.columns["dwell"][start:end].tolist() == mine["dwell"].to_list()  # type: ignore[union-attr]


def test_fits_on_the_training_period_only(tmp_path: Path) -> None:
    views = make_views()
    late = SPLIT["train_end"] + DAY
    template = views["impressions"].row(0, named=True)
    new = [
        {**template, "request": 9001, "item": 777, "time": late, "device": "watch"},
        {**template, "request": 9002, "item": 888, "time": late, "device": "watch"},
    ]
    views["impressions"] = pl.concat([views["impressions"], pl.DataFrame(new, schema=views["impressions"].schema)])
    early_event = {"user": template["user"], "item": 888, "time": SPLIT["train_end"] - 1, "type": "click", "dwell": 0.0}
    late_event = {**early_event, "item": 999, "time": SPLIT["train_end"]}
    events = pl.DataFrame([early_event, late_event], schema=views["events"].schema)
    views["events"] = pl.concat([views["events"], events])
    training_set = build(tmp_path, views)
    keys = training_set.items.keys.to_pylist()  # type: ignore[union-attr]
    ids = {key: int(training_set.items.array("item_id")[keys.index(key)]) for key in (777, 888, 999)}
    assert ids[777] == 1  # shown only after training
    assert ids[888] >= 2  # part of a history that training reads
    assert ids[999] == 1
    devices = {n: set(training_set.split(n).requests.array("device").tolist()) for n in SPLITS}
    assert 1 not in devices["train"]
    assert 1 in devices["validation"]


def test_vocabulary_counts_impressions_and_past_events_of_history_attributes(tmp_path: Path) -> None:
    """``min_count`` is met by one impression and one click before the period's end, and by neither alone."""
    time = [START + 10, START + 20, START + 30]
    views = {
        "impressions": pl.DataFrame({"user": [1, 1, 1], "item": [5, 6, 7], "time": time, "click": [0, 1, 0]}),
        "events": pl.DataFrame({"user": [1, 1], "item": [5, 8], "time": [START, SPLIT["train_end"] - 1]}),
    }
    log = {"user": "user", "item": "item", "time": "time"}
    schema = make_schema(
        views={"impressions": log, "events": log},
        features=[
            {
                "name": "item_id",
                "kind": "categorical",
                "scope": "item",
                "column": "item",
                "encoder": {"kind": "vocabulary", "min_count": 2},
            }
        ],
        histories=[{"name": "past", "attributes": ["item_id"]}],
        tasks=[{"name": "click", "label": "click"}],
    )
    training_set = build(tmp_path, views, schema)
    ids = dict(zip(training_set.items.keys.to_pylist(), training_set.items.array("item_id").tolist(), strict=True))  # type: ignore[union-attr]
    assert ids == {None: 1, 5: 2, 6: 1, 7: 1, 8: 1}


def test_requests_take_their_earliest_time_and_stay_in_one_split(tmp_path: Path) -> None:
    views = make_views()
    end = SPLIT["train_end"]
    row = views["impressions"].row(0, named=True)
    straddling = [{**row, "request": 9000, "item": 100 + i, "time": end + (i - 2) * 1000} for i in (2, 1, 3)]
    views["impressions"] = pl.concat(
        [views["impressions"], pl.DataFrame(straddling, schema=views["impressions"].schema)]
    )
    number = len(views["impressions"]) - 3
    found = impressions_of(build(tmp_path, views), "clicked")
    for offset in range(3):
        assert found[number + offset]["time"] == end - 1000
        assert found[number + offset]["split"] == "train"
    assert len({found[number + offset]["request"] for offset in range(3)}) == 1


def test_time_features_read_the_request_time_in_any_unit(tmp_path: Path) -> None:
    """The time column is in seconds; hour_of_day must not read it as microseconds."""
    views = make_views()
    for view in ("impressions", "events"):
        views[view] = views[view].with_columns(pl.col("time") // 1_000_000)
    mapping = schema_mapping()
    for view in ("impressions", "events"):
        mapping["views"][view]["time_unit"] = "s"
    training_set = build(tmp_path, views, make_schema(views=mapping["views"]))
    requests = training_set.split("train").requests
    hours = (requests.array("@time") // 3_600_000_000) % 24
    assert requests.array("hour").tolist() == (hours + 2).tolist()
    assert len(set(hours.tolist())) > 3


def test_rows_outside_the_periods_are_counted(tmp_path: Path) -> None:
    views = make_views()
    split = {**SPLIT, "train_start": START + DAY, "test_end": START + 9 * DAY}
    training_set = build(tmp_path, views, split=split)
    time = views["impressions"].select(pl.col("time").min().over("request"))["time"]
    outside = int(((time < split["train_start"]) | (time >= split["test_end"])).sum())
    summary = training_set.manifest["summary"]
    assert outside > 0
    assert summary["outside_split"] == outside
    assert sum(summary["rows"].values()) + outside == len(views["impressions"])


def test_manifest_tells_rows_checksums_and_fingerprints(tmp_path: Path) -> None:
    training_set = build(tmp_path, make_views())
    folder, manifest = tmp_path / "training_set", training_set.manifest
    assert set(manifest["files"]) == {p for p in tree(folder) if p != "manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_of(folder / name)
        if name.endswith(".arrow"):
            with pa.memory_map(str(folder / name)) as file:
                assert entry["rows"] == pa.ipc.open_file(file).read_all().num_rows
    assert manifest["rows"] == {name: training_set.split(name).num_rows for name in SPLITS}
    assert manifest["requests"] == {name: training_set.split(name).num_requests for name in SPLITS}
    assert manifest["encoder_fingerprint"] == training_set.encoder.fingerprint
    assert not list(folder.rglob(".*"))


def test_tables_are_one_uncompressed_batch_that_maps_without_a_copy(tmp_path: Path) -> None:
    build(tmp_path, make_views())
    for path in (tmp_path / "training_set").rglob("*.arrow"):
        if "vocabularies" in path.parts:
            continue
        with pa.memory_map(str(path)) as file:
            mapped = file.read_buffer()
            reader = pa.ipc.open_file(file)
            assert reader.num_record_batches == 1
            batch = reader.get_batch(0)
            assert batch.num_rows > 0
            buffers = [b for column in batch.columns for b in column.buffers() if b is not None and b.size]
            assert buffers, path
            for buffer in buffers:
                assert mapped.address <= buffer.address <= mapped.address + mapped.size - buffer.size, path


def test_a_finished_set_is_left_alone_until_something_changes(tmp_path: Path) -> None:
    views = make_views()
    write_views(tmp_path / "views", views)
    schema, data = make_schema(), config(tmp_path)
    first = build_training_set(schema, data)
    manifest = tmp_path / "training_set" / "manifest.json"

    def stamp() -> int:
        return manifest.stat().st_mtime_ns

    before = stamp()
    second = build_training_set(schema, data)
    assert not first.skipped
    assert second.skipped
    assert stamp() == before
    assert {**first.to_dict(), "skipped": True} == second.to_dict()
    assert not build_training_set(schema, data, force=True).skipped
    assert build_training_set(schema, data).skipped
    later = (tmp_path / "views" / "items.parquet").stat().st_mtime + 10
    os.utime(tmp_path / "views" / "items.parquet", (later, later))
    assert not build_training_set(schema, data).skipped
    assert not build_training_set(make_schema(name="other"), data).skipped
    changed = config(tmp_path, split={**SPLIT, "train_end": START + 5 * DAY})
    assert not build_training_set(make_schema(name="other"), changed).skipped
    (tmp_path / "training_set" / "train" / "requests.arrow").unlink()
    assert not build_training_set(make_schema(name="other"), changed).skipped


def test_summary_is_json(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make_views())
    summary = build_training_set(make_schema(), config(tmp_path))
    plain = json.loads(json.dumps(summary.to_dict()))
    assert plain["rows"] == dict(summary.rows)
    assert plain["events"]["seen"] == 300
    assert summary.num_rows == sum(plain["rows"].values())
    assert summary.bytes == sum(len(c) for n, c in tree(tmp_path / "training_set").items() if n != "manifest.json")


def test_progress_goes_to_stderr_and_counts_every_stage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # Rich draws as on a terminal
    write_views(tmp_path / "views", make_views())
    build_training_set(make_schema(), config(tmp_path), progress=True)
    written = capfd.readouterr()
    assert written.out == ""
    assert "Computing checksums" in written.err
    num_stages = 6 + 1 + len(make_schema().all_features) + 2 + 2 + 3 + 1
    assert f"{num_stages - 1}/{num_stages}" in written.err


def test_a_link_to_a_training_set_stays_a_link(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make_views())
    (tmp_path / "disk").mkdir()
    (tmp_path / "training_set").symlink_to(tmp_path / "disk" / "set")
    for _ in range(2):
        build_training_set(make_schema(), config(tmp_path), force=True)
    assert (tmp_path / "training_set").is_symlink()
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["set", "set.lock"]
    TrainingSet.open(tmp_path / "training_set", verify=True)


@pytest.mark.parametrize("dtype", [pl.Boolean(), pl.Float32(), pl.Decimal(4, 1), pl.UInt8()])
def test_labels_of_any_numeric_type(tmp_path: Path, dtype: pl.DataType) -> None:
    views = make_views()
    expected = build(tmp_path / "a", views)
    views["impressions"] = views["impressions"].with_columns(pl.col("click").cast(dtype))
    same_sets(expected, build(tmp_path / "b", views))


def test_an_empty_training_period_is_an_error(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make_views())
    split = {"train_end": 1000, "validation_end": 2000, "test_end": START + 20 * DAY}
    with pytest.raises(SourceError, match="training period must hold an impression") as error:
        build_training_set(make_schema(), config(tmp_path, split=split))
    assert "2020-09-" in str(error.value)
    assert "time_unit" in str(error.value)


def test_a_history_without_any_event_of_its_types_is_an_error(tmp_path: Path) -> None:
    histories = [{**schema_mapping()["histories"][0], "event_types": ["clik"]}]
    write_views(tmp_path / "views", make_views())
    with pytest.raises(SourceError, match="did you mean 'click'"):
        build_training_set(make_schema(histories=histories), config(tmp_path))


def test_an_empty_event_log_gives_empty_histories(tmp_path: Path) -> None:
    views = make_views()
    views["events"] = views["events"].head(0)
    training_set = build(tmp_path, views)
    assert training_set.events["clicked"].num_rows == 0
    assert all(not row["history"] for row in impressions_of(training_set, "clicked").values())


def test_without_events_users_and_items_views(tmp_path: Path) -> None:
    views = {"impressions": make_views()["impressions"]}
    log = {"user": "user", "item": "item", "time": "time"}
    features = [f for f in schema_mapping()["features"] if f["name"] in ("user_id", "item_id", "device", "position")]
    schema = make_schema(views={"impressions": log}, features=features, histories=[])
    training_set = build(tmp_path, views, schema)
    keys = training_set.items.keys.to_pylist()  # type: ignore[union-attr]
    assert keys == [None, *sorted(set(views["impressions"]["item"]))]
    split = training_set.split("train")
    assert split.is_flat
    assert split.requests.array("@time").tolist() == sorted(split.requests.array("@time").tolist())


@pytest.mark.parametrize("kind", ["text", "integer"])
def test_keys_of_either_type(tmp_path: Path, kind: str) -> None:
    views = make_views()
    if kind == "text":
        for view, columns in {"impressions": ["user", "item", "request"], "events": ["user", "item"]}.items():
            views[view] = views[view].with_columns(pl.format("k{}", pl.col(c)).alias(c) for c in columns)
        views["users"] = views["users"].with_columns(pl.format("k{}", "user").alias("user"))
        views["items"] = views["items"].with_columns(pl.format("k{}", "item").cast(pl.Categorical).alias("item"))
    found = impressions_of(build(tmp_path, views), "clicked")
    events = views["events"].to_dicts()
    for number, expected in enumerate(expected_impressions(views["impressions"].to_dicts(), events, ["click"])):
        assert found[number]["user"] == expected.user
        assert found[number]["history"] == [(events[e]["item"], events[e]["time"]) for e in expected.history]


def test_values_that_cannot_be_encoded_name_the_feature_and_leave_nothing(tmp_path: Path) -> None:
    views = make_views()
    views["items"] = views["items"].with_columns(category=pl.lit(0.5))
    with pytest.raises(EncodingError, match="category"):
        build(tmp_path, views)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["training_set.lock", "views"]
    with pytest.raises(IntegrityError):
        TrainingSet.open(tmp_path / "training_set")


def test_a_failed_build_leaves_the_old_set(tmp_path: Path) -> None:
    views = make_views()
    old = tree_of(build(tmp_path, views))
    views["impressions"] = views["impressions"].drop("click")
    with pytest.raises(SourceError):
        build(tmp_path, views)
    assert tree_of(TrainingSet.open(tmp_path / "training_set", verify=True)) == old


def tree_of(training_set: TrainingSet) -> dict[str, bytes]:
    return tree(training_set.folder)


def test_dense_vectors_and_lists(tmp_path: Path) -> None:
    views = make_views()
    n = len(views["items"])
    vectors = np.arange(3 * n, dtype=np.float32).reshape(n, 3)
    views["items"] = views["items"].with_columns(
        pl.Series("vector", vectors), pl.Series("genres", [[i % 3, 7] if i % 2 else [] for i in range(n)])
    )
    features = [
        *schema_mapping()["features"],
        {"name": "vector", "kind": "dense", "scope": "item", "dim": 3, "transform": {"kind": "keep"}},
        {"name": "genres", "kind": "multi_categorical", "scope": "item"},
    ]
    training_set = build(tmp_path, views, make_schema(features=features))
    keys = training_set.items.keys.to_pylist()  # type: ignore[union-attr]
    for number, row in enumerate(views["items"].iter_rows(named=True)):
        place = keys.index(row["item"])
        np.testing.assert_array_equal(training_set.items.array("vector")[place], vectors[number])
        genres = training_set.items.columns["genres"]
        length = genres.offsets[place + 1] - genres.offsets[place]  # type: ignore[union-attr]
        assert length == len(row["genres"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_end": "2022-05-01"}, "must have an offset"),
        ({"train_end": "May"}, "must be an ISO 8601 time"),
        ({"validation_end": START}, "train_end before validation_end"),
        ({"train_start": START + 7 * DAY}, "train_start before train_end"),
    ],
)
def test_split_times_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, split={**SPLIT, **changes})


def test_split_times_as_text_and_as_microseconds_agree(tmp_path: Path) -> None:
    text = {
        "train_end": "2022-05-01T00:00:00+08:00",
        "validation_end": "2022-05-01T00:00:00Z",
        "test_end": "2022-05-01T01:02:03.000004+00:00",
    }
    assert config(tmp_path, split=text).split.boundaries == {
        "train_start": None,
        "train_end": 1_651_334_400_000_000,
        "validation_end": 1_651_363_200_000_000,
        "test_end": 1_651_366_923_000_004,
    }
