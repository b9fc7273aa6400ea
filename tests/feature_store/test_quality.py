from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from feature_store.quality import Periods, QualityReport, check_quality
from feature_store.quality_page import quality_page
from recsys.cli import app
from recsys.config import validate
from recsys.errors import ConfigError
from recsys.schema import Schema
from tests.feature_store.small_views import DAY, SPLIT, START, config, make_views, schema_mapping, write_views

NOW = datetime.fromtimestamp(START / 1e6, UTC) + timedelta(days=10)
HALVES = Periods((START, START + 5 * DAY), (START + 5 * DAY, START + 10 * DAY))


def make_schema(*expectations: dict[str, Any], **drift: Any) -> Schema:
    quality = {"expectations": list(expectations), "drift": drift}
    return validate(Schema, schema_mapping(quality=quality), source="test")


def check(folder: Path, frames: dict[str, pl.DataFrame], schema: Schema, **options: Any) -> QualityReport:
    write_views(folder / "views", frames)
    return check_quality(schema, config(folder), now=NOW, periods=options.pop("periods", HALVES))


def large() -> dict[str, pl.DataFrame]:
    return make_views(num_requests=3000, num_events=300, seed=3)


@pytest.mark.parametrize(
    ("rule", "holds", "got"),
    [
        ({"view": "items", "column": "category", "max_null_rate": 0.1}, True, "10.00%"),
        ({"view": "items", "column": "category", "max_null_rate": 0.09}, False, "10.00%"),
        ({"view": "users", "column": "age", "lowest": 0, "highest": 120}, True, "0.00% outside"),
        ({"view": "users", "column": "age", "lowest": 0, "highest": 30}, False, "outside"),
        ({"view": "users", "column": "age", "highest": 30, "max_outside_rate": 1.0}, True, "outside"),
        ({"view": "items", "column": "category", "lowest": 0}, False, "no numbers"),
        ({"view": "users", "column": "user", "min_distinct": 12, "max_distinct": 12}, True, "12"),
        ({"view": "users", "column": "user", "min_distinct": 13}, False, "12"),
        ({"view": "users", "column": "user", "max_distinct": 11}, False, "12"),
        ({"view": "impressions", "column": "time", "max_age_hours": 48}, True, "hours"),
        ({"view": "impressions", "column": "time", "max_age_hours": 0.001}, False, "hours"),
        ({"view": "users", "column": "age", "max_age_hours": 48}, False, "no time"),
    ],
)
def test_expectations(tmp_path: Path, rule: dict[str, Any], holds: bool, got: str) -> None:
    frames = make_views()
    is_null = pl.int_range(pl.len()) < 2
    frames["items"] = frames["items"].with_columns(category=pl.when(is_null).then(None).otherwise(pl.col("category")))
    for severity in ("fail", "warn"):
        report = check(tmp_path, frames, make_schema({**rule, "severity": severity}))
        checks = [c for c in report.checks if c.place == f"{rule['view']}.{rule['column']}"]
        assert {c.status for c in checks} == {"pass" if holds else severity}
        assert got in checks[0].got


def test_a_time_in_the_future_is_not_fresh(tmp_path: Path) -> None:
    frames = make_views()
    frames["impressions"] = frames["impressions"].with_columns(pl.col("time") + 100 * DAY)
    schema = make_schema({"view": "impressions", "column": "time", "max_age_hours": 24.0})
    later = Periods((START, START + 105 * DAY), (START + 105 * DAY, START + 111 * DAY))
    report = check(tmp_path, frames, schema, periods=later)
    assert "in the future" in report.checks[0].got
    assert report.status == "fail"


def test_broken_rows_warn_and_fail_above_the_limit(tmp_path: Path) -> None:
    frames = make_views()
    frames["events"][0, "item"] = None
    report = check(tmp_path / "a", frames, make_schema())
    (found,) = [c for c in report.checks if c.place == "events"]
    assert (found.status, found.value) == ("warn", 1 / 300)
    assert "item is null: 1" in found.got
    frames["events"] = frames["events"].with_columns(item=pl.lit(None, pl.Int64))
    report = check(tmp_path / "b", frames, make_schema())
    assert next(c for c in report.checks if c.place == "events").status == "fail"


def test_what_moved_is_found_and_what_did_not_is_not(tmp_path: Path) -> None:
    frames = large()
    is_late = pl.col("time") >= START + 5 * DAY
    frames["impressions"] = frames["impressions"].with_columns(
        price=pl.when(is_late).then(3.0).otherwise(1.0) * (pl.col("price") % 7),
        device=pl.when(is_late & (pl.col("request") % 2 == 0)).then(pl.lit("watch")).otherwise(pl.col("device")),
        click=pl.when(is_late & (pl.col("request") % 3 > 0)).then(1).otherwise(pl.col("click")),
    )
    report = check(tmp_path, frames, make_schema())
    status = {d.name: d.status for d in report.drift}
    assert status["price"] == status["device"] == "fail"
    assert status["click"] in ("warn", "fail")
    assert {n for n, s in status.items() if s != "pass"} <= {"price", "device", "click"}
    device = next(d for d in report.drift if d.name == "device")
    assert device.unseen == pytest.approx(0.5, abs=0.06)
    assert report.status == "fail"
    calm = check(tmp_path, frames, make_schema(ignore=["price", "device", "click"]))
    assert {d.status for d in calm.drift} == {"pass"}
    assert next(d for d in calm.drift if d.name == "price").psi > 1


