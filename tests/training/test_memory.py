from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, sys
import torch
from training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return torch.zeros(20_000_000).add(1.0).sum().item()  # two tensors of 76 MiB
for _ in range(10):  # until the heap has its size
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


def page_faults(mode: str) -> int:
    """Of ten steps in a process of its own."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CODE, mode], cwd=root, check=True, capture_output=True, timeout=300)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator's settings are glibc's")
def test_freed_memory_is_used_again_without_the_kernel() -> None:
    kept, default = page_faults("keep"), page_faults("default")
    assert default > 10 * 30_000, "two tensors of 19,531 pages a step"
    assert kept < default / 4
