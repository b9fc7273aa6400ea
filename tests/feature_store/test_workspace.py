from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from feature_store.build import build_training_set
from feature_store.workspace import exclusive, replacing
from recsys.errors import IntegrityError, SourceError
from recsys.training_set import TrainingSet
from tests.feature_store.small_views import config, make_schema, make_views, same_sets, write_views

ROOT = Path(__file__).parents[2]
FOREVER = """
import sys
from pathlib import Path
from feature_store.build import build_training_set
from tests.feature_store.small_views import config, make_schema
schema, data = make_schema(), config(Path(sys.argv[1]))
build_training_set(schema, data)
print("built", flush=True)
while True:
    build_training_set(schema, data, force=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    """Whatever is there after a SIGKILL is a whole set; the next build ends well and clears up."""
    write_views(tmp_path / "views", make_views(num_requests=3000, num_events=20_000))
    expected = make_reference(tmp_path)
    rng = random.Random(kills)
    left_behind = 0
    for kill in range(kills):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", FOREVER, str(tmp_path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if kill:
            # A set is there already, so the child says so at once and builds it over and over.
            assert process.stdout.readline() == "built\n"
            time.sleep(rng.uniform(0.0, 0.6))
        else:
            while not list(tmp_path.glob("training_set.tmp-*")):
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        left_behind += len(list(tmp_path.glob("training_set.tmp-*")))
        if (tmp_path / "training_set").exists():
            same_sets(expected, TrainingSet.open(tmp_path / "training_set", verify=True))
        else:
            with pytest.raises(IntegrityError):
                TrainingSet.open(tmp_path / "training_set")
    assert left_behind > 0, "no kill fell into a build: the test has shown nothing"
    build_training_set(make_schema(), config(tmp_path))
    same_sets(expected, TrainingSet.open(tmp_path / "training_set", verify=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "training_set", "training_set.lock", "views"]


def make_reference(folder: Path) -> TrainingSet:
    """The set that every build of the folder's views must give."""
    target = folder / "expected" / "training_set"
    build_training_set(make_schema(), config(folder, training_set=str(target)))
    (folder / "expected" / "training_set.lock").unlink()
    return TrainingSet.open(target, verify=True)


def test_killed_between_the_two_renames_the_old_set_is_put_back(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make_views())
    build_training_set(make_schema(), config(tmp_path))
    (tmp_path / "training_set").rename(tmp_path / "training_set.tmp-old-123")
    (tmp_path / "training_set.tmp-123").mkdir()
    assert build_training_set(make_schema(), config(tmp_path)).skipped
    assert sorted(p.name for p in tmp_path.iterdir()) == ["training_set", "training_set.lock", "views"]


def test_stale_folders_of_other_sets_are_left_alone(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make_views())
    for name in ("other.tmp-1", "training_set2.tmp-1", "training_set.tmp-1"):
        (tmp_path / name).mkdir()
    build_training_set(make_schema(), config(tmp_path))
    assert not (tmp_path / "training_set.tmp-1").exists()
    assert (tmp_path / "other.tmp-1").exists()
    assert (tmp_path / "training_set2.tmp-1").exists()


def test_a_name_with_pattern_characters_matches_only_itself(tmp_path: Path) -> None:
    folder = tmp_path / "set[1]"
    (tmp_path / "set1.tmp-1").mkdir()
    (tmp_path / "set[1].tmp-1").mkdir()
    with exclusive(folder):
        assert (tmp_path / "set1.tmp-1").exists()
        assert not (tmp_path / "set[1].tmp-1").exists()


@pytest.mark.parametrize("name", ["notes.txt", "model/weights.bin"])
def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, name: str) -> None:
    write_views(tmp_path / "views", make_views())
    path = tmp_path / "training_set" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(SourceError, match="must be a training set or not exist"):
        build_training_set(make_schema(), config(tmp_path), force=True)
    assert path.read_text() == "precious"


def finished_set(folder: Path) -> Path:
    write_views(folder / "views", make_views())
    build_training_set(make_schema(), config(folder))
    return folder / "training_set"


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"name": "my app", "files": {"precious.txt": {"bytes": 8, "sha256": ""}}},
        {"format": "recsys.artifact", "format_version": 2, "files": {"precious.txt": {"bytes": 8, "sha256": ""}}},
        [],
    ],
)
def test_a_manifest_of_something_else_is_no_licence(tmp_path: Path, manifest: object) -> None:
    write_views(tmp_path / "views", make_views())
    folder = tmp_path / "training_set"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "precious.txt").write_text("precious")
    with pytest.raises(SourceError, match="must be a training set or not exist"):
        build_training_set(make_schema(), config(tmp_path), force=True)
    assert (folder / "precious.txt").read_text() == "precious"


