"""The run folder: what is damaged is named, and nothing of it is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recsys.errors import IntegrityError
from training.run import RunFolder
from training.trainer import TrainResult

CONFIG = {
    "format_version": 1,
    "fingerprint": "ab",
    "experiment": {},
    "schema": {},
    "training_set": {"path": "p", "fingerprint": "f"},
    "table_sizes": {"item": 3},
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold an object"),
        ("{", "must be readable JSON"),
        ({**CONFIG, "experiment": []}, "experiment must be an object"),
        ({**CONFIG, "table_sizes": {"item": "3"}}, "must name its training set and the sizes of its tables"),
        ({**CONFIG, "training_set": {}}, "must name its training set and the sizes of its tables"),
        ({"format_version": 1}, "must say fingerprint, experiment"),
        ({**CONFIG, "format_version": 7}, "must be of format 1, got 7"),
    ],
)
def test_a_damaged_configuration(run: RunFolder, content: Any, message: str) -> None:
    assert run.config() == CONFIG
    (run.path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(IntegrityError, match=rf"config\.json.* {message}"):
        run.config()


@pytest.mark.parametrize(
    ("content", "message"), [([], "must hold an object"), ({"best_checkpoint": 3}, "must say selected_by, finished_at")]
)
def test_a_damaged_summary(run: RunFolder, content: Any, message: str) -> None:
    (run.path / "summary.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=rf"summary\.json {message}"):
        run.summary()


def test_a_summary_that_lacks_a_part(run: RunFolder) -> None:
    with pytest.raises(IntegrityError, match=r"summary\.json must say how the run ended"):
        TrainResult.from_summary(run.path, {"epochs": 1})


def test_a_file_that_may_not_be_read(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(IntegrityError, match=r"config\.json cannot be read: Permission denied"):
        run.config()


def test_a_torn_last_line_is_left_out_and_any_other_is_named(run: RunFolder) -> None:
    lines = [{"kind": "step", "step": 1}, {"kind": "epoch", "step": 2, "name": "\u2028"}]
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    assert run.lines() == []
    run.metrics.write_text(whole, encoding="utf-8")
    assert run.lines() == lines
    run.metrics.write_text(whole + '{"kind": "st', encoding="utf-8")
    assert run.lines() == lines
    for broken in ('{"kind": "st', "[]", '{"kind": "step"}', "\N{REPLACEMENT CHARACTER}"):
        run.metrics.write_text(whole + broken + "\n" + whole, encoding="utf-8")
        with pytest.raises(IntegrityError, match=r"metrics\.jsonl, line 3 must be a JSON object"):
            run.lines()
