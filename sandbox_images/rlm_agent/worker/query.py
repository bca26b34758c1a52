"""`llm_query` and its kin: calls out of a cell, over the session's socket to the agent.

A connection per thread and process instead of one shared: no reader thread (which would forbid the
checkpoint), nothing to demultiplex, and right across forks.
"""

import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rlm_agent import limits
from rlm_agent.frames import Frame, FrameError, Kind
from rlm_agent.worker.link import Link, LinkClosed

SOCKET_VARIABLE = "RLM_SESSION_SOCKET"
MAX_BATCH = 10_000
WINDOW = 256
"""Calls of one batch on their way at once; the host's own limit is usually lower."""

ForkHere = Callable[[Frame, list[int]], Frame]


class LMReply(str):
    """A sub-LM's answer: a str that also says whether it is one.

    A failure reads "Error: …" for code that only prints it; `ok` and `error` are for code that checks.
    """

    ok: bool
    error: str | None
    model: str
    usage: dict[str, Any]

    @classmethod
    def answer(cls, text: str, model: str, usage: dict[str, Any]) -> "LMReply":
        reply = cls(text)
        reply.ok, reply.error, reply.model, reply.usage = True, None, model, usage
        return reply

    @classmethod
    def failure(cls, error: str) -> "LMReply":
        reply = cls(f"Error: {error}")
        reply.ok, reply.error, reply.model, reply.usage = False, error, "", {}
        return reply


class Queries:
    """The calls of one session. Works from any thread and from any process that a cell forks."""

    def __init__(self, address: str, fork_here: ForkHere | None = None) -> None:
        """`address`: path of the session's socket."""
        self._local = _Connections()
        self._address = address
        self._fork_here = fork_here

    def __reduce__(self) -> tuple[type["Queries"], tuple[str]]:
        """So that `multiprocessing.Pool().map(llm_query, prompts)` works: each process has its own."""
        return Queries, (self._address,)

    def llm_query(self, prompt: str, model: str | None = None) -> LMReply:
        """Ask a sub-LM. Never raises for a failed call: see `LMReply.ok`."""
        return self._ask("llm", [prompt], model)[0]

    def llm_query_batched(self, prompts: Sequence[str], model: str | None = None) -> list[LMReply]:
        """Ask many at once; answers in the order of the prompts, a failure fills its own slot."""
        return self._ask("llm", prompts, model)

    def rlm_query(self, prompt: str, model: str | None = None) -> LMReply:
        """Ask a recursive LM with a REPL of its own; a plain llm_query where recursion has ended."""
        return self._ask("rlm", [prompt], model)[0]

    def rlm_query_batched(self, prompts: Sequence[str], model: str | None = None) -> list[LMReply]:
        """Ask many recursive LMs at once."""
        return self._ask("rlm", prompts, model)

    def call_tool(self, name: str, body: bytes) -> LMReply:
        """Have the host call a function of its own."""
        return self._send({"kind": "tool", "tool": name}, [body])[0]

    def _ask(self, kind: str, prompts: Sequence[str], model: str | None) -> list[LMReply]:
        return self._send({"kind": kind, "model": model or ""}, _checked(prompts, model))

    def _send(self, header: dict[str, str], bodies: list[bytes | LMReply]) -> list[LMReply]:
        link: Link | None = None
        try:
            link = self._local.take(self._address)
            replies = _Exchange(link, header, self._fork_here).run(bodies)
        except (OSError, LinkClosed, FrameError) as error:
            self._local.drop(link)
            return [LMReply.failure(f"the call did not reach the host: {error!r}")] * len(bodies)
        except BaseException:
            # Interrupted with answers still on their way: a fresh connection makes the agent cancel them.
            self._local.drop(link)
            raise
        self._local.put_back(link)
        return replies

    def move(self, address: str) -> None:
        """Call from another session, into which this process has been forked."""
        self._local.drop_all()
        self._address = address


