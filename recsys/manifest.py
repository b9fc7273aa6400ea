"""The manifest of an artifact, read without the libraries that run its model.

So a command can say at once that there is no artifact, rather than after seconds of loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from recsys.errors import ArtifactError
from recsys.files import read_object

FORMAT = "recsys.artifact"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_FIELDS: dict[str, type] = {
    "name": str,
    "schema": dict,
    "encoder_fingerprint": str,
    "tables": dict,
    "spaces": list,
    "programs": dict,
    "files": dict,
}
_TABLE: dict[str, type] = {"rows": int, "dim": int, "file": str}
Engine = Literal["auto", "compiled", "portable"]
"""Which program single requests run on: see :class:`recsys.predictor.Predictor`."""
EXPORT_AGAIN = "export the artifact again with `recsys export RUN`"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest's format.

    Raises:
        ArtifactError: there is none, it cannot be read, is of another version, or holds other types than it should.
    """
    path = folder / MANIFEST
    try:
        manifest = read_object(path, {}, hint=EXPORT_AGAIN, error=ArtifactError)
    except FileNotFoundError as err:
        raise ArtifactError(
            f"{folder} must be an artifact, got a folder without {MANIFEST}"
            if folder.is_dir()
            else f"{folder} must be an artifact's folder, got no such folder",
            hint="write one with `recsys export RUN`",
        ) from err
    if not is_artifact(manifest):
        raise ArtifactError(f"{path} must be the manifest of an artifact, got another file", hint=EXPORT_AGAIN)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} must be of format version {FORMAT_VERSION}, got {manifest.get('format_version')!r}",
            hint=f"{EXPORT_AGAIN}, or use the version of recsys that wrote it",
        )
    manifest = read_object(path, _FIELDS, hint=EXPORT_AGAIN, error=ArtifactError)
    for name, table in manifest["tables"].items():
        if not isinstance(table, dict) or not all(isinstance(table.get(k), v) for k, v in _TABLE.items()):
            raise ArtifactError(f"{path}: tables.{name} must say {', '.join(_TABLE)}", hint=EXPORT_AGAIN)
    programs = (part for part in manifest["programs"].values() if part is not None)
    if not all(isinstance(part, dict) for part in (*manifest["spaces"], *programs)):
        raise ArtifactError(f"{path}: spaces and programs must hold objects, got another type", hint=EXPORT_AGAIN)
    return manifest


def is_artifact(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is that of an artifact, of whatever version."""
    return manifest.get("format") == FORMAT
