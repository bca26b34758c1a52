"""How the command talks: results on stdout, everything else on stderr."""

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer
from rich.console import Console

from rlm_core.text import one_line, printable

LINE_CHARS = 1_000


def stderr_console() -> Console:
    return Console(stderr=True)


def stdout_console() -> Console:
    return Console()


def say(text: str) -> None:
    """A result, on stdout; what the terminal can't show is replaced, never lost with a traceback, and what
    would steer it is shown."""
    if sys.stdout.isatty():
        text = printable(text)
    typer.echo(text.encode("utf-8", "replace").decode())


def say_columns(rows: Sequence[Sequence[str]]) -> None:
    """A table, one line a row and never folded, for people and for `grep`."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def fail(error: Exception, code: int) -> NoReturn:
    """One clear line, and the exit code."""
    typer.echo(f"rlm: {one_line(printable(str(error)), LINE_CHARS)}", err=True)
    sys.exit(code)
