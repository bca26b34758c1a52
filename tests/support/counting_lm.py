"""An LM on loopback that answers when it is let, and counts the requests that are open: a request whose client
has gone is open no more."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from aiohttp import web

from tests.support.lm_server import completion

Answer = Callable[[dict[str, Any]], str | None]
Server = TypeVar("Server", bound="CountingLM")


class CountingLM:
    """`answer` gives a text, or None for a request that is to stay open; at once, unless it has a thread."""

    def __init__(self, answer: Answer, *, in_thread: bool = False) -> None:
        self._in_thread = in_thread
        self.base_url = ""
        self.open = self.begun = 0
        self.changed = threading.Condition()
        self._answer = answer
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()

    def wait_for(self, fulfilled: Callable[["CountingLM"], bool], seconds: float = 20.0) -> None:
        """Raises AssertionError when it does not come true in time."""
        until = time.monotonic() + seconds
        with self.changed:
            while not fulfilled(self):
                assert self.changed.wait(until - time.monotonic()), (self.open, self.begun)

    def wake(self) -> None:
        """Who waits looks again."""
        with self.changed:
            self.changed.notify_all()

    def _count(self, open_: int, begun: int) -> None:
        with self.changed:
            self.open += open_
            self.begun += begun
            self.changed.notify_all()

    async def _serve(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = await asyncio.to_thread(self._answer, body) if self._in_thread else self._answer(body)
        if text is None:
            self._count(1, 1)
            try:
                await asyncio.Event().wait()
            finally:
                self._count(-1, 0)
        return web.json_response(completion(text, "m"))

    async def main(self, ready: threading.Event) -> None:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._serve)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    def run(self, ready: threading.Event) -> None:
        self._loop.run_until_complete(self.main(ready))
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)


def counting_lm(answer: Answer, *, in_thread: bool = False) -> AbstractContextManager[CountingLM]:
    return serving(CountingLM(answer, in_thread=in_thread))


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(ready,))
    thread.start()
    try:
        assert ready.wait(20)
        yield server
    finally:
        server.stop()
        thread.join(20)
