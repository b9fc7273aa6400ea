"""What a figure was measured on: without it, the figure cannot be compared with another."""

from __future__ import annotations

import math
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "numpy",
    "polars",
    "pyarrow",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "ray",
    "mlflow",
    "uvicorn",
    "lmdb",
)


def machine_record() -> dict[str, Any]:
    """Processor, cores, memory, thread limits, versions and the date."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "threads": {name: os.environ[name] for name in _THREAD_SETTINGS if name in os.environ},
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


_THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def peak_memory_mib() -> float:
    """The most memory that this process has had resident since it started.

    Read from the kernel's record of the process image: ``getrusage`` also counts the parent that it was forked from.
    """
    return _status("VmHWM")


def memory_mib() -> float:
    """The memory that this process has resident now."""
    return _status("VmRSS")


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return math.nan
