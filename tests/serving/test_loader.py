"""Artifacts by folder and by name: registered versions of MLflow, loaded back and asked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from recsys.errors import ArtifactError, UnavailableError
from serving.loader import locate
from serving.scorer import Scorer
from tests.serving.conftest import World

BODY = {"user_id": 1000, "candidates": [2**53 + 1, 2**53 + 2], "time": 1_700_900_000_000_000}


@pytest.fixture(autouse=True)
def _mlflow_is_loud() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_folder(world: World) -> None:
    located = locate(world.artifact)
    assert (located.folder, located.name, located.version) == (world.artifact, "tiny", None)
    with pytest.raises(ArtifactError, match="no such folder"):
        locate(world.folder / "nothing")


@pytest.mark.parametrize(
    "text", ["models:/din", "models:/din@", "models:/din/latest", "models:din@champion", "models:/a/b@c"]
)
def test_what_is_no_model_uri(text: str) -> None:
    with pytest.raises(ArtifactError, match="must be a folder, models:/NAME@ALIAS or models:/NAME/VERSION"):
        locate(text)


def test_registered_versions(
    world: World, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from serving.pyfunc import ENTRY, signature
    from training.tracking import register

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for expected in (1, 2):
        version = register(
            world.artifact,
            name="din",
            alias="champion",
            python_model=ENTRY,
            uri=uri,
            signature=signature(scorer.artifact),
        )
        assert version.version == expected
    capfd.readouterr()
    champion = locate("models:/din@champion", tracking_uri=uri)
    assert capfd.readouterr() == ("", "")
    assert (champion.name, champion.version) == ("din", "2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert locate("models:/din@champion") == champion, "mlflow.db in the working directory is found"
    first = locate("models:/din/1", tracking_uri=uri)
    assert first.version == "1"
    loaded = Scorer.load(champion.folder)
    np.testing.assert_array_equal(loaded.rank(BODY).scores, scorer.rank(BODY).scores)
    with pytest.raises(UnavailableError, match="models:/din@challenger cannot be had from MLflow"):
        locate("models:/din@challenger", tracking_uri=uri)
    with pytest.raises(UnavailableError, match="models:/other/1 cannot be had"):
        locate("models:/other/1", tracking_uri=uri)


def test_a_store_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "mlflow.db"
    with pytest.raises(UnavailableError, match="must be an MLflow store, got no such file"):
        locate("models:/din@champion", tracking_uri=f"sqlite:///{missing}")
    assert not missing.exists(), "a look-up must not make a store"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UnavailableError, match="needs an MLflow store, found none"):
        locate("models:/din@champion")
