"""Experiment tracking and the model registry, by MLflow: the one module of training that imports it.

By default everything goes to a SQLite file beside the run folders, ``mlflow.db``, with artifacts in the folder
``mlflow-artifacts`` next to it; ``tracking.uri`` names any other MLflow store. Nothing here calls the network unless
that URI does, and MLflow's own telemetry is off.

Importing MLflow takes two seconds and creating its SQLite schema two more, so a :class:`Tracker` does both, and all its
writing, in a thread of its own, while the model trains. What cannot be tracked is said once, on the log; it never stops
a training run, whose own folder holds every figure.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import queue
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import Field

from recsys.config import Config
from recsys.errors import MissingDependencyError, UnavailableError
from recsys.files import write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)

_PARAMS_AT_ONCE = 100
_LONGEST_VALUE = 6000
_OFFLINE = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


class TrackingConfig(Config):
    """Where runs are tracked."""

    enabled: bool = True
    uri: str | None = Field(None, min_length=1, description="MLflow tracking URI; SQLite beside the run if not given")
    experiment: str | None = Field(None, min_length=1, description="MLflow experiment; our own name if not given")


def default_uri(run_dir: str | Path) -> str:
    """The SQLite file beside a run folder, as a tracking URI."""
    return f"sqlite:///{(Path(run_dir).absolute().parent / 'mlflow.db').as_posix()}"


def connect(uri: str) -> MlflowClient:
    """Opens an MLflow store for tracking and registry; creates the SQLite file where there is none.

    Raises:
        MissingDependencyError: mlflow is not installed.
        UnavailableError: the store does not answer.
    """
    client_class = _client_class()
    with _creation_lock(uri):
        try:
            client = client_class(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)  # the first call creates the schema
        except Exception as err:
            raise UnavailableError(
                f"tracking.uri {_without_secret(uri)} does not answer: {type(err).__name__}: {_first_line(err)}",
                hint="check the URI, or train with --set tracking.enabled=false",
            ) from err
    return client


def _client_class() -> type[MlflowClient]:
    """Imports MLflow with its telemetry off, and keeps its remarks on its own schema to itself."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    os.environ.update(_OFFLINE)
    try:
        from mlflow import MlflowClient
    except ImportError as err:
        raise MissingDependencyError(
            "tracking needs the package mlflow", hint="install it, or train with --set tracking.enabled=false"
        ) from err
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    for noisy in ("mlflow", "alembic"):
        logger = logging.getLogger(noisy)
        if logger.getEffectiveLevel() < logging.WARNING:
            logger.setLevel(logging.WARNING)
    # MLflow 3.17 on SQLAlchemy 2.1: deprecations of one library, seen only by the other's authors.
    warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")
    return MlflowClient


