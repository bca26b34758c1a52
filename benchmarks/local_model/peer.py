"""The tasks with `rlms` 0.1.3, run by its own interpreter. Reads a JSON object from standard input (base_url,
turns, seconds, tasks: context and question each), prints a JSON list of responses. Imports nothing of ours.
"""

# The peer is not installed where the types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
import json
import sys

from rlm import RLM


def main() -> None:
    work = json.load(sys.stdin)
    responses = []
    for task in work["tasks"]:
        rlm = RLM(
            backend="vllm",
            backend_kwargs={"model_name": "local", "base_url": work["base_url"], "api_key": "k"},
            max_iterations=work["turns"],
            max_timeout=work["seconds"],
        )
        try:
            responses.append(str(rlm.completion(task["context"], root_prompt=task["question"]).response))
        except Exception as error:  # noqa: BLE001 - whatever it is, the task is not solved
            responses.append(f"{type(error).__name__}: {error}")
        print(len(responses), repr(responses[-1][:200]), file=sys.stderr, flush=True)
    print(json.dumps(responses))


if __name__ == "__main__":
    main()