def test_a_set_with_a_users_own_file_is_never_replaced(tmp_path: Path) -> None:
    folder = finished_set(tmp_path)
    (folder / "train" / "notes.txt").write_text("precious")
    with pytest.raises(SourceError, match=r"also holds train/notes\.txt, which its manifest does not name"):
        build_training_set(make_schema(), config(tmp_path), force=True)
    assert (folder / "train" / "notes.txt").read_text() == "precious"


def test_a_set_from_before_manifests_had_a_format_is_known_by_its_fields(tmp_path: Path) -> None:
    folder = finished_set(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("format") == "recsys.training_set"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert build_training_set(make_schema(), config(tmp_path)).skipped
    (folder / "users.arrow").unlink()
    assert not build_training_set(make_schema(), config(tmp_path)).skipped
    TrainingSet.open(folder, verify=True)


@pytest.mark.parametrize("damage", ["cut", "files", "empty"])
def test_a_damaged_manifest_is_not_finished_and_the_build_says_what_to_delete(tmp_path: Path, damage: str) -> None:
    folder = finished_set(tmp_path)
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text({"cut": text[:99], "files": json.dumps(json.loads(text) | {"files": []}), "empty": ""}[damage])
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        TrainingSet.open(folder)
    with pytest.raises(SourceError, match=rf"manifest is damaged.*{path}") as caught:
        build_training_set(make_schema(), config(tmp_path))
    assert caught.value.hint is not None
    assert f"delete {folder} and run the command again" in caught.value.hint
    shutil.rmtree(folder)
    assert not build_training_set(make_schema(), config(tmp_path)).skipped


def test_a_damaged_summary_is_built_again(tmp_path: Path) -> None:
    folder = finished_set(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["summary"]["rows"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert not build_training_set(make_schema(), config(tmp_path)).skipped


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make_views())
    (tmp_path / "training_set").mkdir()
    build_training_set(make_schema(), config(tmp_path))
    TrainingSet.open(tmp_path / "training_set", verify=True)


def test_an_open_set_can_be_read_while_it_is_replaced(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make_views())
    build_training_set(make_schema(), config(tmp_path))
    time_of_requests = TrainingSet.open(tmp_path / "training_set").split("train").requests.array("@time")
    before = time_of_requests.copy()
    write_views(tmp_path / "views", make_views(seed=5))
    build_training_set(make_schema(), config(tmp_path), force=True)
    assert (time_of_requests == before).all()


def test_a_second_build_waits_for_the_first_and_finds_its_result(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make_views())
    summaries = []
    with (tmp_path / "training_set.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = [
            threading.Thread(target=lambda: summaries.append(build_training_set(make_schema(), config(tmp_path))))
            for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
        time.sleep(0.3)
        assert not list(tmp_path.glob("training_set*tmp*"))
        assert not summaries
    for thread in waiting:
        thread.join()
    assert sorted(s.skipped for s in summaries) == [False, True]


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = finished_set(tmp_path)
    before = (folder / "manifest.json").read_text()

    def fail() -> None:
        with exclusive(folder), replacing(folder) as new:
            (new / "manifest.json").write_text("new")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert (folder / "manifest.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["training_set", "training_set.lock", "views"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="can be written to"), exclusive(tmp_path / "file" / "set"):
        pass


def refusal(folder: Path) -> str:
    with pytest.raises(IntegrityError) as raised:
        TrainingSet.open(folder)
    return str(raised.value)


def test_who_opens_what_is_not_whole_is_told_what_happened(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with exclusive(folder), replacing(folder) as temporary:
        (temporary / "users.arrow").write_bytes(b"half")
        assert f"{folder} must hold a training set, got none yet: it is being built" in refusal(folder)
        draft = temporary.name
        shutil.copytree(temporary, tmp_path / "kept")
        (temporary / "manifest.json").write_text("{}")
    shutil.rmtree(folder)
    (tmp_path / "kept").rename(tmp_path / draft)  # as a SIGKILL leaves it
    said = refusal(folder)
    assert f"{folder} must hold a training set, got only {draft} beside it: a build was killed before its end" in said
    assert "Hint: run `recsys build CONFIG` again" in said
    said = refusal(tmp_path / draft)
    assert f"{draft} must hold a training set, got the unfinished work of a build of set" in said
    assert "Hint: name set; if it is not there, run `recsys build CONFIG` again" in said
    write_views(tmp_path / "views", make_views())
    build_training_set(make_schema(), config(tmp_path, training_set=str(folder)))
    assert not (tmp_path / draft).exists()
    (folder / "manifest.json").unlink()
    assert f"{folder} must hold a training set, got files, but no manifest.json" in refusal(folder)
    assert f"{tmp_path / 'nowhere'} must hold a training set, got no manifest.json" in refusal(tmp_path / "nowhere")
