"""Building against the same work with pandas and with FuxiCTR's preprocessing.

Three processes, one after the other, each alone with the same simulated views (Parquet; histories of clicks, the
newest ``max_length`` before each request):

``recsys``
    ``build_training_set`` from the four views: checks every row, joins users and items, finds the histories, groups,
    splits and sorts requests, fits the encoders on the training period, writes and checksums the training set.

``pandas``
    The same from the same views, as it is written by hand with vectorised pandas and numpy: merges users and items into
    the impressions, sorts the clicks, finds each impression's history by a binary search on (user, time), takes the
    newest ``max_length`` items of it as a list, splits by time, fits category codes on the training period, maps, and
    writes one Parquet file a split, histories as lists of ids. No checks, no quarantine, no checksums, and
    of multi-valued features only the history.

``fuxictr``
    FuxiCTR's ``FeatureProcessor`` and ``build_dataset`` (fit and transform), in a Python environment of its own. It
    joins nothing and finds no histories: it reads flat files, one row an impression, with histories as lists
    of ids. These are given to it; making them is not counted. It reads ids as text, fits vocabularies on the
    training period, and writes padded arrays, one Parquet file a split. It encodes the same features as pandas here.

So both peers do less than the build. Rows a second are impressions over seconds from the first file opened to
the last file written, without the start of the interpreter; memory is the most that a process and all its children
have resident at once (proportional set size, sampled every 50 ms), for Ray's workers and object store count too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np  # the rest is imported where it is used: FuxiCTR's environment runs this file too

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = "RECSYS_BENCH_FUXICTR"
"""Names the Python of an environment with FuxiCTR; without it, FuxiCTR is left out."""

CATEGORICAL = {
    "users": ("age_group", "gender", "city"),
    "items": ("category", "brand"),
    "impressions": ("user_id", "item_id", "device", "hour", "weekday", "position"),
}
DENSE = {"users": ("account_age_days",), "items": ("price", "age_days")}
LABEL = "is_click"
HISTORY = "clicked_items"
SAMPLE_SECONDS = 0.05


def run(num_impressions: int = 5_000_000, *, max_length: int = 50, repeats: int = 1, seed: int = 0) -> dict[str, Any]:
    """Simulates views with histories of about ``max_length`` clicks, and lets each build from them in turns.

    Args:
        num_impressions: about so many.
        max_length: of the history.
        repeats: rounds; medians of seconds and the largest memory count.
        seed: of the simulator.

    Returns:
        Rows a second, seconds and peak memory of each, and the ratios to the peers.
    """
    from benchmarks.machine import machine_record
    from feature_store.datasets.simulator import SimulatorConfig, simulate

    with tempfile.TemporaryDirectory(prefix="recsys-bench-") as scratch:
        views = Path(scratch) / "views"
        config = SimulatorConfig(num_impressions=num_impressions, warm_up_clicks_per_user=float(max_length), seed=seed)
        simulated = simulate(config, views)
        span = simulated.last_time + 1 - simulated.first_time
        options = {
            "views": str(views),
            "folder": scratch,
            "max_length": max_length,
            "train_end": simulated.first_time + span * 8 // 10,
            "validation_end": simulated.first_time + span * 9 // 10,
            "test_end": simulated.last_time + 1,
        }
        pythons = {"recsys": sys.executable, "pandas": sys.executable}
        if os.environ.get(ENVIRONMENT):
            pythons["fuxictr"] = os.environ[ENVIRONMENT]
            _in_process(sys.executable, "flatten", options)
        rounds = [{name: _in_process(p, name, options) for name, p in pythons.items()} for _ in range(repeats)]
    num_rows = simulated.num_rows["impressions"]
    figures: dict[str, Any] = {
        "impressions": num_rows,
        "events": simulated.num_rows["events"],
        "max_length": max_length,
        "rounds": repeats,
    }
    seconds = {name: median(r[name]["seconds"] for r in rounds) for name in pythons}
    memory = {name: max(r[name]["peak_memory_mib"] for r in rounds) for name in pythons}
    for name in pythons:
        figures[f"{name}_rows_per_s"] = round(num_rows / seconds[name])
        figures[f"{name}_seconds"] = round(seconds[name], 2)
        figures[f"{name}_peak_memory_mib"] = round(memory[name])
    for name in ("pandas", "fuxictr"):
        if name in pythons:
            figures[f"times_as_fast_as_{name}"] = round(seconds[name] / seconds["recsys"], 2)
            figures[f"memory_of_that_of_{name}"] = round(memory["recsys"] / memory[name], 3)
    if "fuxictr" not in pythons:
        figures["fuxictr"] = f"left out: {ENVIRONMENT} names no Python with it"
    return {**figures, "machine": machine_record()}


def _in_process(python: str, name: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Runs one builder in a process of its own, and watches its memory."""
    # FuxiCTR's Python must not find this project's packages, nor need them: it is given this file, not this module.
    command = [python, str(Path(__file__).resolve()), name, json.dumps(dict(options))]
    environment = {**os.environ, "PYTHONPATH": "" if name == "fuxictr" else str(ROOT)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=options["folder"], env=environment, stdout=output, text=True)
        peak = _peak_memory(process)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        output.seek(0)
        seconds = float(output.read().strip().splitlines()[-1])
    return {"seconds": seconds, "peak_memory_mib": peak}


