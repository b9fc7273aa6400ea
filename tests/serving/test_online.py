"""Serving from an online store: the same answers as from the training set, and events as they are pushed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from feature_store.online.location import open_backend
from feature_store.online.materialize import materialize
from feature_store.online.pushing import Event
from feature_store.online.store import Limits, OnlineStore
from recsys.cli import app
from recsys.errors import ArtifactError, ConfigError, RecsysError, SourceError, UnavailableError
from recsys.predictor import Predictor
from recsys.training_set import TIME
from serving.online_features import OnlineFeatures
from serving.scorer import Scorer
from tests.serving.conftest import World
from tests.training_sets import build_synthetic


def filled(world: World, location: str, **limits: Any) -> OnlineStore:
    backend = open_backend(location, is_writable=True)
    store = OnlineStore(backend, world.training_set.encoder, limits=Limits(**limits))
    materialize(store, world.training_set)
    return store


def requests_of(world: World) -> list[dict[str, Any]]:
    """Requests with known, unknown and no users, one and many candidates, stored and given histories."""
    users, items = world.training_set.users.keys, world.training_set.items.keys
    assert users is not None
    assert items is not None
    keys = items[1:].to_pylist()
    times = world.training_set.split("test").requests.array(TIME).tolist()
    made: list[dict[str, Any]] = [
        {"user_id": user, "candidates": keys[place : place + 1 + place % 7], "time": times[place % len(times)]}
        for place, user in enumerate(users[1:13].to_pylist())
    ]
    made.append({"user_id": None, "candidates": [*keys[:3], 12345], "time": times[0]})
    made.append({"user_id": 424242, "candidates": keys[:3], "time": times[0]})
    made.append({**made[0], "histories": {"clicked": [keys[3], keys[4]]}, "user": {"age": 33.0}})
    return made


def test_the_same_answers_as_from_the_training_set(world: World, location: str) -> None:
    store = filled(world, location, keep_events=1000)
    predictor = Scorer.load(world.artifact).predictor
    online = Scorer(predictor, OnlineFeatures(store))
    offline = Scorer.load(world.artifact, features=world.training_set.folder)
    for request in requests_of(world):
        found, expected = online.rank(request), offline.rank(request)
        assert found.items == expected.items
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)
        assert found.num_unknown_candidates == expected.num_unknown_candidates
        assert found.is_unknown_user == expected.is_unknown_user
    # Many requests in one batch, too.
    parsed = [online.parser.parse(request) for request in requests_of(world)]
    found_batch, expected_batch = online.assembler.batch(parsed).batch, offline.assembler.batch(parsed).batch
    np.testing.assert_array_equal(online.score(found_batch), offline.score(expected_batch))
    store.close()


def test_a_request_is_one_read(world: World, location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(world, location)
    scorer = Scorer(Scorer.load(world.artifact).predictor, OnlineFeatures(store))
    reads: list[int] = []
    plain = store.backend.get
    monkeypatch.setattr(store.backend, "get", lambda keys: (reads.append(len(keys)), plain(keys))[1])
    scorer.rank(requests_of(world)[5])
    assert reads == [1 + 2 + 6]  # the user, two histories, the candidates
    store.close()


def test_the_next_request_sees_a_pushed_event_and_none_at_its_own_time(world: World, location: str) -> None:
    store = filled(world, location)
    scorer = Scorer(Scorer.load(world.artifact).predictor, OnlineFeatures(store))
    offline = Scorer.load(world.artifact, features=world.training_set.folder)
    item = requests_of(world)[0]["candidates"][0]
    when = 1_800_000_000_000_000
    request = {"user_id": 424243, "candidates": [item], "time": when + 1}
    before = scorer.rank(request).probabilities
    assert store.push(Event(424243, item, when, "click", {"dwell": 30})).histories == ["clicked", "seen"]
    after = scorer.rank(request).probabilities
    assert not np.array_equal(before, after)
    event = {"item_id": item, "time": when, "dwell": 30}
    given = {**request, "histories": {"clicked": [event], "seen": [{"item_id": item, "time": when}]}}
    np.testing.assert_array_equal(after, offline.rank(given).probabilities)
    np.testing.assert_array_equal(
        scorer.rank({**request, "time": when}).probabilities, offline.rank({**request, "time": when}).probabilities
    )
    store.close()


def test_a_scorer_of_another_encoder_refuses(world: World, location: str, tmp_path: Path) -> None:
    other = build_synthetic(tmp_path / "other", num_requests=60, seed=77)
    OnlineStore(open_backend(location, is_writable=True), other.encoder, limits=Limits()).close()
    with pytest.raises(ArtifactError, match="must be encoded by the model's encoder, got another one's"):
        Scorer.load(world.artifact, features=location)


@pytest.mark.parametrize(
    ("location", "error", "words"),
    [
        ("lmdb:nowhere", SourceError, "recsys materialize"),
        ("redis://127.0.0.1:1/0", UnavailableError, "must be a Redis server that answers"),
        ("unix:///nowhere.sock", UnavailableError, "must be a Redis server that answers"),
    ],
)
def test_no_store(world: World, location: str, error: type[RecsysError], words: str) -> None:
    with pytest.raises(error, match=words):
        Scorer.load(world.artifact, features=location)


def test_a_password_is_not_shown() -> None:
    with pytest.raises(UnavailableError) as caught:
        open_backend("redis://:secret@127.0.0.1:1/0", is_writable=False)
    assert "secret" not in str(caught.value)


def test_locations() -> None:
    for wrong in ("lmdb:", "folder", "http://host"):
        with pytest.raises(ConfigError, match="STORE must be lmdb:PATH or redis"):
            open_backend(wrong, is_writable=False)
    with pytest.raises(ConfigError, match=r"redis://localhost:1/one must name a database by its number, got 'one'"):
        open_backend("redis://localhost:1/one", is_writable=False)


# The commands


@pytest.fixture
def run() -> Callable[..., Any]:
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    return lambda *arguments, **more: runner.invoke(app, [str(a) for a in arguments], **more)


def test_the_commands(world: World, location: str, run: Callable[..., Any]) -> None:
    folder = world.training_set.folder
    middle = "2023-11-18T00:00:00Z"
    done = run("materialize", location, "--training-set", folder, "--until", middle, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["written"]["users"] == 30
    done = run("materialize", location, "-t", folder)
    assert done.exit_code == 0, done.stderr
    assert "items written" in done.stdout
    item = requests_of(world)[0]["candidates"][0]
    event = {"user_id": 424244, "item_id": item, "type": "click", "time": "2030-01-01T00:00:00+00:00", "dwell": 3}
    done = run("push", location, "--model", world.artifact, json.dumps(event), "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["pushed"] == {"clicked": 1, "seen": 1}
    lines = "\n".join(json.dumps({**event, "type": kind}) for kind in ("view", "view")) + "\n\n"
    done = run("push", location, "-m", folder, "--json", input=lines)
    assert json.loads(done.stdout) == {
        "store": location, "events": 2, "fed_derived_values_only": 0, "changed_nothing": 0,
        "pushed": {"clicked": 0, "seen": 2},
    }  # fmt: skip
    features = OnlineFeatures.open(location, world.training_set.encoder)
    when = np.array([2_000_000_000_000_000])
    users = pa.array([424244])
    assert features.history("seen", users, when, 9).times.tolist() == [1_893_456_000_000_000] * 3
    assert len(features.history("clicked", users, when, 9).times) == 1
    features.store.close()
    assert isinstance(Scorer.load(world.artifact, features=location).predictor, Predictor)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ("{", "event 1: must be a JSON object"),
        ("[]", "event 1: must be a JSON object"),
        ('{"item_id": 1, "type": "click"}', "event 1: 'user_id' must be given"),
        ('{"user_id": 1, "item_id": 1, "type": "click", "time": 1.5}', "event 1: 'time' must be ISO 8601"),
        ('{"user_id": 1, "item_id": 1}', "event 1: type must be given"),
        ('{"user_id": 1, "user_id": 2, "item_id": 1, "type": "click"}', "event 1: 'user_id' must be given once"),
        (
            '{"user_id": 1, "item_id": 1, "type": "click", "dwell": NaN}',
            "event 1: must be a JSON object, which has no NaN",
        ),
        ('{"user_id": 1, "item_id": 1, "type": "click", "dwell": 1e999}', "event 1: 'dwell' must be finite"),
        ('{"user_id": 1, "item_id": 1, "type": ["click"]}', "event 1: 'type' must be text or an integer"),
        ('{"user_id": 1, "item_id": 9223372036854775808, "type": "click"}', "event 1: the item's key must be a signed"),
        ('{"user_id": 1, "item_id": 1, "type": "click", "time": "2030-01-01"}', "write 2030-01-01T00:00:00Z for UTC"),
        ('{"user_id": 1, "item_id": 1, "type": "click", "time": "\u00b2"}', "event 1: 'time' must be ISO 8601 text"),
        ('{"user_id": 1, "item_id": 1, "type": "click", "time": "0001-01-01T00:00:00Z"}', "between 1970 and 2200"),
        pytest.param("[" * 100_000, "event 1: must be a JSON object", id="deep"),
        ('{"user_id": 1, "item_id": 1, "type": "click", "dwel": 1}', "event 1: 'dwel' must be a column"),
    ],
)
def test_events_that_are_none(world: World, tmp_path: Path, run: Callable[..., Any], event: str, words: str) -> None:
    location = f"lmdb:{tmp_path / 'online'}"
    filled(world, location).close()
    done = run("push", location, "--model", world.artifact, event)
    assert done.exit_code == 2
    assert words in done.stderr


def test_bytes_that_are_no_text_and_where_to_go_on(world: World, tmp_path: Path, run: Callable[..., Any]) -> None:
    location = f"lmdb:{tmp_path / 'online'}"
    filled(world, location).close()
    event = json.dumps({"user_id": 424244, "item_id": 5, "type": "click"}).encode()
    done = run("push", location, "-m", world.artifact, input=b"\xef\xbb\xbf" + event + b"\r\n\n" + b"{\xff}\n" + event)
    assert done.exit_code == 2
    assert "event 3: must be UTF-8, got other bytes" in done.stderr
    assert "those before it are in the store: go on with this one" in done.stderr
    store = OnlineStore(open_backend(location, is_writable=False), world.training_set.encoder)
    assert len(store.history("clicked", pa.array([424244])).times) == 1
    store.close()


def test_folders_of_other_things_are_no_stores(world: World, tmp_path: Path, run: Callable[..., Any]) -> None:
    """A store in the folder of a training set would keep it from being built again."""
    folder = world.training_set.folder
    before = sorted(p.name for p in folder.iterdir())
    event = json.dumps({"user_id": 1, "item_id": 5, "type": "click"})
    (tmp_path / "file").write_text("x")
    for place, words in ((folder, "got a folder of other files"), (tmp_path / "file", "got a file")):
        done = run("materialize", f"lmdb:{place}", "-t", folder)
        assert done.exit_code == 2
        assert f"{place} must be the folder of an online store, or be empty, or not exist, {words}" in done.stderr
    for place in (folder, tmp_path / "nowhere"):
        done = run("push", f"lmdb:{place}", "-m", folder, event)
        assert done.exit_code == 2
        assert f"{place} must hold an online store, got none" in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == before
    assert not (tmp_path / "nowhere").exists()
    done = run("push", f"lmdb:{tmp_path}", "-m", tmp_path / "nowhere", event)
    assert "--model must be the folder of an artifact or of a training set" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--until", "9" * 25), "--until must lie between 1970 and 2200"),
        (("--until", "9" * 40), "TIME must be ISO 8601 or UTC microseconds"),
        (("--until", "\u00b2"), "TIME must be ISO 8601 or UTC microseconds"),
        (("--until", "-5"), "--until must lie between 1970 and 2200"),
        (("--until", "1700000000"), "got 1700000000, which is 1970-01-01T00:28:20+00:00: events go on until 20"),
        (("--until", "2023-11-18"), "write 2023-11-18T00:00:00Z for UTC"),
        (("--user-ttl", "1e300"), "user_ttl_s: must be less than or equal to 3155760000"),
        (("--keep-events", "99999999999999999999"), "keep_events: must be less than or equal to 1000000000"),
    ],
)
def test_options_that_cannot_be_meant(
    world: World, tmp_path: Path, run: Callable[..., Any], arguments: tuple[str, str], words: str
) -> None:
    name, value = arguments
    done = run("materialize", f"lmdb:{tmp_path / 'online'}", "-t", world.training_set.folder, f"{name}={value}")
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_type_that_nothing_names_is_told_once(world: World, tmp_path: Path, run: Callable[..., Any]) -> None:
    location = f"lmdb:{tmp_path / 'online'}"
    filled(world, location).close()
    kinds = ("click", "clik", "view", "clik", "CLICK")
    event = {"user_id": 424244, "item_id": 5, "time": "2030-01-01T00:00:00Z"}
    done = run("push", location, "-m", world.artifact, *(json.dumps({**event, "type": kind}) for kind in kinds))
    assert done.exit_code == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"event {number}: type {kind!r} is named by no history and no derived value, and goes to histories of all "
        "types only: did you mean 'click'?"
        for number, kind in ((2, "clik"), (5, "CLICK"))
    ]


@pytest.mark.parametrize("time", [1_735_689_600, 1_735_689_600_000], ids=["seconds", "milliseconds"])
def test_a_pushed_time_in_another_unit_is_told(
    world: World, tmp_path: Path, run: Callable[..., Any], time: int
) -> None:
    location = f"lmdb:{tmp_path / 'online'}"
    filled(world, location).close()
    event = json.dumps({"user_id": 424244, "item_id": 5, "type": "view", "time": time})
    done = run("push", location, "--model", world.artifact, event)
    assert done.exit_code == 2
    assert f"got {time}, which is 1970-01" in done.stderr
    done = run("push", location, "--model", world.artifact, event, "--any-time", "--json")
    assert json.loads(done.stdout)["pushed"]["seen"] == 1
