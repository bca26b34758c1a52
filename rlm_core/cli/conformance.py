"""`rlm conformance`: does an environment do what every environment has to?"""

import json
from typing import Annotated

import typer

from rlm_core.cli.output import say, stdout_console
from rlm_core.cli.run import read_policy
from rlm_core.portal import portal
from rlm_core.text import printable

SIGNS = {
    "passed": "ok",
    "failed": "FAILED",
    "known failure": "known",
    "fixed": "FIXED",
    "not applicable": "-",
    "refused": "refused",
}


def conformance(
    environment: Annotated[str, typer.Argument(help="Name of an installed environment.")],
    check: Annotated[list[str] | None, typer.Argument(help="Checks, as calls.* or state.echo.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="A field of the policy, as memory=2GiB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a check.")] = False,
) -> None:
    """Run the checks that every environment has to pass; exit code 1 when one fails."""
    from rlm_core.conformance.runner import Outcome, run

    console = stdout_console()

    def told(outcome: Outcome) -> None:
        if as_json:
            fields = {"check": outcome.check.name, "status": outcome.status, "detail": outcome.detail}
            say(json.dumps({**fields, "seconds": round(outcome.seconds, 3)}))
            return
        sign = SIGNS[outcome.status]
        text = f"{sign:8}{outcome.check.name:26}{outcome.seconds:6.1f} s  {outcome.check.says}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        if outcome.detail:
            console.print(
                f"        {printable(outcome.detail)}", markup=False, highlight=False, soft_wrap=True
            )

    outcomes = portal().run(run(environment, read_policy(option or []), check or [], told))
    bad = [outcome for outcome in outcomes if not outcome.ok]
    if not as_json:
        console.print(
            f"{len(outcomes) - len(bad)} of {len(outcomes)} checks as they should be", highlight=False
        )
    if bad:
        raise typer.Exit(1)
