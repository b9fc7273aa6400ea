"""The demo's ranking service: a process of its own, asked over HTTP, stopped at the end."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from recsys.errors import UnavailableError

_HOST = "127.0.0.1"
_READY = re.compile(r"Serving .* at (http://[0-9.]+:([0-9]+)), ready")


class Service:
    """``recsys serve`` as a context manager: ready when entered, gone when left.

    Args:
        artifact: what to serve.
        log: file that its output goes to.
        start_timeout_s: how long it may take to be ready.

    Attributes:
        url: where it listens.
    """

    def __init__(self, artifact: Path, log: Path, *, start_timeout_s: float = 180.0) -> None:
        self._artifact = artifact
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self.url = ""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "recsys.cli", "serve", str(self._artifact), "--host", _HOST, "--port", "0"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def rank(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ranks one request.

        Raises:
            UnavailableError: the service does not answer, or refuses.
        """
        status, answer = self._ask("POST", "/rank", json.dumps(request).encode())
        if status != http.client.OK:
            raise UnavailableError(
                f"{self.url}/rank must answer 200, got {status}: {answer[:500].decode(errors='replace')}"
            )
        reply: dict[str, Any] = json.loads(answer)
        return reply

    def _ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(_HOST, self._port, timeout=30)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as err:
            raise UnavailableError(f"{self.url} does not answer: {err}", hint=f"its log is {self._log}") from err
        finally:
            connection.close()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Waits for the line that says where it listens: it chose the port itself."""
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            has_ended = process.poll() is not None
            said = self._log.read_text(encoding="utf-8", errors="replace")
            ready = _READY.search(said)
            if ready is not None and not has_ended:
                self.url, self._port = ready[1], int(ready[2])
                return
            if has_ended:
                raise UnavailableError(
                    f"the service must start, but ended with status {process.returncode}",
                    hint=f"its log is {self._log}: " + " / ".join(said.strip().splitlines()[-5:]),
                )
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"the service must be ready within {self._start_timeout_s:g} s", hint=f"its log is {self._log}"
                )
            time.sleep(0.02)

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
