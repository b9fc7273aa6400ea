"""Derived values: look-ups a second of each kind, one thread, and what they add to a build's time.

The log is synthetic, so that its size can be chosen: events and impressions of users and items whose frequency falls
off as that of words, at microsecond times over four weeks. A figure includes everything but reading: sorting the
events, running totals, the look-ups of all impressions.
"""

from __future__ import annotations

import statistics
import time as clock
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import machine_record, peak_memory_mib
from recsys.derived import Count, Mean, Recency, Windowed
from recsys.windows import GroupedRows, LatestVersion, WindowedValue, in_units

DAY = 86_400_000_000
CHUNK = 1 << 20


def run(
    num_impressions: int = 5_000_000,
    *,
    num_events: int = 5_000_000,
    num_users: int = 200_000,
    num_items: int = 50_000,
    num_categories: int = 200,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures each kind of value, in turn, ``repeats`` times.

    Returns:
        Figures by name: look-ups a second with and without the sorting of the events, medians; peak memory.
    """
    rng = np.random.default_rng(seed)
    user, item, time = _log(rng, num_events, num_users, num_items)
    asked_user, asked_item, asked_time = _log(rng, num_impressions, num_users, num_items)
    category = rng.integers(0, num_categories, num_items)
    values = rng.integers(0, 2, num_events).astype(np.float64)
    everything = np.ones(num_events, np.bool_)
    pairs = user * num_categories + category[item]
    asked_pairs = asked_user * num_categories + category[asked_item]
    created = time + rng.integers(0, DAY // 24, num_events)

    def windowed(spec: Windowed, key: np.ndarray, known: np.ndarray | None = None) -> Callable[[], WindowedValue]:
        units = in_units(values, 6) if isinstance(spec, Mean) else None
        return lambda: WindowedValue.build(spec, GroupedRows(key, time, known), everything, units)

    plain: dict[str, Any] = {"name": "v", "by": ("user",)}
    mean = Mean(**plain, value="x", window="7d", prior=0.1, prior_count=10.0)
    cases: dict[str, tuple[Callable[[], Any], np.ndarray]] = {
        "count_user_7d": (windowed(Count(**plain, window="7d"), user), asked_user),
        "count_item_1d": (windowed(Count(**plain, window="1d"), item), asked_item),
        "count_user_category": (windowed(Count(**plain), pairs), asked_pairs),
        "rate_user_7d": (windowed(mean, user), asked_user),
        "recency_user": (windowed(Recency(**plain), user), asked_user),
        "count_user_7d_created": (windowed(Count(**plain, window="7d"), user, created), asked_user),
        "as_of_item": (lambda: LatestVersion.build(item, time, None, np.arange(num_events)), asked_item),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (build, key) in cases.items():
            seconds[name].append(_measured(build, key, asked_time))
    figures: dict[str, Any] = {"impressions": num_impressions, "events": num_events}
    for name, taken in seconds.items():
        figures[f"{name}_rows_per_s"] = round(num_impressions / statistics.median(sum(pair) for pair in taken))
        figures[f"{name}_look_ups_per_s"] = round(num_impressions / statistics.median(pair[1] for pair in taken))
    return {**figures, "peak_memory_mib": round(peak_memory_mib()), "machine": machine_record()}


def _log(
    rng: np.random.Generator, size: int, num_users: int, num_items: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and times, sorted by time."""
    skewed = [np.minimum((n ** rng.random(size)).astype(np.int64), n - 1) for n in (num_users, num_items)]
    return skewed[0], skewed[1], np.sort(rng.integers(0, 28 * DAY, size))


def _measured(build: Callable[[], Any], key: np.ndarray, time: np.ndarray) -> tuple[float, float]:
    """CPU seconds of preparing, and of all look-ups."""
    began = clock.process_time()
    value = build()
    built = clock.process_time()
    for start in range(0, len(key), CHUNK):
        part = slice(start, start + CHUNK)
        if isinstance(value, WindowedValue):
            value.at(key[part], time[part])
        else:
            value.at(key[part], time[part], 7 * DAY)
    return built - began, clock.process_time() - built
