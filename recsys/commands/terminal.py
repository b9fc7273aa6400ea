"""What the commands print: results on stdout, everything else on stderr.

A script reads stdout and gets JSON (``--json``) or the result and nothing else; progress and messages are for people.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int], None]
"""Called with the work done and the whole work."""


@cache
def results() -> Console:
    """The console of results: stdout."""
    from rich.console import Console

    return Console(highlight=False)


@cache
def messages() -> Console:
    """The console of progress and messages: stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Writes one JSON document to stdout; what JSON cannot say (NaN, infinity) becomes null."""
    sys.stdout.write(json.dumps(_json_value(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    if hasattr(value, "item"):  # a numpy or torch scalar
        return _json_value(value.item())
    return str(value)


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Prints names and values in two columns; what is nested has its names joined by dots.

    Lines are never folded: paths can be copied from them.
    """
    from rich.text import Text

    facts = _flat(facts)
    console = results()
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        console.print(Text.assemble((name.ljust(width), "dim"), "  ", _shown(value)), soft_wrap=True)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


_LEAST = 12
"""Letters that a folded column of a table keeps at least."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; its first column is text, the others are numbers.

    Nothing is left out: on a terminal that is narrower, long texts are folded in their column; where that does not do,
    or nobody looks at it (a file, a pipe), rows go on past the edge.
    """
    from rich.cells import cell_len
    from rich.segment import Segments
    from rich.table import Table
    from rich.text import Text

    shown = [[_shown(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *shown, strict=True)]
    is_text = [place == 0 or any(isinstance(row[place], str) for row in rows) for place in range(len(columns))]
    least = [
        max(min(width, _LEAST), cell_len(head)) if text else width
        for head, width, text in zip(columns, widths, is_text, strict=True)
    ]
    console = results()
    gaps = 2 * (len(columns) - 1)
    is_folded = console.is_terminal and sum(least) + gaps <= console.width < sum(widths) + gaps
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(
            column,
            justify="right" if place else "left",
            no_wrap=not (is_folded and is_text[place]),
            overflow="fold",
            min_width=least[place] if is_folded else None,
        )
    for row in shown:
        table.add_row(*map(Text, row))
    console.print(Text(title, style="bold"), soft_wrap=True)
    if is_folded:
        console.print(table)
    else:
        wide = console.options.update(width=max(console.width, sum(widths) + gaps))
        console.print(Segments(console.render(table, wide)), soft_wrap=True, end="")
    console.print()


METRIC_COLUMNS = ("auc", "gauc", "logloss", "ne", "ece", "num_rows")


def print_metrics(title: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints metrics, a row a scorer, split or task; what is undefined (None) is a dash."""
    heads = ("", "AUC", "GAUC", "logloss", "NE", "ECE", "rows")
    rows = [[name, *(values[column] for column in METRIC_COLUMNS)] for name, values in metrics.items()]
    print_table(title, heads, rows)


def _shown(value: Any) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, float):
        shown = f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
        return shown if math.isfinite(value) else "\u2013"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return str(value)


@contextmanager
def stage(name: str, *, spinner: bool = True) -> Iterator[Callable[[str], None]]:
    """Shows that a stage runs, then a tick with its seconds (or a cross), on stderr.

    Args:
        spinner: False for a stage that shows its own progress: a terminal holds one moving thing at a time.

    Yields:
        A function that sets the words after the name, such as how far it is or what came out.
    """
    from rich.markup import escape

    console = messages()
    begin = time.perf_counter()
    status = console.status(escape(name), spinner="dots") if spinner else None
    detail = ""

    def tell(text: str) -> None:
        nonlocal detail
        detail = text
        if status is not None:
            status.update(f"{escape(name)} [dim]{escape(text)}[/dim]")

    def close(mark: str, words: str) -> None:
        seconds = time.perf_counter() - begin
        line = f"{mark} [dim]{seconds:6.1f} s[/dim]  {escape(name)}  [dim]{escape(words)}[/dim]"
        console.print(line, soft_wrap=True)

    try:
        with status or nullcontext():
            yield tell
    except BaseException:
        close("[red]\u2717[/red]", "")
        raise
    close("[green]\u2713[/green]", detail)


def counting(tell: Callable[[str], None], unit: str) -> Progress:
    """A progress callback that puts ``done of total unit`` behind a stage's name."""

    def progress(done: int, total: int) -> None:
        tell(f"{done:,} of {total:,} {unit}")

    return progress


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
