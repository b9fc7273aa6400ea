"""SUAN and LightSUAN against the length of the history: one request, all its candidates in one pass.

Dense attention of events to events grows with the square of the length, the sparse one nearly with the length. Timed
is the network alone, eager, in one thread: LightSUAN, SUAN of as many layers, and SUAN of one more (the next grade), on
the same vectors, in turn; the median counts. It is the thread's processor time, which other processes on the machine
disturb less than the clock on the wall. What one candidate costs beside the history is the difference between many
candidates and one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.machine import machine_record
from recsys.config import validate
from recsys.embedded import Embedded, EmbeddedHistory
from recsys.models import build_model
from recsys.models.suan import LightSUANConfig, SUANConfig
from recsys.schema import Schema

WIDTH = 40
PROFILE = 6
SECOND = 1_000_000


def run(
    lengths: Sequence[int] = (50, 100, 200, 500, 1000),
    *,
    num_candidates: int = 100,
    window: int = 32,
    dilation: int = 16,
    repeats: int = 9,
) -> dict[str, Any]:
    """Times a forward pass of one request at each length.

    Args:
        lengths: events of the history.
        num_candidates: rows of the request.
        window, dilation: of LightSUAN.
        repeats: timed in turn.

    Returns:
        Milliseconds of the thread by model and length, of many candidates and of one, and how often LightSUAN's go
        into those of SUAN, and of SUAN of a layer more; the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    light = LightSUANConfig(window=window, dilation=dilation)
    deeper = SUANConfig(num_layers=light.num_layers + 1)
    models = {"suan": SUANConfig(num_layers=light.num_layers), "suan_deeper": deeper, "lightsuan": light}
    rows = []
    try:
        for length in lengths:
            schema = _schema(length)
            torch.manual_seed(0)
            networks = {name: build_model(config, schema, {}).network.eval() for name, config in models.items()}
            row: dict[str, Any] = {"length": length}
            for label, candidates in (("ms", num_candidates), ("ms_one_candidate", 1)):
                times = _times(networks, _request(length, candidates), repeats)
                row |= {f"{name}_{label}": round(1e3 * statistics.median(t), 3) for name, t in times.items()}
            row["speedup"] = round(row["suan_ms"] / row["lightsuan_ms"], 2)
            row["speedup_over_deeper"] = round(row["suan_deeper_ms"] / row["lightsuan_ms"], 2)
            rows.append(row)
    finally:
        torch.set_num_threads(threads)
    settings = {"candidates": num_candidates, "window": window, "dilation": dilation, "repeats": repeats, "threads": 1}
    return settings | {"by_length": rows, "machine": machine_record()}


def _times(networks: dict[str, torch.nn.Module], embedded: Embedded, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for repeat in range(repeats + 2):
            for name, network in networks.items():
                began = time.thread_time()
                network.single_request(embedded)  # type: ignore[operator]
                if repeat >= 2:
                    times[name].append(time.thread_time() - began)
    return times


def _request(length: int, num_candidates: int) -> Embedded:
    generator = torch.Generator().manual_seed(length)
    history = EmbeddedHistory(
        {"x": torch.randn(1, length, WIDTH, generator=generator)},
        torch.tensor([length]),
        torch.randint(0, 10**7, (1, length), generator=generator).sort(1).values * SECOND,
    )
    return Embedded(
        {f"u{i}": torch.randn(1, 8, generator=generator) for i in range(PROFILE)},
        {"x": torch.randn(num_candidates, WIDTH, generator=generator)},
        {"clicked": history},
        torch.zeros(num_candidates, dtype=torch.int64),
        torch.tensor([10**7 * SECOND]),
    )


def _schema(length: int) -> Schema:
    profile = [{"name": f"u{i}", "kind": "dense", "scope": "context", "dim": 8} for i in range(PROFILE)]
    return validate(
        Schema,
        {
            "name": "long_histories",
            "views": {
                "impressions": {"user": "u", "item": "i", "time": "t"},
                "events": {"user": "u", "item": "i", "time": "t"},
                "items": {"path": "items.parquet", "key": "i"},
            },
            "features": [*profile, {"name": "x", "kind": "dense", "scope": "item", "dim": WIDTH}],
            "histories": [{"name": "clicked", "attributes": ["x"], "max_length": length}],
            "tasks": [{"name": "click", "label": "y"}],
        },
        source="long_histories",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 100, 200, 500, 1000])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    print(json.dumps(run(given.lengths, repeats=given.repeats), indent=2))  # noqa: T201 - a command
