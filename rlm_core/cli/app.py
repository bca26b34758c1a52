"""The `rlm` command."""

import os
import signal
import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

import rlm_core.cli.conformance
import rlm_core.cli.demo
import rlm_core.cli.doctor
import rlm_core.cli.run
import rlm_core.cli.sandbox
from rlm_core.cli.output import fail
from rlm_core.errors import RLMError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Recursive Language Models over texts of any length, with their code in a sandbox.",
)
app.command("run")(rlm_core.cli.run.run)
app.command("demo")(rlm_core.cli.demo.demo)
app.command("doctor")(rlm_core.cli.doctor.doctor)
app.command("conformance")(rlm_core.cli.conformance.conformance)
app.add_typer(rlm_core.cli.sandbox.app, name="sandbox")
for point in entry_points(group="rlm.commands"):  # environments bring their own, such as `rlm image`
    app.add_typer(point.load(), name=point.name)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"rlm-sandbox {version('rlm-sandbox')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    return None


def main() -> None:
    """Exit code 0: answered; 1: the run failed or hit a limit; 2: wrong usage; 130: interrupted."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # what its C code notes is not for our users
    for number in (signal.SIGTERM, signal.SIGHUP):  # end as Ctrl-C does: with nothing left behind
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except UsageError as error:
        fail(error, 2)
    except RLMError as error:
        fail(error, 1)
    except OSError as error:
        fail(error, 1)
