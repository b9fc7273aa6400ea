"""Training in many processes, launched by Ray Train. The same experiment, the same run folder, the same checkpoints.

Every process runs :func:`training.trainer.train_rank`, the one that a single process runs, with
:class:`training.sharded.ShardedProcesses` for its strategy. This module starts them, shows what rank 0 writes into
the run folder, and brings errors back as they were.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recsys.errors import MissingDependencyError, RecsysError, TrainingError
from recsys.schema import Schema
from training.checkpoint import CheckpointStore
from training.console import TrainingDisplay
from training.experiment import ExperimentConfig
from training.run import RunFolder
from training.stopping import stop_signals

_POLL_S = 0.5
_STOP_FILE = "stop"


def train_workers(
    experiment: ExperimentConfig, schema: Schema, run_dir: Path, *, workers: int, display: TrainingDisplay
) -> None:
    """Trains a run that has begun with several processes.

    Joins the Ray cluster that ``RAY_ADDRESS`` names, or the one this process is connected to; otherwise starts one on
    this machine and stops it at the end. All processes must see the run folder and the training set under the same
    path.

    Args:
        workers: processes; each takes a GPU if the experiment's device is ``cuda``.

    Raises:
        MissingDependencyError: Ray is not installed.
        RecsysError: as raised in a process.
        TrainingError: a process died, or Ray itself could not go on.
        KeyboardInterrupt, SystemExit: told to stop, the processes have saved and stopped.
    """
    # The current Ray Train; must be set before Ray is imported, and Ray's usage reports stay off.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError
    except ImportError as err:
        raise MissingDependencyError(
            f"training with {workers} workers needs Ray", hint="pip install 'ray[train]', or train with one worker"
        ) from err

    use_gpu = experiment.training.device == "cuda"
    display.say(f"starting {workers} workers on Ray")
    with _cluster(ray, workers), _ray_folder(run_dir) as storage, _Follower(run_dir, display):
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={
                "experiment": experiment.model_dump(mode="json"),
                "schema": schema.model_dump(mode="json"),
                "run_dir": str(run_dir.absolute()),
                "working_dir": str(Path.cwd()),
                "stop_file": str(storage / _STOP_FILE),
            },
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=RunConfig(name="train", storage_path=str(storage), failure_config=FailureConfig(max_failures=0)),
        )
        try:
            _fit(trainer, run_dir, storage / _STOP_FILE, display)
        except TrainingFailedError as err:
            own = _own_error(err)
            if own is not None:
                raise own from err
            raise TrainingError(
                f"a worker failed: {_last_line(err)}",
                hint="run the same command again: training resumes from the last checkpoint",
            ) from err
        except ray.exceptions.RayError as err:
            raise TrainingError(
                f"Ray could not go on: {str(err).strip().partition(chr(10))[0]}",
                hint="run the same command again: training resumes from the last checkpoint",
            ) from err


def _train_loop(config: Mapping[str, Any]) -> None:
    """What each process runs."""
    import ray.train.torch

    from recsys.config import validate
    from training.sharded import ShardedProcesses
    from training.trainer import train_rank

    os.chdir(config["working_dir"])  # paths of the experiment are relative to where the command was given
    for name in ("torchrec", "torch.distributed", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)
    experiment = validate(ExperimentConfig, config["experiment"], source="experiment")
    schema = validate(Schema, config["schema"], source="schema")
    strategy = ShardedProcesses(ray.train.torch.get_device())
    with suppress(KeyboardInterrupt):  # told to stop, which is no failure; who told will raise it
        train_rank(
            experiment,
            schema,
            config["run_dir"],
            strategy,
            display=TrainingDisplay(enabled=False),
            stop_file=Path(config["stop_file"]),
        )


def _fit(trainer: Any, run_dir: Path, stop_file: Path, display: TrainingDisplay) -> None:
    """Runs the processes. Told to stop, tells them; they save, and stop together. Told again, leaves them.

    They run in a thread: in the main one, Ray would take the interrupt for itself and kill them.
    """
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as err:  # noqa: BLE001 - raised again below
            errors.append(err)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    with stop_signals() as stop:
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            if stop.is_set and not stop_file.exists():
                stop_file.touch()
                display.say("stopping: the workers finish the step at hand and save")
    if errors:
        raise errors[0]
    folder = RunFolder(run_dir)
    if stop.is_set and not folder.is_finished:
        store = CheckpointStore(folder.checkpoints)
        step = 0 if store.latest is None else store.read_progress(store.latest)["step"]
        display.say(f"stopped after step {step}: the same command goes on from here")
        stop.raise_it()


@contextmanager
def _cluster(ray: Any, workers: int) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONWARNINGS": "ignore"}}
    options: dict[str, Any] = {"runtime_env": environment, "log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"num_cpus": max(workers + 1, os.cpu_count() or 1), "include_dashboard": False}
    ray.init(**options)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _ray_folder(run_dir: Path) -> Iterator[Path]:
    """A place for what Ray Train keeps of a run. Nothing there is read again: our own checkpoints are the state."""
    folder = Path(tempfile.mkdtemp(prefix=".ray-", dir=run_dir.absolute()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _own_error(err: BaseException) -> RecsysError | None:
    """The error that a process raised on purpose, if that is what stopped the run."""
    failures = getattr(err, "worker_failures", None) or {}
    queue: list[Any] = [failures[rank] for rank in sorted(failures)] + [getattr(err, "controller_failure", None)]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, RecsysError):
            return current
        queue += [getattr(current, name, None) for name in ("_base_exc", "cause", "__cause__", "__context__")]
    return None


def _last_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[-1] if lines else type(err).__name__


class _Follower:
    """Shows the lines that rank 0 appends to the metrics file."""

    def __init__(self, run_dir: Path, display: TrainingDisplay) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._display = display
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics-follower", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        position = self._path.stat().st_size if self._path.exists() else 0
        while True:
            is_last = self._done.wait(_POLL_S)
            position = self._show_from(position)
            if is_last:
                return

    def _show_from(self, position: int) -> int:
        if not self._path.exists() or self._path.stat().st_size < position:
            return 0
        with self._path.open(encoding="utf-8") as file:
            file.seek(position)
            for line in file.read().splitlines(keepends=True):
                if not line.endswith("\n"):
                    break
                position += len(line.encode())
                self._show(json.loads(line))
        return position

    def _show(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "step":
            self._display.say(f"step {line['step']}: loss {line['train_loss']:.4f}")
        elif line["kind"] == "epoch":
            found = {
                f"{task}.{name}": value
                for task, metrics in line["validation"].items()
                for name, value in metrics.items()
                if name in ("auc", "logloss") and value is not None
            }
            shown = ", ".join(f"validation {name} {value:.4f}" for name, value in found.items())
            self._display.say(f"epoch {line['epoch']}: {shown}")
