"""`rlm demo`: the main job, with no key and no engine."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlm_core.cli.run import read_policy
from rlm_core.console import ConsoleObserver
from rlm_core.context import read_path
from rlm_core.demo.script import root_lm, sub_lm
from rlm_core.demo.task import QUESTION, load_text, truth
from rlm_core.errors import ConfigError
from rlm_core.logger import RLMLogger
from rlm_core.rlm import RLM

NEXT = """\
Next, with a key (or --base-url of a server of yours) and a text of your own:

  export OPENAI_API_KEY=…
  {rlm} run "Who is the main character?" --context book.txt --model gpt-5-mini

What happened, turn by turn: {log}
What this machine can do: {rlm} doctor"""


def demo(
    text: Annotated[Path | None, typer.Option(help="Another text than the King James Bible.")] = None,
    env: Annotated[str, typer.Option(help="Where the code runs.")] = "local",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="A field of the policy, e.g. runtime=runsc.")
    ] = None,
    log_dir: Annotated[Path, typer.Option(help="Folder for the run's log.")] = Path("logs"),
) -> None:
    """Ask about a text of 4 million characters: scripted LMs, everything else is real."""
    context = load_text() if text is None else read_path(text)
    if not isinstance(context, str):
        raise ConfigError(f"--text {text} is not a file of UTF-8 text")
    typer.echo(f"{len(context):,} characters. {QUESTION}")
    rlm = RLM(
        backend=root_lm(),
        other_backends=[sub_lm()],
        environment=env,
        environment_kwargs=read_policy(option or []),
        logger=RLMLogger(log_dir),
        observer=ConsoleObserver(),
    )
    with rlm:
        completion = rlm.completion(context, root_prompt=QUESTION)
    expected = truth(context)
    if completion.response != expected:
        typer.echo(f"WRONG: the truth, computed from the whole text, is\n{expected}", err=True)
        raise typer.Exit(1)
    program = "rlm" if shutil.which("rlm") else sys.argv[0]
    calls = sum(each.total_calls for each in completion.usage_summary.model_usage_summaries.values())
    typer.echo(
        f"Right: the same as computed from the whole text. {calls} LM calls, {completion.iterations} turns, "
        f"{completion.execution_time:.1f} s.\n\n{NEXT.format(log=completion.log, rlm=program)}"
    )
