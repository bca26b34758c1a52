"""Prints the score of both libraries on the same model, server and tasks."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.local_model.task import Task
from benchmarks.local_model.tasks import SETS
from benchmarks.local_model.weights import WeightsGone, fetch
from rlm_core import RLM, RLMError
from rlm_core.logger import RLMLogger
from tests.support.llama_server import llama_server

N_CTX = 16_384
TURNS = 8
SECONDS = 300
"""Of a task."""
N_PREDICT = 768
"""Tokens of a reply, for both."""


def by_server(url: str) -> tuple[str, dict[str, Any]]:
    return "vllm", {"model_name": "local", "base_url": url, "context_window": N_CTX}


def in_process(weights: Path) -> tuple[str, dict[str, Any]]:
    """As the server has it: greedily, and as long at most."""
    sampling = {"temperature": 0, "max_tokens": N_PREDICT}
    return "llama_cpp", {"model_path": weights, "n_ctx": N_CTX, "sampling_args": sampling}


def ours(backend: tuple[str, dict[str, Any]], tasks: list[Task], logs: Path | None) -> list[str]:
    responses = []
    for task in tasks:
        with RLM(
            *backend,
            max_iterations=TURNS,
            max_timeout=SECONDS,
            on_limit="return",
            logger=RLMLogger(logs) if logs else None,
        ) as rlm:
            try:
                responses.append(rlm.completion(task.context, root_prompt=task.question).response)
            except RLMError as error:
                responses.append(f"{type(error).__name__}: {error}")
        print(
            f"ours: {task.name}: {task.is_solved_by(responses[-1])}: {responses[-1][:100]!r}", file=sys.stderr
        )
    return responses


def peers(url: str, tasks: list[Task], python: str) -> list[str]:
    work = {
        "base_url": url,
        "turns": TURNS,
        "seconds": SECONDS,
        "tasks": [{"context": task.context, "question": task.question} for task in tasks],
    }
    command = [python, str(Path(__file__).with_name("peer.py"))]
    run = subprocess.run(command, input=json.dumps(work), stdout=subprocess.PIPE, text=True, check=True)
    responses: list[str] = json.loads(run.stdout.splitlines()[-1])
    return responses


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.local_model", description=__doc__)
    parser.add_argument("--peer", help="the interpreter that has rlms; without it, ours only")
    parser.add_argument(
        "--set", choices=SETS, default="unseen", help="which tasks; unseen: new ones of known kinds"
    )
    parser.add_argument("--weights", type=Path, default=Path(".venv-local-model"), help="a folder for them")
    parser.add_argument("--logs", type=Path, help="a folder for trajectories")
    arguments = parser.parse_args()
    try:
        weights = fetch(arguments.weights)
    except WeightsGone as error:
        print(f"skipped: {error}")
        return
    tasks = SETS[arguments.set]()
    columns = [("ours, llama_cpp", ours(in_process(weights), tasks, arguments.logs))]
    with llama_server(weights, N_CTX, N_PREDICT, os.cpu_count() or 1) as url:
        columns.append(("ours, its server", ours(by_server(url), tasks, arguments.logs)))
        if arguments.peer:
            columns.append(("rlms 0.1.3, its server", peers(url, tasks, arguments.peer)))
    table = Table(
        "task", "truth", *(name for name, _ in columns), title=f"{weights.stem}, {arguments.set} tasks"
    )
    solved = [
        [task.is_solved_by(each) for task, each in zip(tasks, column, strict=True)] for _, column in columns
    ]
    for row, task in enumerate(tasks):
        marks = [
            "solved" if column[row] else f"no: {columns[n][1][row][:40]}" for n, column in enumerate(solved)
        ]
        table.add_row(task.name, task.truth, *marks)
    table.add_row("solved", str(len(tasks)), *(str(sum(column)) for column in solved))
    Console().print(table)


if __name__ == "__main__":
    main()
