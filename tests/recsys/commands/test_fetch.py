"""``recsys fetch``: what it shows of a store, and what it says where there is nothing to show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from feature_store.online.location import open_backend
from feature_store.online.materialize import materialize
from feature_store.online.pushing import Event
from feature_store.online.store import Limits, OnlineStore
from recsys.cli import app
from recsys.training_set import TrainingSet
from tests.feature_store.small_views import build, make_schema, make_views
from tests.training_sets import build_synthetic

LATER = 1_800_000_000_000_000


@pytest.fixture(scope="module")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build_synthetic(tmp_path_factory.mktemp("fetch"), num_requests=120, seed=5)


@pytest.fixture
def run() -> Callable[..., Any]:
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    return lambda *arguments, **more: runner.invoke(app, ["fetch", *(str(a) for a in arguments)], **more)


def store_of(training_set: TrainingSet, location: str, **limits: Any) -> OnlineStore:
    return OnlineStore(open_backend(location, is_writable=True), training_set.encoder, limits=Limits(**limits))


def known_keys(training_set: TrainingSet) -> tuple[list[int], list[int]]:
    users, items = training_set.users.keys, training_set.items.keys
    assert users is not None
    assert items is not None
    return users[1:].to_pylist(), items[1:].to_pylist()


def test_the_command(training_set: TrainingSet, location: str, run: Callable[..., Any]) -> None:
    store = store_of(training_set, location, user_ttl_s=3600.0)
    materialize(store, training_set)
    users, items = known_keys(training_set)
    store.push(Event(424242, items[0], LATER, "click", {"dwell": 30}))
    store.close()
    done = run(location)
    assert done.exit_code == 0, done.stderr
    assert training_set.encoder.fingerprint in done.stdout
    done = run(location, "--count", "--json")
    counted = json.loads(done.stdout)
    assert (counted["users"], counted["items"]) == (len(users), len(items))
    assert counted["limits"]["user_ttl_s"] == 3600.0

    done = run(location, "-m", training_set.folder, "-u", users[0], "-i", items[0], "-i", items[1], "--at", LATER)
    assert done.exit_code == 0, done.stderr
    assert f"user {users[0]}, a request at 2027-01-15T08:00:00+00:00" in done.stdout
    assert "stored, expires 20" in done.stdout
    assert f"item {items[1]}" in done.stdout
    assert "stored, never expires" in done.stdout
    assert "history clicked: " in done.stdout

    # Only events strictly before the time, of a user without features.
    for at, times in ((LATER, []), (LATER + 1, [LATER])):
        done = run(location, "-m", training_set.folder, "--user", 424242, "--at", at, "--json")
        assert done.exit_code == 0, done.stderr
        shown = json.loads(done.stdout)["user"]
        assert (shown["is_known"], shown["expires"]) == (False, None)
        assert shown["histories"]["clicked"]["times"] == times
        assert shown["histories"]["clicked"]["num_stored"] == 1
    assert shown["histories"]["clicked"]["events"][0]["item_id"] == items[0]
    assert shown["histories"]["clicked"]["events"][0]["dwell"] == "[15, 31)"
    done = run(location, "-m", training_set.folder, "--user", users[0], "--events", 1, "--json")
    assert all(len(h["times"]) <= 1 for h in json.loads(done.stdout)["user"]["histories"].values())


def test_who_is_not_there_is_named(training_set: TrainingSet, location: str, run: Callable[..., Any]) -> None:
    now = LATER
    store = OnlineStore(
        open_backend(location, is_writable=True),
        training_set.encoder,
        limits=Limits(item_ttl_s=10.0),
        now=lambda: now,
    )
    materialize(store, training_set)
    store.close()
    _, items = known_keys(training_set)
    done = run(location, "-m", training_set.folder, "-u", 987654, "-i", items[0], "-i", 123456, "--json")
    assert done.exit_code == 2
    assert "user 987654, item 123456 must be in the store, got nothing of them" in done.stderr
    assert [item["is_known"] for item in json.loads(done.stdout)["items"]] == [True, False]


def test_what_has_expired_says_so(training_set: TrainingSet, tmp_path: Path, run: Callable[..., Any]) -> None:
    location = f"lmdb:{tmp_path / 'online'}"
    long_ago = 1_600_000_000_000_000
    backend = open_backend(location, is_writable=True)
    store = OnlineStore(backend, training_set.encoder, limits=Limits(user_ttl_s=60.0), now=lambda: long_ago)
    materialize(store, training_set)
    store.close()
    users, _ = known_keys(training_set)
    done = run(location, "-m", training_set.folder, "-u", users[0])
    assert done.exit_code == 2
    assert f"user {users[0]} (expired 2020-09-13T12:27:40+00:00) must be in the store" in done.stderr
    assert "not stored: a request gets unknown values, expired 2020-09-13T12:27:40+00:00" in done.stdout


def test_what_is_wrong_is_named(training_set: TrainingSet, tmp_path: Path, run: Callable[..., Any]) -> None:
    location = f"lmdb:{tmp_path / 'online'}"
    store = store_of(training_set, location)
    materialize(store, training_set)
    store.close()
    other = build(tmp_path / "other", make_views(), make_schema())
    model = ("-m", training_set.folder)
    for arguments, words in (
        ((f"lmdb:{tmp_path / 'none'}",), "none must hold an online store, got none"),
        (("data/online",), "STORE must be lmdb:PATH or redis://HOST:PORT/DB, got 'data/online'"),
        ((location, "--user", 1), "--model must be given with --user and --item"),
        ((location, *model, "--user", "ann"), "user_id must be an integer, as the store's keys are, got 'ann'"),
        ((location, *model, "--user", 2**63), "user_id must be a signed 64-bit integer"),
        ((location, *model, "--at", "2026-01-31"), "write 2026-01-31T00:00:00Z for UTC"),
        ((location, *model, "--at=-5"), "--at must lie between 1970 and 2200"),
        (
            (location, "-m", other.folder, "--user", 1),
            f": it is {training_set.encoder.fingerprint[:12]}, the model's {other.encoder.fingerprint[:12]}",
        ),
    ):
        done = run(*arguments)
        assert done.exit_code == 2
        assert words in done.stderr
    assert not (tmp_path / "none").exists()
