from __future__ import annotations

from pathlib import Path

import pytest

from feature_store.datasets import DATASETS
from recsys.errors import SourceError
from recsys.schema import Schema

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_entries_have_a_valid_schema_and_fail_clearly_without_raw_files(name: str, tmp_path: Path) -> None:
    dataset = DATASETS[name]
    assert dataset.name == name
    assert Schema.load(ROOT / dataset.schema_file).name == name
    with pytest.raises(SourceError, match="does not exist"):
        dataset.load(tmp_path / "nowhere", tmp_path / "views", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"(must hold|does not exist)"):
        dataset.load(tmp_path / "empty", tmp_path / "views", None)
    assert not (tmp_path / "views").exists()