@contextmanager
def _creation_lock(uri: str) -> Iterator[None]:
    """Lets one process at a time create a SQLite file: two would both run its migrations."""
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an MLflow experiment, created where there is none.

    The artifacts of a SQLite store go to the folder ``mlflow-artifacts`` beside it.
    """
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    path = _sqlite_path(uri)
    location = None if path is None else (path.absolute().parent / "mlflow-artifacts").as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except Exception:
        found = client.get_experiment_by_name(name)  # another process was first
        if found is None:
            raise
        return str(found.experiment_id)


class Tracker:
    """Tracks one run, from a thread of its own.

    Args:
        config: where to.
        run_dir: the run folder; ``mlflow.json`` in it remembers the MLflow run, so that a resumed run goes on in it.
        name: of the run, and of the MLflow experiment where the config has none.
        params: flat; long values are cut to what MLflow takes.
        tags: of the run.
        files: artifacts known from the start, ``(path, folder among the artifacts)``.
        say: shows a failure to the user.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: str | Path,
        *,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        files: Sequence[tuple[Path, str]] = (),
        say: Callable[[str], None] = _log.warning,
    ) -> None:
        self._config = config
        self._memory = Path(run_dir) / "mlflow.json"
        self._uri = config.uri or default_uri(run_dir)
        self._name = name
        self._say = say
        self._jobs: queue.Queue[Callable[[MlflowClient, str], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._failed = False
        if config.enabled:
            self._jobs.put(lambda client, run: _log_params(client, run, params))
            self.log_files(files)
            self._thread = threading.Thread(target=self._work, args=(dict(tags),), name="tracking", daemon=True)
            self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs metrics; those that are not defined are left out."""
        now = int(time.time() * 1000)

        def job(client: MlflowClient, run: str) -> None:
            from mlflow.entities import Metric

            values = [Metric(k, float(v), now, step) for k, v in metrics.items() if math.isfinite(v)]
            client.log_batch(run, metrics=values)

        self._jobs.put(job)

    def log_files(self, files: Sequence[tuple[Path, str]]) -> None:
        """Logs artifacts, ``(path, folder among the artifacts)`` each; the folder may be empty."""

        def job(client: MlflowClient, run: str) -> None:
            for path, folder in files:
                client.log_artifact(run, str(path), folder or None)

        if files:
            self._jobs.put(job)

    def finish(self, status: str = "FINISHED") -> None:
        """Waits until everything is written, and ends the MLflow run.

        Args:
            status: of MLflow: ``FINISHED``, ``FAILED`` or ``KILLED``.
        """
        if self._thread is None:
            return
        self._jobs.put(lambda client, run: client.set_terminated(run, status))
        self._jobs.put(None)
        self._thread.join()
        self._thread = None

    def _work(self, tags: dict[str, str]) -> None:
        client, run = None, ""
        while (job := self._jobs.get()) is not None:
            if self._failed:
                continue
            try:
                if client is None:
                    client = connect(self._uri)
                    run = self._open_run(client, tags)
                job(client, run)
            except Exception as err:  # noqa: BLE001 - whatever a store may raise, training goes on, and the user is told
                self._failed = True
                self._say(f"warning: this run is no longer tracked: {_first_line(err)}")
                _log.debug("tracking failed", exc_info=err)

    def _open_run(self, client: MlflowClient, tags: dict[str, str]) -> str:
        experiment = experiment_id(client, self._uri, self._config.experiment or self._name)
        known = _remembered(self._memory, self._uri)
        if known is not None:
            try:
                client.update_run(known, status="RUNNING")
            except Exception:  # noqa: BLE001 - it was deleted from the store: begin another
                _log.info("MLflow run %s is gone", known)
            else:
                return known
        run = client.create_run(experiment, run_name=self._name, tags=tags).info.run_id
        write_json(self._memory, {"tracking_uri": self._uri, "experiment_id": experiment, "run_id": run})
        return str(run)


def tracked_run(run_dir: str | Path) -> tuple[str, str] | None:
    """Tracking URI and MLflow run id of a run folder; None if the run was not tracked."""
    try:
        memory = json.loads((Path(run_dir) / "mlflow.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return memory["tracking_uri"], memory["run_id"]


def _remembered(memory: Path, uri: str) -> str | None:
    known = tracked_run(memory.parent)
    return known[1] if known is not None and known[0] == uri else None


def _log_params(client: MlflowClient, run: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    known = client.get_run(run).data.params
    values = [Param(k, str(v)[:_LONGEST_VALUE]) for k, v in params.items() if k not in known]
    for first in range(0, len(values), _PARAMS_AT_ONCE):
        client.log_batch(run, params=values[first : first + _PARAMS_AT_ONCE])


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model.

    Attributes:
        name: of the model.
        version: 1, 2, ...
        alias: that now points to it.
        tracking_uri: of the registry.
        run_id: the MLflow run that it belongs to.
    """

    name: str
    version: int
    alias: str
    tracking_uri: str
    run_id: str

    @property
    def uri(self) -> str:
        """For ``mlflow.pyfunc.load_model`` and ``recsys serve``."""
        return f"models:/{self.name}@{self.alias}"


def register(
    artifact: str | Path,
    *,
    name: str,
    alias: str,
    python_model: Any,
    uri: str,
    run_id: str | None = None,
    requirements: Sequence[str] = (),
    signature: Any = None,
    input_example: Any = None,
    code_paths: Sequence[str] = (),
) -> RegisteredVersion:
    """Registers an exported artifact as the next version of a model, and points an alias to it.

    Args:
        artifact: folder of the artifact; copied into the store.
        name: of the registered model, created where there is none.
        alias: for instance ``champion``.
        python_model: the ``mlflow.pyfunc.PythonModel``, or the file that defines it, that loads the artifact named
            ``artifact``.
        uri: tracking URI of the store.
        run_id: the MLflow run that the model came from; one is made if not given.
        requirements: what the model needs to be loaded elsewhere, as pip names it.
        signature: an ``mlflow.models.ModelSignature``.
        input_example: a data frame that the model scores; kept with the model.
        code_paths: files and folders that are copied with the model.

    Raises:
        MissingDependencyError: mlflow is not installed.
        UnavailableError: the store does not answer or refuses.
    """
    client = connect(uri)
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException

    try:
        if run_id is None:
            run_id = str(client.create_run(experiment_id(client, uri, name), run_name=name).info.run_id)
            client.set_terminated(run_id)
        with tempfile.TemporaryDirectory(prefix="recsys-model-") as folder:
            path = Path(folder) / "model"
            mlflow.pyfunc.save_model(
                path=str(path),
                python_model=python_model,
                artifacts={"artifact": str(Path(artifact).absolute())},
                pip_requirements=list(requirements),
                signature=signature,
                input_example=input_example,
                code_paths=list(code_paths) or None,
            )
            client.log_artifacts(run_id, str(path), "model")
        try:
            client.create_registered_model(name)
        except MlflowException as err:
            if err.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(run_id).info.artifact_uri}/model"
        version = client.create_model_version(name, source, run_id=run_id)
        client.set_registered_model_alias(name, alias, version.version)
    except (MlflowException, OSError) as err:
        raise UnavailableError(
            f"model {name!r} cannot be registered at {_without_secret(uri)}: {_first_line(err)}",
            hint="check that the store can be written",
        ) from err
    return RegisteredVersion(name, int(version.version), alias, uri, run_id)


def _without_secret(uri: str) -> str:
    """The URI without user name and password."""
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    return uri.replace(parts.netloc.rpartition("@")[0], "***")


def _first_line(err: BaseException) -> str:
    return str(err).splitlines()[0] if str(err) else type(err).__name__
