"""``recsys materialize``: what it says of expired values, and how much room it gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from feature_store.online.lmdb_store import LMDB
from feature_store.online.location import open_backend
from feature_store.online.materialize import materialize
from feature_store.online.store import Limits, OnlineStore
from recsys.cli import app
from recsys.training_set import TrainingSet
from tests.training_sets import build_synthetic


@pytest.fixture(scope="module")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build_synthetic(tmp_path_factory.mktemp("materialize"), num_requests=120, seed=5)


def run(*arguments: object) -> str:
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    done = runner.invoke(app, ["materialize", *map(str, arguments)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_what_had_expired_is_told(training_set: TrainingSet, tmp_path: Path) -> None:
    shown = {}
    for form in ((), ("--json",)):
        location = f"lmdb:{tmp_path / ('store' + ''.join(form))}"
        backend = open_backend(location, is_writable=True)
        old = OnlineStore(
            backend, training_set.encoder, limits=Limits(user_ttl_s=60.0), now=lambda: 1_600_000_000_000_000
        )
        materialize(old, training_set)
        old.close()
        shown[form] = run(location, "--training-set", training_set.folder, *form)
    num_swept = json.loads(shown["--json",])["swept"]
    assert num_swept > 30
    assert ["expired,", "removed", str(num_swept)] in [line.split() for line in shown[()].splitlines()]
    # Nothing expires without a limit: nothing is said.
    assert "expired, removed" not in run(f"lmdb:{tmp_path / 'plain'}", "--training-set", training_set.folder)


def test_a_run_can_give_an_lmdb_store_more_room(training_set: TrainingSet, tmp_path: Path) -> None:
    for room in (("--map-gib", 70), ()):
        run(f"lmdb:{tmp_path / 'online'}", "-t", training_set.folder, *room)
        store = LMDB(tmp_path / "online", is_writable=False)
        assert store._environment.info()["map_size"] == 70 << 30
        store.close()
