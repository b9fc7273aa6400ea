"""The command line: instant help, clean errors, exit statuses, stdout for results only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from recsys import __version__
from recsys.cli import AFTER_INTERRUPT, app
from recsys.errors import DataError

COMMANDS = (
    *("simulate", "data", "build", "train", "sweep", "scale", "evaluate", "export", "score"),
    *("materialize", "push", "fetch", "serve", "demo", "bench"),
)
MOST_MODULES = 400
"""What makes help slow is what it loads: 342 modules take a third of a second of a slow processor."""
HEAVY = {"torch", "torchrec", "polars", "mlflow", "ray", "numpy", "pyarrow", "pandas", "pydantic", "yaml", "uvicorn"}


@pytest.fixture
def run() -> Callable[..., Any]:
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    return lambda *arguments: runner.invoke(app, list(arguments))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Puts a benchmark of one's own where ``recsys bench score`` looks for it: a command whose work a test decides."""

    def put(work: Callable[[], Any]) -> None:
        package, module = ModuleType("benchmarks"), ModuleType("benchmarks.score")
        package.__path__ = []  # type: ignore[attr-defined]
        module.run = work  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "benchmarks", package)
        monkeypatch.setitem(sys.modules, "benchmarks.score", module)

    return put


def fail(error: BaseException) -> Callable[[], Any]:
    def work() -> Any:
        raise error

    return work


@pytest.mark.parametrize("command", ["", *COMMANDS, "data check", "data inspect"])
def test_help_comes_at_once_and_shows_an_example(command: str) -> None:
    arguments = [*command.split(), "--help"]
    code = (
        "import sys; from recsys.cli import main\n"
        f"sys.argv = ['recsys', *{arguments!r}]\n"
        "try:\n    main()\n"
        "finally:\n    print('\\n@', *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    shown, _, loaded = done.stdout.rpartition("@")
    modules = loaded.split()
    assert not HEAVY & {module.partition(".")[0] for module in modules}
    assert len(modules) < MOST_MODULES
    assert f"recsys {command}" in shown
    assert "Example:" in shown or not command


def test_help_lists_every_command(run: Callable[..., Any]) -> None:
    shown = run("--help").stdout
    assert all(f" {command} " in shown for command in COMMANDS)


def test_every_advice_is_for_a_command() -> None:
    assert set(AFTER_INTERRUPT) <= set(COMMANDS)


def test_version(run: Callable[..., Any]) -> None:
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, f"recsys {__version__}\n")


def test_an_unknown_option_is_a_usage_error(run: Callable[..., Any]) -> None:
    done = run("train", "x.yaml", "--epochz", "3")
    assert done.exit_code == 2
    assert "--epochz" in done.stderr


def test_an_error_of_ours_is_a_message_and_a_hint(run: Callable[..., Any], benchmark: Any) -> None:
    benchmark(fail(DataError("column 'clicks' must hold 0 or 1, got [2]", hint="give at_least")))
    done = run("bench", "score")
    assert done.exit_code == 2
    assert "Error: column 'clicks' must hold 0 or 1, got [2]\n\nHint: give at_least\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("by", ["option", "environment"])
