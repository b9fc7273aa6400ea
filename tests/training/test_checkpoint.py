from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import training.checkpoint
from recsys.errors import CheckpointError
from training.checkpoint import CheckpointStore, checkpoint_name


def state(value: float, rows: int = 5) -> dict[str, Any]:
    return {
        "model": {"table.weight": torch.full((rows, 3), value), "bias": torch.tensor([value])},
        "optimizer": {"state": {"bias": {"exp_avg": torch.tensor([value * 2]), "step": torch.tensor(value)}}},
    }


def values(loaded: dict[str, Any]) -> set[float]:
    """The values that all tensors of a state were made from."""
    flat = [*loaded["model"].values(), *loaded["optimizer"]["state"]["bias"].values()]
    scale = [1, 1, 2, 1]
    return {v / s for tensor, s in zip(flat, scale, strict=True) for v in tensor.flatten().tolist()}


def loaded_value(store: CheckpointStore) -> float:
    latest = store.latest
    assert latest is not None
    into = state(0.0)
    store.load(latest, into)
    (value,) = values(into)
    assert store.read_progress(latest)["value"] == value
    return value


def save(store: CheckpointStore, step: int, *, best: str | None = None) -> str:
    return store.save(step, state(float(step)), {"value": float(step), "best": best})


def folders(store: CheckpointStore) -> set[str]:
    return {p.name for p in store.folder.iterdir() if p.is_dir()}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_what_was_saved_is_loaded(store: CheckpointStore) -> None:
    assert store.latest is None
    save(store, 7)
    assert store.latest == "step-000000000007"
    assert loaded_value(store) == 7.0


def test_a_part_of_the_state_can_be_loaded(store: CheckpointStore) -> None:
    name = save(store, 7)
    model = state(0.0)["model"]
    store.load(name, {"model": model})
    assert torch.equal(model["table.weight"], torch.full((5, 3), 7.0))


def test_the_newest_two_and_their_best_are_kept(store: CheckpointStore) -> None:
    first = save(store, 1, best=checkpoint_name(1))
    for step in (2, 3, 4):
        save(store, step, best=first)
    assert folders(store) == {first, checkpoint_name(3), checkpoint_name(4)}
    save(store, 5, best=checkpoint_name(5))
    assert folders(store) == {first, checkpoint_name(4), checkpoint_name(5)}, "4 still refers to the first"
    save(store, 6, best=checkpoint_name(5))
    assert folders(store) == {checkpoint_name(5), checkpoint_name(6)}


class Killed(BaseException):
    pass


def save_dying_at(store: CheckpointStore, step: int, kill_at: int) -> bool:
    """Saves, but nothing touches the disk from the given call on; whether the save got to its end."""
    calls = 0

    def dying(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= kill_at:
                raise Killed
            return original(*args, **kwargs)

        return call

    places = [(Path, "mkdir"), (Path, "rename"), (Path, "unlink"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in places:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            save(store, step, best=checkpoint_name(step))
        except (Killed, CheckpointError):  # torch wraps what is raised inside of it
            return False
    return True


def test_a_process_killed_at_any_write_leaves_the_old_checkpoint_or_the_new(tmp_path: Path) -> None:
    found = []
    for kill_at in range(1, 100):
        store = CheckpointStore(tmp_path / str(kill_at))
        save(store, 1, best=checkpoint_name(1))
        save(store, 2, best=checkpoint_name(1))
        finished = save_dying_at(store, 3, kill_at)

        again = CheckpointStore(store.folder)
        value = loaded_value(again)
        found.append(value)
        assert value == 3.0 if finished else value in (2.0, 3.0)
        if value == 2.0:
            into = state(0.0)
            again.load(checkpoint_name(1), into)  # the best one is still there
            assert values(into) == {1.0}
        save(again, 3, best=checkpoint_name(3))
        assert loaded_value(again) == 3.0
        assert not [n for n in folders(again) if n.startswith(".tmp-")]
        if finished:
            break
    assert found == sorted(found)
    assert found.count(2.0) >= 5
    assert found.count(3.0) >= 2, "killed after the new one had its name"


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_changed_byte_is_found(store: CheckpointStore, file: str) -> None:
    name = save(store, 1)
    path = store.folder / name / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        store.load(name, state(0.0))


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_missing_file_is_found(store: CheckpointStore, file: str) -> None:
    name = save(store, 1)
    (store.folder / name / file).unlink()
    with pytest.raises(CheckpointError, match=r"Hint: delete .*step-000000000001 to resume from the checkpoint before"):
        store.load(name, state(0.0))


def test_after_deleting_a_damaged_checkpoint_the_one_before_is_the_latest(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    name = save(store, 2)
    for path in (store.folder / name).iterdir():
        path.unlink()
    (store.folder / name).rmdir()
    with caplog.at_level(logging.WARNING):
        assert loaded_value(store) == 1.0
    assert f"{name} was removed" in caplog.text


def test_a_checkpoint_of_another_model_does_not_fit(store: CheckpointStore) -> None:
    name = save(store, 1)
    with pytest.raises(CheckpointError, match=r"does not fit this model: .*model\.table\.weight"):
        store.load(name, state(0.0, rows=6))
    more = state(0.0)
    more["model"]["other"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"does not fit this model: .*model\.other"):
        store.load(name, more)


def test_a_checkpoint_of_another_version_is_refused(store: CheckpointStore) -> None:
    name = save(store, 1)
    path = store.folder / name / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="must be of format 1, got 99"):
        store.load(name, state(0.0))


def test_a_full_disk_is_reported_and_leaves_the_old_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.checkpoint, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
        save(store, 2)
    assert loaded_value(store) == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold an object"),
        ({"format_version": 1}, "must say world, progress, files"),
        ({"format_version": 1, "world": 1, "progress": {}, "files": []}, "files must be an object"),
        ({"format_version": 1, "world": "1", "progress": {}, "files": {}}, "world must be a whole number"),
    ],
)
def test_a_manifest_of_other_types_is_refused(store: CheckpointStore, content: Any, message: str) -> None:
    name = save(store, 1)
    (store.folder / name / "manifest.json").write_text(json.dumps(content))
    for read in (lambda: store.load(name, state(0.0)), lambda: store.read_progress(name)):
        with pytest.raises(CheckpointError, match=rf"manifest\.json.* {message}"):
            read()


@pytest.mark.parametrize("content", [[], {}, {"checkpoints": {}}, {"checkpoints": [1]}, {"checkpoints": ["../other"]}])
def test_a_list_of_checkpoints_of_other_types_is_refused(store: CheckpointStore, content: Any) -> None:
    save(store, 1)
    (store.folder / "latest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"latest\.json"):
        _ = store.latest
