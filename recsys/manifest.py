"""The manifest of an artifact, read without the libraries that run its model.

So a command can say at once that there is no artifact, rather than after seconds of loading torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from recsys.errors import ArtifactError

FORMAT = "recsys.artifact"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_FIELDS = ("name", "schema", "encoder_fingerprint", "tables", "spaces", "programs", "files")
Engine = Literal["auto", "compiled", "portable"]
"""Which program single requests run on: see :class:`recsys.predictor.Predictor`."""
EXPORT_AGAIN = "export the artifact again with `recsys export RUN`"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest's format.

    Raises:
        ArtifactError: there is none, it cannot be read, or it is of another version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise ArtifactError(
            f"{folder} must be an artifact, got a folder without {MANIFEST}"
            if folder.is_dir()
            else f"{folder} must be an artifact's folder, got no such folder",
            hint="write one with `recsys export RUN`",
        ) from err
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path} must be readable JSON, got something else", hint=EXPORT_AGAIN) from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path} must be the manifest of an artifact, got another file", hint=EXPORT_AGAIN)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} must be of format version {FORMAT_VERSION}, got {manifest.get('format_version')!r}",
            hint=f"{EXPORT_AGAIN}, or use the version of recsys that wrote it",
        )
    missing = [field for field in _FIELDS if field not in manifest]
    if missing:
        raise ArtifactError(f"{path} must say {', '.join(missing)}", hint=EXPORT_AGAIN)
    return manifest
