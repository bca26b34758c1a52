"""The attach connection of an engine behind TLS or SSH, as a socket that an event loop can use."""

import contextlib
import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from rlm_agent.rpc.reader import READ_BYTES

LOOK_SECONDS = 1.0
"""How often one way looks whether the other has ended."""


class Bridge:
    """Two threads, one a way; what one of them finds closed ends both."""

    def __init__(self, engine: Any) -> None:
        """`engine` is a TLS socket or an SSH channel; nobody else may use it any more."""
        self.socket, self._plain = socket.socketpair()
        self.socket.setblocking(False)
        self._engine = engine
        self._ended = threading.Event()
        self._is_tls = isinstance(engine, ssl.SSLSocket)
        # OpenSSL does not allow two threads in one connection; an SSH channel does, and waits by itself.
        self._turn = threading.Lock() if self._is_tls else contextlib.nullcontext()
        engine.settimeout(0 if self._is_tls else LOOK_SECONDS)
        self._plain.settimeout(LOOK_SECONDS)
        self._threads = [
            threading.Thread(target=self._run, args=(way,), name="rlm-attach", daemon=True)
            for way in (self._up, self._down)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, way: Callable[[], None]) -> None:
        with contextlib.suppress(OSError, ValueError, EOFError):
            way()
        if self._ended.is_set():
            self._close()  # the second one to end
        self._ended.set()
        with contextlib.suppress(OSError):
            self._plain.shutdown(socket.SHUT_RDWR)

    def _close(self) -> None:
        ends: list[Any] = [self._engine, getattr(self._engine, "_response", None), self._plain]
        for end in ends:
            with contextlib.suppress(OSError, AttributeError):
                end.close()

    def _up(self) -> None:
        while data := self._try(lambda: self._plain.recv(READ_BYTES)):
            self._send_all(data, self._send_to_engine)

    def _down(self) -> None:
        while data := self._try(
            lambda: self._of_engine(lambda: self._engine.recv(READ_BYTES), selectors.EVENT_READ)
        ):
            self._send_all(data, self._plain.send)

    def _send_to_engine(self, data: memoryview) -> int:
        events = selectors.EVENT_READ | selectors.EVENT_WRITE
        return int(self._of_engine(lambda: self._engine.send(data), events))

    def _send_all(self, data: bytes, send: Callable[[memoryview], int]) -> None:
        view = memoryview(data)
        while view:
            view = view[self._try(lambda left=view: send(left)) :]  # type: ignore[misc]

    def _of_engine(self, action: Callable[[], Any], events: int) -> Any:
        """Raises TimeoutError when it has to be tried again."""
        try:
            with self._turn:
                return action()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            with selectors.DefaultSelector() as selector:
                selector.register(self._engine, events)
                selector.select(LOOK_SECONDS)
            raise TimeoutError from None

    def _try(self, action: Callable[[], Any]) -> Any:
        """Again and again until it is done, or the other way has ended (EOFError)."""
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                return action()
        raise EOFError
