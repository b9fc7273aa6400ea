"""The command line: all commands, and where every error of theirs ends.

It may import every package, and imports none until a command runs: ``--help`` must come at once. Errors raised on
purpose are printed as a message with its hint, and the exit status is 2; ``--debug`` shows where they were raised. So
are a file or folder that the system does not let us read or write, where no command has said more about it. An
interrupt ends with status 130 and says how to go on. Anything else is a defect: status 1, with the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from recsys.commands import (
    analyse,
    bench,
    build,
    check,
    data,
    demo,
    evaluate,
    export,
    fetch,
    inspect,
    materialize,
    push,
    scale,
    score,
    serve,
    simulate,
    sweep,
    train,
)
from recsys.errors import ConfigError, RecsysError

AFTER_INTERRUPT = {
    "train": "Run the same command again: training goes on from the last checkpoint.",
    "sweep": "Run the same command again: finished runs are kept, and training goes on from the last checkpoint.",
    "build": "Run the same command again: nothing half-built is left behind.",
    "simulate": "Run the same command again: nothing half-written is left behind.",
    "data": "Run the same command again: nothing half-written is left behind.",
    "export": "Run the same command again: nothing half-written is left behind.",
    "scale": "Run the same command again: finished trials are kept, and interrupted ones go on.",
    "materialize": "Run the same command again: it goes on where it stopped.",
    "score": "Run the same command again: nothing half-written is left behind.",
    "demo": "Run the same command again: stages that are done are kept, and training goes on from its last checkpoint.",
}

CALM = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "500",
}
"""Set for every command unless set already: libraries draw no bars of their own and call nobody; and OpenMP's threads
spin for microseconds at most while they wait for one another, for spinning for long beside a busy process makes
training many times slower. GNU's runtime, which is torch's, goes by the count, others by the policy."""


_FILES = "check the path, what may be read and written there, and the space left; --debug shows what was being done"


class Commands(TyperGroup):
    """The group of all commands: where every error of a command ends."""

    def get_help_option(self, ctx: Any) -> Any:
        """The ``--help`` flag, False unless given: Typer leaves None, which it imports pydantic to turn into a bool."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; turns its errors into messages and exit statuses."""
        debug = bool(ctx.params.get("debug"))
        for name, value in CALM.items():
            os.environ.setdefault(name, value)
        try:
            return super().invoke(ctx)
        except RecsysError as err:
            if debug:
                raise
            _print_error(err)
            raise typer.Exit(2) from err
        except KeyboardInterrupt as err:
            if debug:
                raise
            advice = AFTER_INTERRUPT.get(ctx.invoked_subcommand or "", "")
            sys.stderr.write(f"\nInterrupted. {advice}".rstrip() + "\n")
            raise typer.Exit(130) from err
        except (TyperException, typer.Exit, typer.Abort):
            raise
        except BrokenPipeError as err:
            # Whoever read our output has left, as in `| head`. Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from err
        except Exception as err:
            if debug:
                raise
            if isinstance(err, OSError) and err.filename is not None and err.strerror is not None:
                _print_error(ConfigError(f"{os.fsdecode(err.filename)} cannot be used: {err.strerror}", hint=_FILES))
                raise typer.Exit(2) from err
            traceback.print_exc()
            sys.stderr.write(f"\nUnexpected {type(err).__name__}: this is a defect of recsys, not of your input.\n")
            raise typer.Exit(1) from err


def _print_error(error: RecsysError) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("Error: ", "bold red"), error.message), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble("\n", ("Hint: ", "bold yellow"), error.hint), soft_wrap=True)


app = typer.Typer(
    name="recsys",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,  # its options would import pydantic before any help is shown
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _version(given: bool) -> None:
    if given:
        from recsys import __version__

        typer.echo(f"recsys {__version__}")
        raise typer.Exit


@app.callback()
def recsys(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="RECSYS_DEBUG", help="Show where an error was raised.")
    ] = False,
) -> None:
    """From click logs to a ranking service.

    \b
    A first run, in under three minutes:
        recsys demo
    \b
    Your own data, step by step:
        recsys build configs/experiment/din_kuairand.yaml
        recsys train configs/experiment/din_kuairand.yaml --run runs/din
        recsys export runs/din --output artifacts/din
        recsys serve artifacts/din
    """  # noqa: D301


app.command()(simulate.simulate)
data.data.command()(inspect.inspect)
data.data.command()(check.check)
app.add_typer(data.data, name="data")
app.command()(build.build)
app.command()(train.train)
app.command()(sweep.sweep)
app.command()(evaluate.evaluate)
app.add_typer(analyse.analyse, name="analyse")
app.command()(scale.scale)
app.command()(export.export)
app.command()(score.score)
app.command()(materialize.materialize)
app.command()(push.push)
app.command()(fetch.fetch)
app.command()(serve.serve)
app.command()(demo.demo)
app.command()(bench.bench)


def main() -> None:
    """Runs the command line; the console script ``recsys``."""
    app()


if __name__ == "__main__":
    main()
