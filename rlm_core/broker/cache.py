"""Answers of LMs on disk: what was asked before of a model, in the same scope, is not paid for again."""

import asyncio
import hashlib
import json
import logging
import os
import sqlite3
import threading
from pathlib import Path

from rlm_core.clients.base import LMClient, LMRequest, LMResponse
from rlm_core.errors import ConfigError
from rlm_core.types import TokenUsage

log = logging.getLogger(__name__)
LOCK_SECONDS = 5.0
"""That one process waits for another's writing."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    scope TEXT NOT NULL, question BLOB NOT NULL,
    text TEXT NOT NULL, model TEXT NOT NULL, finish TEXT NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (scope, question)
) WITHOUT ROWID
"""


class DiskCache:
    """An SQLite file, which several processes may share; where it is made here, only its user can read it.

    An answer is found by its scope and by all that it depends on: the client with its arguments, the messages
    and the tokens that it may have. Nothing is kept of a client whose `identity` says nothing. A file that
    can't be read or written once is told of in the log, left alone from then on, and harms nothing.
    """

    def __init__(self, path: str | os.PathLike[str], scope: str) -> None:
        """`scope`: what was written in another is not found.

        Raises:
            ConfigError: the file can't be opened, or is something else.
        """
        self._scope = scope
        self._path = Path(path)
        self._lock = threading.Lock()
        self._in_use = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            self._connection = sqlite3.connect(self._path, LOCK_SECONDS, check_same_thread=False)
            self._connection.execute(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cache: can't use {self._path}: {error}") from None

    async def get(self, client: LMClient, request: LMRequest) -> LMResponse | None:
        """The answer that is recorded, with a usage of nothing."""
        return await asyncio.to_thread(self._get, _question(client, request)) if client.identity else None

    async def put(self, client: LMClient, request: LMRequest, response: LMResponse) -> None:
        """Write it down; cancelling this does not stop it."""
        if client.identity:
            await asyncio.shield(asyncio.to_thread(self._put, _question(client, request), response))

    async def forget(self) -> None:
        """Nobody will ask for this scope again."""
        await asyncio.to_thread(self._change, "DELETE FROM answers WHERE scope = ?", (self._scope,))

    async def __aenter__(self) -> "DiskCache":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.shield(asyncio.to_thread(self._close))

    def _close(self) -> None:
        with self._lock:
            self._in_use = False
            self._connection.close()

    def _get(self, question: bytes) -> LMResponse | None:
        query = "SELECT text, model, finish, tokens FROM answers WHERE scope = ? AND question = ?"
        with self._lock:
            if not self._in_use:
                return None
            try:
                row = self._connection.execute(query, (self._scope, question)).fetchone()
            except sqlite3.Error as error:
                self._give_up(error)
                return None
        if row is None:
            return None
        text, model, finish, tokens = row
        return LMResponse(text, model, TokenUsage(cost=0.0), finish, recorded_tokens=tokens)

    def _put(self, question: bytes, response: LMResponse) -> None:
        tokens = response.usage.input_tokens + response.usage.output_tokens
        row = (self._scope, question, response.text, response.model, response.finish_reason, tokens)
        self._change("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    def _change(self, statement: str, values: tuple[object, ...]) -> None:
        with self._lock:
            if not self._in_use:
                return
            try:
                with self._connection:
                    self._connection.execute(statement, values)
            except (sqlite3.Error, UnicodeEncodeError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._in_use = False
        log.warning("cache: %s can't be used any more: %s", self._path, error)


def _question(client: LMClient, request: LMRequest) -> bytes:
    parts = [client.identity, request.model, request.max_output_tokens, list(map(dict, request.messages))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
