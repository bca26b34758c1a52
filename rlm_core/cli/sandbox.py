"""`rlm sandbox`: what is still running, of any host, and how to end it."""

import asyncio
import time
from typing import Annotated

import typer
from rich.table import Table

from rlm_core.cli.output import fail, stdout_console
from rlm_core.environment import Environment, RunningSandbox, known_environments, make_environment
from rlm_core.errors import ConfigError, UsageError
from rlm_core.portal import portal
from rlm_core.text import printable

app = typer.Typer(no_args_is_help=True, help="Sandboxes that are still there.")


@app.command("ls")
def ls() -> None:
    """List the sandboxes of every host in all environments that can tell."""
    table = Table("ID", "ENVIRONMENT", "AGE", "STATE", "LEASE")
    for environment, sandbox in portal().run(_all()):
        age = f"{max(0, int(time.time()) - sandbox.created)} s"
        table.add_row(
            printable(sandbox.id), environment.name, age, printable(sandbox.state), f"{sandbox.lease:g} s"
        )
    stdout_console().print(table)


@app.command("rm")
def rm(
    ids: Annotated[list[str] | None, typer.Argument(help="As told by rlm sandbox ls.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them, whoever uses them.")] = False,
) -> None:
    """End sandboxes, whoever has started them."""
    if not ids and not everything:
        fail(ConfigError("which? pass ids, or --all"), 2)
    removed = portal().run(_remove(ids or [], everything=everything))
    for each in removed:
        typer.echo(each)
    if unknown := set(ids or ()) - set(removed):
        fail(ConfigError(f"no sandbox {', '.join(sorted(unknown))}; see: rlm sandbox ls"), 2)


async def _all() -> list[tuple[Environment, RunningSandbox]]:
    found: list[tuple[Environment, RunningSandbox]] = []
    for name in known_environments():
        try:
            environment = make_environment(name, {})
            found += [(environment, sandbox) for sandbox in await environment.running()]
        except UsageError as error:  # what is not there has none
            typer.echo(f"rlm: {name}: {error}", err=True)
    return found


async def _remove(ids: list[str], *, everything: bool) -> list[str]:
    wanted = [(where, each.id) for where, each in await _all() if everything or each.id in ids]
    await asyncio.gather(*(environment.remove(sandbox_id) for environment, sandbox_id in wanted))
    return [sandbox_id for _, sandbox_id in wanted]
