"""Where a model comes from: a folder, or a registered version in MLflow."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.artifact import MANIFEST, read_manifest
from recsys.errors import ArtifactError, MissingDependencyError, UnavailableError

_URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))$")


@dataclass(frozen=True)
class Located:
    """A found artifact.

    Attributes:
        folder: where it is.
        name: of the model.
        version: registered version; None for a folder.
    """

    folder: Path
    name: str
    version: str | None


def locate(location: str | Path, *, tracking_uri: str | None = None) -> Located:
    """Finds an artifact.

    Args:
        location: its folder, ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        tracking_uri: of the MLflow store; MLflow's own choice (``MLFLOW_TRACKING_URI``) if not given.

    Raises:
        ArtifactError: there is no artifact, or the location is none of these forms.
        UnavailableError: the store does not answer, or has no such version.
        MissingDependencyError: mlflow is not installed.
    """
    text = str(location)
    if not text.startswith("models:"):
        folder = Path(location)
        return Located(folder, str(read_manifest(folder)["name"]), None)
    match = _URI.match(text)
    if match is None:
        raise ArtifactError(
            f"artifact must be a folder, models:/NAME@ALIAS or models:/NAME/VERSION, got {text!r}",
            hint="for example models:/din@champion",
        )
    return _registered(match["name"], match["alias"], match["version"], tracking_uri)


def _registered(name: str, alias: str | None, version: str | None, tracking_uri: str | None) -> Located:
    try:
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as err:
        raise MissingDependencyError("models:/ needs mlflow", hint="pip install mlflow") from err
    wanted = f"{name}@{alias}" if alias else f"{name}/{version}"
    try:
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        found: Any = (
            client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
        )
        model = Path(
            download_artifacts(
                artifact_uri=f"models:/{name}/{found.version}", tracking_uri=tracking_uri, registry_uri=tracking_uri
            )
        )
    except MlflowException as err:
        raise UnavailableError(
            f"models:/{wanted} cannot be had from MLflow: {str(err).splitlines()[0]}",
            hint="give the store's address with --tracking-uri or MLFLOW_TRACKING_URI, and check name and alias",
        ) from err
    except OSError as err:
        raise UnavailableError(f"models:/{wanted} cannot be downloaded: {err}") from err
    folders = sorted(
        p.parent for p in model.rglob(MANIFEST) if p.parent.name != "features" and (p.parent / "tables").is_dir()
    )
    if not folders:
        raise ArtifactError(
            f"models:/{wanted} must hold an artifact, got none",
            hint="register one with `recsys export RUN --register NAME`",
        )
    return Located(folders[0], name, str(found.version))
