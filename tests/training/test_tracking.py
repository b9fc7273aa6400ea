from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from recsys.errors import UnavailableError
from tests.synthetic import schema
from tests.training.conftest import MakeExperiment
from training import tracking
from training.run import RunFolder
from training.tracking import Tracker, TrackingConfig, connect, default_uri, experiment_id, register, tracked_run
from training.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def run_python(code: str, argument: str) -> str:
    """Runs code in a process without any MLflow setting; what it says on either stream."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "DO_NOT_TRACK"))}
    done = subprocess.run(
        [sys.executable, "-c", code, argument],
        cwd=Path(tracking.__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for the whole module: its schema takes seconds to create."""
    return default_uri(tmp_path_factory.mktemp("runs") / "any")


def test_the_default_store_is_a_sqlite_file_beside_the_run(tmp_path: Path) -> None:
    assert default_uri(tmp_path / "runs" / "one") == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_a_run_is_tracked_with_its_parameters_metrics_configuration_and_report(
    make_experiment: MakeExperiment, run_dir: Path, store: str
) -> None:
    result = train(make_experiment(tracking={"uri": store}, log_every_steps=10), schema(), run_dir, progress=False)
    tracked = tracked_run(run_dir)
    assert tracked is not None
    assert tracked[0] == store
    client = connect(store)
    run = client.get_run(tracked[1])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.batch_size"] == "64"
    assert run.data.params["model.embedding_dim"] == "4"
    assert run.data.tags["recsys.fingerprint"] == result.fingerprint
    folder = RunFolder(run_dir)
    epochs = [line for line in folder.lines() if line["kind"] == "epoch"]
    history = client.get_metric_history(run.info.run_id, "validation.click.auc")
    assert [(m.step, m.value) for m in history] == [(e["step"], e["validation"]["click"]["auc"]) for e in epochs]
    losses = client.get_metric_history(run.info.run_id, "train.loss")
    assert [m.value for m in losses] == [x["train_loss"] for x in folder.lines() if x["kind"] == "step"]
    assert result.test is not None
    assert run.data.metrics["test.click.auc"] == result.test["click"]["auc"]
    artifacts = Path(default_uri(run_dir)).parent  # where they are not
    assert not (artifacts / "mlflow-artifacts").exists()
    local = Path(client.download_artifacts(run.info.run_id, "", str(run_dir)))
    assert json.loads((local / "config.json").read_text())["fingerprint"] == result.fingerprint
    assert "files" in json.loads((local / "training_set" / "manifest.json").read_text())
    assert "<html" in (local / "report.html").read_text()


def tracker(run_dir: Path, uri: str, said: list[str] | None = None) -> Tracker:
    run_dir.mkdir(parents=True, exist_ok=True)
    say = (lambda _: None) if said is None else said.append
    return Tracker(TrackingConfig(uri=uri), run_dir, name="one", params={"a": 1}, tags={"b": "2"}, say=say)


def test_a_resumed_run_goes_on_in_its_mlflow_run(run_dir: Path, store: str) -> None:
    first = tracker(run_dir, store)
    first.log_metrics({"m": 1.0}, 1)
    first.finish("KILLED")
    known = tracked_run(run_dir)
    assert known is not None
    assert connect(store).get_run(known[1]).info.status == "KILLED"
    second = tracker(run_dir, store)
    second.log_metrics({"m": 2.0, "undefined": float("nan")}, 2)
    second.finish()
    assert tracked_run(run_dir) == known
    run = connect(store).get_run(known[1])
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"m": 2.0}
    assert [m.value for m in connect(store).get_metric_history(known[1], "m")] == [1.0, 2.0]


def test_many_and_long_parameters_are_kept(run_dir: Path, store: str) -> None:
    run_dir.mkdir(parents=True)
    params = {f"p{i}": i for i in range(250)} | {"long": "x" * 10_000}
    one = Tracker(TrackingConfig(uri=store), run_dir, name="one", params=params, tags={})
    one.finish()
    known = tracked_run(run_dir)
    assert known is not None
    found = connect(store).get_run(known[1]).data.params
    assert len(found) == 251
    assert found["p249"] == "249"
    assert found["long"] == "x" * 6000


