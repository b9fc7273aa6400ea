"""Asks an ASGI application without a socket."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import orjson

from serving.service import RankingApp


async def ask(
    app: RankingApp,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: list[tuple[bytes, bytes]] | None = None,
    chunks: list[bytes] | None = None,
) -> tuple[int, Any]:
    """Sends one request; returns the status and the parsed body."""
    raw = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
    parts = [raw] if chunks is None else list(chunks)
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    if headers is None:
        headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    if not sent:
        return 0, None
    answer = b"".join(m.get("body", b"") for m in sent[1:])
    return sent[0]["status"], orjson.loads(answer) if answer else None
