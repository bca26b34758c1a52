"""How the command talks: results on stdout, everything else on stderr."""

import sys
from typing import NoReturn

import typer
from rich.console import Console

from rlm_core.text import one_line, printable

LINE_CHARS = 1_000


def stderr_console() -> Console:
    return Console(stderr=True)


def fail(error: Exception, code: int) -> NoReturn:
    """One clear line, and the exit code."""
    typer.echo(f"rlm: {one_line(printable(str(error)), LINE_CHARS)}", err=True)
    sys.exit(code)


def note_local(environment: str) -> None:
    """Say once what a local sandbox is not."""
    if environment == "local":
        typer.echo(
            "rlm: environment 'local' runs model-written code as you, in a process of its own: "
            "no security boundary",
            err=True,
        )
