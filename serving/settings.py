"""Settings of the ranking service, and its socket: all that can be wrong before a model is loaded.

Nothing here imports torch, so that a port in use is reported at once.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from recsys.config import Config
from recsys.errors import UnavailableError
from recsys.manifest import Engine


class ServiceConfig(Config):
    """Settings of the service."""

    artifact: str = Field(min_length=1, description="folder, models:/NAME@ALIAS or models:/NAME/VERSION")
    features: str | None = Field(
        None,
        description="folder of stored features, lmdb:PATH or redis://HOST:PORT/DB; the artifact's own if not given",
    )
    tracking_uri: str | None = Field(None, description="MLflow store of models:/; MLflow's own choice if not given")
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8080, ge=0, le=65535, description="0 takes a free one")
    threads: int = Field(2, ge=1, le=256, description="requests scored side by side")
    max_waiting: int = Field(
        64, ge=0, description="requests that may send their body or wait for a thread; more are refused with 503"
    )
    max_candidates: int = Field(5000, ge=1, description="of one request")
    max_events: int = Field(10_000, ge=0, description="of one history that comes with a request")
    max_body_mib: float = Field(4.0, gt=0, le=1024)
    body_timeout_s: float = Field(10.0, gt=0, le=3600, description="how long a caller may take to send its body")
    drain_s: int = Field(10, ge=0, description="how long requests under way may take when the service is told to stop")
    engine: Engine = Field("auto", description="compiled, portable, or auto: compiled where it can run")
    access_log: bool = False


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, taken before anything is loaded.

    Raises:
        UnavailableError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as err:
        raise UnavailableError(f"host {host!r} must be an address of this machine: {err.strerror}") from err
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as err:
        listener.close()
        raise UnavailableError(
            f"port {port} of {host} must be free: {err.strerror}",
            hint="stop what listens there, or choose another port with --port (0 takes a free one)",
        ) from err
    try:
        yield listener
    finally:
        listener.close()
