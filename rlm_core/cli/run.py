"""`rlm run`: ask a question about files."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlm_core.cli.output import fail, say, stderr_console
from rlm_core.clients import known_backends
from rlm_core.console import ConsoleObserver, ProgressObserver
from rlm_core.context import read_path
from rlm_core.errors import ConfigError, RLMError, UsageError
from rlm_core.logger import RLMLogger
from rlm_core.pool import SandboxPool
from rlm_core.rlm import RLM
from rlm_core.types import RLMChatCompletion

STDIN = "-"


def run(
    question: Annotated[str, typer.Argument(help="What to find out.")],
    context: Annotated[
        list[str] | None,
        typer.Option("--context", "-c", help="A file, a folder, or - for stdin. Repeatable."),
    ] = None,
    backend: Annotated[str, typer.Option(help="LM backend.")] = "openai",
    model: Annotated[str | None, typer.Option(help="Model name.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible server.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Variable that has the key for --base-url; none is sent without it.")
    ] = None,
    env: Annotated[str, typer.Option(help="Where the code runs.")] = "local",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            help="A field of the policy, as memory=2GiB, env.NAME=value or files.NAME=path. Repeatable.",
        ),
    ] = None,
    pool: Annotated[
        int | None,
        typer.Option(min=1, help="Sandboxes to start at once, while the text is read, and to keep ready."),
    ] = None,
    max_iterations: Annotated[int, typer.Option(help="Turns of the root LM.")] = 30,
    max_depth: Annotated[int, typer.Option(help="0 asks the LM directly; 2: rlm_query has a REPL.")] = 1,
    max_budget: Annotated[float | None, typer.Option(help="USD.")] = None,
    prices: Annotated[
        Path | None, typer.Option(help="TOML file with the prices of models that have no known one.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Input and output, of all calls.")] = None,
    max_timeout: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder for the run's log.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every turn.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask a question about texts of any length."""
    console = stderr_console()
    stack = contextlib.ExitStack()
    try:
        kwargs = backend_arguments(backend, model, base_url, api_key_env)
        policy = read_policy(option or [])
        warm = stack.enter_context(SandboxPool(env, pool, policy)) if pool else None
        value = read_contexts(context or [])
        rlm = RLM(
            backend=backend,
            backend_kwargs=kwargs,
            environment=env,
            environment_kwargs=None if warm else policy,
            pool=warm,
            max_iterations=max_iterations,
            max_depth=max_depth,
            max_budget=max_budget,
            prices=prices,
            max_tokens=max_tokens,
            max_timeout=max_timeout,
            on_limit="return",
            logger=RLMLogger(log_dir) if log_dir else None,
            observer=ConsoleObserver(console) if verbose else ProgressObserver(console),
        )
        with rlm:
            completion = rlm.completion(value, root_prompt=question)
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done; another one could only cut the line short
        say_failure(interrupt, "interrupted", as_json=as_json)
        typer.echo("rlm: interrupted; nothing is left running", err=True)
        raise typer.Exit(130) from None
    except RLMError as error:
        say_failure(error, str(error), as_json=as_json)
        fail(error, 2 if isinstance(error, UsageError) else 1)
    finally:
        stack.close()
    say(json.dumps(summary(completion)) if as_json else completion.response)
    if completion.status != "answered":
        why = completion.error or f"no answer within {max_iterations} turns"
        best = "; this is the best effort" if completion.response.strip() else ""
        typer.echo(f"rlm: {why}{best}", err=True)
        raise typer.Exit(1)


def say_failure(error: BaseException, why: str, *, as_json: bool) -> None:
    """As JSON, with what the run used where it had begun; else there is only the line on stderr."""
    if as_json:
        completion = error.completion if isinstance(error, RLMError) else None
        known = summary(completion) if completion is not None else {}
        say(json.dumps({**known, "status": "failed", "error": why}))


def backend_arguments(
    backend: str, model: str | None, base_url: str | None, api_key_env: str | None
) -> dict[str, str]:
    """Raises ConfigError for what is missing."""
    if backend == "scripted":
        raise ConfigError("backend 'scripted' is for Python code; try: rlm demo")
    if model is None and backend in known_backends():
        raise ConfigError("which model? pass --model NAME")
    key = os.environ.get(api_key_env) if api_key_env is not None else None
    if api_key_env is not None and not key:
        raise ConfigError(f"--api-key-env: the variable {api_key_env} is not set")
    given = {"model_name": model, "base_url": base_url, "api_key": key}
    return {name: value for name, value in given.items() if value is not None}


def read_contexts(sources: list[str]) -> Any:
    """One source is the context itself; several are a dict by their names; none is an empty text.

    Raises:
        ConfigError: a source that can't be read.
    """
    values = {source: _read(source) for source in sources}
    return values[sources[0]] if len(values) == 1 else values or ""


def read_policy(options: list[str]) -> dict[str, Any]:
    """Fields of the policy as they are typed; what comes several times is a list, `env.NAME` one of many.

    Raises:
        ConfigError: one that is not name=value.
    """
    policy: dict[str, Any] = {}
    for each in options:
        name, equals, value = each.partition("=")
        if not equals:
            raise ConfigError(f"--option {each!r}: it takes name=value, e.g. memory=2GiB")
        name, dot, key = name.partition(".")
        if dot:  # a field that is a mapping
            policy[name] = {**policy.get(name, {}), key: value}
        elif name in policy or name == "packages":  # several make a list, where the field is one
            policy[name] = [*_listed(policy.get(name, [])), value]
        else:
            policy[name] = value
    return policy


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read(source: str) -> Any:
    if source != STDIN:
        return read_path(Path(source))
    if sys.stdin is None:
        raise ConfigError("--context - reads the text from stdin, and stdin is closed")
    if sys.stdin.isatty():
        raise ConfigError("--context - reads the text from stdin, and stdin is a terminal")
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def summary(completion: RLMChatCompletion) -> dict[str, Any]:
    return {
        "response": completion.response,
        "status": completion.status,
        "usage": completion.usage_summary.to_dict(),
        "execution_time": completion.execution_time,
        "iterations": completion.iterations,
        "run_id": completion.run_id,
        "log": completion.log,
    }
