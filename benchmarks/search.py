"""The search stage of DARE at several widths of the attention vectors: what narrow ones save.

For one request the stage gathers the attention vectors of the history from the table, scores every candidate against
every event, and selects the K best of each. Gathering and scoring cost in proportion to the width; the selection does
not know it. The parts are timed apart and together, the widths in turns, so that whatever else the machine does falls
on all of them; the ratios of the medians are the figures to trust.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine_record
from recsys.ops.search_attention import best, relevance_single_request

BAR = 0.55
"""Half the width may cost at most so much of the stage."""


def run(
    lengths: Sequence[int] = (1_000, 10_000),
    candidates: Sequence[int] = (1, 10, 100, 500),
    widths: Sequence[int] = (128, 64, 32),
    *,
    top_k: int = 20,
    table_rows: int = 1_000_000,
    rounds: int = 15,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Draws tables and times the stage.

    Args:
        lengths: of the history.
        candidates: of the request.
        widths: of a token's attention vector, all its features together; the first is what the others are compared
            with.
        top_k: events that a candidate keeps.
        table_rows: of the table that the vectors are gathered from, at random.
        rounds: turns of each width; the median counts. One more comes first and does not count.
        seed: of everything drawn.
        device: where it runs; one thread where that is a CPU.

    Returns:
        Figures by name: microseconds of ``gather``, ``scores``, ``selection``, of the last two in one (``search``) and
        of all (``stage``), by length, candidates and width; ratios to the first width; whether every stage of half the
        width keeps within the bar; the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"top_k": top_k, "rounds": rounds, "device": device}
    try:
        generator = torch.Generator().manual_seed(seed)
        tables = {w: torch.randn(table_rows, w, generator=generator).to(device) for w in widths}
        for length in lengths:
            for number in candidates:
                figures |= _figures(tables, length, number, top_k, table_rows, rounds, generator, device)
    finally:
        torch.set_num_threads(threads)
    half = [v for k, v in figures.items() if k.startswith("ratio_stage_") and k.endswith(f"_{widths[0] // 2}")]
    figures["half_width_within_bar"] = f"{sum(ratio <= BAR for ratio in half)} of {len(half)}"
    return {**figures, "bar": BAR, "machine": machine_record()}


def _figures(
    tables: dict[int, Tensor],
    length: int,
    number: int,
    top_k: int,
    table_rows: int,
    rounds: int,
    generator: torch.Generator,
    device: str,
) -> dict[str, Any]:
    """Of one length and number of candidates."""
    rows = torch.randint(table_rows, (rounds + 1, length), generator=generator).to(device)
    own, lengths = torch.randn(1, length, generator=generator).to(device), torch.tensor([length], device=device)
    times: dict[tuple[str, int], list[float]] = {}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for width, table in tables.items():
                query = torch.randn(number, width, generator=generator).to(device)
                # Other rows for the whole than for the parts: nobody finds them in a cache.
                gathered, gather_s = _timed(device, _gathered, table, rows[turn])
                scores, scores_s = _timed(device, relevance_single_request, query, gathered, own, lengths)
                _, selection_s = _timed(device, best, scores, top_k)
                _, search_s = _timed(device, _searched, query, gathered, own, lengths, top_k)
                other = torch.randint(table_rows, (length,), generator=generator).to(device)
                _, stage_s = _timed(device, _staged, query, table, other, own, lengths, top_k)
                parts = {
                    "gather": gather_s,
                    "scores": scores_s,
                    "selection": selection_s,
                    "search": search_s,
                    "stage": stage_s,
                }
                if turn > 0:
                    for part, seconds in parts.items():
                        times.setdefault((part, width), []).append(seconds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    first = next(iter(tables))
    found: dict[str, Any] = {}
    for (part, width), seconds in medians.items():
        found[f"{part}_us_at_{length}_events_{number}_candidates_width_{width}"] = round(seconds * 1e6, 1)
    for (part, width), seconds in medians.items():
        if width != first and part != "selection":
            ratio = round(seconds / medians[part, first], 3)
            found[f"ratio_{part}_at_{length}_events_{number}_candidates_width_{width}"] = ratio
    return found


def _gathered(table: Tensor, rows: Tensor) -> Tensor:
    return table.index_select(0, rows).unsqueeze(0)


def _searched(query: Tensor, keys: Tensor, own: Tensor, lengths: Tensor, top_k: int) -> Tensor:
    return best(relevance_single_request(query, keys, own, lengths), top_k)


def _staged(query: Tensor, table: Tensor, rows: Tensor, own: Tensor, lengths: Tensor, top_k: int) -> Tensor:
    return _searched(query, _gathered(table, rows), own, lengths, top_k)


def _timed(device: str, work: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, float]:
    """What ``work`` gives, and its seconds."""
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work(*arguments)
    if is_cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - began
