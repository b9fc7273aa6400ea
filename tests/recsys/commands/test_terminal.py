"""Tables on terminals of any width, and in files: no cell is ever lost."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from recsys.commands import terminal

HEADS = ("where", "status", "rule", "found")
ROWS: list[tuple[Any, ...]] = [
    ("impressions.a_column_with_a_long_name", "fail", "at most 0.01 are missing of all that it holds", 0.5),
    ("impressions", "warn", "no broken rows", 12_345_678),
]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    def show(*, width: int, is_terminal: bool, rows: list[tuple[Any, ...]] = ROWS) -> list[str]:
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=width, color_system=None)
        monkeypatch.setattr(terminal, "results", lambda: console)
        terminal.print_table("expectations", HEADS, rows)
        return file.getvalue().splitlines()

    return show


@pytest.mark.parametrize("width", [20, 40, 64, 72, 80, 100, 300])
def test_a_narrow_terminal_loses_nothing(shown: Any, width: int) -> None:
    lines = shown(width=width, is_terminal=True)
    words = " ".join(lines).split()
    assert {*HEADS, "fail", "warn", "0.5000", "12,345,678"} <= set(words)
    assert {"at", "most", "0.01", "are", "missing", "holds", "broken"} <= set(words)
    assert "impressions.a_column_with_a_long_name" in "".join(line[:38].split(" ")[0] for line in lines[2:])


def test_a_terminal_of_80_columns_folds_the_long_texts_only(shown: Any) -> None:
    lines = shown(width=80, is_terminal=True)
    assert max(map(len, lines)) <= 80
    assert [word for word in ("fail", "warn") if not any(f" {word} " in line for line in lines)] == []


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_fits_and_what_nobody_looks_at_has_a_line_a_row(shown: Any, *, is_terminal: bool) -> None:
    lines = shown(width=300 if is_terminal else 40, is_terminal=is_terminal)
    assert lines[1].split() == list(HEADS)
    assert [" ".join(line.split()) for line in lines[2:4]] == [
        "impressions.a_column_with_a_long_name fail at most 0.01 are missing of all that it holds 0.5000",
        "impressions warn no broken rows 12,345,678",
    ]


def test_a_table_without_rows_has_its_heads(shown: Any) -> None:
    assert shown(width=40, is_terminal=False, rows=[])[1].split() == list(HEADS)
