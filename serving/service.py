"""The ranking service: a raw ASGI application on uvicorn.

======  =========  ================================================================================================
method  path       answer
======  =========  ================================================================================================
POST    /rank      the candidates of a request, best first (:mod:`serving.request` says what a request is)
GET     /health    200 while the process runs
GET     /ready     200 once the model is loaded and its recorded rows gave their recorded logits, else 503
GET     /          what is served, and the paths
======  =========  ================================================================================================

There is no framework between uvicorn and a request: one costs more than the whole of parsing and encoding it. Scoring
runs in a pool of threads with one torch thread each, so that the event loop stays free while a request is parsed and
encoded. The network runs without the interpreter's lock, compiled or not, so requests are scored side by side on as
many cores as there are threads, and ``/health`` answers meanwhile; parsing and encoding take turns. What cannot be
answered soon is refused at once with 503; a request counts from when its body begins to be read, and has a limited time
to send it.

Errors are ``{"error": {"type", "message", "hint"}}``: 404 no such path, 405 method, 408 body sent too slowly, 413 body
too large, 415 not JSON, 422 the request breaks a rule, 503 not ready or overloaded, 500 our mistake (in full in the
log, by number in the answer).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import signal
import socket
import sys
import threading
import time as clock
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import torch

from recsys.errors import RequestError, UnavailableError
from recsys.predictor import Predictor
from serving.features import SnapshotFeatures
from serving.loader import Located, locate
from serving.request import RequestParser
from serving.scorer import Ranking, Scorer
from serving.settings import ServiceConfig, listening

_log = logging.getLogger("serving.service")

ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_SWITCH_S = 0.001
_TIMED_OUT = 408
_DRAIN_BYTES = 64 * 2**20
"""So much of a refused body is read before its connection is closed."""
_PATHS = {"/rank": ("POST",), "/health": ("GET", "HEAD"), "/ready": ("GET", "HEAD"), "/": ("GET", "HEAD")}


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class Model:
    """What answers requests.

    Attributes:
        scorer: loaded and warm.
        located: where it came from.
        facts: what ``/ready`` and every answer say of it.
        load_s: seconds that loading took.
    """

    scorer: Scorer
    located: Located
    facts: dict[str, Any]
    load_s: float

    @classmethod
    def load(cls, config: ServiceConfig) -> Model:
        """Loads what the settings name.

        Raises:
            ArtifactError: it cannot be used.
            UnavailableError: the MLflow store does not answer.
        """
        began = clock.perf_counter()
        torch.set_num_threads(1)
        located = locate(config.artifact, tracking_uri=config.tracking_uri)
        scorer = Scorer.load(located.folder, features=config.features, engine=config.engine)
        schema = scorer.artifact.schema
        scorer.parser = RequestParser(
            schema,
            max_candidates=config.max_candidates,
            max_events=config.max_events,
            training_period=scorer.artifact.training_period,
        )
        facts = {
            "name": located.name,
            "version": located.version or scorer.artifact.manifest.get("created_at"),
            "fingerprint": scorer.artifact.fingerprint[:16],
            "encoder_fingerprint": scorer.artifact.encoder.fingerprint[:16],
        }
        return cls(scorer, located, facts, clock.perf_counter() - began)

    def rank(self, body: bytes, received: float) -> bytes:
        """Answers one request.

        Args:
            body: JSON.
            received: ``time.perf_counter()`` when it had come in.

        Raises:
            RequestError: it breaks a rule.
        """
        began = clock.perf_counter()
        request = self.scorer.parser.parse(body)
        parsed = clock.perf_counter()
        ranking = self.scorer.rank(request)
        done = clock.perf_counter()
        return orjson.dumps(
            {
                "request_id": request.request_id,
                "task": ranking.task,
                "ranked": ranked(ranking, self.scorer.artifact.tasks),
                "unknown_user": ranking.is_unknown_user,
                "unknown_candidates": ranking.num_unknown_candidates,
                "ignored_events": ranking.num_ignored_events,
                "model": self.facts,
                "timing_ms": {
                    "wait": round((began - received) * 1e3, 3),
                    "parse": round((parsed - began) * 1e3, 3),
                    "score": round((done - parsed) * 1e3, 3),
                },
            }
        )


def ranked(ranking: Ranking, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """Candidates for JSON, best first; with the scores of every task where there are several."""
    scores = ranking.scores.tolist()
    if len(tasks) == 1:
        return [{"item": item, "score": score} for item, score in zip(ranking.items, scores, strict=True)]
    return [
        {"item": item, "score": score, "scores": dict(zip(tasks, row, strict=True))}
        for item, score, row in zip(ranking.items, scores, ranking.probabilities.tolist(), strict=True)
    ]


class Body:
    """The body of one request, of which no more than a limit is kept.

    Args:
        receive: of the ASGI connection.
        limit: bytes.

    Attributes:
        is_over: whether nothing more will come: it was read to its end, or the caller has gone.
        is_too_large: whether more than the limit came.
    """

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self.is_over = False
        self.is_too_large = False

    async def _part(self) -> bytes | None:
        """The next piece; None if the caller has gone."""
        message = await self._receive()
        has_gone = message["type"] == "http.disconnect"
        self.is_over = has_gone or not message.get("more_body", False)
        return None if has_gone else message.get("body", b"")

    async def read(self) -> bytes | None:
        """The whole of it; None if it is too large, or the caller has gone."""
        parts: list[bytes] = []
        size = 0
        while True:
            part = await self._part()
            if part is None:
                return None
            parts.append(part)
            size += len(part)
            if size > self._limit:
                self.is_too_large = True
                return None
            if self.is_over:
                return b"".join(parts) if len(parts) > 1 else part

    async def drain(self) -> None:
        """Reads on to its end and keeps nothing, up to a bound."""
        left = _DRAIN_BYTES
        while not self.is_over and left > 0:
            left -= len(await self._part() or b"")


class RankingApp:
    """The ASGI application.

    Args:
        config: settings.
        model: loaded; None if it is still to come (:meth:`use`).
    """

    def __init__(self, config: ServiceConfig, model: Model | None = None) -> None:
        self.config = config
        self._model = model
        self._max_body = int(config.max_body_mib * 2**20)
        self._pool = ThreadPoolExecutor(config.threads, "scorer", initializer=torch.set_num_threads, initargs=(1,))
        self._under_way = 0

    def use(self, model: Model) -> None:
        """Answers with this model from now on; requests under way keep the one that they began with."""
        self._model = model

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """One connection's event stream, as ASGI defines it."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                self._pool.shutdown(wait=False, cancel_futures=True)
                return

    async def _http(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        reply: Reply | None
        body = Body(receive, self._max_body)
        try:
            reply = await self._answer(scope, body)
        except Exception as err:  # noqa: BLE001 - the one handler: nothing may leave without an answer
            reply = error_reply(err)
        if reply is None:  # the caller has gone
            return
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(reply.body)).encode()),
            *reply.headers,
        ]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        content = b"" if scope["method"] == "HEAD" else reply.body
        if scope["method"] != "POST" or body.is_over or reply.status == _TIMED_OUT:
            await send({"type": "http.response.body", "body": content})
            return
        # Closing on a caller that is still sending resets the connection, and with it the answer that it has not read.
        await send({"type": "http.response.body", "body": content, "more_body": True})
        with suppress(TimeoutError):
            await asyncio.wait_for(body.drain(), self.config.body_timeout_s)
        await send({"type": "http.response.body", "body": b""})

    async def _answer(self, scope: ASGIScope, body: Body) -> Reply | None:
        path, method = scope["path"], scope["method"]
        allowed = _PATHS.get(path)
        if allowed is None:
            return _error(404, "NotFound", "there is no such path", f"paths: {', '.join(sorted(_PATHS))}")
        if method not in allowed:
            reply = _error(405, "MethodNotAllowed", f"{path} takes {allowed[0]}", None)
            return reply._replace(headers=((b"allow", ", ".join(allowed).encode()),))
        if path == "/rank":
            return await self._rank(scope, body)
        if path == "/health":
            return Reply(200, b'{"status":"ok"}')
        return self._ready() if path == "/ready" else self._index()

    async def _rank(self, scope: ASGIScope, body: Body) -> Reply | None:
        model = self._model
        if model is None:
            raise UnavailableError("the model is still being loaded", hint="ask GET /ready")
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
        if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
            return _error(
                415, "UnsupportedMediaType", "the body must be JSON", "send the header content-type: application/json"
            )
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._max_body:
            return self._too_large()
        if self._under_way >= self.config.threads + self.config.max_waiting:
            raise UnavailableError("the service is overloaded", hint="try again, or add threads or machines")
        # Counted from here: whoever sends its body slowly holds a place as well.
        self._under_way += 1
        try:
            try:
                raw = await asyncio.wait_for(body.read(), self.config.body_timeout_s)
            except TimeoutError:
                return self._too_slow()
            if raw is None:
                return self._too_large() if body.is_too_large else None
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._pool, model.rank, raw, clock.perf_counter())
        finally:
            self._under_way -= 1
        return Reply(200, answer)

    def _too_large(self) -> Reply:
        message = f"the body must be at most {self.config.max_body_mib:g} MiB"
        reply = _error(413, "BodyTooLarge", message, "send fewer candidates or events at once, or raise max_body_mib")
        return reply._replace(headers=((b"connection", b"close"),))

    def _too_slow(self) -> Reply:
        message = f"the body must be sent within {self.config.body_timeout_s:g} s"
        reply = _error(_TIMED_OUT, "BodyTimeout", message, "send it whole, or raise body_timeout_s")
        return reply._replace(headers=((b"connection", b"close"),))

    def _ready(self) -> Reply:
        if self._model is None:
            raise UnavailableError("the model is still being loaded")
        predictor = self._model.scorer.predictor
        facts = {
            "status": "ready",
            "model": self._model.facts,
            "engine": predictor.engine,
            "engine_note": predictor.engine_note,
            "self_test_max_error": predictor.max_error,
        }
        return Reply(200, orjson.dumps(facts))

    def _index(self) -> Reply:
        facts: dict[str, Any] = {"service": "recsys ranking", "paths": {p: m[0] for p, m in _PATHS.items()}}
        if self._model is not None:
            facts["model"] = self._model.facts
            facts["tasks"] = self._model.scorer.artifact.tasks
            facts["example"] = example_request(self._model.scorer)
        return Reply(200, orjson.dumps(facts))


