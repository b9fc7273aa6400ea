"""A small training set, and both backends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import lmdb
import pytest

from feature_store.online.key_values import KeyValues
from feature_store.online.location import open_backend
from recsys.training_set import TrainingSet
from tests.redis_server import redis_server
from tests.training_sets import build_synthetic


@pytest.fixture(scope="session")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return build_synthetic(tmp_path_factory.mktemp("online"), num_requests=120, seed=5)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["lmdb", pytest.param("redis", marks=pytest.mark.server)])
def fresh(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], KeyValues]]:
    """Opens an empty backend at every call; LMDB does not wait for the disk: no test cuts the power."""
    monkeypatch.setattr("feature_store.online.lmdb_store.lmdb.open", partial(lmdb.open, sync=False))
    opened: list[KeyValues] = []
    folder = tmp_path_factory.mktemp("stores")
    numbers = itertools.count()

    def new() -> KeyValues:
        number = next(numbers)
        if request.param == "lmdb":
            location = f"lmdb:{folder / str(number)}"
        else:
            url: str = request.getfixturevalue("redis_url")
            location = f"{url}?namespace={folder.name}-{number}"
        opened.append(open_backend(location, is_writable=True))
        return opened[-1]

    yield new
    for backend in opened:
        backend.close()
