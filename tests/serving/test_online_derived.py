"""Derived values from an online store: what is computed at a request's time is what its training rows hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from feature_store.online.fetched import fetch
from feature_store.online.location import open_backend
from feature_store.online.materialize import Materializer, Summary
from feature_store.online.pushed import counted_event
from feature_store.online.pushing import Event
from feature_store.online.store import Limits, OnlineStore
from feature_store.snapshot import training_set_views, view_snapshot
from recsys.batch import Bags, Batch
from recsys.cli import app
from recsys.config import validate
from recsys.derived import Sum
from recsys.errors import ConfigError, DataError, RequestError, SourceError
from recsys.schema import Schema
from recsys.training_set import SPLITS, TrainingSet
from serving.assembler import Assembler
from serving.online_features import OnlineFeatures
from serving.request import RequestParser
from tests.feature_store.derived_views import CONTEXT, DERIVED, make, mapping
from tests.feature_store.small_views import DAY, START, build, config, schema_mapping, write_views

MORE: list[dict[str, Any]] = [
    {"name": "pair_dwell", "kind": "sum", "by": ["item", "user"], "value": "dwell", "window": "4d"},
    {"name": "age_likes", "kind": "count", "by": ["years"], "event_types": ["like"], "window": "4d"},
    {"name": "category_mean", "kind": "mean", "by": ["category"], "value": "dwell", "window": "4d"},
    {"name": "user_rate", "kind": "mean", "by": ["user"], "source": "impressions", "value": "click", "window": "3d"}
    | {"known_after": "30m", "prior": 0.1, "prior_count": 2.0},
]
YEARS = {"name": "years", "column": "age", "kind": "categorical", "scope": "user"}
SCOPES = {"pair_dwell": "candidate", "age_likes": "context", "category_mean": "candidate", "user_rate": "context"}


def derived_schema(**changes: Any) -> Schema:
    shape = mapping(derived=[*DERIVED, *MORE], **changes)
    shape["features"] = [
        *shape["features"],
        YEARS,
        *(
            {"name": f"f_{n}", "column": n, "kind": "dense", "scope": s, "transform": {"kind": "keep"}}
            for n, s in SCOPES.items()
        ),
    ]
    return validate(Schema, shape, source="test")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build(tmp_path_factory.mktemp("derived"), make(2), derived_schema())


def opened(training_set: TrainingSet, location: str, **limits: Any) -> OnlineStore:
    return OnlineStore(open_backend(location, is_writable=True), training_set.encoder, limits=Limits(**limits))


def filled(training_set: TrainingSet, store: OnlineStore, until: int | None = None) -> Summary:
    with training_set_views(training_set) as views:
        return Materializer(store, views, derived=views.derived, chunk=7).run(until)


def requests_of(training_set: TrainingSet) -> list[tuple[int, str, int]]:
    """Time, split and number of every request, in order of time."""
    return sorted(
        (int(when), name, number)
        for name in SPLITS
        for number, when in enumerate(training_set.split(name).requests.array("@time"))
    )


def body_of(training_set: TrainingSet, split_name: str, number: int) -> dict[str, Any]:
    """A request with nothing but keys and time, and what no store holds."""
    split = training_set.split(split_name)
    assert training_set.users.keys is not None
    assert training_set.items.keys is not None
    rows = slice(int(split.row_offsets[number]), int(split.row_offsets[number + 1]))
    return {
        "user_id": training_set.users.keys[split.requests.array("@user_row")[number]].as_py(),
        "time": int(split.requests.array("@time")[number]),
        "candidates": training_set.items.keys.take(split.impressions.array("@item_row")[rows]).to_pylist(),
    }


def assemble(store: OnlineStore, *bodies: dict[str, Any]) -> Batch:
    parser = RequestParser(store.schema)
    return Assembler(store.encoder, OnlineFeatures(store)).batch([parser.parse(body) for body in bodies]).batch


def derived_names(training_set: TrainingSet) -> list[str]:
    schema = training_set.schema
    return [f.name for f in schema.features if schema.derived_of(f) is not None]


def values(batch: Batch, name: str) -> list[Any]:
    """A derived feature of a batch."""
    column = batch.context[name] if name in batch.context else batch.candidate[name]
    assert not isinstance(column, Bags)
    found: list[Any] = column.tolist()
    return found


def assert_equal(found: Batch, stored: Batch, names: Iterable[str]) -> None:
    for name in names:
        assert values(found, name) == values(stored, name), name


def test_online_is_offline_at_the_time_of_materialising(built: TrainingSet, location: str) -> None:
    store = opened(built, location)
    names = derived_names(built)
    chosen = requests_of(built)[5::4]
    with training_set_views(built) as views:
        materializer = Materializer(store, views, derived=views.derived)
        for when, split, number in chosen:
            materializer.run(when)
            stored = Batch.from_training_set(built, split, np.array([number]))
            assert_equal(assemble(store, body_of(built, split, number)), stored, names)
    assert len(chosen) > 8
    store.close()


def test_pushes_that_are_newer_than_a_later_run_stay(built: TrainingSet, location: str) -> None:
    """Older ones are replaced in each history, and each log's rows, that has anything of the user since the run before;
    in others they stay, too."""
    store = opened(built, location, keep_events=1000)
    log = pl.read_parquet(built.folder.parent / "views" / "events.parquet")
    users = sorted(set(log["user"]))
    # The first six hours after the fourth day in which some users click, some do something else, and some do nothing.
    whole, of_clicks = set(users), log.filter(pl.col("type") == "click")
    active, clicking = (dict(rows.group_by("time").agg("user").iter_rows()) for rows in (log, of_clicks))
    before = min(t for t in clicking if t >= START + 4 * DAY and set(clicking[t]) < set(active[t]) < whole)
    until, idle, without_click = before + DAY // 4, whole - set(active[before]), whole - set(clicking[before])
    filled(built, store, before)
    pushed = (before + 1, until, until + 7)
    for user in users:
        for when in pushed:
            store.push(Event(user, 101, when, "click", {"dwell": 1.0, "created": when}))
    at = until + 10

    def seen(user: int) -> tuple[list[int], float]:
        found = fetch(store, user, [], at).user
        assert found is not None
        return found.histories["clicked"].times, found.derived["f_user_events"]

    def logged(user: int, end: int) -> tuple[list[int], int]:
        own = log.filter((pl.col("user") == user) & (pl.col("time") < end)).sort("time")
        return own.filter(pl.col("type") == "click")["time"].to_list(), len(own)

    filled(built, store, until)
    for user in users:
        clicks, num_events = logged(user, until)
        clicks += pushed if user in without_click else pushed[1:]
        assert seen(user) == (sorted(clicks), num_events + (3 if user in idle else 2))
    # A request between the pushes sees the earlier ones only.
    between = fetch(store, users[0], [], until + 1).user
    assert between is not None
    assert between.derived["f_user_events"] == seen(users[0])[1] - 1
    # Once a run reaches past them, the log counts alone, of all who click in it since.
    filled(built, store)
    later = set(log.filter((pl.col("time") >= until) & (pl.col("type") == "click"))["user"])
    assert later
    for user in later:
        assert seen(user) == logged(user, at)
    store.close()


def test_only_what_has_changed_is_written(built: TrainingSet, tmp_path: Path) -> None:
    store = opened(built, f"lmdb:{tmp_path / 'online'}")
    minute, start = 60_000_000, START + 5 * DAY
    with training_set_views(built) as views:
        materializer = Materializer(store, views, derived=views.derived)
        # Everything happens at whole hours, events at every sixth.
        whole, still, later = (materializer.run(start + after * minute) for after in (1, 2, 361))
    kinds = ("derived values of items", "derived values of users", "rows of events", "rows of events by created")
    assert {still.visited[kind] for kind in kinds} == {0}
    assert all(later.written[kind] == later.visited[kind] <= whole.written[kind] for kind in kinds)
    assert later.written["derived values of items"] > 0
    assert 0 < later.visited["rows of events"] < whole.written["rows of events"]
    store.close()


def test_unfinished_runs_of_other_times_leave_nothing_behind(built: TrainingSet, tmp_path: Path) -> None:
    store = opened(built, f"lmdb:{tmp_path / 'online'}")
    names = derived_names(built)

    def stop(kind: str, done: int, _total: int) -> None:
        if kind == "derived values of users" and done:
            raise KeyboardInterrupt

    with training_set_views(built) as views:
        materializer = Materializer(store, views, derived=views.derived, chunk=5)
        num_torn = 0
        for when, split, number in requests_of(built)[5::6]:
            for until in range(max(when - 40 * (DAY // 24), START), when, 10 * (DAY // 24)):
                try:
                    materializer.run(max(until, (store.meta()["materialized"] or {"until": 0})["until"]), progress=stop)
                except KeyboardInterrupt:
                    num_torn += 1
            assert materializer.run(when).resumed is False
            stored = Batch.from_training_set(built, split, np.array([number]))
            assert_equal(assemble(store, body_of(built, split, number)), stored, names)
    assert num_torn > 8
    store.close()


LIVE = {
    "f_user_clicks_1d", "f_user_events", "f_user_known", "f_user_category", "f_since_click", "f_mixed", "activity",
    "f_pair_dwell",
}  # fmt: skip
"""Values of a user's events: as of the request's time, however long ago the store was materialised."""


def test_values_of_a_user_s_events_follow_what_is_pushed(built: TrainingSet, location: str) -> None:
    store = opened(built, location, keep_events=1000)
    middle = START + 4 * DAY
    filled(built, store, middle)
    events = pl.read_parquet(built.folder.parent / "views" / "events.parquet").filter(pl.col("time") >= middle)
    assert len(events) > 50
    for row in events.sample(fraction=1.0, shuffle=True, seed=3).to_dicts():
        brought = {"dwell": row["dwell"], "created": row["created"]}
        store.push(Event(row["user"], row["item"], row["time"], row["type"], brought))
    assert set(derived_names(built)) >= LIVE
    later = [(split, number) for when, split, number in requests_of(built) if when >= middle]
    for split, number in later:
        stored = Batch.from_training_set(built, split, np.array([number]))
        assert_equal(assemble(store, body_of(built, split, number)), stored, LIVE)
    # The log replaces what was pushed: all is as if nothing had been.
    filled(built, store)
    plain = {k: v for prefix in (b"v", b"r") for k, v in store.backend.scan(prefix)}
    other = opened(built, location + ("2" if location.startswith("lmdb") else "?namespace=other"), keep_events=1000)
    filled(built, other)
    assert plain == {k: v for prefix in (b"v", b"r") for k, v in other.backend.scan(prefix)}
    store.close()
    other.close()


def test_many_requests_in_one_batch_are_each_as_alone(built: TrainingSet, tmp_path: Path) -> None:
    store = opened(built, f"lmdb:{tmp_path / 'online'}")
    filled(built, store, START + 4 * DAY)
    bodies = [body_of(built, split, n) for when, split, n in requests_of(built) if when >= START + 4 * DAY]
    bodies += [{"user_id": None, "time": START + 9 * DAY, "candidates": [101, 424242]}]
    together = assemble(store, *bodies)
    alone = [assemble(store, body) for body in bodies]
    for name in derived_names(built):
        assert values(together, name) == [value for one in alone for value in values(one, name)]
    store.close()


def test_who_is_not_known_has_no_rows(built: TrainingSet, tmp_path: Path) -> None:
    store = opened(built, f"lmdb:{tmp_path / 'online'}")
    filled(built, store)
    batch = assemble(store, {"user_id": 424242, "time": START + 99 * DAY, "candidates": [424242]})
    assert values(batch, "f_user_events") == [[0.0]]
    assert values(batch, "f_item_likes") == [[0.25]]
    assert values(batch, "f_item_rate") == [[np.float32(1.0 / 5.0)]]
    assert values(batch, "shade") == [1]
    store.close()


def test_what_a_request_brings_takes_its_place(built: TrainingSet, tmp_path: Path) -> None:
    store = opened(built, f"lmdb:{tmp_path / 'online'}")
    filled(built, store)
    body = {"user_id": 1, "time": START + 30 * DAY, "candidates": [{"item": 101, "item_rate": 0.75}, {"item": 102}]}
    plain = assemble(store, {**body, "candidates": [101, 102]})
    batch = assemble(store, {**body, "context": {"user_events": 31}})
    assert values(batch, "f_user_events") == [[31.0]]
    assert values(batch, "f_item_rate") == [[0.75], values(plain, "f_item_rate")[1]]
    store.close()


def test_requests_of_the_past_are_refused_not_answered_from_their_future(built: TrainingSet, tmp_path: Path) -> None:
    store = opened(built, f"lmdb:{tmp_path / 'online'}")
    filled(built, store, START + 5 * DAY)
    with pytest.raises(RequestError, match=r"candidates\.item_likes must be given: .* as of a time after the request"):
        assemble(store, {"user_id": 1, "time": START + 4 * DAY, "candidates": [101]})
    store.close()


def test_rows_beyond_the_limit_are_counted_and_windows_that_need_them_refused(
    built: TrainingSet, tmp_path: Path
) -> None:
    store = opened(built, f"lmdb:{tmp_path / 'online'}", keep_rows=3)
    summary = filled(built, store)
    assert summary.cut_users["rows of events"] > 0
    body = {"user_id": 1, "time": START + 60 * DAY, "candidates": [101]}
    with pytest.raises(RequestError, match=r"context\.user_events must be given: .* reaches further back") as caught:
        assemble(store, body)
    # Two days back from so late there is nothing that could be missing.
    assert "since_click" not in str(caught.value)
    store.push(Event(1, 101, START + 59 * DAY, "click", {"dwell": 1, "created": START + 59 * DAY}))
    with pytest.raises(RequestError, match="user_events"):
        assemble(store, body)
    store.close()


def test_a_store_filled_without_views_refuses(built: TrainingSet, tmp_path: Path) -> None:
    store = opened(built, f"lmdb:{tmp_path / 'online'}")
    Materializer(store, built).run()
    with pytest.raises(RequestError, match=r"context\.since_click must be given: .* was not materialised"):
        assemble(store, {"user_id": 1, "time": START + 60 * DAY, "candidates": [101]})
    filled(built, store)
    assemble(store, {"user_id": 1, "time": START + 60 * DAY, "candidates": [101]})
    with pytest.raises(ConfigError, match="holds derived values"):
        Materializer(store, built).run()
    store.close()


def test_attributes_of_both_are_refused(tmp_path: Path) -> None:
    one = {"name": "age_category", "kind": "count", "by": ["years", "category"]}
    shape = mapping(derived=[*DERIVED, one])
    shape["features"] = [*shape["features"], YEARS, {"name": "age_category", "kind": "dense", "scope": "candidate"}]
    training_set = build(tmp_path, make(2), validate(Schema, shape, source="test"))
    store = opened(training_set, f"lmdb:{tmp_path / 'online'}")
    filled(training_set, store)
    with pytest.raises(RequestError, match=r"^candidates\.age_category must be given: .* attributes of users and of"):
        assemble(store, {"user_id": 1, "time": START + 60 * DAY, "candidates": [101]})
    store.close()


def test_events_that_do_not_fit_are_refused(built: TrainingSet, tmp_path: Path) -> None:
    store = opened(built, f"lmdb:{tmp_path / 'online'}")
    good = {"dwell": 3, "created": START}
    with pytest.raises(DataError, match="materialize before events are pushed"):
        store.push(Event(1, 101, START, "click", good))
    filled(built, store)
    with pytest.raises(DataError, match="'created' must be given in UTC microseconds"):
        store.push(Event(1, 101, START + 60 * DAY, "click", {"dwell": 3}))
    for created in (-1, (START + 60 * DAY) // 1_000_000, 10**17):
        with pytest.raises(DataError, match="'created' must be in UTC microseconds between 1970 and 2200"):
            store.push(Event(1, 101, START + 60 * DAY, "click", good | {"created": created}))
    with pytest.raises(DataError, match="'dwell' must be of the types of the events view"):
        store.push(Event(1, 101, START + 60 * DAY, "click", good | {"dwell": "long"}))
    store.close()


@pytest.mark.parametrize("dwell", [None, float("nan")])
def test_nan_in_an_event_is_missing_as_in_a_build(dwell: float | None) -> None:
    """Or it would be greater than everything, and count for ``dwell > 20``."""
    (spec,) = (d for d in derived_schema().derived if d.name == "item_dwell")
    assert isinstance(spec, Sum)
    meta = {"derived": {"columns": {"dwell": "Float64"}}}
    schema = derived_schema()
    assert counted_event(spec, schema, Event(1, 101, START, "click", {"dwell": 30.0}), lambda: meta)[0] is True
    assert counted_event(spec, schema, Event(1, 101, START, "click", {"dwell": dwell}), lambda: meta)[0] is False


def test_views_that_have_changed_are_named(tmp_path: Path) -> None:
    views = make(3)
    training_set = build(tmp_path, views, derived_schema())
    views["events"] = views["events"].head(30)
    write_views(tmp_path / "views", views)
    with pytest.raises(SourceError, match="must be as they were when it was built"), training_set_views(training_set):
        pass
    with view_snapshot(config(tmp_path), training_set.encoder) as snapshot:
        assert sum(t.num_rows for t in snapshot.events.values()) <= 60


def test_context_of_these_schemas() -> None:
    schema = derived_schema()
    found = {f.source_column for f in schema.features_of("context") if schema.derived_of(f) is not None}
    assert found == {*CONTEXT, "age_likes", "user_rate"}


def content(location: str, training_set: TrainingSet) -> dict[bytes, bytes]:
    """All values of a store, but not what it says about itself."""
    store = OnlineStore(open_backend(location, is_writable=False), training_set.encoder)
    found = {k: v for prefix in (b"u", b"i", b"h", b"v", b"r") for k, v in store.backend.scan(prefix)}
    store.close()
    return found


def test_the_command_takes_views_or_a_training_set(tmp_path: Path) -> None:
    training_set = build(tmp_path, make(4), derived_schema())
    schema = derived_schema().model_dump(mode="json")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    experiment = {"name": "small", "schema_file": "schema.yaml", "model": {"kind": "din"}, "training": {}} | {
        "data": config(tmp_path).model_dump(mode="json")
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})

    def run(store: str, *arguments: object) -> str:
        done = runner.invoke(app, ["materialize", f"lmdb:{tmp_path / store}", *map(str, arguments)])
        return done.stdout + done.stderr

    until = ("--until", START + 6 * DAY)
    assert "rows of events written" in run("a", "-t", training_set.folder, *until)
    assert "rows of events written" in run("b", "-e", tmp_path / "experiment.yaml", *until)
    assert "rows of events written" in run(
        "c", "-e", tmp_path / "experiment.yaml", "-m", training_set.folder, "--keep-rows", 10_000, *until
    )
    first = content(f"lmdb:{tmp_path / 'a'}", training_set)
    assert len(first) > 60
    for other in "bc":
        assert content(f"lmdb:{tmp_path / other}", training_set) == first
    assert "one of --training-set and --experiment must be given" in run("d")
    assert "--model must be given with --experiment only" in run("d", "-t", "x", "-m", "y")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema | {"name": "other"}))
    assert "schema must be the one of the model" in run("b", "-e", tmp_path / "experiment.yaml")


def test_events_that_feed_derived_values_alone_are_counted_as_such(tmp_path: Path) -> None:
    shape = schema_mapping(
        histories=[{"name": "clicked", "event_types": ["click"], "attributes": ["item_id"]}],
        derived=[{"name": "since_like", "kind": "recency", "by": ["user"], "event_types": ["click", "like"]}],
    )
    shape["features"] = [
        *shape["features"],
        {"name": "since_like", "kind": "dense", "scope": "context", "transform": {"kind": "keep"}},
    ]
    training_set = build(tmp_path, make(5), validate(Schema, shape, source="test"))
    location = f"lmdb:{tmp_path / 'online'}"
    store = opened(training_set, location)
    filled(training_set, store)
    assert store.push(Event(1, 101, START + 20 * DAY, "like")) == ([], ["since_like"])
    assert store.push(Event(1, 101, START + 20 * DAY, "click")) == (["clicked"], ["since_like"])
    assert store.push(Event(1, 101, START + 20 * DAY, "share")) == ([], [])
    store.close()
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    kinds = ("click", "like", "share", "share", "like", "like")
    events = [json.dumps({"user": 1, "item": 101, "type": kind, "time": START + 21 * DAY}) for kind in kinds]
    done = runner.invoke(app, ["push", location, "--model", str(training_set.folder), *events, "--json"])
    assert json.loads(done.stdout) == {
        "store": location, "events": 6, "fed_derived_values_only": 3, "changed_nothing": 2, "pushed": {"clicked": 1}
    }  # fmt: skip
    done = runner.invoke(app, ["push", location, "--model", str(training_set.folder), *events])
    assert "feed derived values only" in done.stdout
    assert done.stderr == (
        "event 3: type 'share' is named by no history and no derived value, and changes nothing: known names: 'click', "
        "'like'\n"
    )