def test_nothing_moves_between_halves_of_one_distribution(tmp_path: Path) -> None:
    report = check(tmp_path, large(), make_schema())
    assert {d.name: d.status for d in report.drift if d.status != "pass"} == {}
    assert report.periods["reference"]["impressions"] + report.periods["current"]["impressions"] == len(
        large()["impressions"]
    )


def test_without_periods_training_is_compared_with_what_came_after(tmp_path: Path) -> None:
    frames = make_views()
    report = check(tmp_path, frames, make_schema(), periods=None)
    first = datetime.fromtimestamp(int(frames["impressions"]["time"].min()) / 1e6, UTC)  # type: ignore[arg-type]
    assert report.periods["reference"]["from"] == first.isoformat(timespec="seconds")
    assert report.periods["current"]["from"] == datetime.fromtimestamp(SPLIT["train_end"] / 1e6, UTC).isoformat(
        timespec="seconds"
    )


def test_a_period_without_impressions(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the current period must hold an impression, got none .*\n\nHint: impressions"
    ):
        check(tmp_path, make_views(), make_schema(), periods=Periods(HALVES.reference, (5, 6)))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"view": "users", "column": "agee", "lowest": 0},
            "column 'agee' of view 'users' is read by nothing, did you mean",
        ),
        ({"view": "users", "column": "age"}, "must give at least one of"),
        ({"view": "users", "column": "age", "lowest": 2, "highest": 1}, "lowest must be at most highest"),
        ({"view": "users", "column": "age", "max_null_rate": 2}, "max_null_rate"),
        ({"view": "user", "column": "age", "lowest": 0}, "view"),
    ],
)
def test_expectations_that_make_no_sense(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_schema(rule)
    with pytest.raises(ConfigError, match="'agee' is no feature and no task, did you mean 'age'"):
        make_schema(ignore=["agee"])


def test_an_expectation_of_events_that_nothing_reads_is_refused() -> None:
    quality = {"expectations": [{"view": "events", "column": "time", "max_null_rate": 0.1}]}
    with pytest.raises(ConfigError, match="column 'time' of view 'events' is read by nothing, as the whole view is"):
        validate(Schema, schema_mapping(histories=[], quality=quality), source="test")


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect"):
            assert self.open.pop() == tag


def test_the_page_is_whole_safe_and_has_a_plot_a_feature(tmp_path: Path) -> None:
    frames = make_views()
    frames["impressions"] = frames["impressions"].with_columns(device=pl.lit("<script>alert('x')</script>"))
    report = check(tmp_path, frames, make_schema({"view": "users", "column": "age", "lowest": 0}))
    text = quality_page(report)
    page = Page()
    page.feed(text)
    assert page.open == []
    tags = [tag for tag, _ in page.seen]
    assert "script" not in tags
    assert tags.count("svg") == len(report.drift) == 11
    assert not [a for _, attributes in page.seen for a in attributes if a in ("src", "href")]
    assert "users.age" in text


def test_the_command(tmp_path: Path) -> None:
    write_views(tmp_path / "views", make_views())
    calm = {"warn_psi": 9.0, "fail_psi": 9.0, "warn_js": 0.9, "fail_js": 0.9}
    quality = {"expectations": [{"view": "users", "column": "age", "highest": 10.0}], "drift": calm}
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema_mapping(quality=quality)))
    data = {"views": str(tmp_path / "views"), "training_set": str(tmp_path / "set"), "split": SPLIT}
    experiment = {"name": "x", "schema_file": "schema.yaml", "data": data, "model": {"kind": "din"}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(experiment))
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    page, file = tmp_path / "out" / "quality.html", tmp_path / "out" / "quality.json"
    done = runner.invoke(
        app, ["data", "check", str(tmp_path / "x.yaml"), "--html", str(page), "-o", str(file), "--json"]
    )
    assert done.exit_code == 3, done.stderr
    answer = json.loads(done.stdout)
    assert answer == json.loads(file.read_text())
    assert answer["status"] == "fail"
    assert [c["status"] for c in answer["checks"] if c["place"] == "users.age"] == ["fail"]
    assert page.read_text().startswith("<!doctype html>")
    shown = runner.invoke(app, ["data", "check", str(tmp_path / "x.yaml")])
    assert shown.exit_code == 3
    assert "users.age" in shown.stdout
    halves = [
        "--reference",
        "2020-09-13T00:00Z..2020-09-18T00:00Z",
        "--current",
        "2020-09-18T00:00Z..2020-09-24T00:00Z",
    ]
    assert runner.invoke(app, ["data", "check", str(tmp_path / "x.yaml"), *halves, "--json"]).exit_code == 3
    folder = runner.invoke(app, ["data", "check", str(tmp_path / "x.yaml"), "--html", str(tmp_path)])
    assert folder.exit_code == 2
    assert f"--html must name a file to write, got a folder, {tmp_path}" in folder.stderr
    for wrong in (halves[:2], ["--reference", "x", "--current", "y"], [*halves[:3], "2020-09-18..2020-09-19"]):
        refused = runner.invoke(app, ["data", "check", str(tmp_path / "x.yaml"), *wrong])
        assert refused.exit_code == 2
        assert "--" in refused.stderr
