"""One live namespace, and how a cell runs in it."""

import ast
import builtins
import contextlib
import io
import linecache
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from rlm_agent.worker import bound, variables
from rlm_agent.worker.names import Names
from rlm_agent.worker.query import Queries

TEXT_CHARS = 16 << 10
"""Longest traceback or message that a result carries."""
_PAGE = os.sysconf("SC_PAGESIZE")
GROWN_BYTES = 16 << 20
"""By so much, and to twice its size, a process grows before all of it is searched for garbage: that takes a
second for each 500 MB of small objects, and memory of its own for those that the checkpoint shares."""
REHEARSAL = "(lambda: (lambda: (lambda: (lambda: [str(n) for n in range(3)])())())())()\nNone"
"""Deeper than a cell that does nothing."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cell that lived to its end went. `status` is "ok", "error" or "interrupted"."""

    status: str
    error: dict[str, str] | None = None
    answer_ready: bool = False
    answer: str = ""
    notices: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)


class Repl:
    def __init__(self, queries: Queries) -> None:
        self.module = ModuleType("__main__")
        self.namespace: dict[str, Any] = self.module.__dict__
        self.namespace["__builtins__"] = builtins
        self.names = Names(self.namespace, queries)
        self._cells = 0
        self._bytes_when_collected = _resident_bytes()
        """At the last collection of all that there is."""
        self._has_grown = False
        """Much, since then."""
        self._stdout, self._stderr = _open_stream(1), _open_stream(2)

    def run(self, action: Callable[[], None]) -> Outcome:
        """Do something that may run the user's code, with SIGINT raising KeyboardInterrupt in it."""
        return self._run(action, is_rehearsal=False)

    def _run(self, action: Callable[[], None], *, is_rehearsal: bool) -> Outcome:
        try:
            return _interruptible(lambda: self._attempt(action, is_rehearsal=is_rehearsal))
        except BaseException as error:
            # An interrupt, or a __str__ of the user's, came while the outcome was being put together.
            described = _describe(error)
            if not is_rehearsal:
                with contextlib.suppress(BaseException):
                    self._stderr.write(described["traceback"])
                    self._flush()
            return Outcome(_status_of(error), described)

    def execute(self, code: str) -> None:
        """Run a cell; the value of a last bare expression is echoed, as in a REPL."""
        self._cells += 1
        self._execute(code, f"<cell {self._cells}>", self.namespace)

    def _execute(self, code: str, filename: str, namespace: dict[str, Any]) -> None:
        linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
        tree = ast.parse(code, filename)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, filename, "exec", dont_inherit=True), namespace)
        if last is not None:
            echo = compile(ast.Interactive([last]), filename, "single", dont_inherit=True)
            exec(echo, namespace)

    def rehearse(self) -> Outcome:
        """Do what every cell does, on nothing, but print nothing, and run nothing of the user's: no text of
        an answer, and no `__del__` of earlier cells, which have ended.

        A forked process copies each memory page at its first write; this makes it copy those that a
        cell needs before there is a cell (measured: 0.9 ms less in each).
        """
        names: dict[str, Any] = {"__builtins__": builtins}
        return self._run(lambda: self._execute(REHEARSAL, "<rehearsal>", names), is_rehearsal=True)

    def look_at_growth(self) -> None:
        """While nobody waits, as they would at the end of a cell (measured: 20 µs)."""
        self._has_grown = _resident_bytes() > 2 * self._bytes_when_collected + GROWN_BYTES

    def _attempt(self, action: Callable[[], None], *, is_rehearsal: bool) -> Outcome:
        status, described = "ok", None
        raised = self._try(action)
        if raised is not None:
            status, described = _status_of(raised), _describe(raised)
            raised.__traceback__ = None
            if not is_rehearsal:
                self._stderr.write(described["traceback"])
                self._flush()
        del raised  # and what it holds, before garbage is collected
        self._prepare()  # now: what a cell has put in the place of a stream may have a __del__
        notices = self.names.restore()
        ready, text = (False, "") if is_rehearsal else self.names.final_answer()
        types = self._types()
        # Here and not later: it may run a __del__ of the user's, which must happen within the cell.
        self._collect_garbage(may_be_all=not is_rehearsal)
        return Outcome(status, described, ready, text, notices, types)

    def _try(self, action: Callable[[], None]) -> BaseException | None:
        self._prepare()
        try:
            action()
        except BaseException as raised:
            return raised
        finally:
            late = _end_timers()
            self._flush()
        return late

    def _types(self) -> dict[str, str]:
        found = variables.visible(self.namespace, self.names.reserved)
        return {name: variables.type_name(value) for name, value in found.items()}

    def _collect_garbage(self, *, may_be_all: bool) -> None:
        """Of this cell; of all cells, which each fork has frozen, once they have grown."""
        if not (may_be_all and self._has_grown):
            bound.collect()
            return
        bound.unfreeze()
        bound.collect()
        bound.give_back(0)  # else it counts as grown, and garbage would be let grow to twice that
        self._bytes_when_collected, self._has_grown = _resident_bytes(), False

    def _prepare(self) -> None:
        if self._stdout.closed:
            self._stdout = _open_stream(1)
        if self._stderr.closed:
            self._stderr = _open_stream(2)
        sys.stdout, sys.stderr = self._stdout, self._stderr
        sys.displayhook, sys.excepthook = sys.__displayhook__, sys.__excepthook__
        sys.modules["__main__"] = self.module
        self.namespace["__builtins__"] = builtins

    def _flush(self) -> None:
        replaced = sys.stdout is not self._stdout or sys.stderr is not self._stderr
        for stream in (*((sys.stdout, sys.stderr) if replaced else ()), self._stdout, self._stderr):
            try:  # noqa: SIM105 - for each of them in each cell
                stream.flush()
            except (OSError, ValueError, AttributeError):  # closed, or its reader is gone
                pass
        # C code in the cell has buffers of its own, which a fork would double.
        bound.flush_c(None)


