"""The same work in `rlms` 0.1.3, run by its own interpreter: prints one JSON object of seconds and bytes.

Usage: python peer.py BASE_URL [IMAGE [MEGABYTES]]. With megabytes of context it runs a cell in Docker for
each line on stdin, and says how long that took. Imports nothing of ours.
"""

# The peer is not installed where the types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rlm import RLM
from rlm.clients import get_client
from rlm.core.lm_handler import LMHandler
from rlm.environments.local_repl import LocalREPL
from rlm.logger import RLMLogger


def median_of(work, times) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def cells() -> dict:
    found = {}
    for megabytes in (1, 100, 1000):
        start = time.perf_counter()
        repl = LocalREPL(context_payload="x" * (megabytes * 1_000_000))
        found[f"context_{megabytes}_mb_s"] = time.perf_counter() - start
        found[f"noop_{megabytes}_mb_s"] = median_of(lambda repl=repl: repl.execute_code("pass"), 50)
        repl.cleanup()
    return found


def queries(base_url) -> dict:
    client = get_client("openai", {"model_name": "m", "base_url": base_url, "api_key": "k"})
    handler = LMHandler(client)
    handler.start()
    repl = LocalREPL(lm_handler_address=(handler.host, handler.port), context_payload="x")
    own_seconds = []
    complete = client.completion

    def timed(*args, **kwargs) -> str:
        start = time.perf_counter()
        try:
            return complete(*args, **kwargs)
        finally:
            own_seconds.append(time.perf_counter() - start)

    client.completion = timed
    repl.execute_code("llm_query('x')")
    one = median_of(lambda: repl.execute_code("llm_query('x')"), 100)
    own = statistics.median(own_seconds[1:])
    batch = median_of(lambda: repl.execute_code("r = llm_query_batched(['x'] * 200)"), 3)
    repl.cleanup()
    handler.stop()
    return {"query_s": one - own, "batch_200_s": batch}


def start() -> dict:
    def once() -> None:
        repl = LocalREPL(context_payload="x")
        repl.execute_code("pass")
        repl.cleanup()

    return {"start_s": median_of(once, 5)}


def log() -> dict:
    """Bytes on disk after five turns over a context of 5 MB."""
    with tempfile.TemporaryDirectory() as folder:
        logger = RLMLogger(log_dir=folder)
        rlm = RLM(backend="openai", backend_kwargs={"model_name": "m", "api_key": "k"}, logger=logger)
        replies = iter(
            ["```repl\nx = context[:10]\n```"] * 4
            + ['```repl\nanswer["content"] = 1; answer["ready"] = True\n```']
        )
        LMHandler.completion = lambda self, prompt, model=None: next(replies)
        rlm.completion("x" * 5_000_000, root_prompt="q")
        return {"log_bytes": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())}


def docker(base_url, image) -> dict:
    """Its Docker environment, on an image that has what it needs."""
    handler, new_repl = docker_repls(base_url, image)
    repl = new_repl("x" * 1_000_000)
    answer = repl.execute_code("print(llm_query('x'))").stdout
    assert answer.strip() and "Error" not in answer, answer
    noop = median_of(lambda: repl.execute_code("pass"), 5)
    one = median_of(lambda: repl.execute_code("llm_query('x')"), 5)
    batch = median_of(lambda: repl.execute_code("r = llm_query_batched(['x'] * 200)"), 3)
    repl.cleanup()

    def once() -> None:
        repl = new_repl("x")
        repl.execute_code("pass")
        seconds.append(time.perf_counter() - begun)
        repl.cleanup()

    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        once()
    handler.stop()
    return {"query_s": one - noop, "batch_200_s": batch - noop, "start_s": statistics.median(seconds)}


def docker_repls(base_url, image) -> tuple:
    from rlm.environments.docker_repl import DockerREPL

    handler = LMHandler(get_client("openai", {"model_name": "m", "base_url": base_url, "api_key": "k"}))
    handler.start()
    address = (handler.host, handler.port)

    def new_repl(text) -> DockerREPL:
        return DockerREPL(image=image, lm_handler_address=address, context_payload=text)

    return handler, new_repl


def cells_on_request(base_url, image, megabytes) -> None:
    handler, new_repl = docker_repls(base_url, image)
    repl = new_repl("x" * (megabytes * 1_000_000))
    for _ in sys.stdin:
        print(median_of(lambda: repl.execute_code("pass"), 1), flush=True)
    repl.cleanup()
    handler.stop()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        cells_on_request(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    elif len(sys.argv) > 2:
        print(json.dumps(docker(sys.argv[1], sys.argv[2])))
    else:
        print(json.dumps({**cells(), **queries(sys.argv[1]), **start(), **log()}))
