"""The requirement files are complete: with --no-deps, nothing that a package declares is missing or too old."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
# torchrec names the CUDA build of FBGEMM, whichever is meant.
EITHER_BUILD = {"fbgemm-gpu": "fbgemm-gpu-cpu"}


def pins(*names: str) -> dict[str, str]:
    """Versions by normalised name, with the files that a file includes."""
    found: dict[str, str] = {}
    for name in names:
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            if line.startswith("-r "):
                found |= pins(line.removeprefix("-r "))
            elif line and not line.startswith("#"):
                pinned = re.fullmatch(r"([a-z0-9.-]+)==(\S+)", line)
                assert pinned, f"{name}: {line} must be NAME==VERSION, the name in lower case with hyphens"
                assert pinned[1] not in found, f"{name}: {pinned[1]} is pinned twice"
                found[pinned[1]] = pinned[2]
    return found


def lacking(requirements: list[str], pinned: dict[str, str]) -> list[str]:
    """Which of the requirements, extras included, the pins do not meet."""
    problems = []
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        name = name if name in pinned else EITHER_BUILD.get(name, name)
        if name not in pinned:
            problems.append(f"{text}: not pinned")
        elif not requirement.specifier.contains(Version(pinned[name]), prereleases=True):
            problems.append(f"{text}: pinned at {pinned[name]}")
        else:
            for extra in requirement.extras:
                wanted = [Requirement(each) for each in distribution(name).requires or []]
                needed = [str(each).partition(";")[0] for each in wanted if needs(each, extra)]
                problems += [f"{text}: {problem}" for problem in lacking(needed, pinned)]
    return problems


def needs(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


CPU = pins("torch-cpu.txt", "base-cpu.txt", "dev.txt")


@pytest.mark.parametrize("name", CPU)
def test_what_a_package_declares_is_pinned(name: str) -> None:
    package = distribution(name)
    assert Version(package.version).public == CPU[name], "the environment is not what the files say: make setup"
    declared = [Requirement(each) for each in package.requires or []]
    needed = [
        str(each).partition(";")[0] for each in declared if each.marker is None or each.marker.evaluate({"extra": ""})
    ]
    assert lacking(needed, CPU) == []


def test_what_the_project_declares_is_pinned_for_both_builds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for build in ("cpu", "cuda"):
        assert lacking(project["dependencies"], pins(f"torch-{build}.txt", f"base-{build}.txt")) == []


def test_the_two_builds_differ_only_in_what_carries_cuda() -> None:
    cuda = pins("torch-cuda.txt", "base-cuda.txt", "dev.txt")
    differing = {name for name, version in (CPU.items() ^ cuda.items())}
    assert {name for name in differing if not name.startswith(("nvidia-", "cuda-"))} == {
        "triton",
        "fbgemm-gpu",
        "fbgemm-gpu-cpu",
    }
