"""``recsys export``: a trained run to an artifact that serves."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from recsys.commands.options import Json

if TYPE_CHECKING:
    from training.tracking import RegisteredVersion


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the artifact to write.")],
    register: Annotated[
        str | None, typer.Option("--register", metavar="NAME", help="Register it under this name.")
    ] = None,
    alias: Annotated[str, typer.Option(help="Alias that shall point to the registered version.")] = "champion",
    snapshot: Annotated[
        Literal["none", "items", "all"],
        typer.Option(help="What the artifact knows by key: nothing, items, or items, users and histories."),
    ] = "all",
    compiled: Annotated[
        Literal["auto", "always", "never"],
        typer.Option("--compile", help="Compile the program of single requests; auto: where there is a C++ compiler."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Export a trained run as an artifact, and register it as a model version if asked to.

    \b
    Example:
        recsys export runs/din_kuairand --output artifacts/din_kuairand
        recsys export runs/din_kuairand --output artifacts/din --register ranker --alias champion
    """  # noqa: D301
    from recsys.commands.terminal import print_facts, print_json, stage
    from recsys.errors import ConfigError
    from training.console import quiet_libraries
    from training.export import export_artifact
    from training.run import TrainedRun

    quiet_libraries()
    trained = TrainedRun.load(run)
    if trained.experiment.training.history_length is not None:
        raise ConfigError(
            f"{run} must be trained without training.history_length to be exported, got "
            f"{trained.experiment.training.history_length}: a service reads each history's max_length",
            hint="set max_length in the schema, build and train",
        )
    with stage(f"export {run}") as tell:
        summary = export_artifact(
            trained.model,
            trained.training_set(),
            output,
            name=trained.experiment.name,
            compile="auto" if compiled == "auto" else compiled == "always",
            snapshot=snapshot,
            model_config=trained.experiment.model,
            facts={"run_fingerprint": trained.fingerprint, "validation": trained.summary["validation"]},
            stage=tell,
        )
        tell("")
    registered = None
    if register is not None:
        with stage(f"register {register}"):
            registered = _register(
                run, output, name=register, alias=alias, tracking_uri=trained.experiment.tracking.uri
            )
    if as_json:
        print_json(asdict(summary) | {"registered": None if registered is None else asdict(registered)})
        return
    facts: dict[str, Any] = {
        "size": f"{summary.bytes / 2**20:,.1f} MiB",
        "single requests": summary.engine if summary.note is None else f"{summary.engine}: {summary.note}",
        "largest error": f"{summary.max_error:.1e}",
    }
    if registered is not None:
        facts |= {"registered": f"{registered.uri}, version {registered.version}", "registry": registered.tracking_uri}
    print_facts(str(output), facts)


def _register(run: Path, artifact: Path, *, name: str, alias: str, tracking_uri: str | None) -> RegisteredVersion:
    from recsys.artifact import Artifact
    from serving.pyfunc import ENTRY, input_example, requirements, signature
    from training.tracking import default_uri, register, tracked_run

    opened, tracked = Artifact.open(artifact), tracked_run(run)
    return register(
        artifact,
        name=name,
        alias=alias,
        python_model=ENTRY,
        uri=tracking_uri or default_uri(run) if tracked is None else tracked[0],
        run_id=None if tracked is None else tracked[1],
        requirements=requirements(),
        signature=signature(opened),
        input_example=input_example(opened),
    )
