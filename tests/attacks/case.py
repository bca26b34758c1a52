"""One attack. Its code ends by printing `OUTCOME <word>`: "ok" when it got what it wanted, else why not."""

from dataclasses import dataclass

CONTAINERS = frozenset({"docker", "runsc"})
ISOLATED = CONTAINERS | {"bubblewrap"}
EVERYWHERE = ISOLATED | {"local"}
HOST_KERNEL = ISOLATED - {"runsc"}
"""gVisor is a kernel of its own: what it allows is virtual."""

PRELUDE = """
import ctypes, errno, glob, json, os, resource, signal, socket, stat, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def attempt(action, *arguments):
    try:
        action(*arguments)
        return "ok"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    except Exception as error:
        return type(error).__name__
def reached(number, *arguments):
    # A call with arguments that make no sense: only what forbids it says one of these.
    why = attempt(syscall, number, *arguments)
    return why if why in ("EPERM", "ENOSYS", "EACCES") else "ok"
def first_ok(outcomes):
    outcomes = list(outcomes)
    return "ok" if "ok" in outcomes else outcomes[0]
def tried_in_child(action, *arguments):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, attempt(action, *arguments).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    return os.read(reader, 100).decode() or "died"
def in_child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return "ok" if status == 0 else signal.Signals(os.WTERMSIG(status)).name
"""


@dataclass(frozen=True, slots=True)
class Case:
    id: str
    title: str
    code: str
    expected: str
    """What the catalogue says, in its words."""
    applies: frozenset[str] = ISOLATED
    inert: bool = False
    """It works, and gains nothing."""
    statuses: tuple[str, ...] = ("ok",)
    """How the cell may end."""
    control: str | None = None
    """Code that shows the attack where nothing holds it; the same code when it is None, none when empty."""
    timeout: float = 20.0
    session_may_end: bool = False
    context_waits: bool = False
    """Meanwhile the agent holds a context for a third session, which is still busy."""
    ends: frozenset[str] = frozenset()
    """Environments in which it may end its whole sandbox, which is then one of its own."""
