"""The table of a sweep says by what each run was selected."""

from __future__ import annotations

from typing import Any

from training.sweep import markdown


def arm(selected_by: str) -> dict[str, Any]:
    spread = {"mean": 0.7, "sd": None, "seeds": 1}
    metrics = {"click": {"auc": spread, "gauc": spread, "logloss": spread, "gauc_users": 3}}
    return {"selected_by": selected_by, "validation": metrics, "test": metrics, "rela_impr": {}}


def test_one_rule_is_told_once() -> None:
    text = markdown({"base": "a", "arms": {"a": arm("click.auc"), "b": arm("click.auc")}})
    assert text.endswith("Each run's epoch was selected by its validation click.auc.\n")


def test_rules_that_differ_are_told_by_experiment() -> None:
    text = markdown({"base": "a", "arms": {"a": arm("click.auc"), "b": arm("mean auc of click, like")}})
    assert text.endswith("on the validation split: `a` by click.auc; `b` by mean auc of click, like.\n")
