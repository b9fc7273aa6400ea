"""Appending a day of logs to a training set of many, against building all of it again, in turns.

Each runs in a process of its own, so that its CPU time and its peak memory are its own, with and without derived
values (``configs/schema/simulated_derived.yaml`` and ``simulated.yaml``). The views come from the simulator, one file a
day and log. Bytes written are those of the files that only the new version has: an append links the others.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time as clock
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl

from benchmarks.machine import machine_record, memory_mib, peak_memory_mib

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {"plain": "simulated.yaml", "derived": "simulated_derived.yaml"}
DAY = 86_400_000_000
LOGS = ("impressions", "events")
WAYS = ("append", "rebuild")


def run(num_impressions: int = 1_000_000, *, num_days: int = 20, repeats: int = 5, seed: int = 0) -> dict[str, Any]:
    """Simulates days of logs, builds a set of all but the last, then appends the last and rebuilds, in turns.

    Args:
        num_impressions: about so many over all days.
        num_days: at least 4.
        repeats: rounds; medians of seconds, the largest memory counts.
        seed: of the simulator.

    Returns:
        Figures by name, first those of a schema without derived values: wall and CPU seconds, peak memory and bytes
        written of an append and of a rebuild, and how many times as long the latter takes.
    """
    from feature_store.datasets.simulator import SimulatorConfig, simulate

    with tempfile.TemporaryDirectory(prefix="recsys-bench-") as name:
        scratch = Path(name)
        simulated = simulate(
            SimulatorConfig(num_impressions=num_impressions, num_days=num_days, seed=seed), scratch / "simulated"
        )
        begin = simulated.first_time // DAY * DAY
        counts = _by_day(scratch, begin, num_days)
        split = {"train_end": begin + (num_days - 3) * DAY, "validation_end": begin + (num_days - 2) * DAY}
        split["test_end"] = max(begin + num_days * DAY, simulated.last_time + 1)
        figures: dict[str, Any] = {"days": num_days, "rounds": repeats}
        for log in LOGS:
            figures |= {log: simulated.num_rows[log], f"appended_{log}": counts[log]}
        for kind, schema in SCHEMAS.items():
            options = {"schema": schema, "split": split}
            base = {**options, "way": "rebuild", "views": str(scratch / "before"), "target": str(scratch / "base")}
            _measured(base)
            rounds = [{way: _one(scratch, way, options) for way in WAYS} for _ in range(repeats)]
            figures |= _figures(kind, rounds)
            shutil.rmtree(scratch / "base")
    return {**figures, "machine": machine_record()}


def _by_day(scratch: Path, begin: int, num_days: int) -> dict[str, int]:
    """Views of all days but the last in ``before``, of all in ``after``: the same files. Rows of the last day by log.

    A request is of the day of its first impression; what came before the first day is of the first.
    """
    counts: dict[str, int] = {}
    for log in LOGS:
        rows = pl.read_parquet(scratch / "simulated" / f"{log}.parquet")
        time = pl.col("time").to_physical()
        first = time.min().over("request_id") if log == "impressions" else time
        days = rows.with_columns(((first - begin) // DAY).clip(0, num_days - 1).alias("@day"))
        for (number,), part in days.partition_by("@day", as_dict=True, include_key=False).items():
            day = int(number)
            counts[log] = part.height if day == num_days - 1 else counts.get(log, 0)
            path = scratch / "after" / f"{log}.parquet" / f"day-{day:04d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_parquet(path)
            if day < num_days - 1:
                _link(path, scratch / "before" / path.relative_to(scratch / "after"))
    for entity in ("users", "items"):
        for views in ("before", "after"):
            _link(scratch / "simulated" / f"{entity}.parquet", scratch / views / f"{entity}.parquet")
    return counts


def _link(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    os.link(path, place)


def _one(scratch: Path, way: str, options: Mapping[str, Any]) -> dict[str, float]:
    """One append to the set of all days but the last, or one build of all days, into a folder that goes."""
    target = scratch / "target" / "set"
    if way == "append":
        shutil.copytree(scratch / "base", target, copy_function=os.link)
    try:
        return _measured({**options, "way": way, "views": str(scratch / "after"), "target": str(target)})
    finally:
        shutil.rmtree(scratch / "target")


def _figures(kind: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    seconds = {way: median(r[way]["seconds"] for r in rounds) for way in WAYS}
    cpu = {way: median(r[way]["cpu_seconds"] for r in rounds) for way in WAYS}
    for way in WAYS:
        name = f"{kind}_{way}"
        figures |= {
            f"{name}_seconds": round(seconds[way], 3),
            f"{name}_cpu_seconds": round(cpu[way], 3),
            f"{name}_peak_memory_mib": round(max(r[way]["peak_memory_mib"] for r in rounds)),
            f"{name}_bytes_written": int(median(r[way]["bytes_written"] for r in rounds)),
        }
    figures[f"{kind}_rows_are_the_same"] = len({r[way]["rows"] for r in rounds for way in WAYS}) == 1
    figures[f"{kind}_carried_bytes"] = int(rounds[0]["append"]["carried_bytes"])
    figures[f"{kind}_times_as_fast_as_a_rebuild"] = round(seconds["rebuild"] / seconds["append"], 2)
    figures[f"{kind}_times_less_cpu_than_a_rebuild"] = round(cpu["rebuild"] / cpu["append"], 2)
    return {**figures, "libraries_memory_mib": round(rounds[0]["append"]["libraries_memory_mib"])}


def _measured(options: Mapping[str, Any]) -> dict[str, float]:
    """One append or build in a new process."""
    command = [sys.executable, "-m", "benchmarks.append", json.dumps(dict(options))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _work(options: Mapping[str, Any]) -> dict[str, float]:
    from feature_store.append import append_to_training_set
    from feature_store.build import DataConfig, build_training_set
    from recsys.config import load_yaml, validate
    from recsys.schema import Schema

    path = ROOT / "configs" / "schema" / options["schema"]
    schema = validate(Schema, load_yaml(path), source=str(path))
    settings = {"views": options["views"], "training_set": options["target"], "split": options["split"]}
    data = validate(DataConfig, settings, source="benchmark")
    before = memory_mib()
    cpu, began = _cpu_seconds(), clock.perf_counter()
    if options["way"] == "append":
        summary = append_to_training_set(schema, data)
    else:
        summary = build_training_set(schema, data, force=True)
    seconds, cpu = clock.perf_counter() - began, _cpu_seconds() - cpu
    folder = Path(options["target"])
    own = [p.stat() for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1]
    carried = [p.stat().st_size for p in (folder / "derived").rglob("*") if p.is_file()]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "libraries_memory_mib": before,
        "peak_memory_mib": peak_memory_mib(),
        "bytes_written": sum(status.st_size for status in own),
        "carried_bytes": sum(carried),
        "rows": summary.num_rows,
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_work(json.loads(sys.argv[1]))))
