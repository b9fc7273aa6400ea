"""The online store: reading what one request needs, one user with 500 events and 500 items.

*get* is what the store does: keys to bytes, in one transaction or one round trip. *read* is what a service sees of it:
raw keys to encoded columns. Redis, where there is a server program, runs on this machine, reached over a local socket;
its commands are counted by the server.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine_record
from benchmarks.simulated import simulated_training_set
from feature_store.online.key_values import KeyValues
from feature_store.online.lmdb_store import LMDB
from feature_store.online.materialize import materialize
from feature_store.online.pushing import Event
from feature_store.online.reading import cut
from feature_store.online.store import Limits, OnlineStore
from recsys.training_set import TrainingSet, end_column, start_column

BAR_US = 300.0
"""What a read from LMDB may take, keys to columns, median."""


def run(
    num_events: int = 500, num_items: int = 500, *, num_impressions: int = 40_000, calls: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Simulates, builds, materialises and reads.

    Args:
        num_events: of the user's history.
        num_items: read with the user; other ones, drawn anew, at every call.
        num_impressions: simulated; more of them give more users and items.
        calls: timed; the median counts.
        seed: of the simulator and of the draws.

    Returns:
        Figures by name: microseconds of a get, a read and a push, round trips of a read, values written a second when
        materialising, bytes of the values; the machine.
    """
    with tempfile.TemporaryDirectory(prefix="recsys-bench-") as scratch:
        folder = Path(scratch)
        training_set = simulated_training_set(
            folder, num_impressions=num_impressions, history_length=2 * num_events, max_candidates=50, seed=seed
        )
        figures: dict[str, Any] = {"events": num_events, "items": num_items, "calls": calls, "bar_us": BAR_US}
        backend: KeyValues = LMDB(folder / "online")
        figures["lmdb"] = _measure(backend, training_set, num_events, num_items, calls, seed)
        figures["within_bar"] = figures["lmdb"]["read_us"] <= BAR_US
        with _redis_server(folder) as address:
            if address is None:
                figures["redis"] = None
            else:
                from feature_store.online.redis_store import Redis

                figures["redis"] = _measure(Redis(address), training_set, num_events, num_items, calls // 4, seed)
                figures["redis"]["round_trips_of_a_read"] = _round_trips(address, training_set, num_items)
    return {**figures, "machine": machine_record()}


def _measure(
    backend: KeyValues, training_set: TrainingSet, num_events: int, num_items: int, calls: int, seed: int
) -> dict[str, Any]:
    store = OnlineStore(backend, training_set.encoder, limits=Limits(keep_events=num_events))
    began = time.perf_counter()
    summary = materialize(store, training_set)
    materialised_s = time.perf_counter() - began
    users, items = training_set.users, training_set.items
    assert users.keys is not None
    assert items.keys is not None
    history = training_set.schema.histories[0].name
    longest = np.flatnonzero(users.array(end_column(history)) - users.array(start_column(history)) >= num_events)
    if len(longest) == 0:
        raise AssertionError(f"a user must have {num_events} events, got none")
    rng = np.random.default_rng(seed)
    asked = [
        (users.keys.take(rng.choice(longest, 1)), items.keys.take(rng.integers(1, items.num_rows, num_items)))
        for _ in range(calls)
    ]
    names = [store.request_keys(*keys) for keys in asked]
    before = np.array([2**62])

    def read(keys: tuple[Any, Any]) -> None:
        found = store.read(*keys)
        for name, events in found.histories.items():
            if len(cut(events, before, num_events).times) != num_events and name == history:
                raise AssertionError("the history must be read whole")

    kind = (training_set.schema.history(history).event_types or (None,))[0]
    late = [
        Event(keys[0][0].as_py(), keys[1][0].as_py(), 7_000_000_000_000_000 + n, kind)
        for n, keys in enumerate(asked[: calls // 10])
    ]
    sizes = [len(value) for value in backend.get(names[0]) if value is not None]
    figures: dict[str, Any] = {
        "materialised_values_per_s": round(sum(summary.written.values()) / materialised_s),
        "kib_of_a_read": round(sum(sizes) / 1024, 1),
    }
    timed: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
        "get": (backend.get, names), "read": (read, asked), "push": (store.push, late)
    }  # fmt: skip
    for name, (work, arguments) in timed.items():
        median, tail = _microseconds(work, arguments)
        figures |= {f"{name}_us": median, f"{name}_p99_us": tail}
    store.close()
    return figures


def _microseconds(work: Callable[[Any], object], arguments: list[Any]) -> tuple[float, float]:
    """Median and 99th percentile."""
    taken = []
    for argument in arguments:
        began = time.perf_counter()
        work(argument)
        taken.append(time.perf_counter() - began)
    median, tail = np.quantile(taken, [0.5, 0.99]) * 1e6
    return round(float(median), 1), round(float(tail), 1)


def _round_trips(address: str, training_set: TrainingSet, num_items: int) -> int:
    """Commands that the server has seen for one read."""
    import redis

    from feature_store.online.redis_store import Redis

    watcher: Any = redis.Redis.from_url(address)
    store = OnlineStore(Redis(address), training_set.encoder)
    assert training_set.users.keys is not None
    assert training_set.items.keys is not None
    keys = training_set.users.keys[1:2], training_set.items.keys[1 : num_items + 1]
    store.read(*keys)
    watcher.config_resetstat()
    store.read(*keys)
    commands = {n: s["calls"] for n, s in watcher.info("commandstats").items() if "config" not in n and "info" not in n}
    store.close()
    watcher.close()
    return int(sum(commands.values()))


@contextmanager
def _redis_server(folder: Path) -> Iterator[str | None]:
    """Address of a server of our own on a local socket; None without the program."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    path = folder / "redis.sock"
    options = {"port": "0", "unixsocket": str(path), "save": "", "appendonly": "no", "dir": str(folder)}
    command = [program, *(word for name, value in options.items() for word in (f"--{name}", value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(path, process)
        yield f"unix://{path}"
    finally:
        process.terminate()
        process.wait()


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
                return
            except OSError:
                time.sleep(0.02)
    raise AssertionError("redis-server must start")


if __name__ == "__main__":
    import json

    print(json.dumps(run(), indent=2))  # noqa: T201