def test_a_store_that_fails_is_said_once_and_stops_nothing(
    make_experiment: MakeExperiment, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    uri = f"sqlite:///{tmp_path}/file/mlflow.db"
    result = train(make_experiment(epochs=2, tracking={"uri": uri}), schema(), run_dir)
    assert result.epochs == 2
    shown = capfd.readouterr().err
    assert shown.count("warning: this run is no longer tracked") == 1
    assert tracked_run(run_dir) is None


def test_a_store_that_does_not_answer_is_an_error_without_the_password() -> None:
    with pytest.raises(UnavailableError) as caught:
        connect("mysql://user:secret@localhost:1/x")
    assert "***@localhost" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_no_tracking_imports_no_mlflow(training_set: Any, tmp_path: Path) -> None:
    code = """
import sys
import training.tracking, training.trainer
tracker = training.tracking.Tracker(
    training.tracking.TrackingConfig(enabled=False), sys.argv[1], name="x", params={}, tags={})
tracker.log_metrics({"a": 1.0}, 1)
tracker.finish()
assert "mlflow" not in sys.modules
"""
    run_python(code, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_tracking_never_touches_the_network_nor_says_anything(tmp_path: Path) -> None:
    """In a process of its own, where every connection to anywhere is refused and recorded."""
    code = """
import socket, sys
calls = []
def refuse(*args):
    calls.append(args)
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from pathlib import Path
from training.tracking import Tracker, TrackingConfig, tracked_run
folder = Path(sys.argv[1]) / "run"
folder.mkdir()
tracker = Tracker(TrackingConfig(), folder, name="x", params={"a": 1}, tags={})
tracker.log_metrics({"m": 1.0}, 1)
tracker.finish()
assert tracked_run(folder) is not None
assert not calls, calls
import os
assert "MLFLOW_DISABLE_TELEMETRY" not in os.environ
"""
    assert run_python(code, str(tmp_path)) == ""


@pytest.mark.slow
def test_several_processes_may_create_the_store_at_once(tmp_path: Path) -> None:
    uri = default_uri(tmp_path / "run")
    code = """
import sys
from training.tracking import connect, experiment_id
experiment_id(connect(sys.argv[1]), sys.argv[1], "x")
"""
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run_python, [code, code], [uri, uri])) == ["", ""]
    assert connect(uri).get_experiment_by_name("x") is not None


def test_writing_happens_beside_training(run_dir: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging returns at once, however slow the store is."""
    original = tracking.connect

    reachable = threading.Event()

    def slow(uri: str) -> Any:
        assert reachable.wait(60)
        return original(uri)

    monkeypatch.setattr(tracking, "connect", slow)
    one = tracker(run_dir, store)
    one.log_metrics({"m": 1.0}, 1)  # would never return if it waited
    reachable.set()
    one.finish()
    known = tracked_run(run_dir)
    assert known is not None
    assert connect(store).get_run(known[1]).data.metrics == {"m": 1.0}
    assert not [t for t in threading.enumerate() if t.name == "tracking"]


MODEL = """
import mlflow.pyfunc, pandas as pd
from pathlib import Path
class Model(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.factor = float(Path(context.artifacts["artifact"], "factor.txt").read_text())
    def predict(self, context, model_input: pd.DataFrame, params=None):
        return model_input["x"] * self.factor
mlflow.models.set_model(Model())
"""


def test_an_artifact_is_registered_version_after_version_and_the_alias_moves(tmp_path: Path, store: str) -> None:
    import mlflow.pyfunc
    import pandas as pd

    (tmp_path / "model.py").write_text(MODEL)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    versions = []
    for factor in (2.0, 3.0):
        (artifact / "factor.txt").write_text(str(factor))
        versions.append(
            register(
                artifact,
                name="ranker",
                alias="champion",
                python_model=str(tmp_path / "model.py"),
                uri=store,
                requirements=["mlflow"],
            )
        )
    assert [v.version for v in versions] == [1, 2]
    assert versions[1].uri == "models:/ranker@champion"
    client = connect(store)
    assert client.get_model_version_by_alias("ranker", "champion").version in (2, "2")
    assert client.get_model_version("ranker", "1").run_id == versions[0].run_id
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    try:
        loaded = mlflow.pyfunc.load_model(versions[1].uri)
        assert loaded.predict(pd.DataFrame({"x": [1.0, 2.0]})).tolist() == [3.0, 6.0]
    finally:
        mlflow.set_tracking_uri(before)


def test_library_logs_are_quiet_but_their_errors_are_not(store: str, caplog: pytest.LogCaptureFixture) -> None:
    connect(store)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("alembic").info("migrating")
        logging.getLogger("mlflow.store").error("broken")
    assert "migrating" not in caplog.text
    assert logging.getLogger("mlflow.store").isEnabledFor(logging.ERROR)


def test_experiments_are_found_again(store: str) -> None:
    client = connect(store)
    assert experiment_id(client, store, "twice") == experiment_id(client, store, "twice")
    path = store.removeprefix("sqlite:///")
    with sqlite3.connect(path) as database:
        (location,) = database.execute("select artifact_location from experiments where name = 'twice'").fetchone()
    assert location == Path(path).parent.joinpath("mlflow-artifacts").as_uri()
