"""Training processes killed outright at random moments: the next one goes on, and nothing half-written is ever read."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recsys.errors import IntegrityError
from recsys.training_set import TrainingSet
from tests.synthetic import schema
from tests.training.conftest import MakeExperiment
from tests.training.test_trainer import result_of, same_checkpoints
from training.checkpoint import CheckpointStore
from training.experiment import ExperimentConfig
from training.run import RunFolder, TrainedRun
from training.trainer import train

KILLS = 3

CODE = """
import sys
from pathlib import Path
from recsys.config import validate
from recsys.schema import Schema
from training import trainer
from training.experiment import ExperimentConfig
import json
trainer._LOOK_EVERY_STEPS = 1
given = json.loads(Path(sys.argv[1]).read_text())
experiment = validate(ExperimentConfig, given["experiment"], source="given")
schema = validate(Schema, given["schema"], source="given")
print("training", flush=True)
trainer.train(experiment, schema, sys.argv[2], progress=False)
"""


def start(given: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(given), str(run_dir)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def number_of_checkpoints_seen(run_dir: Path) -> int:
    """Steps of the newest checkpoint; 0 if there is none yet."""
    latest = CheckpointStore(run_dir / "checkpoints").latest
    return 0 if latest is None else int(latest.removeprefix("step-"))


def wait_for_work(process: subprocess.Popen[bytes], run_dir: Path, beyond: int) -> None:
    """Until the process has saved a checkpoint beyond the given step, or has ended."""
    assert process.stdout is not None
    process.stdout.readline()
    while process.poll() is None and number_of_checkpoints_seen(run_dir) <= beyond:
        time.sleep(0.002)


@pytest.mark.slow
def test_kills_at_random_moments(
    training_set: TrainingSet, make_experiment: MakeExperiment, run_dir: Path, tmp_path: Path
) -> None:
    # A checkpoint after every step: half of the time is spent inside of one.
    experiment: ExperimentConfig = make_experiment(epochs=3, log_every_steps=2, checkpoint_every_s=1e-9)
    given = tmp_path / "given.json"
    given.write_text(
        json.dumps({"experiment": experiment.model_dump(mode="json"), "schema": schema().model_dump(mode="json")})
    )
    expected = train(experiment, schema(), run_dir / "whole", progress=False)
    broken = run_dir / "broken"
    moments = random.Random(0)
    killed = reached = 0
    while killed < KILLS:
        process = start(given, broken)
        with process:
            wait_for_work(process, broken, reached)
            time.sleep(moments.uniform(0.0, 0.1))
            if process.poll() is not None:
                assert process.stderr is not None
                pytest.fail(f"ended before it was killed: {process.stderr.read().decode()}")
            process.send_signal(signal.SIGKILL)
        killed += 1
        now = number_of_checkpoints_seen(broken)
        assert now > reached, "every attempt gets further than the one before"
        reached = now
        with pytest.raises(IntegrityError, match="must have finished"):
            TrainedRun.load(broken)
        assert all(json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines())
    found = train(experiment, schema(), broken, progress=False)
    assert result_of(found) == result_of(expected)
    same_checkpoints(run_dir / "whole", broken)
    assert RunFolder(broken).lines() == RunFolder(run_dir / "whole").lines()
    left = [p.name for p in broken.rglob("*") if ".tmp-" in p.name]
    assert left == []


@pytest.mark.slow
def test_a_kill_while_the_result_is_written_loses_nothing(
    make_experiment: MakeExperiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the last epoch, before the summary: the next run only scores the test split again."""
    import training.trainer

    class Killed(BaseException):
        pass

    def dying(*_: object, **__: object) -> None:
        raise Killed

    expected = train(make_experiment(), schema(), run_dir / "whole", progress=False)
    for place in ("write_run_report", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(training.trainer, place, dying)
            with pytest.raises(Killed):
                train(make_experiment(), schema(), run_dir / "broken", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(training.trainer.Trainer, "_step", dying)
        found = train(make_experiment(), schema(), run_dir / "broken", progress=False)
    assert result_of(found) == result_of(expected)