def _peak_memory(process: subprocess.Popen[str]) -> float:
    """MiB; waits for the process."""
    import psutil

    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        try:
            for each in [watched, *watched.children(recursive=True)]:
                total += each.memory_full_info().pss
        except psutil.Error:  # a child has just ended
            pass
        peak = max(peak, total)
        time.sleep(SAMPLE_SECONDS)
    return peak / 2**20


def _recsys(options: Mapping[str, Any]) -> float:
    from feature_store.build import DataConfig, build_training_set
    from recsys.config import load_yaml, validate
    from recsys.schema import Schema

    path = ROOT / "configs" / "schema" / "simulated.yaml"
    mapping = load_yaml(path)
    for history in mapping["histories"]:
        history["max_length"] = options["max_length"]
    schema = validate(Schema, mapping, source=str(path))
    split = {name: options[name] for name in ("train_end", "validation_end", "test_end")}
    settings = {"views": options["views"], "training_set": f"{options['folder']}/training_set", "split": split}
    data = validate(DataConfig, settings, source="benchmark")
    began = time.perf_counter()
    build_training_set(schema, data, force=True)
    return time.perf_counter() - began


def _joined(options: Mapping[str, Any]) -> Any:
    """Impressions with the attributes of user and item, the calendar, and the history as a list of item ids."""
    import pandas as pd

    views = Path(options["views"])
    read = {
        "users": pd.read_parquet(views / "users.parquet"),
        "items": pd.read_parquet(views / "items.parquet"),
        "impressions": pd.read_parquet(views / "impressions.parquet"),
        "events": pd.read_parquet(views / "events.parquet"),
    }
    rows = read["impressions"]
    rows = rows.merge(read["users"][["user_id", *CATEGORICAL["users"], *DENSE["users"]]], on="user_id", how="left")
    rows = rows.merge(read["items"][["item_id", *CATEGORICAL["items"], *DENSE["items"]]], on="item_id", how="left")
    moment = pd.to_datetime(rows["time"], unit="us")
    rows["hour"], rows["weekday"] = moment.dt.hour, moment.dt.day_of_week
    clicks = read["events"]
    clicks = clicks[clicks["type"] == "click"].sort_values(["user_id", "time"], kind="stable")
    users, times = clicks["user_id"].to_numpy(), clicks["time"].to_numpy()
    # The end of the history: how many clicks come before (user, time). One search over both needs one sort of both.
    both = pd.DataFrame(
        {
            "user_id": np.concatenate([rows["user_id"], users]),
            "time": np.concatenate([rows["time"], times]),
            "is_click": np.repeat([0, 1], [len(rows), len(clicks)]),
        }
    )
    order = np.lexsort((both["is_click"], both["time"], both["user_id"]))
    before = np.empty(len(both), dtype=np.int64)
    before[order] = np.cumsum(both["is_click"].to_numpy()[order]) - both["is_click"].to_numpy()[order]
    end = before[: len(rows)]
    start = np.maximum(end - options["max_length"], np.searchsorted(users, rows["user_id"].to_numpy()))
    items = clicks["item_id"].to_numpy()
    rows[HISTORY] = pd.Series([items[a:b] for a, b in zip(start.tolist(), end.tolist(), strict=True)], rows.index)
    return rows