def error_reply(err: Exception) -> Reply:
    """The answer to an error: the one place where the tree of errors becomes HTTP."""
    if isinstance(err, RequestError):
        return _error(422, "RequestError", err.message, err.hint)
    if isinstance(err, UnavailableError):
        reply = _error(503, "UnavailableError", err.message, err.hint)
        return reply._replace(headers=((b"retry-after", b"1"),))
    number = secrets.token_hex(6)
    _log.error("error %s", number, exc_info=err)
    return _error(500, "InternalError", f"the service failed; its log says why under {number}", None)


def _error(status: int, kind: str, message: str, hint: str | None) -> Reply:
    return Reply(status, orjson.dumps({"error": {"type": kind, "message": message, "hint": hint}}))


def example_request(scorer: Scorer) -> dict[str, Any]:
    """A request that the stored features can answer."""
    features = scorer.assembler.features
    users: list[Any] = []
    items: list[Any] = []
    if isinstance(features, SnapshotFeatures):
        users, items = features.some_users(1), features.some_items(3)
    return {"user_id": users[0] if users else 1, "candidates": items or [1, 2, 3]}


# The process


def serve(
    config: ServiceConfig, *, listener: socket.socket | None = None, announce: Callable[[str], None] | None = None
) -> None:
    """Runs the service until it is told to stop (SIGTERM, SIGINT); requests under way are answered first.

    It listens at once and loads the model meanwhile: ``/health`` answers 200, ``/ready`` and ``/rank`` 503.

    Args:
        config: settings.
        listener: bound socket to listen on; if not given, one of the settings' address.
        announce: called with the lines that say that the service is ready; printed if not given.

    Raises:
        UnavailableError: the port is taken or the address is not this machine's; the MLflow store does not answer.
        ArtifactError: the artifact cannot be used.
    """
    import uvicorn

    with listening(config.host, config.port) if listener is None else nullcontext(listener) as listener:
        port = listener.getsockname()[1]
        app = RankingApp(config)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="uvloop",
                http="httptools",
                ws="none",
                lifespan="on",
                log_level="info" if config.access_log else "warning",
                access_log=config.access_log,
                timeout_graceful_shutdown=config.drain_s,
                server_header=False,
                date_header=False,
            )
        )
        failures: list[BaseException] = []

        def load() -> None:
            try:
                model = Model.load(config)
                # What is loaded stays. Left to the collector, it would be walked through again and again: a pause of
                # hundreds of milliseconds for everyone, every few large answers.
                gc.collect()
                gc.freeze()
                app.use(model)
                (announce or _print)(ready_lines(model, config.host, port))
            except BaseException as err:  # noqa: BLE001 - raised again below, in the thread that called
                failures.append(err)
                server.should_exit = True

        loading = threading.Thread(target=load, name="loader", daemon=True)
        with _quiet_end(), _quick_turns():
            loading.start()
            server.run(sockets=[listener])
        if failures:
            raise failures[0]


@contextmanager
def _quick_turns() -> Iterator[None]:
    """A thread that parses or encodes gives way to the event loop sooner: Python's own 5 ms are felt in ``/health``."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _quiet_end() -> Iterator[None]:
    """Ends with status 0 when told to stop: uvicorn raises the signal again once it has drained."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ready_lines(model: Model, host: str, port: int) -> str:
    """What the service says when it can answer: its address, and how to ask."""
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    predictor: Predictor = model.scorer.predictor
    example = orjson.dumps(example_request(model.scorer)).decode()
    engine = predictor.engine if predictor.engine_note is None else f"{predictor.engine}: {predictor.engine_note}"
    quoted = example.replace("'", "'\\''")
    return (
        f"Serving {model.facts['name']} ({engine}) at {url}, ready after {model.load_s:.1f} s\n"
        f"  curl -s {url}/rank -H 'content-type: application/json' -d '{quoted}'"
    )


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
