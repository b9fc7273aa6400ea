"""The service: answers, refusals, and the process around them."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.config import load_yaml, validate
from recsys.errors import UnavailableError
from serving.scorer import Scorer
from serving.service import Model, RankingApp, serve
from serving.settings import ServiceConfig, listening
from tests.serving.asgi import ask
from tests.serving.conftest import World

ITEM = 2**53 + 1
BODY = {"user_id": 1000, "candidates": [ITEM, ITEM + 1, ITEM + 2, 5], "time": 1_700_900_000_000_000}


@pytest.fixture(scope="module")
def config(world: World) -> ServiceConfig:
    return ServiceConfig(artifact=str(world.artifact), threads=2, max_candidates=50, max_body_mib=0.01)


@pytest.fixture(scope="module")
def model(config: ServiceConfig) -> Model:
    return Model.load(config)


@pytest.fixture(scope="module")
def app(config: ServiceConfig, model: Model) -> RankingApp:
    return RankingApp(config, model)


def call(app: RankingApp, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
    return asyncio.run(ask(app, method, path, body, **options))


# Answers


def test_a_ranked_answer(app: RankingApp, scorer: Scorer) -> None:
    status, reply = call(app, "POST", "/rank", {**BODY, "request_id": "a1", "task": "like"})
    assert status == 200
    ranking = scorer.rank({**BODY, "task": "like"})
    assert [c["item"] for c in reply["ranked"]] == ranking.items
    np.testing.assert_array_equal([c["score"] for c in reply["ranked"]], ranking.scores)
    assert [c["scores"]["like"] for c in reply["ranked"]] == [c["score"] for c in reply["ranked"]]
    assert (reply["request_id"], reply["task"]) == ("a1", "like")
    assert (reply["unknown_user"], reply["unknown_candidates"], reply["ignored_events"]) == (False, 1, 0)
    assert reply["model"]["name"] == "tiny"
    assert reply["timing_ms"]["score"] > 0


def test_equal_scores_keep_the_order_of_the_request(app: RankingApp) -> None:
    candidates = [5, ITEM, 6, ITEM, 7, 5]
    _, reply = call(app, "POST", "/rank", {**BODY, "candidates": candidates})
    unknown = [c["item"] for c in reply["ranked"] if c["item"] in (5, 6, 7)]
    assert unknown == [5, 6, 7, 5]
    assert len(reply["ranked"]) == 6


def test_paths(app: RankingApp) -> None:
    assert call(app, "GET", "/health") == (200, {"status": "ok"})
    status, ready = call(app, "GET", "/ready")
    assert (status, ready["status"], ready["engine"]) == (200, "ready", "portable")
    assert ready["self_test_max_error"] <= 1e-5
    status, index = call(app, "GET", "/")
    assert status == 200
    assert index["paths"]["/rank"] == "POST"
    assert call(app, "POST", "/rank", index["example"])[0] == 200
    assert call(app, "HEAD", "/health") == (200, None)


# Refusals


def test_the_settings_that_come_with_the_project_are_valid() -> None:
    files = sorted((Path(__file__).resolve().parents[2] / "configs" / "serving").glob("*.yaml"))
    assert files
    for file in files:
        assert validate(ServiceConfig, load_yaml(file), source=str(file)).host == "127.0.0.1"


def test_scores_that_are_no_numbers_are_refused(config: ServiceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(config)
    monkeypatch.setattr(model.scorer.predictor, "logits", lambda batch: np.full((batch.num_rows, 2), np.nan))
    status, reply = call(RankingApp(config, model), "POST", "/rank", BODY)
    assert status == 422
    assert "a score is not a number" in reply["error"]["message"]


def test_statuses(app: RankingApp) -> None:
    assert call(app, "GET", "/nothing")[0] == 404
    assert call(app, "GET", "/rank")[0] == 405
    assert call(app, "POST", "/ready")[0] == 405
    assert call(app, "POST", "/rank", BODY, headers=[(b"content-type", b"text/csv")])[0] == 415
    assert call(app, "POST", "/rank", BODY, headers=[(b"content-type", b"application/json; charset=utf-8")])[0] == 200
    assert call(app, "POST", "/rank", BODY, headers=[])[0] == 200
    status, reply = call(app, "POST", "/rank", {"candidates": list(range(51))})
    assert (status, reply["error"]["type"]) == (422, "RequestError")
    assert reply["error"]["message"] == "candidates must be at most 50, got 51"
    assert call(app, "POST", "/rank", b"{")[0] == 422
    assert call(app, "POST", "/rank", {**BODY, "user_id": "text"})[0] == 422


def test_a_time_in_seconds_is_refused_by_what_the_artifact_knows(app: RankingApp) -> None:
    status, reply = call(app, "POST", "/rank", {**BODY, "time": BODY["time"] // 10**6})  # type: ignore[operator]
    assert (status, reply["error"]["type"]) == (422, "RequestError")
    assert "got seconds by its size" in reply["error"]["message"]


def test_a_body_that_is_too_large(app: RankingApp) -> None:
    declared = [(b"content-type", b"application/json"), (b"content-length", b"99999999999")]
    assert call(app, "POST", "/rank", b"{}", headers=declared)[0] == 413
    pieces = [b" " * 4000] * 1000
    status, reply = call(app, "POST", "/rank", chunks=pieces)
    assert status == 413
    assert reply["error"]["message"] == "the body must be at most 0.01 MiB"


def test_a_body_in_pieces(app: RankingApp) -> None:
    raw = orjson.dumps(BODY)
    pieces = [raw[i : i + 7] for i in range(0, len(raw), 7)]
    assert call(app, "POST", "/rank", chunks=pieces)[0] == 200


def test_bodies_that_come_slowly_count_and_time_out(config: ServiceConfig, model: Model) -> None:
    """Two callers who never finish their bodies fill the service; their time over, they are told so and it is free."""
    app = RankingApp(config.model_copy(update={"threads": 1, "max_waiting": 1, "body_timeout_s": 0.2}), model)
    scope = {"type": "http", "method": "POST", "path": "/rank", "headers": [], "query_string": b""}
    sent: list[list[Any]] = [[], []]

    async def crowd() -> None:
        begun = [asyncio.Event(), asyncio.Event()]

        async def slow(place: int) -> None:
            first = [{"type": "http.request", "body": b"{", "more_body": True}]

            async def receive() -> Any:
                if first:
                    return first.pop()
                begun[place].set()
                return await asyncio.get_running_loop().create_future()

            async def send(message: Any) -> None:
                sent[place].append(message)

            await app(scope, receive, send)

        slow_ones = [asyncio.create_task(slow(place)) for place in range(2)]
        for event in begun:
            await event.wait()
        status, reply = await ask(app, "POST", "/rank", BODY)
        assert (status, reply["error"]["message"]) == (503, "the service is overloaded")
        await asyncio.wait_for(asyncio.gather(*slow_ones), 30)
        assert (await ask(app, "POST", "/rank", BODY))[0] == 200

    asyncio.run(crowd())
    for start, body in sent:
        assert start["status"] == 408
        assert (b"connection", b"close") in start["headers"]
        error = orjson.loads(body["body"])["error"]
        assert (error["type"], error["message"]) == ("BodyTimeout", "the body must be sent within 0.2 s")


def test_a_refused_body_is_read_to_its_end_but_not_for_ever(app: RankingApp) -> None:
    """A connection that is closed on unread bytes is reset, and the answer lost."""
    piece = {"type": "http.request", "body": b" " * 2**20, "more_body": True}
    scope = {"type": "http", "method": "POST", "path": "/rank", "headers": [], "query_string": b""}

    def refused(num_pieces: int) -> tuple[int, list[Any]]:
        taken, sent = 0, []

        async def receive() -> Any:
            nonlocal taken
            taken += 1
            return piece if taken < num_pieces else {**piece, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(app(scope, receive, send))
        return taken, sent

    taken, sent = refused(8)
    assert taken == 8
    assert sent[0]["status"] == 413
    assert sent[1]["more_body"], "the answer must not wait for the rest"
    assert refused(1)[0] == 1
    assert refused(10_000)[0] == 257


def test_a_caller_that_goes_away_gets_nothing(app: RankingApp) -> None:
    assert call(app, "POST", "/rank", chunks=[]) == (0, None)


def test_before_the_model_is_loaded(config: ServiceConfig) -> None:
    app = RankingApp(config)
    assert call(app, "GET", "/health")[0] == 200
    assert call(app, "GET", "/")[0] == 200
    for method, path in (("GET", "/ready"), ("POST", "/rank")):
        status, reply = call(app, method, path, BODY)
        assert (status, reply["error"]["type"]) == (503, "UnavailableError")


def test_our_mistakes_are_numbered_and_not_shown(
    config: ServiceConfig, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(model.scorer, "rank", broken)
    status, reply = call(RankingApp(config, model), "POST", "/rank", BODY)
    assert (status, reply["error"]["type"]) == (500, "InternalError")
    assert "secret" not in orjson.dumps(reply).decode()
    number = re.search(r"under ([0-9a-f]{12})", reply["error"]["message"])
    assert number is not None
    assert number[1] in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_too_many_at_once_are_refused(config: ServiceConfig, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    original = model.rank

    def slow(self: Model, body: bytes, received: float) -> bytes:
        release.wait(30)
        return original(body, received)

    monkeypatch.setattr(Model, "rank", slow)
    app = RankingApp(config.model_copy(update={"threads": 1, "max_waiting": 2}), model)

    async def crowd() -> list[int]:
        asked = [asyncio.create_task(ask(app, "POST", "/rank", BODY)) for _ in range(5)]
        await asyncio.wait(asked[3:])  # three have a thread or may wait for one
        assert [t.result()[0] for t in asked if t.done()] == [503, 503]
        assert (await ask(app, "GET", "/health"))[0] == 200, "the loop must not be blocked"
        release.set()
        return [(await t)[0] for t in asked]

    assert sorted(asyncio.run(crowd())) == [200, 200, 200, 503, 503]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([ITEM, ITEM + 1, 5, -1, 2**63 - 1])
TIMES = st.sampled_from(["2023-11-20", "2024-01-01T10:00:00+05:30", 1_700_500_000_000_000, 1])
NUMBERS = st.integers(-5, 5) | st.floats(-1e300, 1e300) | st.none()
WORDS = st.sampled_from(["c1", "s1", "t1,t2,,", "", "never seen"]) | st.none()
ROWS = st.fixed_dictionaries(
    {"item_id": KEYS},
    optional={"price": NUMBERS, "tags": WORDS, "category": WORDS, "source": WORDS},
)
EVENTS = st.fixed_dictionaries(
    {"item_id": KEYS, "time": TIMES}, optional={"dwell": NUMBERS, "category": WORDS, "tags": WORDS}
)
GOOD = st.fixed_dictionaries(
    {"candidates": st.lists(KEYS | ROWS, min_size=1, max_size=5)},
    optional={
        "user_id": st.sampled_from([1000, 1003, 7, None]),
        "time": TIMES,
        "user": st.fixed_dictionaries({}, optional={"age": NUMBERS, "interests": st.lists(WORDS, max_size=3)}),
        "context": st.fixed_dictionaries({}, optional={"time": TIMES}),
        "histories": st.fixed_dictionaries(
            {},
            optional={
                "clicked": st.lists(EVENTS, max_size=12),
                "seen": st.lists(st.fixed_dictionaries({"item_id": KEYS, "time": TIMES}), max_size=9)
                | st.lists(KEYS, max_size=9),
            },
        ),
        "task": st.sampled_from(["click", "like", None]),
    },
)


@given(GOOD)
def test_every_good_request_is_answered(app: RankingApp, body: dict[str, Any]) -> None:
    status, reply = call(app, "POST", "/rank", json.dumps(body).encode())
    assert status == 200, reply
    keys = [c["item_id"] if isinstance(c, dict) else c for c in body["candidates"]]
    assert sorted(c["item"] for c in reply["ranked"]) == sorted(keys)
    assert all(0.0 <= c["score"] <= 1.0 for c in reply["ranked"])


@given(GOOD, st.data())
def test_no_request_is_our_mistake(app: RankingApp, body: dict[str, Any], data: st.DataObject) -> None:
    """A good request with something put anywhere in it."""
    text = json.dumps(body)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    changed = json.loads(text)
    walk(changed)
    for _ in range(data.draw(st.integers(1, 2))):
        node, key = data.draw(st.sampled_from(places))
        node[key] = data.draw(JSON | KEYS | WORDS | TIMES)
    status, reply = call(app, "POST", "/rank", json.dumps(changed).encode())
    assert status in (200, 422), reply
    if status == 422:
        assert reply["error"]["message"]


# The process


COMMAND = """
import sys
from serving.service import serve
from serving.settings import ServiceConfig
import json
serve(ServiceConfig(artifact=sys.argv[1], port=int(sys.argv[2]), threads=2, **json.loads(sys.argv[3])))
"""


class Process:
    """``serve`` in a process of its own."""

    def __init__(self, artifact: Path, port: int = 0, settings: dict[str, Any] | None = None) -> None:
        root = Path(__file__).resolve().parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", COMMAND, str(artifact), str(port), json.dumps(settings or {})],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        match = re.search(r"http://\S+:(\d+)", self.first_line)
        self.url = match[0] if match else ""

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def running(world: World) -> Iterator[Process]:
    process = Process(world.artifact)
    yield process
    if process.process.poll() is None:
        process.process.kill()
        process.process.communicate()


def test_over_a_socket(running: Process, scorer: Scorer) -> None:
    assert "Serving tiny (portable" in running.first_line
    with httpx.Client(base_url=running.url, timeout=30) as client:
        assert client.get("/ready").json()["status"] == "ready"
        reply = client.post("/rank", json=BODY)
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "application/json"
        ranking = scorer.rank(BODY)
        assert [c["item"] for c in reply.json()["ranked"]] == ranking.items
        np.testing.assert_allclose([c["score"] for c in reply.json()["ranked"]], ranking.scores, atol=1e-9, rtol=0)
        assert client.get("/health").status_code == 200
        assert client.get("/rank").status_code == 405
        assert client.get("/rank").headers["allow"] == "POST"
        assert client.get("/nothing").status_code == 404
        assert (
            client.post("/rank", content=b"x" * (5 * 2**20), headers={"content-type": "application/json"}).status_code
            == 413
        )
        assert client.post("/rank", content=b"{", headers={"content-type": "application/json"}).status_code == 422
        assert client.post("/rank", json=BODY).status_code == 200


def test_a_large_body_sent_before_the_answer_is_read(running: Process) -> None:
    """As most clients do: they send all of it, and only then look for an answer."""
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=30)
    connection.request("POST", "/rank", b" " * (5 * 10**6), {"content-type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 413
    assert orjson.loads(reply.read())["error"]["type"] == "BodyTooLarge"
    connection.close()


def test_many_callers_at_once_get_their_own_answers(running: Process, scorer: Scorer) -> None:
    bodies = [
        {**BODY, "user_id": 1000 + i % 20, "request_id": i, "candidates": [ITEM + i % 7, ITEM + 9]} for i in range(60)
    ]
    with httpx.Client(base_url=running.url, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda body: client.post("/rank", json=body), bodies))
    for body, reply in zip(bodies, replies, strict=True):
        assert reply.status_code == 200
        assert reply.json()["request_id"] == body["request_id"]
        expected = scorer.rank(body)
        assert [c["item"] for c in reply.json()["ranked"]] == expected.items
        np.testing.assert_allclose([c["score"] for c in reply.json()["ranked"]], expected.scores, atol=1e-9, rtol=0)


def test_the_printed_example_works(running: Process) -> None:
    assert running.process.stdout is not None
    command = running.process.stdout.readline().strip()
    reply = subprocess.run(["sh", "-c", command], capture_output=True, check=False, timeout=60)
    if reply.returncode == 127:
        pytest.skip("there is no curl here")
    assert "ranked" in orjson.loads(reply.stdout)


def test_a_port_that_is_taken(running: Process, world: World) -> None:
    port = int(running.url.rsplit(":", 1)[1])
    with pytest.raises(UnavailableError, match=rf"port {port} of 127\.0\.0\.1 must be free"):
        serve(ServiceConfig(artifact=str(world.artifact), port=port))


def test_a_port_is_taken_as_soon_as_the_first_service_has_it() -> None:
    with listening("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with (
            pytest.raises(UnavailableError, match=f"port {port} of 127.0.0.1 must be free"),
            listening("127.0.0.1", port),
        ):
            pytest.fail("two sockets hold one port")


def test_a_service_that_cannot_listen_is_never_ready(world: World) -> None:
    """Bound beside another that began to listen meanwhile: the model is loaded, and nothing could reach it."""
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind(("127.0.0.1", 0))
        second.bind(first.getsockname())
        first.listen()
        said: list[str] = []
        with pytest.raises(UnavailableError, match="must be free to serve on"):
            serve(ServiceConfig(artifact=str(world.artifact)), listener=second, announce=said.append)
        assert said == []


# Connections


@pytest.fixture(scope="module")
def strict(world: World) -> Iterator[Process]:
    """Short of time and of connections."""
    process = Process(world.artifact, settings={"body_timeout_s": 0.5, "max_connections": 3})
    yield process
    process.end()


def connected(process: Process) -> socket.socket:
    host, port = process.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side ends."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("begun", [b"", b"POST /rank HTTP/1.1\r\ncontent-le", b"GET /health HTTP/1.1\r\n\r\nGET /"])
def test_a_head_that_never_ends_is_not_waited_for(strict: Process, begun: bytes) -> None:
    with connected(strict) as connection:
        connection.sendall(begun)
        assert rest(connection).count(b"HTTP/1.1 200") == begun.count(b"/health")


def test_no_more_connections_than_the_limit(strict: Process) -> None:
    held = [connected(strict) for _ in range(3)]
    with connected(strict) as fourth:
        answer = rest(fourth)
    for connection in held:
        assert rest(connection) == b"", "it must end by itself"
        connection.close()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"too many connections" in answer
    assert httpx.get(f"{strict.url}/health").status_code == 200


def test_100_mib_are_refused_with_an_answer(running: Process) -> None:
    """Sent whole before anything is read; the answer ends with our side of the connection, not with a reset."""
    with connected(running) as connection:
        connection.sendall(b"POST /rank HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (100 * 2**20))
        for _ in range(100):
            connection.sendall(b" " * 2**20)
        head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in head.lower()
    assert orjson.loads(body)["error"]["type"] == "BodyTooLarge"


def test_who_reads_while_sending_has_the_answer_and_the_end_at_once(running: Process) -> None:
    with connected(running) as connection:
        connection.sendall(b"POST /rank HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n ")
        assert rest(connection).startswith(b"HTTP/1.1 413 ")


def test_a_caller_who_asks_for_leave_is_not_waited_for(running: Process) -> None:
    with connected(running) as connection:
        connection.sendall(
            b"POST /rank HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n"
        )
        assert rest(connection).startswith(b"HTTP/1.1 413 ")


def test_drains_have_a_bound_of_their_own(app: RankingApp) -> None:
    """Where it is reached, a refused body is not read at all, and the connection ends with the answer."""
    declared = [(b"content-length", b"99999999999")]
    scope = {"type": "http", "method": "POST", "path": "/rank", "headers": declared, "query_string": b""}
    taken, sent = [0] * 9, [list[Any]() for _ in range(9)]

    async def crowd() -> None:
        async def one(place: int) -> None:
            async def receive() -> Any:
                taken[place] += 1
                return await asyncio.get_running_loop().create_future()

            async def send(message: Any) -> None:
                sent[place].append(message)

            await app(scope, receive, send)

        tasks = [asyncio.create_task(one(place)) for place in range(9)]
        await asyncio.wait(tasks[8:])
        for task in tasks[:8]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(crowd())
    assert taken == [1] * 8 + [0]
    assert [s[0]["status"] for s in sent] == [413] * 9
    assert (b"connection", b"close") in sent[8][0]["headers"]
    assert not sent[8][1].get("more_body")
    status, _ = call(app, "POST", "/rank", b" " * 99999, headers=[])
    assert status == 413


def test_an_address_of_another_machine(world: World) -> None:
    with pytest.raises(UnavailableError, match="must be"):
        serve(ServiceConfig(artifact=str(world.artifact), host="192.0.2.1", port=0))


def test_told_to_stop_it_answers_what_is_under_way_and_ends_well(world: World) -> None:
    process = Process(world.artifact)
    statuses: list[int] = []
    closed: list[str] = []
    stop = threading.Event()

    def ask_on() -> None:
        with httpx.Client(base_url=process.url, timeout=30) as client:
            while not stop.is_set():
                try:
                    reply = client.post("/rank", json={**BODY, "candidates": [ITEM] * 2000})
                except httpx.ConnectError:
                    return  # it no longer listens
                except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as err:
                    closed.append(str(err))
                    return
                statuses.append(reply.status_code)

    threads = [threading.Thread(target=ask_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(statuses) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    status, _, err = process.end()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert status == 0
    assert err == ""
    assert set(statuses) == {200}
    # A kept-alive connection that was closed between two requests: nothing was under way on it. Where the next request
    # meets the closing, the system resets the connection.
    told = ("without sending a response", "Connection reset by peer", "Broken pipe")
    assert all(any(words in message for words in told) for message in closed)


def test_an_artifact_that_cannot_be_used_ends_the_process(tmp_path: Path) -> None:
    process = Process(tmp_path)
    out, err = process.process.communicate(timeout=60)
    assert process.process.returncode == 1
    assert "ArtifactError" in err
    assert "Serving" not in process.first_line + out


def test_nothing_is_left_listening(world: World) -> None:
    process = Process(world.artifact)
    port = int(process.url.rsplit(":", 1)[1])
    assert process.end(signal.SIGINT)[0] == 0
    with socket.socket() as probe:
        probe.settimeout(1)
        assert probe.connect_ex(("127.0.0.1", port)) != 0
