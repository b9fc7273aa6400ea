"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="A.B=C", help="Override one value of the configuration; repeat for more."),
]
ExperimentArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="Experiment file. Its schema_file is relative to the file, its data folders to the working folder.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")]
ArtifactArgument = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="Artifact folder, or models:/NAME@ALIAS of the registry.")
]
Features = Annotated[
    str | None,
    typer.Option(
        "--features",
        metavar="FOLDER|STORE",
        help="Where users, items and histories are read: a training set, lmdb:PATH or redis://HOST:PORT/DB; "
        "the artifact's own otherwise.",
    ),
]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow store of models:/.")
]