class _Connections(threading.local):
    """Those of one thread: more than one where a signal handler or a finalizer calls within a call."""

    def __init__(self) -> None:
        self._open: set[Link] = set()
        self._idle: Link | None = None
        self._pid = os.getpid()

    def take(self, address: str) -> Link:
        """The idle one, or a new one; to be put back or dropped."""
        link, self._idle = self._idle, None
        if link is not None and self._pid == os.getpid() and link.intact():
            return link
        self.drop(link)  # a cell has closed it, or it is the parent's
        if not address:
            raise OSError(f"this is no process of a session: {SOCKET_VARIABLE} is not set")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(None)  # whatever a cell's default is: an answer takes the time that it takes
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        link, self._pid = Link(sock), os.getpid()
        self._open.add(link)
        return link

    def put_back(self, link: Link) -> None:
        idle, self._idle = self._idle, link
        self.drop(idle)

    def drop(self, link: Link | None) -> None:
        if link is not None:
            self._open.discard(link)
            if link.intact():
                link.close()

    def drop_all(self) -> None:
        self._idle = None
        for link in list(self._open):
            self.drop(link)


class _Exchange:
    """Sends prompts and collects answers, at most WINDOW of them open."""

    def __init__(self, link: Link, header: dict[str, str], fork_here: ForkHere | None) -> None:
        self._link = link
        self._header = header
        self._fork_here = fork_here

    def run(self, bodies: list[bytes | LMReply]) -> list[LMReply]:
        replies: dict[int, LMReply] = {}
        open_calls = 0
        for index, body in enumerate(bodies):
            if isinstance(body, LMReply):
                replies[index] = body
                continue
            if open_calls == WINDOW:
                self._collect_one(bodies, replies)
                open_calls -= 1
            self._link.send(Frame(Kind.CALL, {**self._header, "id": index}, body))
            open_calls += 1
        while open_calls:
            self._collect_one(bodies, replies)
            open_calls -= 1
        return [replies[index] for index in range(len(bodies))]

    def _collect_one(self, bodies: list[bytes | LMReply], replies: dict[int, LMReply]) -> None:
        while True:
            frame, fds = self._link.receive()
            if frame.kind is not Kind.FORK:
                break
            if self._fork_here is None:
                self._link.send(Frame(Kind.FORKED, {"error": "this process can't fork its session"}))
            else:
                prompt = bodies[int(frame.header["id"])]
                assert isinstance(prompt, bytes)
                self._link.send(self._fork_here(Frame(Kind.FORK, frame.header, prompt), fds))
            for fd in fds:
                os.close(fd)
        header = frame.header
        if header.get("error") is None:
            text = frame.body.decode("utf-8", "surrogatepass")
            reply = LMReply.answer(text, str(header.get("model", "")), dict(header.get("usage") or {}))
        else:
            reply = LMReply.failure(str(header["error"]))
        replies[int(header["id"])] = reply


def _checked(prompts: Sequence[str], model: str | None) -> list[bytes | LMReply]:
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of str; for one prompt use llm_query or rlm_query")
    if model is not None and not isinstance(model, str):
        raise TypeError(f"model must be a str or None, not {type(model).__name__}")
    if len(model or "") > limits.MAX_ID_CHARS:
        raise ValueError(f"a model's name has at most {limits.MAX_ID_CHARS} characters")
    if len(prompts) > MAX_BATCH:
        raise ValueError(f"{len(prompts):,} prompts in one batch; at most {MAX_BATCH:,}: split the list")
    return [_checked_prompt(prompt) for prompt in prompts]


def _checked_prompt(prompt: str) -> bytes | LMReply:
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a str, not {type(prompt).__name__}")
    body = prompt.encode("utf-8", "surrogatepass")
    if len(body) > limits.MAX_PROMPT:
        return LMReply.failure(
            f"the prompt has {len(prompt):,} characters ({len(body):,} bytes); "
            f"at most {limits.MAX_PROMPT:,} bytes: split it into smaller chunks"
        )
    return body
