"""Building a training set: rows a second, peak memory, and bytes an impression whatever the length of histories.

Each build runs in a process of its own, so that its peak memory is its own. The views come from the simulator.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine_record, memory_mib, peak_memory_mib

ROOT = Path(__file__).resolve().parents[1]
ID_BYTES = 8
"""What an event costs at the least where histories are copied: one int64 id."""


def run(
    num_impressions: int = 1_000_000, *, max_lengths: Sequence[int] = (50, 1_000), repeats: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Simulates views, and builds them once for each maximum history length.

    Args:
        num_impressions: about so many; the simulator ends with a whole request.
        max_lengths: of every history.
        repeats: builds at each length; the fastest counts, the largest memory counts.
        seed: of the simulator.

    Returns:
        Figures by name: rows a second, seconds, peak memory and what the libraries take of it before the build begins,
        bytes an impression in the requests and impressions files, and in all; what copies of the histories would add.
    """
    from feature_store.datasets.simulator import SimulatorConfig, simulate

    with tempfile.TemporaryDirectory(prefix="recsys-bench-") as scratch:
        views = Path(scratch) / "views"
        simulated = simulate(SimulatorConfig(num_impressions=num_impressions, seed=seed), views)
        num_rows = simulated.num_rows["impressions"]
        figures: dict[str, Any] = {"impressions": num_rows, "events": simulated.num_rows["events"]}
        logs: dict[int, dict[str, str]] = {}
        for length in max_lengths:
            target = Path(scratch) / f"training_set_{length}"
            options = {
                "views": str(views),
                "target": str(target),
                "max_length": length,
                "times": [simulated.first_time, simulated.last_time],
            }
            builds = [_measured(options) for _ in range(repeats)]
            seconds = min(b["seconds"] for b in builds)
            manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
            logs[length] = {
                name: entry["sha256"]
                for name, entry in manifest["files"].items()
                if name.endswith(("/requests.arrow", "/impressions.arrow"))
            }
            log_bytes = sum(manifest["files"][name]["bytes"] for name in logs[length])
            figures |= {
                f"rows_per_s_at_{length}": round(num_rows / seconds),
                f"seconds_at_{length}": round(seconds, 3),
                f"peak_memory_mib_at_{length}": round(max(b["peak_memory_mib"] for b in builds)),
                f"bytes_per_impression_at_{length}": round(log_bytes / num_rows, 2),
                f"all_bytes_per_impression_at_{length}": round(builds[0]["bytes"] / num_rows, 2),
                f"copied_history_bytes_per_impression_at_{length}": round(builds[0]["copied_bytes"] / num_rows, 2),
            }
            figures["libraries_memory_mib"] = round(builds[0]["libraries_memory_mib"])
        figures["requests_and_impressions_are_the_same_bytes"] = len({json.dumps(f) for f in logs.values()}) == 1
    return {**figures, "machine": machine_record()}


def _measured(options: dict[str, Any]) -> dict[str, Any]:
    """One build in a new process."""
    command = [sys.executable, "-m", "benchmarks.build", json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _build(options: dict[str, Any]) -> dict[str, Any]:
    from feature_store.build import DataConfig, build_training_set
    from recsys.config import load_yaml, validate
    from recsys.schema import Schema
    from recsys.training_set import TrainingSet

    path = ROOT / "configs" / "schema" / "simulated.yaml"
    mapping = load_yaml(path)
    for history in mapping["histories"]:
        history["max_length"] = options["max_length"]
    schema = validate(Schema, mapping, source=str(path))
    first, last = options["times"]
    span = last + 1 - first
    split = {"train_end": first + span * 8 // 10, "validation_end": first + span * 9 // 10, "test_end": last + 1}
    settings = {"views": options["views"], "training_set": options["target"], "split": split}
    before = memory_mib()
    summary = build_training_set(schema, validate(DataConfig, settings, source="benchmark"), force=True)
    peak = peak_memory_mib()
    return {
        "seconds": summary.seconds,
        "bytes": summary.bytes,
        "libraries_memory_mib": before,
        "peak_memory_mib": peak,
        "copied_bytes": _copied_bytes(TrainingSet.open(options["target"]), summary.rows),
    }


def _copied_bytes(training_set: Any, splits: Iterable[str]) -> int:
    """What one id an event would take if every impression held its history."""
    total = 0
    for history in training_set.schema.histories:
        for name in splits:
            split = training_set.split(name)
            columns = split.requests.columns
            length = columns[f"@end.{history.name}"] - columns[f"@start.{history.name}"]
            copies = np.minimum(length, history.max_length) * np.diff(split.row_offsets)
            total += int(copies.sum()) * ID_BYTES
    return total


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_build(json.loads(sys.argv[1]))))
