"""Answers of LMs on disk: what was asked before of a model, in the same scope, is not paid for again."""

import asyncio
import hashlib
import json
import logging
import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

from rlm_core.clients.base import LMClient, LMRequest, LMResponse
from rlm_core.errors import ConfigError
from rlm_core.types import TokenUsage

log = logging.getLogger(__name__)
LOCK_SECONDS = 10.0
"""That one process waits for another's writing."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    scope TEXT NOT NULL, question BLOB NOT NULL,
    text TEXT NOT NULL, model TEXT NOT NULL, finish TEXT NOT NULL,
    PRIMARY KEY (scope, question)
) WITHOUT ROWID
"""


class DiskCache:
    """An SQLite file, which several processes may share; only its user can read it.

    An answer is found by its scope and by all that it depends on: the client with its arguments, the messages
    and the tokens that it may have.
    """

    def __init__(self, path: str | os.PathLike[str], scope: str) -> None:
        """`scope`: what was written in another is not found.

        Raises:
            ConfigError: the file can't be opened, or is something else.
        """
        self._scope = scope
        self._path = Path(path)
        self._lock = threading.Lock()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            self._connection = sqlite3.connect(self._path, LOCK_SECONDS, check_same_thread=False)
            # An answer that a crash of the machine takes with it is asked for again, no more.
            self._connection.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; {SCHEMA};")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cache: can't use {self._path}: {error}") from None

    async def get(self, client: LMClient, request: LMRequest) -> LMResponse | None:
        """The answer that is recorded, with a usage of nothing."""
        return await asyncio.to_thread(self._get, _question(client, request))

    async def put(self, client: LMClient, request: LMRequest, response: LMResponse) -> None:
        """A cache that can't be written is told of in the log and harms nothing."""
        await asyncio.to_thread(self._put, _question(client, request), response)

    def __enter__(self) -> "DiskCache":
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._connection.close()

    def _get(self, question: bytes) -> LMResponse | None:
        query = "SELECT text, model, finish FROM answers WHERE scope = ? AND question = ?"
        try:
            with self._lock, closing(self._connection.execute(query, (self._scope, question))) as found:
                row = found.fetchone()
        except sqlite3.Error as error:
            log.warning("cache: can't read %s: %s", self._path, error)
            return None
        return row and LMResponse(row[0], row[1], TokenUsage(cost=0.0), row[2])

    def _put(self, question: bytes, response: LMResponse) -> None:
        row = (self._scope, question, response.text, response.model, response.finish_reason)
        try:
            with self._lock, self._connection:
                self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", row)
        except (sqlite3.Error, UnicodeEncodeError) as error:
            log.warning("cache: can't write %s: %s", self._path, error)


def _question(client: LMClient, request: LMRequest) -> bytes:
    asked = client.identity or f"{type(client).__qualname__} {client.model_name}"
    parts = [asked, request.model, request.max_output_tokens, list(map(dict, request.messages))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
