"""Connections of the service: how many, how long one may take to ask, and how one ends while its caller still sends.

uvicorn limits requests, not connections, and waits for ever for the end of a request's head. So a caller could hold a
descriptor and memory for nothing; here a connection has a limited time from its first byte, or from the last answer's
end and the next byte, to a whole head, and there is a limited number of them.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

EXTENSION = "recsys.connection"
"""Where an ASGI scope has the :class:`Connection`."""
_FULL = b'{"error":{"type":"UnavailableError","message":"the service has too many connections","hint":"try again"}}'
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 1\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)


class Connection(HttpToolsProtocol):
    """One connection. Limits are those of the class; :func:`limited` makes one that has others."""

    head_timeout_s = 10.0
    max_connections = 512

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection, or refuses it with 503 where there are too many."""
        is_full = len(self.connections) >= self.max_connections
        super().connection_made(transport)
        if is_full:
            transport.write(_REFUSAL)
            transport.close()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets it."""
        self._has_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads on; what is no part of a request under way must become the head of one in time."""
        if self.transport.is_closing():
            return
        cycle: Any = self.cycle  # None before the first request
        if self._head_timer is None and (cycle is None or cycle.response_complete):
            self._await_head()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._has_head()
        self.scope["extensions"] = {EXTENSION: self}  # type: ignore[dict-item]
        super().on_headers_complete()

    def half_close(self) -> None:
        """Says that nothing more will be sent, after what was sent already; the caller may still send."""
        if not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()

    def end(self) -> None:
        """Closes it in the middle of an exchange whose answer was sent."""
        self.cycle.response_complete = True
        self.transport.close()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _has_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def limited(head_timeout_s: float, max_connections: int) -> type[Connection]:
    """Connections with these limits.

    Args:
        head_timeout_s: for the head of a request.
        max_connections: open at once.
    """
    return type("LimitedConnection", (Connection,), locals())


class Server(uvicorn.Server):
    """A server that tells when it began to answer.

    Attributes:
        has_begun: set then; never where it could not begin.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_begun = threading.Event()

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Begins to answer."""
        await super().startup(sockets=sockets)
        if self.started:
            self.has_begun.set()
