"""Trials of a study side by side, under Ray Tune."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from recsys.errors import MissingDependencyError, RecsysError
from training.scaling import Outcome, Trial, failed, run_trial

_ERROR = "error_of_trial"


def run_trials(
    config: str | Path,
    overrides: Sequence[str],
    trials: Sequence[Trial],
    *,
    workers: int,
    folder: Path,
    advance: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Runs trials, ``workers`` at a time, and gives their results in order.

    A trial's state is its run folder, so one that a machine's death interrupted goes on from its last checkpoint when
    the study is run again; Ray's own record in ``folder`` is only of how the trials went.

    Raises:
        MissingDependencyError: Ray Tune is not installed.
        TrainingError: a trial failed; the others are finished first.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its banner, whatever the verbosity
    try:
        import ray
        from ray import tune
    except ImportError as err:
        raise MissingDependencyError(
            "several trials at a time need Ray Tune", hint="pip install 'ray[tune]', or run one at a time"
        ) from err

    total = len(trials)
    working_dir, source = str(Path.cwd()), str(Path(config).absolute())

    def run(settings: dict[str, Any]) -> None:
        os.chdir(working_dir)  # data folders are relative to it
        try:
            outcome = run_trial(source, list(overrides), Trial(**settings["trial"]))
        except RecsysError as err:  # Tune would keep the traceback alone
            outcome = {_ERROR: str(err)}
        tune.report(outcome)

    class Progress(tune.Callback):
        """Tells how far the trials are. Tune pickles its callbacks, and ``advance`` may hold a terminal: not kept."""

        def __init__(self, advance: Callable[[int, int], None] = lambda _, __: None) -> None:
            self.done, self.advance = 0, advance

        def __reduce__(self) -> tuple[type[Progress], tuple[()]]:
            return Progress, ()

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
            self.done += 1
            self.advance(self.done, total)

    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        cpus = None if address else workers
        ray.init(
            address=address, num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    try:
        advance(0, len(trials))
        tuner = tune.Tuner(
            tune.with_resources(run, {"cpu": 1}),
            param_space={"trial": tune.grid_search([asdict(trial) for trial in trials])},
            tune_config=tune.TuneConfig(max_concurrent_trials=workers),
            run_config=tune.RunConfig(
                name="study", storage_path=str(folder.absolute()), verbose=0, callbacks=[Progress(advance)]
            ),
        )
        grid = tuner.fit()
        found: dict[str, dict[str, Any]] = {}
        for result in (grid[place] for place in range(len(grid))):
            settings = (result.config or {})["trial"]
            metrics = result.metrics or {}
            if result.error is not None:
                raise failed(settings["folder"], str(result.error).strip().splitlines()[-1])
            if _ERROR in metrics:
                raise failed(settings["folder"], metrics[_ERROR])
            found[settings["folder"]] = metrics
    finally:
        if started:
            ray.shutdown()
    # Ray adds figures of its own.
    names = [field.name for field in fields(Outcome)]
    return [{name: found[trial.folder][name] for name in names} for trial in trials]
