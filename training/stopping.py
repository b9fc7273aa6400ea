"""Being told to stop: by a signal, or by another process that was, through a file."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn


class StopRequest:
    """Whether the process was told to stop. The first signal asks; the second one is not caught again.

    Args:
        file: asks too, once it exists.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._signal: int | None = None

    @property
    def is_set(self) -> bool:
        """To be looked at between two steps: it may ask the file system."""
        return self._signal is not None or (self._file is not None and self._file.exists())

    def note(self, number: int, _: FrameType | None) -> None:
        """Handles a signal."""
        if self._signal is not None:
            self.raise_it()
        self._signal = number

    def raise_it(self) -> NoReturn:
        """Ends the process as the signal would have.

        Raises:
            SystemExit: it was SIGTERM.
            KeyboardInterrupt: it was SIGINT, or the file.
        """
        if self._signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


@contextmanager
def stop_signals(file: Path | None = None) -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request to stop at the next look; in the main thread only, as Python has it."""
    stop = StopRequest(file)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
