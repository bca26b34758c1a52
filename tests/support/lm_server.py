"""A real HTTP server on loopback that speaks OpenAI chat completions, as told by a function."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HangUp:
    """In the place of an answer: the connection is closed."""


Reply = str | bytes | tuple[int, dict[str, Any]] | tuple[int, dict[str, Any], dict[str, str]] | HangUp | None
Answer = Callable[[dict[str, Any]], Reply]


@dataclass
class LMServer:
    base_url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of each request; names in lower case."""
    paths: list[str] = field(default_factory=list)


def completion(text: str | None, model: str, **extra: Any) -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14, "cost": 0.25},
        **extra,
    }


@contextmanager
def lm_server(answer: Answer) -> Iterator[LMServer]:
    """`answer` gets the request's JSON: a text (or None for null) is a completion, a tuple is status and body,
    and headers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.paths.append(self.path)
            reply = answer(request)
            if isinstance(reply, HangUp):
                self.close_connection = True
            elif isinstance(reply, bytes):
                self._send(200, reply)
            elif isinstance(reply, tuple):
                self._send(reply[0], json.dumps(reply[1]).encode(), *reply[2:])
            else:
                self._send(200, json.dumps(completion(reply, request["model"])).encode())

        def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    httpd = Server(("127.0.0.1", 0), Handler)
    server = LMServer(f"http://127.0.0.1:{httpd.server_port}/v1")
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
