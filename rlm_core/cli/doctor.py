"""`rlm doctor`: what this machine can do."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlm_core.cli.run import read_policy
from rlm_core.doctor import EnvironmentReport, Report, examine


def doctor(
    environment: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="A field of its policy, as memory=2GiB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine has, and what each environment can and can't do here."""
    if option and environment is None:
        raise typer.BadParameter("-o is a field of one environment: name it first")
    report = examine(environment, read_policy(option or []))
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        _show(report, Console())
    if not report.healthy:
        raise typer.Exit(1)


def _show(report: Report, console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(report):
        table.add_row(name, escape(value))
    console.print(table)
    for environment in report.environments:
        console.print(f"\n[bold]{environment.name}[/bold]: {escape(_state(environment))}")
        for note in environment.notes:
            console.print(f"  {escape(note)}")
        if not (environment.enforces or environment.cannot_enforce):
            continue  # it could not be loaded
        console.print(f"  enforces: {', '.join(environment.enforces) or 'nothing'}")
        console.print(f"  can't enforce: {', '.join(environment.cannot_enforce) or 'nothing'}")


def _rows(report: Report) -> list[tuple[str, str]]:
    return [
        ("python", report.python),
        ("platform", report.platform),
        *((name, number or "not installed") for name, number in report.packages.items()),
        ("keys set", ", ".join(name for name, is_set in report.keys.items() if is_set) or "none"),
        ("docker engine", report.engine or "none answers"),
        ("fork", "yes" if report.fork else "no: cells can't be rolled back"),
        ("huge pages", report.huge_pages),
    ]


def _state(environment: EnvironmentReport) -> str:
    if not environment.works:
        return f"does not work: {environment.problem}"
    agent = f"works (agent {environment.agent_build})" if environment.agent_build else "answers"
    return f"{agent}; {environment.summary}"
