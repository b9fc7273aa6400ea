"""Batch scoring: every row in its place, whatever the files look like, and never half a file."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.artifact import Artifact
from recsys.errors import ConfigError, SourceError
from recsys.predictor import Predictor
from serving.batch import score_parquet
from serving.features import NoFeatures
from serving.scorer import Scorer
from tests.serving.conftest import World


@pytest.fixture(scope="module")
def scored(world: World, scorer: Scorer, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """The view in one piece."""
    out = tmp_path_factory.mktemp("scored") / "all.parquet"
    summary = score_parquet(scorer, world.impressions, out, batch_size=100_000)
    frame = pl.read_parquet(out)
    assert summary.rows == len(frame)
    assert summary.columns == ("score_click", "score_like")
    assert (summary.rows_with_unknown_item, summary.rows_with_unknown_user) == (0, 0)
    return frame


def scores(frame: pl.DataFrame) -> np.ndarray:
    return frame.select("score_click", "score_like").to_numpy()


@pytest.mark.parametrize(("batch_size", "row_group"), [(1, 7), (10, 1000), (64, 3), (1000, 50)])
def test_pieces_do_not_matter(
    world: World, scorer: Scorer, scored: pl.DataFrame, tmp_path: Path, batch_size: int, row_group: int
) -> None:
    view = pq.read_table(world.impressions)
    pq.write_table(view, tmp_path / "in.parquet", row_group_size=row_group)
    score_parquet(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet", batch_size=batch_size)
    again = pl.read_parquet(tmp_path / "out.parquet")
    assert again.drop("score_click", "score_like").equals(pl.from_arrow(view))  # type: ignore[arg-type]
    np.testing.assert_allclose(scores(again), scores(scored), atol=1e-6, rtol=0)


def test_rows_in_any_order_get_their_own_scores(
    world: World, scorer: Scorer, scored: pl.DataFrame, tmp_path: Path
) -> None:
    order = np.random.default_rng(0).permutation(len(scored))
    pl.read_parquet(world.impressions)[order].write_parquet(tmp_path / "in.parquet")
    score_parquet(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet", batch_size=100_000)
    np.testing.assert_allclose(
        scores(pl.read_parquet(tmp_path / "out.parquet")), scores(scored)[order], atol=1e-6, rtol=0
    )


def test_a_folder_of_parts(world: World, scorer: Scorer, scored: pl.DataFrame, tmp_path: Path) -> None:
    view = pl.read_parquet(world.impressions)
    parts = tmp_path / "in"
    (parts / "day=2").mkdir(parents=True)
    view[:90].write_parquet(parts / "a.parquet")
    view[90:].write_parquet(parts / "day=2" / "b.parquet")
    (parts / "_SUCCESS").write_text("")
    summary = score_parquet(scorer, parts, tmp_path / "out")
    assert summary.rows == len(view)
    written = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.parquet"))
    assert written == ["a.parquet", "day=2/b.parquet"]
    both = pl.concat([pl.read_parquet(tmp_path / "out" / name, hive_partitioning=False) for name in written])
    np.testing.assert_allclose(scores(both), scores(scored), atol=1e-6, rtol=0)
    score_parquet(scorer, parts, tmp_path / "joined.parquet", batch_size=13)
    np.testing.assert_allclose(scores(pl.read_parquet(tmp_path / "joined.parquet")), scores(scored), atol=1e-6, rtol=0)


def test_columns_that_features_do_not_read_are_kept(world: World, scorer: Scorer, tmp_path: Path) -> None:
    view = pl.read_parquet(world.impressions)
    extra = pl.Series("note", [["x", None], []] * (len(view) // 2) + [None] * (len(view) % 2))
    # A column of an item feature says what was stored then; the stored features are what counts.
    view.with_columns(extra, pl.lit(10.0**6).alias("price")).write_parquet(tmp_path / "in.parquet")
    score_parquet(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet", column="p.{task}")
    score_parquet(scorer, world.impressions, tmp_path / "plain.parquet", column="p.{task}")
    out, plain = pl.read_parquet(tmp_path / "out.parquet"), pl.read_parquet(tmp_path / "plain.parquet")
    assert out["note"].equals(extra)
    assert out["p.click"].equals(plain["p.click"])
    assert out.columns == [*view.columns, "note", "price", "p.click", "p.like"]


def test_unknown_users_and_items_are_scored_and_counted(world: World, scorer: Scorer, tmp_path: Path) -> None:
    view = pl.read_parquet(world.impressions)[:6].with_columns(request_id=pl.Series([1, 1, 2, 3, 3, 3]))
    frame = view.with_columns(
        user_id=pl.Series([5, 5, None, 1000, 1000, 1000]), item_id=pl.Series([5, None, 6, *view["item_id"][3:]])
    )
    frame.write_parquet(tmp_path / "in.parquet")
    summary = score_parquet(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert (summary.rows_with_unknown_user, summary.rows_with_unknown_item) == (3, 3)
    assert np.isfinite(scores(pl.read_parquet(tmp_path / "out.parquet"))).all()


def test_integer_times_have_the_unit_of_the_schema_and_timestamps_their_own(
    world: World, scorer: Scorer, scored: pl.DataFrame, tmp_path: Path
) -> None:
    view = pl.read_parquet(world.impressions)
    for kind in (pl.Datetime("us"), pl.Datetime("ns", "UTC")):
        times = view["time"].cast(pl.Datetime("us", "UTC" if kind.time_zone else None)).cast(kind)
        view.with_columns(time=times).write_parquet(tmp_path / "in.parquet")
        score_parquet(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet")
        np.testing.assert_allclose(scores(pl.read_parquet(tmp_path / "out.parquet")), scores(scored), atol=1e-6, rtol=0)


def test_without_stored_features_columns_of_users_and_items_count(world: World, tmp_path: Path) -> None:
    artifact = Artifact.open(world.artifact)
    bare = Scorer(Predictor(artifact), NoFeatures(artifact.encoder))
    view = pl.read_parquet(world.impressions)
    items = pl.read_parquet(world.folder / "views" / "items.parquet")
    users = pl.read_parquet(world.folder / "views" / "users.parquet")
    wide = view.join(items, on="item_id", how="left", maintain_order="left").join(
        users, on="user_id", how="left", maintain_order="left"
    )
    early = wide.with_columns(time=pl.lit(1))  # before every event, so that stored histories are empty as well
    early.write_parquet(tmp_path / "in.parquet")
    view.with_columns(time=pl.lit(1)).write_parquet(tmp_path / "narrow.parquet")
    score_parquet(bare, tmp_path / "in.parquet", tmp_path / "inline.parquet")
    score_parquet(world.artifact, tmp_path / "narrow.parquet", tmp_path / "stored.parquet")
    inline, stored = pl.read_parquet(tmp_path / "inline.parquet"), pl.read_parquet(tmp_path / "stored.parquet")
    np.testing.assert_allclose(scores(inline), scores(stored), atol=1e-6, rtol=0)


def test_an_empty_file(world: World, scorer: Scorer, tmp_path: Path) -> None:
    pl.read_parquet(world.impressions)[:0].write_parquet(tmp_path / "in.parquet")
    assert score_parquet(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet").rows == 0
    assert pl.read_parquet(tmp_path / "out.parquet").columns[-2:] == ["score_click", "score_like"]


def test_what_is_missing_is_named(world: World, scorer: Scorer, tmp_path: Path) -> None:
    view = pl.read_parquet(world.impressions)
    view.drop("source", "time").rename({"user_id": "uid"}).write_parquet(tmp_path / "in.parquet")
    with pytest.raises(SourceError, match="must have the columns 'user_id', 'time', 'source'"):
        score_parquet(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet")
    with pytest.raises(SourceError, match="does not exist"):
        score_parquet(scorer, tmp_path / "nothing.parquet", tmp_path / "out.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        score_parquet(scorer, tmp_path / "text.parquet", tmp_path / "out.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="must hold Parquet files, got none"):
        score_parquet(scorer, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out.parquet").exists()


def test_values_of_the_wrong_type_leave_no_file(world: World, scorer: Scorer, tmp_path: Path) -> None:
    view = pl.read_parquet(world.impressions)
    for column, values, message in (
        ("source", pl.Series([1.5] * len(view)), "feature 'source' must hold"),
        ("item_id", view["item_id"].cast(pl.String), "candidates must hold integers"),
        ("time", pl.Series([None, *view["time"][1:]]), "must hold a time in every row, got 1 without"),
        ("time", pl.Series(["soon"] * len(view)), "not ISO 8601"),
    ):
        view.with_columns(values.alias(column)).write_parquet(tmp_path / "in.parquet")
        with pytest.raises(SourceError, match=message):
            score_parquet(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet")
        assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]


def test_what_must_not_be_overwritten(world: World, scorer: Scorer, tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pl.read_parquet(world.impressions).with_columns(click=1).write_parquet(source)
    before = source.read_bytes()
    with pytest.raises(ConfigError, match="output must not be the input"):
        score_parquet(scorer, source, source)
    with pytest.raises(ConfigError, match="has a column 'click' already"):
        score_parquet(scorer, source, tmp_path / "out.parquet", column="{task}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="output must be a file"):
        score_parquet(scorer, source, tmp_path / "folder")
    (tmp_path / "parts").mkdir()
    source.rename(tmp_path / "parts" / "a.parquet")
    with pytest.raises(ConfigError, match="must be a new folder or one of Parquet files"):
        score_parquet(scorer, tmp_path / "parts", tmp_path / "folder")
    assert (tmp_path / "parts" / "a.parquet").read_bytes() == before
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["below/scored.parquet", "below/folder"])
def test_an_output_that_cannot_be_written_is_named(world: World, scorer: Scorer, tmp_path: Path, name: str) -> None:
    source = world.impressions
    if not name.endswith(".parquet"):
        source = tmp_path / "source"
        source.mkdir()
        shutil.copy(world.impressions, source / "part.parquet")
    (tmp_path / "below").write_text("a file")
    with pytest.raises(ConfigError, match=rf"output must be .* written to, got {re.escape(str(tmp_path / name))}: "):
        score_parquet(scorer, source, tmp_path / name)
    assert (tmp_path / "below").read_text() == "a file"


def test_columns_must_tell_the_tasks_apart(world: World, scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must tell the tasks apart"):
        score_parquet(scorer, world.impressions, tmp_path / "out.parquet", column="score")


KILLED = """
import sys
from serving.batch import score_parquet
import serving.batch as module
original = module.score_table
def slow(*arguments, **options):
    sys.stdout.write("scoring\\n")
    sys.stdout.flush()
    import time
    time.sleep(0.05)
    return original(*arguments, **options)
module.score_table = slow
score_parquet(sys.argv[1], sys.argv[2], sys.argv[3], batch_size=4)
"""


def test_a_killed_process_leaves_the_old_file(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    pq.write_table(pa.table({"old": [1]}), out)
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(world.artifact), str(world.impressions), str(out)],
        cwd=root,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"},
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"scoring\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert pq.read_table(out).column_names == ["old"]
