"""Export: what is written reproduces the model, at every size, with and without a compiler."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.artifact import Artifact
from recsys.batch import Batch
from recsys.errors import ArtifactError, MissingDependencyError
from recsys.models import DINConfig, RankingModel, build_model
from recsys.predictor import Predictor
from recsys.training_set import TrainingSet, open_event_log, open_table
from serving.features import SnapshotFeatures
from tests.spaced import spaced_model
from tests.training_sets import append_synthetic, build_synthetic
from training import export as module
from training.export import example_inputs, export_artifact, recorded_batches


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build_synthetic(tmp_path_factory.mktemp("export"), num_requests=60)


@pytest.fixture
def model(small_set: TrainingSet) -> RankingModel:
    torch.manual_seed(0)
    config = DINConfig(embedding_dim=4, attention_hidden=(6,), hidden=(8,), attention_softmax=True)
    built = build_model(config, small_set.schema, small_set.encoder.table_sizes)
    with torch.no_grad():
        for parameter in built.lookup.parameters():
            parameter.normal_(0.0, 0.5)
    return built.eval()


def test_an_export_reproduces_the_model(small_set: TrainingSet, model: RankingModel, tmp_path: Path) -> None:
    stages: list[str] = []
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    summary = export_artifact(
        model, small_set, tmp_path / "artifact", name="din", compile=False, stage=stages.append, facts={"run": "r1"}
    )
    assert summary.engine == "portable"
    assert summary.note == "compilation was switched off"
    assert summary.max_error <= 1e-6
    assert summary.bytes == sum(p.stat().st_size for p in (tmp_path / "artifact").rglob("*") if p.is_file())
    assert stages[0] == "Writing tables"
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    assert model.training, "the model is left as it was"
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    model.eval()
    artifact = Artifact.open(tmp_path / "artifact")
    assert artifact.manifest["facts"] == {"run": "r1"}
    assert sorted(p.name for p in (artifact.features_folder or tmp_path).iterdir()) == ["items.arrow", "manifest.json"]
    predictor = Predictor(artifact)
    batch = Batch.from_training_set(small_set, "train", slice(0, 20))
    with torch.inference_mode():
        np.testing.assert_allclose(predictor.logits(batch), model(batch).numpy(), atol=1e-6, rtol=0)


def test_an_artifact_is_replaced_by_a_good_one_and_by_nothing_else(
    small_set: TrainingSet, model: RankingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artifact"
    for name in ("first", "good"):
        export_artifact(model, small_set, out, name=name, compile=False, snapshot="none")
        assert Artifact.open(out).name == name
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    original = module._export

    def changed(_: RankingModel, *rest: object) -> torch.export.ExportedProgram:
        other = build_model(
            DINConfig(embedding_dim=4, attention_hidden=(6,), hidden=(8,)),
            small_set.schema,
            small_set.encoder.table_sizes,
        )
        return original(other, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_export", changed)
    with pytest.raises(ArtifactError, match="recorded rows must give the recorded logits"):
        export_artifact(model, small_set, out, name="bad", compile=False, snapshot="none")
    assert Artifact.open(out).name == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_what_is_no_artifact_is_not_overwritten(small_set: TrainingSet, model: RankingModel) -> None:
    with pytest.raises(ArtifactError, match="must be an artifact or not exist"):
        export_artifact(model, small_set, small_set.folder / "encoder", name="din", compile=False)
    assert (small_set.folder / "encoder" / "encoder.json").is_file()


def test_a_model_of_another_encoder_is_refused(small_set: TrainingSet, tmp_path: Path) -> None:
    sizes = {**small_set.encoder.table_sizes, "item": 7}
    other = build_model(DINConfig(embedding_dim=4), small_set.schema, sizes)
    with pytest.raises(ArtifactError, match="model must have the tables"):
        export_artifact(other, small_set, tmp_path / "artifact", name="din", compile=False)


def test_without_a_compiler(
    small_set: TrainingSet, model: RankingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    summary = export_artifact(model, small_set, tmp_path / "artifact", name="din", compile="auto", snapshot="none")
    assert (summary.engine, summary.note) == ("portable", "no C++ compiler was found")
    with pytest.raises(MissingDependencyError, match=r"needs a C\+\+ compiler"):
        export_artifact(model, small_set, tmp_path / "other", name="din", compile=True, snapshot="none")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_compiler_that_fails(
    small_set: TrainingSet, model: RankingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "g++"
    broken.write_text(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo 'g++ (GCC) 12.2.0'; exit 0; fi\necho broken >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    summary = export_artifact(model, small_set, tmp_path / "artifact", name="din", compile="auto", snapshot="none")
    assert summary.engine == "portable"
    assert "compilation failed" in str(summary.note)


@pytest.mark.slow
def test_a_compiled_program_gives_the_same_and_is_quiet(
    small_set: TrainingSet,
    model: RankingModel,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    levels = {name: logging.getLogger(name).level for name in ("torch", "torch._inductor")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = export_artifact(model, small_set, tmp_path / "artifact", name="din", compile=True, snapshot="none")
    assert summary.engine == "compiled"
    assert summary.compile_s > 0
    assert summary.max_error <= 1e-6
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    assert caplog.records == []
    assert [str(w.message) for w in caught] == []
    assert {name: logging.getLogger(name).level for name in levels} == levels
    compiled = Predictor(Artifact.open(tmp_path / "artifact"), engine="compiled")
    portable = Predictor(Artifact.open(tmp_path / "artifact"), engine="portable")
    whole = Batch.from_training_set(small_set, "train", slice(0, 30))
    for request in range(30):
        batch = whole.select_requests(torch.tensor([request]))
        np.testing.assert_allclose(compiled.logits(batch), portable.logits(batch), atol=1e-6, rtol=0)


def test_example_inputs_have_a_size_of_its_own_for_every_dimension_that_varies(small_set: TrainingSet) -> None:
    inputs, dynamic = example_inputs(small_set.schema, "many", 4)
    sizes = {t.shape[d] for t, dims in zip(inputs, dynamic, strict=True) for d in dims}
    assert len(sizes) == 2 + len(small_set.schema.histories)  # requests, rows, and a length a history
    assert min(sizes) >= 2


def test_recorded_rows_try_the_edges(small_set: TrainingSet) -> None:
    batches = recorded_batches(small_set)
    assert batches["many"].num_requests >= 2
    assert batches["single"].num_requests == 1
    assert batches["single-candidate"].num_rows == 1
    assert int(batches["single-unknown"].histories["clicked"].lengths.sum()) == 0
    assert int(batches["single"].histories["clicked"].lengths.sum()) > 0
    assert all(b.labels is None for b in batches.values())


def test_a_model_with_a_space_of_its_own_is_scored_from_its_tables(small_set: TrainingSet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = spaced_model(small_set.schema, dict(small_set.encoder.table_sizes)).eval()
    with torch.no_grad():
        for parameter in model.lookup.parameters():
            parameter.normal_(0.0, 0.5)
    export_artifact(model, small_set, tmp_path / "artifact", name="spaced", compile=False)
    artifact = Artifact.open(tmp_path / "artifact")
    assert {"item", "item@role", "tags@role"} <= set(artifact.tables)
    predictor = Predictor(artifact)
    for requests in (slice(0, 20), slice(3, 4)):
        batch = Batch.from_training_set(small_set, "train", requests)
        with torch.inference_mode():
            np.testing.assert_allclose(predictor.logits(batch), model(batch).numpy(), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_set_that_was_appended_to_is_exported_with_all_parts_of_its_logs(tmp_path: Path) -> None:
    training_set = append_synthetic(tmp_path)
    torch.manual_seed(0)
    config = DINConfig(embedding_dim=4, attention_hidden=(6,), hidden=(8,))
    model = build_model(config, training_set.schema, training_set.encoder.table_sizes).eval()
    export_artifact(model, training_set, tmp_path / "artifact", name="din", compile=False, snapshot="all")
    artifact = Artifact.open(tmp_path / "artifact")
    assert artifact.features_folder is not None
    test = training_set.split("test")
    batch = Batch.from_training_set(training_set, "test", slice(0, test.num_requests))
    with torch.inference_mode():
        np.testing.assert_allclose(Predictor(artifact).logits(batch), model(batch).numpy(), atol=1e-6, rtol=0)
    # At the time of each request of the newest append, the artifact's source gives the history that it is stored with.
    begin = int(open_table(training_set.folder / "parts" / "00002" / "requests.arrow").array("@time")[0])
    chosen = slice(int(np.searchsorted(test.requests.array("@time"), begin)), test.num_requests)
    newest = Batch.from_training_set(training_set, "test", chosen)
    assert newest.num_requests > 10
    source = SnapshotFeatures(artifact.features_folder, training_set.encoder)
    keys = training_set.users.keys
    assert keys is not None
    users = keys.take(pa.array(test.requests.array("@user_row")[chosen]))
    for name in ("clicked", "seen"):
        log = open_event_log(artifact.features_folder, name)
        assert log.num_rows == training_set.events[name].num_rows
        max_length = training_set.schema.history(name).max_length
        found = source.history(name, users, test.requests.array("@time")[chosen], max_length)
        stored = newest.histories[name]
        assert found.offsets[-1] > 50
        np.testing.assert_array_equal(found.offsets, stored.offsets)
        np.testing.assert_array_equal(found.times, stored.times)
        np.testing.assert_array_equal(found.columns["item_id"], stored.features["item_id"])  # type: ignore[arg-type]
