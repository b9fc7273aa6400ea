"""How long networks take for one request, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from recsys.batch import Batch
from recsys.models import RankingModel

_WARM_UP = 3


def scoring_ms(models: Mapping[str, RankingModel], request: Batch, *, repeats: int = 20) -> dict[str, float]:
    """Median time of each network for one request, uncompiled, in one thread, the models in turn.

    Args:
        models: by name, on the CPU, in evaluation mode; looking ids up is not timed.
        request: one request.
        repeats: that count.

    Returns:
        Milliseconds by name.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            forwards = {n: getattr(m.network, "single_request", m.network) for n, m in models.items()}
            inputs = {name: model.lookup(request) for name, model in models.items()}
            for repeat in range(repeats + _WARM_UP):
                for name, forward in forwards.items():
                    begin = time.perf_counter()
                    forward(inputs[name])
                    if repeat >= _WARM_UP:
                        times[name].append((time.perf_counter() - begin) * 1e3)
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in times.items()}
