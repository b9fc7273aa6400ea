"""``recsys serve``: the ranking service."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from recsys.commands.options import ArtifactArgument, Features, TrackingUri


def serve(
    artifact: ArtifactArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    features: Features = None,
    tracking_uri: TrackingUri = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Requests scored side by side.")] = 2,
    engine: Annotated[
        Literal["auto", "compiled", "portable"], typer.Option(help="Program of single requests.")
    ] = "auto",
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
) -> None:
    """Serve an artifact over HTTP: POST /rank answers with the candidates in ranked order.

    \b
    Example:
        recsys serve artifacts/din --port 8080
        curl -s localhost:8080/rank -H 'content-type: application/json' -d '{"user_id": 17, "candidates": [3, 5, 8]}'
    """  # noqa: D301
    from recsys.config import validate
    from serving.service import ServiceConfig
    from serving.service import serve as run_service

    settings = {
        "artifact": artifact,
        "host": host,
        "port": port,
        "features": features,
        "tracking_uri": tracking_uri,
        "threads": threads,
        "engine": engine,
        "access_log": access_log,
    }
    run_service(validate(ServiceConfig, settings, source="serve"))