def _splits(options: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    time_of = rows["time"]
    return {
        "train": rows[time_of < options["train_end"]],
        "valid": rows[(time_of >= options["train_end"]) & (time_of < options["validation_end"])],
        "test": rows[(time_of >= options["validation_end"]) & (time_of < options["test_end"])],
    }


def _pandas(options: Mapping[str, Any]) -> float:
    import pandas as pd

    began = time.perf_counter()
    rows = _joined(options)
    splits = _splits(options, rows)
    encoded = {name: pd.DataFrame(index=part.index) for name, part in splits.items()}
    for column in (c for columns in CATEGORICAL.values() for c in columns):
        values = splits["train"][column].value_counts().index  # missing values left out
        ids = pd.Series(np.arange(2, len(values) + 2), index=values)
        for name, part in splits.items():
            encoded[name][column] = part[column].map(ids).fillna(1).astype("int64")
        if column == "item_id":
            for name, part in splits.items():
                lengths = part[HISTORY].str.len().to_numpy()
                flat = pd.Series(np.concatenate(part[HISTORY].to_numpy())).map(ids).fillna(1).astype("int64").to_numpy()
                encoded[name][HISTORY] = pd.Series(np.split(flat, np.cumsum(lengths)[:-1]), part.index)
    for column in (c for columns in DENSE.values() for c in columns):
        train = np.log1p(splits["train"][column].clip(lower=0))
        mean, std = train.mean(), train.std()
        for name, part in splits.items():
            scaled = (np.log1p(part[column].clip(lower=0)) - mean) / std
            encoded[name][column] = scaled.fillna(0.0).astype("float32")
    for name, part in splits.items():
        encoded[name][LABEL] = part[LABEL].astype("float32")
        encoded[name].to_parquet(f"{options['folder']}/pandas_{name}.parquet")
    return time.perf_counter() - began


def _flatten(options: Mapping[str, Any]) -> float:
    """What FuxiCTR reads: one row an impression, text, histories joined by '^', which is how it splits them."""
    began = time.perf_counter()
    rows = _joined(options)
    rows[HISTORY] = ["^".join(map(str, items)) for items in rows[HISTORY]]
    for column in (c for columns in CATEGORICAL.values() for c in columns):
        rows[column] = rows[column].astype("str").where(rows[column].notna(), "")
    for column in (c for columns in DENSE.values() for c in columns):
        rows[column] = np.log1p(rows[column].clip(lower=0)).astype("float64")
    kept = [c for columns in (*CATEGORICAL.values(), *DENSE.values()) for c in columns]
    for name, part in _splits(options, rows).items():
        part[[LABEL, *kept, HISTORY]].to_parquet(f"{options['folder']}/flat_{name}.parquet", index=False)
    return time.perf_counter() - began


def _fuxictr(options: Mapping[str, Any]) -> float:
    import shutil

    from fuxictr.preprocess import FeatureProcessor, build_dataset

    shutil.rmtree(f"{options['folder']}/fuxictr", ignore_errors=True)
    features: list[dict[str, Any]] = [
        {"name": [c for columns in CATEGORICAL.values() for c in columns], "active": True, "dtype": "str"}
        | {"type": "categorical"},
        {"name": [c for columns in DENSE.values() for c in columns], "active": True, "dtype": "float"}
        | {"type": "numeric", "normalizer": "StandardScaler"},
        {"name": HISTORY, "active": True, "dtype": "str", "type": "sequence", "splitter": "^"}
        | {"max_len": options["max_length"], "share_embedding": "item_id"},
    ]
    began = time.perf_counter()
    processor = FeatureProcessor(
        feature_cols=features,
        label_col={"name": LABEL, "dtype": "float"},
        dataset_id="fuxictr",
        data_root=f"{options['folder']}/",
    )
    paths = {f"{name}_data": f"{options['folder']}/flat_{name}.parquet" for name in ("train", "valid", "test")}
    build_dataset(processor, **paths, data_format="parquet")
    return time.perf_counter() - began


BUILDERS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "recsys": _recsys,
    "pandas": _pandas,
    "flatten": _flatten,
    "fuxictr": _fuxictr,
}


def _main(arguments: Sequence[str]) -> None:
    seconds = BUILDERS[arguments[0]](json.loads(arguments[1]))
    sys.stdout.write(f"\n{seconds}\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
