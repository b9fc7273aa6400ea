"""Compiled programs: whether callers run side by side, and what cannot be loaded."""

from __future__ import annotations

import asyncio
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.compiled import CompiledProgram
from serving.scorer import Scorer
from serving.service import Model, RankingApp
from serving.settings import ServiceConfig
from tests.serving.asgi import ask
from tests.serving.blocking import BlockingProgram
from tests.serving.conftest import World

BODY = {"user_id": 1000, "candidates": [2**53 + 1, 5], "time": 1_700_900_000_000_000}


def until(condition: Callable[[], bool]) -> None:
    """Waits for it, at most five seconds: half of what a blocked program waits."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


def test_callers_run_side_by_side_and_others_go_on(tmp_path: Path) -> None:
    """A call that kept the interpreter's lock would let neither the second caller in nor this test go on."""
    blocking = BlockingProgram(tmp_path)
    inputs = [torch.full((3, 1), float(i)) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(blocking.program, [x]) for x in inputs]
        until(lambda: blocking.num_entered == 2)
        assert not any(a.done() for a in answers)
        blocking.release()
        for x, answer in zip(inputs, answers, strict=True):
            torch.testing.assert_close(answer.result(20), x, atol=0, rtol=0)
    assert blocking.num_entered == 4


def test_an_error_in_a_program_names_its_reason_and_keeps_no_place(tmp_path: Path) -> None:
    blocking = BlockingProgram(tmp_path, max_callers=1)
    with pytest.raises(RuntimeError, match="the program must have 1 inputs, got 0"):
        blocking.program([])
    blocking.fail()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(blocking.program, [torch.zeros(1)]) for _ in range(3)]
        for answer in answers:
            with pytest.raises(RuntimeError, match="nobody let it go"):
                answer.result(20)


def test_health_is_answered_while_a_compiled_program_runs(
    world: World, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServiceConfig(artifact=str(world.artifact), threads=2)
    model = Model.load(config)
    blocking = BlockingProgram(tmp_path)
    original = model.scorer.predictor.logits

    def logits(batch: Any) -> np.ndarray:
        scores = torch.from_numpy(original(batch))
        return blocking.program([scores]).numpy()

    monkeypatch.setattr(model.scorer.predictor, "logits", logits)
    app = RankingApp(config, model)

    async def ask_both() -> None:
        ranking = asyncio.create_task(ask(app, "POST", "/rank", BODY))
        await asyncio.to_thread(until, lambda: blocking.num_entered == 1)
        assert (await ask(app, "GET", "/health"))[0] == 200
        assert not ranking.done(), "the answer came while the request was being scored"
        blocking.release()
        status, reply = await ranking
        assert status == 200, reply
        assert [c["item"] for c in reply["ranked"]] == scorer.rank(BODY).items

    asyncio.run(ask_both())


def test_what_is_no_package(tmp_path: Path) -> None:
    file = tmp_path / "package.pt2"
    with pytest.raises(OSError, match=r"package\.pt2"):
        CompiledProgram(file)
    file.write_bytes(b"text")
    with pytest.raises(RuntimeError, match="not a package"):
        CompiledProgram(file)
    model = "package/data/aotinductor/model"
    for names, message in (
        ([], "one library, got 0"),
        ([f"{model}/a.so", f"{model}/b.so"], "one library, got 2"),
        ([f"{model}/a.so", f"{model}/a.json"], r"got a\.json beside it"),
    ):
        with zipfile.ZipFile(file, "w") as package:
            for name in names:
                package.writestr(name, b"")
        with pytest.raises(RuntimeError, match=message):
            CompiledProgram(file)
    with zipfile.ZipFile(file, "w") as package:
        package.writestr(f"{model}/a.so", b"not a library")
        package.writestr(f"{model}/a_metadata.json", b"{}")
    with pytest.raises(OSError, match=r"program\.so"):
        CompiledProgram(file)
