"""Where a model comes from: a folder, or a registered version in MLflow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.errors import ArtifactError, MissingDependencyError, UnavailableError
from recsys.manifest import MANIFEST, read_manifest

_URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))$")
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_STORES = ("runs/mlflow.db", "mlflow.db")
"""SQLite files that are looked for, in this order, where no store is named."""


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
        tracking_uri: of the MLflow store; if not given the one that ``MLFLOW_TRACKING_URI`` names, else
            ``runs/mlflow.db`` or ``mlflow.db`` in the working directory.

    Raises:
        ArtifactError: there is no artifact, or the location is none of these forms.
        UnavailableError: the store does not answer, or has no such version.
        MissingDependencyError: mlflow is not installed.
    """
    check_location(location, tracking_uri=tracking_uri)
    text = str(location)
    match = _URI.match(text)
    if match is None:
        folder = Path(location)
        return Located(folder, str(read_manifest(folder)["name"]), None)
    return _registered(text, match, _store(tracking_uri))


def check_location(location: str | Path, *, tracking_uri: str | None = None) -> None:
    """Checks what can be told of a location before any model or store is loaded; arguments as for :func:`locate`.

    Raises:
        ArtifactError: there is no artifact, or the location is none of the forms.
        UnavailableError: the store's file is not there.
    """
    text = str(location)
    if not text.startswith("models:"):
        read_manifest(Path(location))
        return
    if _URI.match(text) is None:
        raise ArtifactError(
            f"artifact must be a folder, models:/NAME@ALIAS or models:/NAME/VERSION, got {text!r}",
            hint="for example models:/din@champion",
        )
    _store(tracking_uri)


def _store(tracking_uri: str | None) -> str:
    named = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if named is None:
        named = next((f"sqlite:///{Path(p).absolute().as_posix()}" for p in _STORES if Path(p).is_file()), None)
    hint = "name the MLflow store with --tracking-uri or MLFLOW_TRACKING_URI"
    if named is None:
        raise UnavailableError("models:/ needs an MLflow store, found none", hint=hint)
    if named.startswith("sqlite:///") and not Path(named.removeprefix("sqlite:///")).is_file():
        # MLflow would make an empty one.
        raise UnavailableError(f"{named} must be an MLflow store, got no such file", hint=hint)
    return named


def _registered(uri: str, match: re.Match[str], store: str) -> Located:
    name, alias = match["name"], match["alias"]
    with _quiet():
        try:
            from mlflow.artifacts import download_artifacts
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError as err:
            raise MissingDependencyError("models:/ needs the package mlflow", hint="install it") from err
        try:
            client = MlflowClient(tracking_uri=store, registry_uri=store)
            version: Any = match["version"]
            if alias is not None:
                version = client.get_model_version_by_alias(name, alias).version
            source = client.get_model_version_download_uri(name, str(version))
            # Files on this machine are used where they lie.
            folder = Path(download_artifacts(artifact_uri=source, tracking_uri=store))
        except (MlflowException, OSError) as err:
            raise UnavailableError(
                f"{uri} cannot be had from MLflow: {str(err).splitlines()[0]}",
                hint="check name and alias, and the store: --tracking-uri or MLFLOW_TRACKING_URI",
            ) from err
    found = sorted(p.parent for p in folder.rglob(MANIFEST) if (p.parent / "tables").is_dir())
    if not found:
        raise ArtifactError(
            f"{uri} must hold an artifact, got none", hint="register one with `recsys export --register`"
        )
    return Located(found[0], name, str(version))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps MLflow from calling home and from drawing progress bars."""
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
