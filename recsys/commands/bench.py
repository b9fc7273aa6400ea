"""``recsys bench``: figures of this machine, from the ``benchmarks`` folder of a checkout."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from recsys.commands.options import Json

BENCHMARKS = ("build", "append", "derived", "batches", "train", "score", "online", "long_histories", "search")
"""What `all` measures; `build-peers` takes long and wants other packages, so it is asked for by name."""


def bench(
    name: Annotated[
        Literal[
            "build",
            "append",
            "build-peers",
            "derived",
            "batches",
            "train",
            "score",
            "online",
            "long_histories",
            "search",
            "all",
        ],
        typer.Argument(
            metavar="build|append|build-peers|derived|batches|train|score|online|long_histories|search|all",
            help="What to measure.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Measure a stage on this machine: rows per second, memory, latency.

    \b
    Example:
        recsys bench score
        recsys bench all --json > figures.json
    """  # noqa: D301
    from recsys.commands.terminal import print_facts, print_json, stage
    from recsys.errors import MissingDependencyError

    results: dict[str, dict[str, Any]] = {}
    for each in BENCHMARKS if name == "all" else (name,):
        try:
            module = _benchmark(each)
        except ModuleNotFoundError as err:
            if not (err.name or "").startswith("benchmarks"):
                raise
            raise MissingDependencyError(
                "the benchmarks must be importable, and an installed package does not hold them",
                hint="run `recsys bench` in a checkout of the project, installed by `pip install --no-deps -e .`",
            ) from err
        with stage(f"benchmark {each}"):
            results[each] = module.run()
    if as_json:
        print_json(results[name] if name != "all" else results)
        return
    for each, figures in results.items():
        print_facts(each, figures)


def _benchmark(name: str) -> Any:
    from importlib import import_module

    return import_module(f"benchmarks.{name.replace('-', '_')}")
