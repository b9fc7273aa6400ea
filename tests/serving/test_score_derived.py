"""Derived values of a file to score: computed from the views, each as its training row holds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from feature_store.lookup import DerivedLookup, derived_lookup
from feature_store.online.location import open_backend
from feature_store.online.materialize import Materializer
from feature_store.online.store import Limits, OnlineStore
from feature_store.snapshot import training_set_views
from recsys.batch import Bags, Batch
from recsys.cli import app
from recsys.errors import ConfigError, RequestError, SourceError
from recsys.training_set import SOURCE_ROW, SPLITS, TrainingSet
from serving.assembler import Assembler
from serving.batch import score_parquet
from serving.features import SnapshotFeatures, WithDerived
from serving.frames import FrameReader
from serving.online_features import OnlineFeatures
from serving.scorer import Scorer
from tests.feature_store.derived_views import NUMBERS, expected, make, schema, stored
from tests.feature_store.small_views import DAY, START, build, make_views
from tests.serving.conftest import make_model
from tests.serving.test_online_derived import derived_schema
from training.export import export_artifact


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build(tmp_path_factory.mktemp("derived"), make(2), schema())


@pytest.fixture(scope="module")
def artifact(built: TrainingSet) -> Path:
    folder = built.folder.parent / "artifact"
    export_artifact(make_model(built), built, folder, name="tiny", compile=False, snapshot="all")
    return folder


def views_of(training_set: TrainingSet) -> str:
    return str(training_set.folder.parent / "views")


def impressions_of(training_set: TrainingSet) -> Path:
    return training_set.folder.parent / "views" / "impressions.parquet"


def of_rows(training_set: TrainingSet, lookup: DerivedLookup, frame: pl.DataFrame) -> dict[str, np.ndarray]:
    """Derived features of every row of a file, as the scorer reads them."""
    encoder = training_set.encoder
    reader = FrameReader(training_set.schema, is_complete=True, has_derived=True)
    raw, order = reader.read(frame.to_arrow(), "test")
    features = WithDerived(SnapshotFeatures(training_set.folder, encoder), lookup)
    batch = Assembler(encoder, features).assemble(raw).batch
    found: dict[str, np.ndarray] = {}
    for feature in training_set.schema.features:
        if training_set.schema.derived_of(feature) is not None:
            of_request = feature.scope == "context"
            column = (batch.context if of_request else batch.candidate)[feature.name]
            assert not isinstance(column, Bags)
            values = column.numpy().reshape(-1)
            found[feature.name] = np.empty(len(frame), values.dtype)
            found[feature.name][order] = values[raw.request_of_row] if of_request else values
    return found


@pytest.mark.parametrize("seed", [2, 5])
def test_they_are_those_of_the_training_rows(tmp_path: Path, seed: int) -> None:
    training_set = build(tmp_path, make(seed), derived_schema())
    view = pl.read_parquet(impressions_of(training_set))
    labels = [task.label for task in training_set.schema.tasks]
    with derived_lookup(views_of(training_set), training_set.encoder) as lookup:
        found = of_rows(training_set, lookup, view.drop(labels))
        again = of_rows(training_set, lookup, view.drop(labels).reverse())
    assert len(found) == 19
    for name, values in found.items():
        wanted = stored(training_set, name)
        assert len(wanted) == len(view)
        assert {row: values[row].item() for row in wanted} == wanted, name
        np.testing.assert_array_equal(again[name][::-1], values, err_msg=name)


def test_who_is_in_no_view_has_no_rows(built: TrainingSet) -> None:
    view = pl.read_parquet(impressions_of(built))
    row = view[:1].with_columns(user=pl.lit(424242), item=pl.lit(424242), time=pl.lit(START + 99 * DAY))
    nobody = row.with_columns(user=pl.lit(None, pl.Int64), item=pl.lit(None, pl.Int64))
    with derived_lookup(views_of(built), built.encoder) as lookup:
        for frame in (row, nobody):
            found = of_rows(built, lookup, frame)
            assert found["f_user_events"].tolist() == [0.0]
            assert found["f_item_likes"].tolist() == [0.25]
            assert found["f_item_rate"].tolist() == [np.float32(1.0 / 5.0)]
            assert found["shade"].tolist() == [1]
        with pytest.raises(RequestError, match="user_id must hold integers"):
            of_rows(built, lookup, row.with_columns(user=pl.lit("424242")))


@pytest.fixture(scope="module")
def scorer(artifact: Path) -> Scorer:
    return Scorer.load(artifact)


def of_training(training_set: TrainingSet, scorer: Scorer) -> dict[int, list[float]]:
    """Probabilities of every training row, by the row of the view."""
    found: dict[int, list[float]] = {}
    for split in SPLITS:
        batch = Batch.from_training_set(training_set, split, slice(None))
        rows = training_set.split(split).impressions.array(SOURCE_ROW).tolist()
        found.update(zip(rows, scorer.score(batch).tolist(), strict=True))
    return found


def test_a_file_of_raw_impressions_is_scored_as_its_training_rows(
    built: TrainingSet, artifact: Path, scorer: Scorer, tmp_path: Path
) -> None:
    runner = CliRunner(env={"RECSYS_DEBUG": None, "COLUMNS": "200", "TERM": "dumb"})
    command = ["score", str(artifact), "-i", str(impressions_of(built)), "-o", str(tmp_path / "out.parquet")]
    done = runner.invoke(app, [*command, "--views", views_of(built), "--json"])
    assert done.exit_code == 0, done.stderr
    wanted = of_training(built, scorer)
    assert json.loads(done.stdout)["rows"] == len(wanted)
    assert json.loads(done.stdout)["given_derived"] == []
    columns = ["score_click", "score_long"]
    scored = pl.read_parquet(tmp_path / "out.parquet").select(columns).to_numpy()
    np.testing.assert_allclose(scored, [wanted[row] for row in range(len(wanted))], atol=1e-6, rtol=0)
    # Pieces, and columns that the file brings itself.
    truth = expected(make(2))
    names = [*NUMBERS, "shade"]
    brought = {name: [truth[row][name] for row in range(len(wanted))] for name in names}
    view = pl.read_parquet(impressions_of(built))
    view.with_columns(pl.Series(n, v) for n, v in brought.items()).write_parquet(tmp_path / "all.parquet")
    summary = score_parquet(scorer, tmp_path / "all.parquet", tmp_path / "brought.parquet")
    assert set(summary.given_derived) == {*names}
    view.with_columns(pl.Series("item_rate", brought["item_rate"])).write_parquet(tmp_path / "one.parquet")
    with derived_lookup(views_of(built), built.encoder) as lookup:
        one = score_parquet(scorer, tmp_path / "one.parquet", tmp_path / "mixed.parquet", derived=lookup, batch_size=5)
    assert one.given_derived == ("item_rate",)
    for name in ("brought", "mixed"):
        again = pl.read_parquet(tmp_path / f"{name}.parquet").select(columns).to_numpy()
        np.testing.assert_allclose(again, scored, atol=1e-6, rtol=0)


def test_without_views_the_columns_and_the_way_out_are_named(
    built: TrainingSet, scorer: Scorer, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=r"must have the columns 'user_clicks_1d', .*, or the views") as caught:
        score_parquet(scorer, impressions_of(built), tmp_path / "out.parquet")
    assert all(repr(name) in caught.value.message for name in (*NUMBERS[:5], "shade") if name != "user_category")
    assert "--views FOLDER" in str(caught.value.hint)
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(SourceError, match="nowhere"), derived_lookup("nowhere", built.encoder):
        pass


def test_an_online_store_gives_them(built: TrainingSet, scorer: Scorer, tmp_path: Path) -> None:
    until, location = START + 5 * DAY, f"lmdb:{tmp_path / 'online'}"
    store = OnlineStore(open_backend(location, is_writable=True), built.encoder, limits=Limits())
    with training_set_views(built) as snapshot:
        Materializer(store, snapshot, derived=snapshot.derived).run(until)
    store.close()
    view = pl.read_parquet(impressions_of(built)).with_columns(time=pl.lit(until))
    view.write_parquet(tmp_path / "in.parquet")
    online = Scorer(scorer.predictor, OnlineFeatures.open(location, built.encoder))
    score_parquet(online, tmp_path / "in.parquet", tmp_path / "online.parquet")
    with derived_lookup(views_of(built), built.encoder) as lookup:
        score_parquet(scorer, tmp_path / "in.parquet", tmp_path / "views.parquet", derived=lookup)
    for name in ("score_click", "score_long"):
        one, other = (pq.read_table(tmp_path / f"{place}.parquet").column(name) for place in ("online", "views"))
        np.testing.assert_allclose(one.to_numpy(), other.to_numpy(), atol=1e-6, rtol=0)
    early = view.with_columns(time=pl.lit(until - 1))
    early.write_parquet(tmp_path / "early.parquet")
    with pytest.raises(SourceError, match=r"item_likes must be given: .* as of a time after the request"):
        score_parquet(online, tmp_path / "early.parquet", tmp_path / "early_out.parquet")


def test_views_are_of_no_use_to_a_model_without_derived_values(tmp_path: Path) -> None:
    training_set = build(tmp_path, make_views())
    with (
        pytest.raises(ConfigError, match="must be given to a model with derived values only"),
        derived_lookup(views_of(training_set), training_set.encoder),
    ):
        pass
