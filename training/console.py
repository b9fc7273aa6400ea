"""What a person sees while a model trains: a progress bar on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0


class _HideRemark(logging.Filter):
    """Hides one remark of torch to authors of tracers, which TorchRec's look-up calls forth."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("is_fx_tracing will return true for both")


_HIDE_REMARK = _HideRemark()


def quiet_libraries() -> None:
    """Hides what torch and TorchRec log about themselves, and nothing else that they log. Safe to call again."""
    logging.getLogger("torch.fx._symbolic_trace").addFilter(_HIDE_REMARK)


class TrainingDisplay:
    """Shows progress and messages. A context manager; outside of it, and when not enabled, it shows nothing.

    Args:
        enabled: False shows nothing at all.
        console: where to; stderr if not given.
    """

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        self._enabled = enabled
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._title = self._note = ""
        self._total = self._done = 0
        self._started = self._shown = 0.0
        self._first = 0

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description:<22}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("rows  {task.fields[speed]:>9} rows/s  {task.fields[note]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def start(self, title: str, total: int, done: int = 0) -> None:
        """Begins a phase, of which ``done`` of ``total`` rows are behind us."""
        self._title, self._note = title, ""
        self._total, self._done, self._first = total, done, done
        self._started = self._shown = time.monotonic()
        if self._progress is not None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(title, total=total, completed=done, speed="", note="")

    def advance(self, rows: int, note: str = "") -> None:
        """Counts rows of the phase.

        Args:
            note: replaces the last one unless empty, for instance the loss.
        """
        self._done += rows
        self._note = note or self._note
        now = time.monotonic()
        speed = (self._done - self._first) / max(now - self._started, 1e-9)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=rows, speed=f"{speed:,.0f}", note=self._note)
        elif self._enabled and now - self._shown >= _LINE_EVERY_S:
            self._shown = now
            share = self._done / max(self._total, 1)
            place = f"{self._done:,} of {self._total:,} rows ({share:.0%})"
            self.say(f"{self._title}: {place}, {speed:,.0f} rows/s  {self._note}".rstrip())

    def say(self, message: str) -> None:
        """Prints a line."""
        if self._enabled:
            (self._progress.console if self._progress is not None else self._console).print(message, markup=False)
