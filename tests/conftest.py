"""What every test shares: few threads, no file outside temporary folders, and the real data where there is any."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Read by torch, OpenBLAS and Polars when they load, so set before any test module is imported.
# One thread a library makes sums reproducible and leaves the other cores to the processes that tests start.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(variable, "1")
# No library writes to the home folder or the working directory, calls home, or takes settings from this machine.
_scratch = tempfile.TemporaryDirectory(prefix="recsys-tests-", ignore_cleanup_errors=True)
SCRATCH = Path(_scratch.name)
os.environ |= {
    "HOME": str(SCRATCH),
    "XDG_CACHE_HOME": str(SCRATCH / "cache"),
    "MPLCONFIGDIR": str(SCRATCH / "matplotlib"),
    "TORCHINDUCTOR_CACHE_DIR": str(SCRATCH / "inductor"),
    "HYPOTHESIS_STORAGE_DIRECTORY": str(SCRATCH / "hypothesis"),
    "MLFLOW_TRACKING_URI": f"sqlite:///{SCRATCH / 'mlflow.db'}",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GIT_PYTHON_REFRESH": "quiet",
}
os.environ.pop("MLFLOW_REGISTRY_URI", None)

from hypothesis import settings  # noqa: E402  its folder is decided above

# No deadline: a busy machine is no bug. In CI the same examples every time; elsewhere new ones are welcome.
settings.register_profile("recsys", deadline=None, database=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("recsys")


def pytest_unconfigure() -> None:
    _scratch.cleanup()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for real data is a `real_data` test."""
    for item in items:
        if "data_root" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real_data)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty working directory for the tests of a module, which must still be empty after them."""
    folder = tmp_path_factory.mktemp("cwd")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    written = sorted(path.name for path in folder.iterdir())
    assert not written, f"a test of {request.path.name} wrote into the working directory: {written}; use tmp_path"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds the public data sets, one folder each: `RECSYS_DATA`. Skips without it."""
    folder = os.environ.get("RECSYS_DATA")
    if not folder:
        pytest.skip("RECSYS_DATA names no folder with the public data sets")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"RECSYS_DATA must name a folder, got {path}")
    return path


@pytest.fixture(scope="session")
def dataset(data_root: Path) -> Callable[[str], Path]:
    """`dataset("movielens_1m")` is that data set's folder; skips where `RECSYS_DATA` does not hold it."""

    def folder_of(name: str) -> Path:
        if not (data_root / name).is_dir():
            pytest.skip(f"RECSYS_DATA holds no folder {name}")
        return data_root / name

    return folder_of


@pytest.fixture(params=["lmdb", pytest.param("redis", marks=pytest.mark.server)])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where an online store may be, of each kind; nothing is there yet."""
    from tests.redis_server import redis_server

    if request.param == "lmdb":
        yield f"lmdb:{tmp_path / 'online'}"
        return
    with redis_server(tmp_path / "redis") as url:
        yield url
