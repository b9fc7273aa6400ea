"""The artifact's folder: whole or refused, with a message that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.artifact import (
    X86_64_V3,
    Artifact,
    ArtifactWriter,
    flatten,
    input_names,
    read_self_test,
    unflatten,
    write_self_test,
)
from recsys.embeddings import Lookup
from recsys.errors import ArtifactError, SchemaError
from recsys.files import sha256_of
from recsys.manifest import MANIFEST
from recsys.predictor import Predictor, load_predictor, torch_version, unfit
from tests.serving.conftest import World
from tests.synthetic import TABLE_SIZES, random_batch, schema


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Path:
    shutil.copytree(world.artifact, tmp_path / "artifact")
    return tmp_path / "artifact"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def resign(folder: Path, relative: str) -> None:
    """Makes the manifest agree with a changed file."""
    path = folder / relative
    edit(folder, lambda m: m["files"].update({relative: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}}))


def test_every_file_is_in_the_manifest(world: World) -> None:
    artifact = Artifact.open(world.artifact)
    files = {p.relative_to(world.artifact).as_posix() for p in world.artifact.rglob("*") if p.is_file()}
    assert files == {*artifact.manifest["files"], MANIFEST}
    assert artifact.tasks == ("click", "like")
    assert artifact.name == "tiny"


def test_tables_are_mapped_and_equal_the_model(world: World) -> None:
    tables = Artifact.open(world.artifact).tables
    weights = {n.split(".")[-2]: p for n, p in world.model.lookup.named_parameters()}
    assert set(tables) == set(weights)
    for name, table in tables.items():
        assert torch.equal(table, weights[name].detach())


@pytest.mark.parametrize("relative", ["network.pt2", "network.single.pt2", "tables/item.npy", "encoder/encoder.json"])
def test_a_changed_file_is_refused(copy: Path, relative: str) -> None:
    path = copy / relative
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed or cut short"):
        Artifact.open(copy)


@pytest.mark.parametrize("relative", ["network.pt2", "tables/item.npy", "self_test.npz", "features/items.arrow"])
def test_a_cut_file_is_refused_without_reading_it(copy: Path, relative: str) -> None:
    path = copy / relative
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="was changed or cut short"):
        Artifact.open(copy, verify=False)


def test_a_missing_file_is_refused(copy: Path) -> None:
    (copy / "network.single.pt2").unlink()
    with pytest.raises(ArtifactError, match=r"network\.single\.pt2 is missing"):
        Artifact.open(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be readable JSON"),
        ("[]", "must be the manifest of an artifact"),
        ('{"format": "recsys.artifact", "format_version": 99}', "must be of format version 2, got 99"),
        ('{"format": "recsys.artifact", "format_version": 2}', "must say name, schema"),
    ],
)
def test_a_manifest_that_says_something_else(copy: Path, content: str, message: str) -> None:
    (copy / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(copy)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        Artifact.open(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"without manifest\.json"):
        Artifact.open(tmp_path)


def test_the_encoder_of_another_model_is_refused(copy: Path) -> None:
    edit(copy, lambda m: m.update(encoder_fingerprint="0" * 64))
    with pytest.raises(ArtifactError, match="must be the encoder that the model was trained with"):
        Artifact.open(copy)


def test_a_table_of_another_size_is_refused(copy: Path) -> None:
    edit(copy, lambda m: m["tables"]["item"].update(rows=3))
    with pytest.raises(ArtifactError, match="table 'item' must have the"):
        Artifact.open(copy)


def test_weights_that_give_other_logits_are_refused(copy: Path) -> None:
    """Every checksum is right, and still the recorded rows give it away."""
    path = copy / "tables" / "item.npy"
    table = np.load(path)
    np.save(path, table + 0.01)
    resign(copy, "tables/item.npy")
    with pytest.raises(ArtifactError, match="recorded rows must give the recorded logits within 1e-05, got"):
        load_predictor(copy)


def test_logits_that_are_not_numbers_are_refused(copy: Path) -> None:
    path = copy / "tables" / "category.npy"
    np.save(path, np.load(path) * np.float32(np.nan))
    resign(copy, "tables/category.npy")
    with pytest.raises(ArtifactError, match="recorded rows must give"):
        load_predictor(copy)


def test_recorded_rows_of_the_many_form_are_replayed_too(copy: Path) -> None:
    artifact = Artifact.open(copy)
    recorded = read_self_test(copy / "self_test.npz", artifact.schema)
    logits = {name: x + 1.0 if name == "many" else x for name, (_, x) in recorded.items()}
    write_self_test(copy / "self_test.npz", {name: b for name, (b, _) in recorded.items()}, logits)
    resign(copy, "self_test.npz")
    predictor = load_predictor(copy)
    with pytest.raises(ArtifactError, match="recorded rows must give"):
        predictor.load_many()


def test_a_program_that_is_none(copy: Path) -> None:
    (copy / "network.single.pt2").write_bytes(b"PK\x03\x04 nothing")
    resign(copy, "network.single.pt2")
    with pytest.raises(ArtifactError, match="cannot be loaded by torch"):
        load_predictor(copy)


def test_recorded_rows_that_are_none(copy: Path) -> None:
    (copy / "self_test.npz").write_bytes(b"nothing")
    resign(copy, "self_test.npz")
    with pytest.raises(ArtifactError, match="must hold the recorded rows"):
        load_predictor(copy)


def test_self_test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    batches = {
        "many": random_batch(5, seed=1),
        "single": random_batch(1, seed=2),
        "empty": random_batch(3, empty_history=True),
    }
    logits = {
        name: np.random.default_rng(0).normal(size=(b.num_rows, 2)).astype(np.float32) for name, b in batches.items()
    }
    write_self_test(tmp_path / "rows.npz", batches, logits)
    lookup = Lookup(schema(), TABLE_SIZES, 4)
    for name, (batch, expected) in read_self_test(tmp_path / "rows.npz", schema()).items():
        np.testing.assert_array_equal(expected, logits[name])
        if name == "empty":
            assert batch.histories["clicked"].offsets.tolist() == [0, 0, 0, 0]
            continue
        pairs = zip(flatten(lookup(batch), "many"), flatten(lookup(batches[name]), "many"), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_flat_inputs_are_named_and_come_back() -> None:
    embedded = Lookup(schema(), TABLE_SIZES, 4)(random_batch(3, seed=1))
    names = input_names(schema(), "many")
    tensors = flatten(embedded, "many")
    assert len(set(names)) == len(names) == len(tensors)
    again = unflatten(schema(), dict(zip(names, tensors, strict=True)))
    for left, right in zip(flatten(again, "many"), tensors, strict=True):
        assert left is right
    assert list(again.request) == list(embedded.request)
    assert list(again.candidate) == list(embedded.candidate)
    assert input_names(schema(), "single") == names[:-1]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "artifact"
    message = rf"{out} must be a place that can be written to: Not a directory"
    with pytest.raises(ArtifactError, match=message), ArtifactWriter(out):
        pytest.fail("the folder was not refused")


# What a compiled program needs


ENTRY = {
    "torch": torch_version(),
    "machine": "x86_64",
    "cpu_features": list(X86_64_V3),
    "file": "network.single.aoti.pt2",
}


def test_what_a_compiled_program_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    able = dict.fromkeys(X86_64_V3, True)
    assert unfit(ENTRY, able) is None
    assert "nothing was compiled" in str(unfit(None, able))
    assert "compiled with torch 1.0" in str(unfit({**ENTRY, "torch": "1.0"}, able))
    assert "compiled for aarch64" in str(unfit({**ENTRY, "machine": "aarch64"}, able))
    assert "processor features avx2, bmi2" in str(unfit(ENTRY, {**able, "avx2": False, "bmi2": False}))


def test_a_compiled_program_that_does_not_fit(copy: Path) -> None:
    """It is refused where it was asked for; else the portable program answers and says why."""
    (copy / ENTRY["file"]).write_bytes(b"not a package")  # type: ignore[operator]
    resign(copy, "network.single.aoti.pt2")
    edit(copy, lambda m: m["programs"].update(compiled={**ENTRY, "torch": "1.0"}))
    predictor = load_predictor(copy)
    assert predictor.engine == "portable"
    assert "torch 1.0" in str(predictor.engine_note)
    with pytest.raises(ArtifactError, match="the compiled program cannot run here: it was compiled with torch"):
        load_predictor(copy, engine="compiled")


# Scores


def test_scores_of_any_shape(world: World) -> None:
    """One candidate, no candidate, no history, requests with and without: the same as the model."""
    predictor = Predictor(Artifact.open(world.artifact))
    whole = world.whole("train")
    for positions in ([0], [1, 2], [5, 5, 5], list(range(9))):
        batch = whole.select_requests(torch.tensor(positions))
        with torch.inference_mode():
            expected = world.model(batch).numpy()
        np.testing.assert_allclose(predictor.logits(batch), expected, atol=1e-6, rtol=0)
    one = whole.exploded().select_requests(torch.tensor([3]))
    with torch.inference_mode():
        np.testing.assert_allclose(predictor.logits(one), world.model(one).numpy(), atol=1e-6, rtol=0)
    nothing = whole.select_requests(torch.tensor([], dtype=torch.int64))
    assert predictor.logits(nothing).shape == (0, 2)


def test_a_row_does_not_depend_on_its_neighbours(world: World) -> None:
    predictor = Predictor(Artifact.open(world.artifact))
    whole = world.whole("validation")
    exploded = predictor.logits(whole.exploded())
    np.testing.assert_allclose(predictor.logits(whole), exploded, atol=1e-6, rtol=0)


def test_an_unknown_task(world: World) -> None:
    artifact = Artifact.open(world.artifact)
    assert artifact.task_position(None) == 0
    assert artifact.task_position("like") == 1
    with pytest.raises(SchemaError, match="task must be one of the model's"):
        artifact.task_position("lik")


# Writing


def test_an_artifact_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "artifact"

    def interrupted() -> None:
        with ArtifactWriter(out) as writer:
            writer.write_table("item", np.zeros((3, 2), np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="must be an artifact or not exist"):
        ArtifactWriter(tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "mine"


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    import os

    dead, alive = tmp_path / ".tmp-artifact-4194999-ab", tmp_path / f".tmp-artifact-{os.getpid()}-cd"
    dead.mkdir()
    alive.mkdir()
    with ArtifactWriter(tmp_path / "artifact"):
        pass
    assert not dead.exists()
    assert alive.exists()
