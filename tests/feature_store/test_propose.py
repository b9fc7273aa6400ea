"""A proposed schema must build as it is, and mean what the data means."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from feature_store.profile import profile_view
from feature_store.propose import Roles, _meant, propose
from recsys.cli import app
from recsys.config import parse_yaml
from recsys.errors import ConfigError, SourceError
from recsys.schema import Schema
from recsys.training_set import TrainingSet
from tests.feature_store.small_views import build as build_views
from tests.feature_store.small_views import make_views, write_views

DAY = 86_400


def run(*arguments: object) -> Any:
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    return runner.invoke(app, [str(a) for a in arguments])


def built(folder: Path, path: Path | str, *options: object) -> tuple[Schema, TrainingSet, dict[str, Any]]:
    """Inspects and builds with the two commands, as a user would, nothing edited in between."""
    schema, experiment = folder / "conf" / "schema.yaml", folder / "conf" / "experiment.yaml"
    done = run("data", "inspect", path, "--schema", schema, "--experiment", experiment, "--json", *options)
    assert done.exit_code == 0, done.stderr
    made = run("build", experiment, "--set", f"data.training_set={folder / 'set'}", "--json")
    assert made.exit_code == 0, made.stderr
    summary = json.loads(made.stdout)
    return Schema.load(schema), TrainingSet.open(folder / "set", verify=True), summary


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_folder_of_views(tmp_path: Path, suffix: str) -> None:
    """What it proposes reads the same users, items and labels as the schema that was written by hand."""
    frames = make_views()
    write_views(tmp_path / "views", frames, suffix=suffix)
    schema, proposed, summary = built(tmp_path / "a", tmp_path / "views")
    assert summary["quarantined"] == {}
    assert schema.views.impressions.request == "request"
    assert schema.views.impressions.time_unit == "us"
    kinds = {f.name: f.kind for f in schema.features}
    assert kinds["tags"] == "multi_categorical"
    assert kinds["age"] == kinds["price"] == "dense"
    assert kinds["device"] == kinds["category"] == "categorical"
    assert "watched" not in kinds, "known only after the impression"
    assert [t.name for t in schema.tasks] == ["click"]
    assert schema.histories[0].event_types == ("click",)
    by_hand = build_views(tmp_path / "b", frames)
    assert proposed.users.keys.equals(by_hand.users.keys)  # type: ignore[union-attr]
    np.testing.assert_array_equal(
        proposed.events["history"].columns["@time"], by_hand.events["clicked"].columns["@time"]
    )
    rows = {name: proposed.split(name).num_rows for name in ("train", "validation", "test")}
    total = len(frames["impressions"])
    assert sum(rows.values()) == total
    assert rows["train"] == pytest.approx(0.8 * total, abs=5)


def log(num_rows: int = 400, *, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "uid": rng.integers(0, 30, num_rows),
            "movie_id": rng.integers(0, 50, num_rows),
            "rating": rng.integers(1, 6, num_rows),
            "ts": 1_600_000_000 + rng.integers(0, 30 * DAY, num_rows),
        }
    )


def test_integers_are_codes_or_amounts_and_it_says_why(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = 30_000
    frame = log(rows).with_columns(
        city=pl.Series(rng.integers(0, 900, rows) * 1009),  # a code by its name
        userRegionId=pl.Series(rng.integers(0, 20_000, rows)),
        age=pl.Series(rng.integers(18, 60, rows)),  # amounts by their names, however few values they have
        num_clicks=pl.Series(rng.geometric(0.3, rows)),
        price=pl.Series(rng.integers(1, 400, rows)),
        x1=pl.Series(rng.integers(0, 200, rows)),  # a code by how often each value comes
        x2=pl.Series(rng.integers(0, 2000, rows)),
        x3=pl.Series(rng.zipf(1.5, rows).clip(0, 900)),  # often repeated, but some far greater than most: counts
    )
    frame.write_parquet(tmp_path / "log.parquet")
    proposal = propose(tmp_path / "log.parquet")
    kinds = {f["name"]: f["kind"] for f in proposal.mapping["features"]}
    codes = {name for name in frame.columns[4:] if kinds[name] == "categorical"}
    assert codes == {"city", "userRegionId", "x1"}
    lines = proposal.schema_yaml().splitlines()

    def above(name: str) -> str:
        place = next(n for n, line in enumerate(lines) if line.startswith(f"  - {{name: {name},"))
        return lines[place - 1]

    assert above("city") == (
        "  # integers with 900 different values: taken as codes, by the name; write kind: dense if they are amounts"
    )
    assert above("x1").endswith("taken as codes, there are few for the rows; write kind: dense if they are amounts")
    assert above("x2").endswith("taken as an amount; write kind: categorical if they are codes")
    assert not {above(name) for name in ("age", "num_clicks", "price")} & {line for line in lines if "#" in line}
    assert "Left out" not in proposal.schema_yaml()
    # Comments are no part of what the schema means.
    assert [f["name"] for f in parse_yaml(proposal.schema_yaml(), source="proposed")["features"]] == list(kinds)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("city", "code"),
        ("user_city_id", "code"),
        ("userCityId", "code"),
        ("categories", "code"),
        ("feat12", "code"),
        ("age_group", "code"),
        ("num_cities", "amount"),
        ("fans_user_num", "amount"),
        ("registerDays", "amount"),
        ("x7", None),
    ],
)
def test_what_names_of_integers_mean(name: str, kind: str | None) -> None:
    assert _meant(name) == kind


def test_one_log_with_ratings_in_seconds(tmp_path: Path) -> None:
    log().write_csv(tmp_path / "ratings.csv")
    schema, training_set, _ = built(tmp_path, tmp_path / "ratings.csv")
    view = schema.views.impressions
    assert (view.user, view.item, view.time, view.time_unit) == ("uid", "movie_id", "ts", "s")
    assert (schema.tasks[0].label, schema.tasks[0].at_least) == ("rating", 3.0)
    assert schema.views.events is not None
    assert training_set.events["history"].num_rows == 400


def test_double_colons_without_a_header(tmp_path: Path) -> None:
    """The form of MovieLens: the separator is found, the columns are numbered and must be named."""
    lines = ["::".join(map(str, row)) for row in log().rows()]
    (tmp_path / "ratings.dat").write_text("\n".join(lines) + "\n")
    refused = run("data", "inspect", tmp_path / "ratings.dat")
    assert refused.exit_code == 2
    assert "--user must name one" in refused.stderr
    assert "c1, c2, c3, c4" in refused.stderr
    roles = ("--user", "c1", "--item", "c2", "--label", "c3", "--time", "c4")
    schema, training_set, _ = built(tmp_path, tmp_path / "ratings.dat", *roles)
    assert schema.views.impressions.format is not None
    assert len(training_set.users.keys or []) == 31


def test_libfm(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entries = [(rng.choice([1, -1]), rng.integers(9), rng.integers(10, 40), rng.integers(40, 44)) for _ in range(200)]
    lines = [f"{label} {user}:1 {item}:1 {other}:1" for label, user, item, other in entries]
    (tmp_path / "train.libfm").write_text("\n".join(lines))
    roles = ("--user", "x1", "--item", "x2", "--time", "row", "--label", "label")
    schema, training_set, _ = built(tmp_path, tmp_path / "train.libfm", *roles)
    assert schema.tasks[0].at_least == 1.0
    assert sum(training_set.split(s).num_rows for s in ("train", "validation", "test")) == 200


def test_hive_partitions_of_a_log_with_local_times_and_lists(tmp_path: Path) -> None:
    start = datetime(2022, 4, 1)  # noqa: DTZ001 - a naive time is the point
    frame = log().with_columns(
        (pl.lit(start) + pl.duration(seconds=pl.col("ts") - 1_600_000_000)).alias("ts"),
        clicked=pl.col("rating") > 3,
        tags=pl.concat_list("rating", pl.col("rating") + 1),
        embedding=pl.concat_list(pl.col("rating") * 0.5, pl.lit(1.0)),
        title=pl.format("a rather long text that only describes the item {}", "movie_id"),
    )
    for (day,), part in frame.group_by(pl.col("ts").dt.date().cast(pl.String)):
        place = tmp_path / "log" / f"day={day}"
        place.mkdir(parents=True)
        part.write_parquet(place / "a.parquet")
    proposal = propose(tmp_path / "log")
    assert proposal.mapping["views"]["impressions"]["time_zone"] == "UTC"
    assert "write the zone" in proposal.schema_yaml()
    features = {f["name"]: f for f in proposal.mapping["features"]}
    assert features["tags"]["kind"] == "multi_categorical"
    assert features["embedding"]["dim"] == 2
    assert "title" not in features
    assert "free text" in proposal.comments["impressions.title"]
    _, training_set, summary = built(tmp_path, tmp_path / "log", "--label", "clicked")
    assert summary["quarantined"] == {}
    assert training_set.events["history"].num_rows == int(frame["clicked"].sum())


def test_names_that_yaml_or_a_schema_would_misread(tmp_path: Path) -> None:
    odd = {"7: {a}": pl.col("uid") % 5, "länge": pl.col("uid") * 0.5}
    frame = log().rename({"rating": "is click"})
    frame = frame.with_columns(pl.col("is click") > 3, pl.lit("x").alias("no"), yes=pl.col("uid") % 3, **odd)
    frame.write_parquet(tmp_path / "my log.parquet")
    schema, _, _ = built(tmp_path, tmp_path / "my log.parquet", "--label", "is click")
    columns = {f.source_column for f in schema.features}
    assert {"yes", "7: {a}", "länge"} <= columns
    assert "no" not in columns, "one value only"
    assert schema.name == "my_log"


def test_profiles(tmp_path: Path) -> None:
    moment = datetime(2022, 4, 30, 16, 0, tzinfo=UTC)
    days = [(moment + timedelta(days=i)).isoformat() for i in range(20)]
    tags = ["b|c", "a|b"] * 10
    lines = [f"{2**53 + i},{i * 0.5},{days[i]},{tags[i]},{'' if i < 5 else i}" for i in range(20)]
    (tmp_path / "x.csv").write_text("big,half,when,tags,gaps\n" + "\n".join(lines))
    profile = profile_view(tmp_path, "x.csv")
    columns = profile.columns
    assert profile.num_rows == 20
    assert {n: c.kind for n, c in columns.items()} == {
        "big": "integer", "half": "number", "when": "timestamp", "tags": "text", "gaps": "integer",
    }  # fmt: skip
    assert (columns["big"].lowest, columns["big"].highest, columns["big"].distinct) == (2**53, 2**53 + 19, 20)
    assert columns["when"].span == ("2022-04-30 16:00:00Z", "2022-05-19 16:00:00Z")
    assert (columns["gaps"].num_null, columns["gaps"].distinct) == (5, 15)
    assert columns["half"].median == 4.75


def test_roles_and_places_that_are_wrong(tmp_path: Path) -> None:
    log().write_parquet(tmp_path / "log.parquet")
    with pytest.raises(ConfigError, match=r"--user must be a column of log\.parquet, got 'uidd'") as error:
        propose(tmp_path / "log.parquet", roles=Roles(user="uidd"))
    assert "did you mean 'uid'" in str(error.value)
    with pytest.raises(ConfigError, match="--label must be a column"):
        propose(tmp_path / "log.parquet", roles=Roles(label="x"))
    with pytest.raises(SourceError, match="must exist"):
        propose(tmp_path / "lag.parquet")
    log().with_columns(ts=pl.lit(1_600_000_000)).write_parquet(tmp_path / "still.parquet")
    with pytest.raises(SourceError, match="impressions must have different times"):
        propose(tmp_path / "still.parquet").experiment_yaml("s.yaml", "set")
    (tmp_path / "users").mkdir()
    log().write_parquet(tmp_path / "users" / "users.parquet")
    with pytest.raises(SourceError, match="must hold impressions"):
        propose(tmp_path / "users")


def test_files_that_tell_nothing(tmp_path: Path) -> None:
    """Each message says what is there, not what was looked for in vain."""
    with pytest.raises(ConfigError, match="PATH must name a file"):
        propose("")
    with pytest.raises(SourceError) as error:
        propose(tmp_path / "empty" / "lag.parquet")
    assert error.value.hint is None
    (tmp_path / "loop.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(SourceError, match=r"loop\.csv must exist, but is a link to nothing"):
        propose(tmp_path / "loop.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SourceError, match=r"PATH: .*folder holds no Parquet") as error:
        propose(tmp_path / "folder")
    assert error.value.hint is None
    for name, content in (("head.csv", "uid,iid,ts\n"), ("cut.csv", "uid,iid,ts")):
        (tmp_path / name).write_text(content)
        with pytest.raises(SourceError, match=f"{name} must hold rows, got none"):
            propose(tmp_path / name)
    log().with_columns(uid=pl.struct("uid")).write_parquet(tmp_path / "nested.parquet")
    with pytest.raises(ConfigError, match="--user must name one") as error:
        propose(tmp_path / "nested.parquet")
    assert error.value.hint == "column 'uid' holds values of an unsupported type, not integers or text"
    log().rename({"uid": " uid "}).write_parquet(tmp_path / "spaced.parquet")
    assert propose(tmp_path / "spaced.parquet").mapping["views"]["impressions"]["user"] == " uid "


def test_the_command_writes_nothing_over(tmp_path: Path) -> None:
    log().write_parquet(tmp_path / "log.parquet")
    (tmp_path / "schema.yaml").write_text("mine")
    done = run("data", "inspect", tmp_path / "log.parquet", "--schema", tmp_path / "schema.yaml")
    assert done.exit_code == 2
    assert (tmp_path / "schema.yaml").read_text() == "mine"
    shown = run("data", "inspect", tmp_path / "log.parquet")
    assert shown.exit_code == 0
    text = shown.stdout[shown.stdout.index("# Proposed by") :]
    assert parse_yaml(text, source="stdout")["name"] == "log"
    assert run("data", "inspect", tmp_path / "log.parquet", "--experiment", tmp_path / "e.yaml").exit_code == 2
