"""Files and folders put in place: whole, durable before they have their name, or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recsys.errors import ConfigError
from recsys.files import (
    append_line,
    check_can_write,
    draft_of,
    put_in_place,
    replacing_file,
    sync_tree,
    write_json,
    write_text,
)


class Killed(BaseException):
    """Stands for a process that ends here."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches the disk, in order: ``sync NAME`` and ``rename NAME``."""
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def synced(descriptor: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name[:4]}")
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        done.append(f"rename {target.name}")
        replace(source, target)

    def renamed(source: Path, target: Path) -> Path:
        done.append(f"rename {target.name[:4]}")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    return done


def folder_holding(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "x").write_text(content)
    return path


def test_a_file_is_durable_before_it_has_its_name(tmp_path: Path, steps: list[str]) -> None:
    write_text(tmp_path / "new" / "a", "ü\n")
    assert steps == ["sync .tmp", "rename a"]
    assert (tmp_path / "new" / "a").read_bytes() == "ü\n".encode()


@pytest.mark.parametrize("error", [ValueError, Killed])
def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "a", "old")

    def fail(path: Path) -> None:
        with replacing_file(path) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(error):
        fail(tmp_path / "a")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a", {"x": object()})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_json(tmp_path / name, {"name": "ü", "n": [1, 2.5]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_text().endswith("}\n")
    assert json.loads((tmp_path / "a").read_text()) == {"name": "ü", "n": [1, 2.5]}


def test_lines_are_added_and_durable(tmp_path: Path, steps: list[str]) -> None:
    append_line(tmp_path / "log", "one")
    append_line(tmp_path / "log", "two")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    assert steps == ["sync log", "sync log"]


def test_a_tree_is_synced_from_its_leaves_up(tmp_path: Path, steps: list[str]) -> None:
    folder_holding(folder_holding(tmp_path / "outer", "1") / "in", "2")
    sync_tree(tmp_path / "outer")
    assert steps == ["sync x", "sync in", "sync x", "sync oute"]
    steps.clear()
    sync_tree(tmp_path / "outer", files=False)
    assert steps == ["sync in", "sync oute"]


def test_the_old_folder_goes_when_the_new_name_is_durable(
    tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def removed(path: Path, ignore_errors: bool) -> None:
        steps.append("remove")
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", removed)
    folder, draft = folder_holding(tmp_path / "set", "old"), folder_holding(tmp_path / "draft", "new")
    put_in_place(draft, folder, retired=tmp_path / "gone")
    assert steps == ["rename gone", "rename set", f"sync {tmp_path.name[:4]}", "remove"]
    assert [(p.name, (p / "x").read_text()) for p in tmp_path.iterdir()] == [("set", "new")]


@pytest.mark.parametrize("kill_at", range(4))
def test_a_process_killed_at_any_step_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    folder, draft = folder_holding(tmp_path / "set", "old"), folder_holding(tmp_path / "draft", "new")
    calls = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > kill_at:
                raise Killed
            return original(*args, **kwargs)

        return call

    for owner, name in [(Path, "rename"), (os, "fsync"), (shutil, "rmtree")]:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    with pytest.raises(Killed):
        put_in_place(draft, folder, retired=tmp_path / "gone")
    found = {p.name: (p / "x").read_text() for p in tmp_path.iterdir()}
    assert (
        found
        == [
            {"set": "old", "draft": "new"},
            {"gone": "old", "draft": "new"},
            {"set": "new", "gone": "old"},
            {"set": "new", "gone": "old"},
        ][kill_at]
    )


def test_a_new_folder_that_cannot_be_put_in_place_gives_the_old_one_its_name_back(tmp_path: Path) -> None:
    folder = folder_holding(tmp_path / "set", "old")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "never_made", folder, retired=tmp_path / "gone")
    assert [(p.name, (p / "x").read_text()) for p in tmp_path.iterdir()] == [("set", "old")]


def test_drafts_are_hidden_and_never_the_same(tmp_path: Path) -> None:
    names = {draft_of(tmp_path / "set").name for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith(".tmp-set-") for name in names)


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y/z", "/dev/null/x", "FILE/x/y", "x" * 300, "x" * 300 + "/y"])
def test_what_cannot_be_written_is_refused_by_its_path(tmp_path: Path, place: str) -> None:
    (tmp_path / "FILE").write_text("")
    path = tmp_path / place
    with pytest.raises(ConfigError) as error:
        check_can_write(path, name="--output")
    assert error.value.message.startswith(f"--output must be a place that can be written to, got {path}: ")


@pytest.mark.parametrize("place", ["new", "new/deeper", "FILE", "FOLDER"])
def test_what_can_be_written_is_left_as_it_is(tmp_path: Path, place: str) -> None:
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FOLDER").mkdir()
    check_can_write(tmp_path / place, name="--output")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["FILE", "FOLDER"]


def test_a_relative_path_is_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_can_write(Path("new/deeper"), name="--output")
    assert list(tmp_path.iterdir()) == []
