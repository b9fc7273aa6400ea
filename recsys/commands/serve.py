"""``recsys serve``: the ranking service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recsys.commands.options import Features, TrackingUri


def serve(
    artifact: Annotated[
        str | None, typer.Argument(metavar="ARTIFACT", help="Artifact folder, or models:/NAME@ALIAS of the registry.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings as YAML; options given here win over it.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if not given.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on, 8080 if not given; 0 takes a free one.")
    ] = None,
    features: Features = None,
    tracking_uri: TrackingUri = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Requests scored side by side; 2 if not given.")
    ] = None,
    engine: Annotated[
        Literal["auto", "compiled", "portable"] | None, typer.Option(help="Program of single requests.")
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
) -> None:
    """Serve an artifact over HTTP: POST /rank answers with the candidates in ranked order.

    \b
    Example:
        recsys serve artifacts/din --port 8080
        recsys serve --config configs/serving/local.yaml
        curl -s localhost:8080/rank -H 'content-type: application/json' -d '{"user_id": 17, "candidates": [3, 5, 8]}'
    """  # noqa: D301
    from recsys.config import load_yaml, validate
    from serving.loader import check_location
    from serving.settings import ServiceConfig, listening

    settings: dict[str, Any] = {} if config is None else load_yaml(config)
    given = {
        "artifact": artifact,
        "host": host,
        "port": port,
        "features": features,
        "tracking_uri": tracking_uri,
        "threads": threads,
        "engine": engine,
        "access_log": access_log or None,
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    checked = validate(ServiceConfig, settings, source="serve" if config is None else str(config))
    check_location(checked.artifact, tracking_uri=checked.tracking_uri)
    with listening(checked.host, checked.port) as listener:
        # Takes seconds, for it loads torch: not before what can be told at once has been.
        from serving.service import serve as run_service

        run_service(checked, listener=listener)