def test_debug_shows_where_an_error_was_raised(
    run: Callable[..., Any], benchmark: Any, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    error = DataError("no")
    benchmark(fail(error))
    if by == "option":
        done = run("--debug", "bench", "score")
    else:
        done = CliRunner(env={"RECSYS_DEBUG": "1"}).invoke(app, ["bench", "score"])
    assert done.exception is error


def test_a_defect_shows_its_traceback_and_status_1(run: Callable[..., Any], benchmark: Any) -> None:
    benchmark(fail(ZeroDivisionError("oops")))
    done = run("bench", "score")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: oops" in done.stderr
    assert "Unexpected ZeroDivisionError" in done.stderr
    assert done.stdout == ""


def test_a_file_that_cannot_be_used_is_named_without_a_traceback(
    run: Callable[..., Any], benchmark: Any, tmp_path: Path
) -> None:
    benchmark((tmp_path / "nowhere" / "file").read_text)
    done = run("bench", "score")
    assert done.exit_code == 2
    assert f"Error: {tmp_path / 'nowhere' / 'file'} cannot be used: No such file or directory\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_the_system_without_a_file_is_a_defect(run: Callable[..., Any], benchmark: Any) -> None:
    benchmark(fail(OSError(24, "Too many open files")))
    done = run("bench", "score")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr


def write_manifest(folder: Path) -> None:
    """The manifest of an artifact that holds nothing."""
    manifest = {"format": "recsys.artifact", "format_version": 2, "name": "din", "schema": {}}
    manifest |= {"encoder_fingerprint": "", "tables": {}, "spaces": [], "programs": {}, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


EARLY = """
import sys
from typer.testing import CliRunner
from recsys.cli import app
done = CliRunner().invoke(app, ["serve", *sys.argv[1:]])
print(done.stderr, done.exit_code, "torch" in sys.modules)
"""


def test_what_keeps_a_service_from_starting_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, message in (
            ([str(tmp_path), "--port", port], f"port {port} of 127.0.0.1 must be free"),
            ([str(tmp_path / "nowhere")], "must be an artifact's folder, got no such folder"),
            (["models:/din@"], "artifact must be a folder, models:/NAME@ALIAS or models:/NAME/VERSION"),
        ):
            command = [sys.executable, "-c", EARLY, *options]
            said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
            assert message in said
            assert said.split()[-2:] == ["2", "False"]


def test_an_interrupt_is_status_130(run: Callable[..., Any], benchmark: Any) -> None:
    benchmark(fail(KeyboardInterrupt()))
    done = run("bench", "score")
    assert done.exit_code == 130
    assert "Interrupted." in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_stage_says_how_to_go_on(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "feature_store.datasets", Interrupted("feature_store.datasets"))
    done = run("data", "list")
    assert done.exit_code == 130
    assert AFTER_INTERRUPT["data"] in done.stderr


def test_json_is_all_of_stdout(run: Callable[..., Any], benchmark: Any) -> None:
    benchmark(lambda: {"p50_ms": 1.5, "undefined": float("nan"), "versions": {"torch": "2.13"}})
    done = run("bench", "score", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"p50_ms": 1.5, "undefined": None, "versions": {"torch": "2.13"}}
    assert "benchmark score" in done.stderr


def test_figures_are_shown_flat_and_unfolded(run: Callable[..., Any], benchmark: Any) -> None:
    path = "/a/long/path" * 30
    benchmark(
        lambda: {"p50_ms": 1.5, "rows_per_s": 123456.7, "machine": {"cores": 2, "models": ["a", "b"]}, "at": path}
    )
    lines = run("bench", "score").stdout.splitlines()
    assert lines == [
        "score",
        "p50_ms          1.5000",
        "rows_per_s      123,457",
        "machine.cores   2",
        "machine.models  a, b",
        f"at              {path}",
    ]


def test_benchmarks_need_a_checkout(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.delitem(sys.modules, "benchmarks.score", raising=False)
    done = run("bench", "score")
    assert done.exit_code == 2
    assert "checkout" in done.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    """``recsys data list | head -0``: the reader is gone before the first word."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "recsys.cli", "data", "list"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_options_of_serve_win_over_its_file(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import serving.service
    from serving.settings import ServiceConfig

    served: list[ServiceConfig] = []
    monkeypatch.setattr(serving.service, "serve", lambda config, listener: served.append(config))
    write_manifest(tmp_path)
    file = tmp_path / "serve.yaml"
    file.write_text(f"artifact: {tmp_path}\nport: 9000\nmax_candidates: 7\n")

    done = run("serve", "--config", str(file), "--port", "0")

    assert done.exit_code == 0
    assert (served[0].artifact, served[0].port, served[0].max_candidates) == (str(tmp_path), 0, 7)
