"""`rlm sandbox`: what is still running, of any host, and how to end it."""

import asyncio
import time
from typing import Annotated

import typer

from rlm_core.cli.output import fail, say_columns
from rlm_core.environment import Environment, RunningSandbox, known_environments, make_environment
from rlm_core.errors import ConfigError, MissingExtra, in_one_line
from rlm_core.portal import portal
from rlm_core.text import printable

ANSWER_SECONDS = 20.0
app = typer.Typer(no_args_is_help=True, help="Sandboxes that are still there.")


@app.command("ls")
def ls() -> None:
    """List the sandboxes of every host in all environments that can tell."""
    rows = [("ID", "ENVIRONMENT", "AGE", "STATE", "LEASE")]
    found, problems = portal().run(_all())
    for environment, sandbox in found:
        age = f"{max(0, int(time.time()) - sandbox.created)} s"
        state = printable(sandbox.state)
        rows.append((printable(sandbox.id), environment.name, age, state, f"{sandbox.lease:g} s"))
    say_columns(rows)
    if problems:
        raise typer.Exit(1)


@app.command("rm")
def rm(
    ids: Annotated[list[str] | None, typer.Argument(help="As told by rlm sandbox ls.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them, whoever uses them.")] = False,
) -> None:
    """End sandboxes, whoever has started them."""
    if not ids and not everything:
        fail(ConfigError("which? pass ids, or --all"), 2)
    removed, problems = portal().run(_remove(ids or [], everything=everything))
    for each in removed:
        typer.echo(each)
    if unknown := set(ids or ()) - set(removed):
        fail(ConfigError(f"no sandbox {', '.join(sorted(unknown))}; see: rlm sandbox ls"), 2)
    if problems:
        raise typer.Exit(1)


async def _all() -> tuple[list[tuple[Environment, RunningSandbox]], bool]:
    """Those that there are, and whether some place that may have more did not answer."""
    found: list[tuple[Environment, RunningSandbox]] = []
    problems = False
    for name in known_environments():
        try:
            environment = make_environment(name, {})
            if environment.capabilities.lists:
                running = await asyncio.wait_for(environment.running(), ANSWER_SECONDS)
                found += [(environment, sandbox) for sandbox in running]
        except (ConfigError, MissingExtra):
            pass  # what is not installed, or has no key, has none of ours
        except Exception as error:  # noqa: BLE001 - a third party's, which must not hide the others
            why = (
                f"no answer within {ANSWER_SECONDS:g} s"
                if isinstance(error, TimeoutError)
                else in_one_line(error)
            )
            typer.echo(f"rlm: {name}: {why}", err=True)
            problems = True
    return found, problems


async def _remove(ids: list[str], *, everything: bool) -> tuple[list[str], bool]:
    found, problems = await _all()
    wanted = [(where, each.id) for where, each in found if everything or each.id in ids]
    await asyncio.gather(*(environment.remove(sandbox_id) for environment, sandbox_id in wanted))
    return [sandbox_id for _, sandbox_id in wanted], problems
