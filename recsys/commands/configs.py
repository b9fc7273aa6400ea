"""The configuration files that come with the platform, in a checkout or in an installed package."""

from __future__ import annotations

from pathlib import Path

from recsys.errors import ConfigError


def shipped_config(name: str) -> Path:
    """Path of a file below ``configs/``.

    Args:
        name: such as ``experiment/din_simulated.yaml``.

    Raises:
        ConfigError: this installation has no such file.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"configs/{name} must come with recsys, but is not there", hint="install recsys again")
