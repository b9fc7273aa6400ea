from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from feature_store.datasets.folder import views_folder
from recsys.errors import SourceError
from recsys.files import write_json

MARKER = "made.json"
ROOT = Path(__file__).parents[3]


def write(output: Path, content: str) -> None:
    with views_folder(output, marker=MARKER) as folder:
        (folder / "view.txt").write_text(content)
        write_json(folder / MARKER, {"a": 1})


def leftovers(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir() if p.name.startswith(".tmp-")]


def test_writes_a_new_folder_and_replaces_one_of_its_own(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "views"
    write(output, "first")
    (output / "stale.txt").write_text("of the first")
    write(output, "second")
    assert sorted(p.name for p in output.iterdir()) == [MARKER, "view.txt"]
    assert (output / "view.txt").read_text() == "second"
    assert leftovers(output.parent) == []


def test_an_error_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    output = tmp_path / "views"
    write(output, "first")
    with pytest.raises(TypeError):
        write(output, 3)  # type: ignore[arg-type]
    assert (output / "view.txt").read_text() == "first"
    assert leftovers(tmp_path) == []


def test_never_replaces_a_users_own_files(tmp_path: Path) -> None:
    output = tmp_path / "home"
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    with pytest.raises(SourceError, match=r"home must be empty or hold made\.json"):
        write(output, "views")
    assert (output / "thesis.tex").read_text() == "precious"
    assert leftovers(tmp_path) == []


def test_an_empty_folder_may_be_filled_and_a_file_may_not_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "views")
    assert (tmp_path / "empty" / "view.txt").read_text() == "views"
    (tmp_path / "file").write_text("text")
    with pytest.raises(SourceError, match="must be a folder, got a file"):
        write(tmp_path / "file", "views")


KILLED = """
import os, signal, sys
from pathlib import Path
from feature_store.datasets.folder import views_folder
with views_folder(Path(sys.argv[1]), marker="made.json") as folder:
    (folder / "view.txt").write_text("half")
    print("writing", flush=True)
    signal.pause() if len(sys.argv) > 2 else os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    output = tmp_path / "views"
    write(output, "first")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(output)], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    assert (output / "view.txt").read_text() == "first"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(output), "wait"], cwd=ROOT, stdout=subprocess.PIPE
    ) as living:
        assert living.stdout is not None
        living.stdout.readline()
        write(output, "second")
        assert len(leftovers(tmp_path)) == 1  # the living one's
        living.kill()
    write(output, "third")
    assert leftovers(tmp_path) == []
    assert (output / "view.txt").read_text() == "third"
