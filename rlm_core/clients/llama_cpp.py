"""A model in a GGUF file, by llama.cpp in this process (xllamacpp): no server, no port, nothing to pay."""

import asyncio
import ctypes
import importlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlm_core.clients.base import LMClient, LMRequest, LMResponse
from rlm_core.clients.failures import DETAIL_CHARS, Peer
from rlm_core.clients.openai_answers import count
from rlm_core.clients.sampling import json_size, refuse_ours
from rlm_core.errors import ConfigError, ProviderRejected
from rlm_core.prices import Price
from rlm_core.text import one_line
from rlm_core.types import TokenUsage

xllamacpp: Any = importlib.import_module("xllamacpp")  # it has no types

DEFAULT_N_CTX = 8192
BATCH_TOKENS = 512
"""Of a prompt, read between two looks at whether the call is cancelled."""
QUIET = -1
_loaded: "list[tuple[Any, weakref.finalize[..., Any]]]" = []
"""The models of this process, and what removes their folders."""


def _leave_to_the_parent() -> None:
    """In a forked child: the threads of these models are not there, so stopping one would never end."""
    for server, removal in _loaded:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(server))
        removal.detach()
    _loaded.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)


class LlamaCppClient(LMClient):
    """The model is loaded by the first call, which takes seconds."""

    price = Price(input=0, output=0)

    def __init__(
        self,
        model_path: str | Path | None = None,
        model_name: str | None = None,
        n_ctx: int = DEFAULT_N_CTX,
        n_parallel: int = 1,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        sampling_args: Mapping[str, Any] | None = None,
        max_retries: int | None = None,
    ) -> None:
        """
        Args:
            model_path: of the .gguf file; `model_name` may be it too.
            model_name: what sub-calls call it; the file's name without its suffix by default.
            n_ctx: tokens that a prompt and its answer may have together.
            n_parallel: requests at once; more wait. Each has `n_ctx` tokens of its own, in memory.
            n_threads: of the processor, for each request; llama.cpp chooses by default.
            n_gpu_layers: layers of the model on the GPU; llama.cpp chooses by default.
            sampling_args: as of llama.cpp's server: temperature, max_tokens, stop, seed, …

        Raises:
            ConfigError: a wrong argument, or no such file. A call raises it for a file that can't be loaded.
        """
        path = Path(model_path or model_name or "")
        if not path.is_file():
            given = f"{path} is not one" if model_path or model_name else "none was given"
            raise ConfigError(
                f"backend 'llama_cpp' needs backend_kwargs={{'model_path': a .gguf file}}; {given}"
            )
        if n_ctx < 1 or n_parallel < 1:
            raise ConfigError("backend 'llama_cpp': n_ctx and n_parallel must be 1 or more")
        self.model_name = model_name if model_name and model_path else path.stem
        self.context_window = n_ctx
        self.max_retries = max_retries
        refuse_ours(sampling_args)
        self.tokens_beside = json_size(sampling_args or {})
        self._sampling = {_own_name(key): value for key, value in (sampling_args or {}).items()}
        self.output_tokens = self._sampling.get("max_tokens")
        stat = path.stat()
        self.resolved = {"file": f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}"}
        self.max_concurrent = n_parallel
        self._peer = Peer("llama.cpp", self.model_name, n_ctx)
        self._pid = os.getpid()
        self._params = params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_batch = n_ctx * n_parallel, n_parallel, BATCH_TOKENS
        params.verbosity, params.ui = QUIET, False
        if n_threads is not None:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
        if n_gpu_layers is not None:
            params.n_gpu_layers = n_gpu_layers
        self._server: Any = None
        self._removal: weakref.finalize[..., Any] | None = None
        self._loading = threading.Lock()
        self._threads = ThreadPoolExecutor(n_parallel, "rlm-llama")

    async def complete(self, request: LMRequest) -> LMResponse:
        if self._pid != os.getpid():
            raise ConfigError("a llama_cpp client can't be used in a forked process: make another one there")
        body = {**self._sampling, "messages": [dict(message) for message in request.messages]}
        if request.max_output_tokens is not None:
            body["max_tokens"] = request.max_output_tokens
        answer = _Answer()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, self._chat, body, answer)
        except (RuntimeError, ValueError) as error:  # ours are neither
            detail = one_line(str(error), DETAIL_CHARS)
            raise ProviderRejected(f"{self._peer} rejected the request: {detail}") from None
        finally:
            answer.unwanted.set()
        return answer.response(self._peer)

    def _chat(self, body: dict[str, Any], answer: "_Answer") -> None:
        server = self._loaded()
        if not answer.unwanted.is_set():
            server.handle_chat_completions(
                {**body, "stream": True, "return_progress": True, "stream_options": {"include_usage": True}},
                answer.take,
            )

    def _loaded(self) -> Any:
        with self._loading:
            if self._server is None:
                # What it listens on whether one wants it or not: a socket of this user, in place of a port.
                folder = tempfile.mkdtemp(prefix="rlm-llama-")
                self._removal = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                self._params.hostnames = [str(Path(folder, "llama.sock"))]
                try:
                    self._server = xllamacpp.Server(self._params)
                except RuntimeError as error:
                    detail = one_line(str(error), DETAIL_CHARS)
                    raise ConfigError(f"llama.cpp can't load {self._params.model.path}: {detail}") from None
                _loaded.append((self._server, self._removal))
            return self._server

    async def aclose(self) -> None:
        if self._pid != os.getpid():
            return  # it is the parent's
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        _loaded[:] = [each for each in _loaded if each[0] is not self._server]
        self._server = None  # which stops it
        if self._removal is not None:
            self._removal()


class _Answer:
    """Put together from the pieces of a stream, in a thread."""

    def __init__(self) -> None:
        self.unwanted = threading.Event()
        self._pieces: list[str] = []
        self._finish_reason = ""
        self._usage: Mapping[str, Any] = {}
        self._error: Mapping[str, Any] | None = None

    def take(self, chunk: Mapping[str, Any]) -> bool:
        """Whether to stop."""
        self._error = chunk.get("error", self._error)
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            self._pieces.append(choice["delta"].get("content") or "")
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        return self.unwanted.is_set()

    def response(self, peer: Peer) -> LMResponse:
        """Raises ProviderError for an answer that is none, or that is not whole."""
        if self._error is not None:
            message = f"{self._error.get('message')} ({self._error.get('type')})"
            raise peer.of_status(int(self._error.get("code") or 500), message, {})
        if not self._finish_reason:
            raise peer.cut_off()
        details = self._usage.get("prompt_tokens_details") or {}
        usage = TokenUsage(
            count(self._usage.get("prompt_tokens")),
            count(self._usage.get("completion_tokens")),
            count(details.get("cached_tokens")),
        )
        return LMResponse("".join(self._pieces), peer.model, usage, self._finish_reason)


def _own_name(name: str) -> str:
    return "max_tokens" if name in ("max_completion_tokens", "max_output_tokens") else name
