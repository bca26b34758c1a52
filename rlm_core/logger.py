"""The log of a run: one JSON object a line, each whole on disk before the next turn.

`rlm_<YYYY-mm-dd_HH-MM-SS>_<id>.jsonl`: a `metadata` line, an `iteration` line per turn (both with the
fields of the original library), and a `result` line. An iteration's `prompt` holds the messages that are
new in that turn. The context is in `contexts/<sha256>`, once for all runs that share it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from pydantic import SecretStr

from rlm_core.context import Encoded
from rlm_core.errors import ConfigError, LogError
from rlm_core.types import RLMChatCompletion, RLMIteration, RLMMetadata


class RLMLogger:
    """Captures each run's trajectory, and writes it to `log_dir` when there is one.

    One logger serves any number of runs, at the same time too; each has a file of its own.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None = None, file_name: str = "rlm") -> None:
        self.log_dir = os.fspath(log_dir) if log_dir is not None else None
        self.log_file_path: str | None = None
        """File of the run that was started last."""
        self._file_name = file_name
        self._last: RunLog | None = None
        if self.log_dir is not None:
            _make_folder(Path(self.log_dir))

    def start_run(self, run_id: str, metadata: RLMMetadata, context: Encoded) -> "RunLog":
        path: Path | None = None
        if self.log_dir is not None:
            stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
            path = Path(self.log_dir) / f"{self._file_name}_{stamp}_{run_id}.jsonl"
            self.log_file_path = str(path)
        self._last = RunLog(path, run_id, metadata, context)
        return self._last

    def get_trajectory(self) -> dict[str, Any] | None:
        """Of the run that was started last: `run_metadata` and `iterations`."""
        return self._last.trajectory() if self._last is not None else None

    @property
    def iteration_count(self) -> int:
        return len(self._last.iterations) if self._last is not None else 0


class RunLog:
    """One run's trajectory and file."""

    def __init__(self, path: Path | None, run_id: str, metadata: RLMMetadata, context: Encoded) -> None:
        self.path = str(path) if path is not None else None
        self.metadata = metadata.to_dict()
        self.iterations: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        if path is not None:
            with _disk_errors(path):
                self.metadata["context"] = _store_context(path.parent / "contexts", context)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
                self._file = os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8")
            self._write("metadata", {"run_id": run_id, **self.metadata})

    def of_child(self, run_id: str, root_model: str) -> "RunLog":
        """Of a run within this one: kept in memory, for the record of the call that it answers."""
        child = RunLog.__new__(RunLog)
        child.path, child.iterations, child._file = None, [], None
        child.metadata = {**self.metadata, "root_model": root_model, "run_id": run_id}
        return child

    def turn(self, iteration: RLMIteration) -> None:
        entry = {
            "type": "iteration",
            "iteration": len(self.iterations) + 1,
            "timestamp": datetime.now().isoformat(),
            **iteration.to_dict(),
        }
        self.iterations.append(entry)
        self._write("iteration", entry)

    def finish(self, completion: RLMChatCompletion) -> None:
        """The `result` line: status, answer or error, usage; then the file is closed.

        Raises:
            LogError: it could not be written.
        """
        try:
            self._write(
                "result",
                {
                    "status": completion.status,
                    "response": completion.response,
                    "error": completion.error,
                    "usage": completion.usage_summary.to_dict(),
                    "execution_time": completion.execution_time,
                    "iterations": completion.iterations,
                },
            )
        finally:
            if self._file is not None:
                with suppress(OSError):  # told by _write: closing tries once more to write the same
                    self._file.close()
                self._file = None

    def trajectory(self) -> dict[str, Any]:
        return {"run_metadata": self.metadata, "iterations": list(self.iterations)}

    def _write(self, kind: str, entry: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = {"type": kind, "timestamp": datetime.now().isoformat(), **entry}
        # ASCII, so that no line separator or surrogate of a cell's output can break a line.
        with _disk_errors(self.path):
            self._file.write(json.dumps(line, ensure_ascii=True, default=_redacted) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _store_context(folder: Path, encoded: Encoded) -> dict[str, Any]:
    """Write the context's bytes under their hash, unless they are there; what the log says of them."""
    hashed, size = hashlib.sha256(), 0
    for chunk in encoded.chunks():
        hashed.update(chunk)
        size += len(chunk)
    digest = hashed.hexdigest()
    path = folder / digest
    if not path.exists():
        folder.mkdir(exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="partial_", delete=False) as file:  # 0600
            file.writelines(encoded.chunks())
        Path(file.name).replace(path)
    return {"kind": encoded.kind, "sha256": digest, "size_bytes": size}


@contextmanager
def _disk_errors(path: object) -> Iterator[None]:
    """Raises LogError in place of OSError."""
    try:
        yield
    except OSError as error:
        raise LogError(f"can't write the log {str(path)!r}: {error.strerror or error}") from None


def _redacted(value: Any) -> str:
    """Secrets by their type, never by their name; anything else by its repr."""
    return "**********" if isinstance(value, SecretStr) else repr(value)[:500]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"can't make log_dir {str(folder)!r}: {error.strerror or error}") from None