def _resident_bytes() -> int:
    """Bytes of memory of this process; 0 where the kernel does not tell."""
    try:
        file = bound.open_file("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return 0
    try:
        return int(bound.read_file(file, 200).split()[1]) * _PAGE
    finally:
        bound.close_file(file)


def _open_stream(fd: int) -> io.TextIOWrapper:
    return open(
        fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", newline="\n", closefd=False
    )


def _end_timers() -> BaseException | None:
    """A timer that a cell forgets is not to ring between two cells; what it raises at the last moment."""
    raised: BaseException | None = None
    for timer in bound.TIMERS:
        try:
            bound.set_timer(timer, 0)
        except BaseException as error:
            raised = error
    return raised


def _interruptible(body: Callable[[], T]) -> T:
    """SIGINT means KeyboardInterrupt in body, and nothing outside of it."""
    try:
        bound.handle(signal.SIGINT, signal.default_int_handler)
        return body()
    finally:
        while True:
            try:
                bound.handle(signal.SIGINT, bound.IGNORE)
                break
            except KeyboardInterrupt:
                continue


def _status_of(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "error"


def _describe(error: BaseException) -> dict[str, str]:
    """Type, message and traceback, each bounded, whatever the exception's own methods do."""
    try:
        lines = traceback.format_exception(type(error), error, _own_frames(error.__traceback__))
        text, message = "".join(lines), str(error)
    except BaseException as worse:
        text = message = f"{type(error).__name__} (its text could not be made: {type(worse).__name__})\n"
    return {"type": type(error).__name__[:200], "message": _cut(message), "traceback": _cut(text)}


def _own_frames(tb: TracebackType | None) -> TracebackType | None:
    """The traceback from the cell's first frame on."""
    while tb is not None and not tb.tb_frame.f_code.co_filename.startswith("<cell "):
        tb = tb.tb_next
    return tb


def _cut(text: str) -> str:
    if len(text) <= TEXT_CHARS:
        return text
    half = TEXT_CHARS // 2
    return f"{text[:half]}\n… [{len(text) - TEXT_CHARS:,} characters left out] …\n{text[-half:]}"
