"""A cell is a transaction: whatever kills it, no variable is lost."""

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path

import pytest
from rlm_agent.worker import process

from rlm_core.environment import Sandbox, SandboxSpec, make_environment
from rlm_core.errors import SandboxLost
from rlm_core.feedback import show
from rlm_core.session import Session
from tests.conftest import SPEC, Recorder, echo
from tests.support.processes import only, open_fds
from tests.support.waiting import passed

A_SESSION = 4
"""Processes: the supervisor, the session's root, the checkpoint and the standby."""
STATE = """
import threading, numpy as np
number = 41
def double(x): return 2 * x
class Point:
    def __init__(self, x): self.x = x
point = Point(3)
def count():
    n = 0
    while True:
        yield n
        n += 1
counter = count()
next(counter), next(counter)
with open("data.txt", "w") as f: f.write("first\\nsecond\\nthird\\n")
file = open("data.txt")
first = file.readline()
raw = open("data.txt", "rb", buffering=0)
raw.read(6)
lock = threading.Lock()
lock.acquire()
array = np.arange(1000).reshape(10, 100)
nested = {"a": [1, {2: point}]}
"""

CHANGE = """
number = 0
point.x = 99
next(counter)
file.readline()
raw.read(6)
lock.release()
array[:] = 7
nested.clear()
new = 1
"""

CHECK = """
assert number == 41 and double(4) == 8 and point.x == 3
assert isinstance(point, Point) and nested["a"][1][2] is point
assert next(counter) == 2
assert file.readline() == "second\\n"
assert raw.read(6) == b"second"
assert lock.locked()
assert array.sum() == 499500
assert "new" not in globals()
print("all as before")
"""

DEATHS = {
    "segfault": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "exit": ("import os; os._exit(3)", "exit code 3"),
    "kill": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    "abort": ("import os; os.abort()", "SIGABRT"),
    "stack": (
        "import sys; sys.setrecursionlimit(10**9)\nclass A:\n  def __getattr__(self, n): return getattr(self, n)\nA().x",
        "SIGSEGV",
    ),
    "close_fds": ("import os; os.closerange(0, 4096)", "closed or replaced file descriptors"),
    "replace_fds": (
        "import os\nfd = os.open('/dev/null', os.O_RDWR)\nfor n in range(3, 1024):\n  if n != fd: os.dup2(fd, n)",
        "closed or replaced file descriptors",
    ),
}

HANGS = {
    "sleep": "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)",
    "blocked": "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, [2]); time.sleep(600)",
    "native": "sum(range(10**15))",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "stubborn": "import time\nwhile True:\n  try:\n    while True: time.sleep(60)\n  except KeyboardInterrupt: pass",
    "regex": "import re, signal; signal.signal(2, signal.SIG_IGN); re.match('(a+)+$', 'a' * 60 + 'b')",
}


@pytest.mark.parametrize("death", DEATHS)
async def test_a_cell_that_dies_loses_nothing(session: Session, death: str) -> None:
    code, why = DEATHS[death]
    assert (await session.execute(STATE)).status == "ok"
    result = await session.execute(CHANGE + code)
    assert result.status == "rolled_back"
    assert result.rollback is not None and why in result.rollback
    after = await session.execute(CHECK)
    assert after.stdout == "all as before\n", after.stderr


@pytest.mark.parametrize("hang", HANGS)
async def test_a_cell_that_hangs_is_killed_and_loses_nothing(session: Session, hang: str) -> None:
    await session.execute(STATE)
    result = await session.execute(CHANGE + HANGS[hang], timeout=0.3)
    assert result.status == "rolled_back"
    assert result.rollback is not None and "timeout" in result.rollback
    after = await session.execute(CHECK)
    assert after.stdout == "all as before\n", after.stderr


async def test_a_timeout_that_the_cell_obeys_keeps_its_state(session: Session) -> None:
    result = await session.execute("reached = 1\nimport time\ntime.sleep(600)\nreached = 2", timeout=0.2)
    assert result.status == "timeout"
    assert "KeyboardInterrupt" in result.stderr
    assert (await session.execute("print(reached)")).stdout == "1\n"


async def test_catastrophic_regex_stops_at_its_time(session: Session) -> None:
    result = await session.execute("import re; re.match('(a+)+$', 'a' * 60 + 'b')", timeout=0.2)
    assert result.status == "timeout"


async def test_an_exception_is_not_a_rollback(session: Session) -> None:
    result = await session.execute("kept = 5\n1/0\nkept = 6")
    assert result.status == "error"
    assert result.error is not None and result.error.type == "ZeroDivisionError"
    assert (await session.execute("print(kept)")).stdout == "5\n"


async def test_memory_over_the_limit_loses_nothing(sandbox: Sandbox) -> None:
    spec = make_environment("local", {"memory": "512MiB"}).spec
    async with Session(sandbox, spec, echo) as session:
        await session.execute("kept = list(range(1000))")
        result = await session.execute("big = bytearray(1 << 30)")
        assert result.error is not None and result.error.type == "MemoryError"
        dies = await session.execute("kept = 0\nblocks = []\nwhile True: blocks.append(' ' * 10_000_000)")
        assert dies.status in ("error", "rolled_back")
        # An exception keeps what the cell had assigned; a death undoes it.
        expected = "499500\n" if dies.rolled_back else "0\n"
        assert (await session.execute("print(sum(kept) if kept else 0)")).stdout == expected


async def test_five_hundred_deaths_leave_no_zombie_no_fd_no_process(sandbox: Sandbox) -> None:
    pid = sandbox.pid  # type: ignore[attr-defined]
    async with Session(sandbox, SandboxSpec(), echo) as session:
        await session.execute("kept = {'n': 0}")
        await session.execute("import os; os._exit(1)")
        await only(A_SESSION, below=pid)
        fds = open_fds(pid)
        deaths = ["os._exit(1)", "os.kill(os.getpid(), 9)", "ctypes.string_at(0)"]
        for number in range(500):
            code = f"import os, ctypes; kept['n'] = {number}; {deaths[number % 3]}"
            assert (await session.execute(code)).status == "rolled_back"
        result = await session.execute("print(kept)")
        assert result.stdout == "{'n': 0}\n"
        after = await session.execute("import os; os._exit(1)")
        assert after.status == "rolled_back"
        left = await only(A_SESSION, below=pid)
        assert not [line for line in left.values() if line.startswith("Z")]
        async with asyncio.timeout(20):
            while open_fds(pid) > fds:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    await only(1, below=pid)  # the supervisor


async def test_random_numbers_go_on_where_they_were_seeded(session: Session) -> None:
    await session.execute("import random; random.seed(7)")
    in_cells = [(await session.execute("print(random.random())")).stdout for _ in range(3)]
    at_once = await session.execute("random.seed(7)\nfor _ in range(3): print(random.random())")
    assert "".join(in_cells) == at_once.stdout


async def test_a_thread_left_behind_costs_the_checkpoint_and_says_so(session: Session) -> None:
    await session.execute("safe = 1")
    started = await session.execute(
        "import threading\nstop = threading.Event()\nthread = threading.Thread(target=stop.wait)\nthread.start()"
    )
    assert started.no_checkpoint is None
    without = await session.execute("later = 2\nprint(thread.is_alive())")
    assert without.stdout == "True\n"
    assert without.no_checkpoint is not None and "thread" in without.no_checkpoint
    assert "no checkpoint" in started.notices[0] and not without.notices
    died = await session.execute("import os; os._exit(1)")
    assert died.status == "rolled_back"
    (told,) = died.notices
    assert "Earlier cells had no checkpoint" in told and "as it was before" not in show(died)
    # The last checkpoint is from before the thread: nothing that was there then is lost.
    assert (await session.execute("print(safe, 'later' in globals())")).stdout == "1 False\n"


async def test_the_checkpoint_is_back_when_the_thread_has_ended(session: Session) -> None:
    await session.execute(
        "import threading\nstop = threading.Event()\nthread = threading.Thread(target=stop.wait)\nthread.start()"
    )
    await session.execute("kept = 3; stop.set(); thread.join()")
    assert (await session.execute("import os; os._exit(1)")).status == "rolled_back"
    result = await session.execute("print(kept)")
    assert result.stdout == "3\n" and result.no_checkpoint is None


async def test_numpy_and_pools_that_are_closed_do_not_cost_the_checkpoint(session: Session) -> None:
    result = await session.execute(
        "import numpy as np\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "a = np.random.rand(400, 400) @ np.random.rand(400, 400)\n"
        "with ThreadPoolExecutor(8) as pool: squares = list(pool.map(lambda x: x * x, range(50)))"
    )
    assert result.status == "ok"
    assert (await session.execute("pass")).no_checkpoint is None


async def test_a_child_that_the_cell_forks_never_reports_for_it(session: Session) -> None:
    result = await session.execute(
        "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint('once' if pid else 'child')"
    )
    assert result.status == "ok"
    assert sorted(result.stdout.split()) == ["child", "once"]
    assert (await session.execute("print('next')")).stdout == "next\n"


async def test_killing_the_checkpoint_and_then_oneself_ends_the_session_with_a_clear_error(
    session: Session,
) -> None:
    await session.execute("x = 1")
    with pytest.raises(SandboxLost, match="session"):
        await session.execute("import os\nos.kill(os.getppid(), 9)\nos.kill(os.getpid(), 9)")


async def test_killing_only_the_checkpoint_costs_nothing(session: Session) -> None:
    await session.execute("x = 1")
    assert (await session.execute("import os; os.kill(os.getppid(), 9); x = 2")).status == "ok"
    assert (await session.execute("print(x)")).stdout == "2\n"
    assert (await session.execute("os._exit(1)")).status == "rolled_back"
    assert (await session.execute("print(x)")).stdout == "2\n"


async def test_daemons_of_a_cell_end_with_the_session(sandbox: Sandbox, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    daemon = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open({str(pid_file)!r}, "w").write(str(os.getpid()))
        while True: time.sleep(60)
    os._exit(0)
while not os.path.exists({str(pid_file)!r}) or not open({str(pid_file)!r}).read(): time.sleep(0.01)
"""
    async with Session(sandbox, SandboxSpec(), echo) as session:
        assert (await session.execute(daemon)).status == "ok"
        pid = int(pid_file.read_text())
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_interrupt_from_the_host(session: Session, recorder: Recorder) -> None:
    running = asyncio.create_task(session.execute("import time\nx = 1\nprint('on')\ntime.sleep(600)"))
    await recorder.saw("on")
    await session.interrupt()
    assert (await running).status == "interrupted"
    assert (await session.execute("print(x)")).stdout == "1\n"


async def test_a_cell_that_ends_as_it_is_killed_is_over_or_undone_and_says_which(sandbox: Sandbox) -> None:
    """The kill comes 0.1 s after the start; the cells end from 5 ms before it to 5 ms after it."""
    async with Session(sandbox, SPEC.model_copy(update={"interrupt_grace": 0.05}), echo) as session:
        await session.execute("import signal, time\nv = -1")
        kept = -1
        for n in range(41):
            seconds = 0.095 + n * 0.00025
            result = await session.execute(
                "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
                f"v, end = {n}, time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass",
                timeout=0.05,
            )
            assert result.status == "ok" or result.rolled_back
            kept = kept if result.rolled_back else n
            found = await session.execute("print(v)")
            assert (found.stdout, found.notices) == (f"{kept}\n", ())


async def test_one_death_at_any_moment_loses_no_variable_and_is_told(sandbox: Sandbox) -> None:
    """Of the standby, of its checkpoint, or of the one before it; the next one comes when there are two again."""
    chance = random.Random(7)
    async with Session(sandbox, SPEC, echo) as session:
        first = await session.execute("import os, time\nv = 0\nprint(os.getppid())")
        root = process.parent(int(first.stdout))
        v = 0
        for _ in range(60):
            await only(2, below=root)
            pause = chance.choice([0, 0, 0.01, 0.03])
            cell = asyncio.create_task(session.execute(f"v += 1\ntime.sleep({pause})\nprint(v)"))
            await passed(chance.random() * 0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(process.descendants(root)), signal.SIGKILL)
            result, now = await cell, await session.execute("print(v)")
            told = any("earlier cell" in notice for notice in (*result.notices, *now.notices))
            if not told:
                assert int(now.stdout) == v + (not result.rolled_back), (v, result, now)
            assert v - 1 <= int(now.stdout) <= v + 1, (v, result, now)
            v = int(now.stdout)


GONE = """
import os
from rlm_agent.worker import bound
def kill(pid, number):
    tries = len(os.listdir("."))
    open(str(tries), "w").close()
    if tries == 1:
        os._exit(7)
    raise ProcessLookupError
bound.kill = kill
"""


async def test_a_cells_death_is_told_by_whoever_can(session: Session) -> None:
    """The old checkpoint has gone when a standby is to end it; and the next standby dies before it says a word."""
    await session.execute("kept = 42")
    assert (await session.execute(GONE)).status == "ok"
    result = await session.execute("kept = 0; os._exit(1)", timeout=10)
    assert result.rolled_back and "exit code 1" in str(result.rollback)
    assert (await session.execute("print(kept)")).stdout == "42\n"


TOLD_TWICE = """
import os, signal
from rlm_agent.frames import Kind
from rlm_agent.worker.chain import Worker
send = Worker._send
def _send(self, frame):
    send(self, frame)
    if frame.kind is Kind.READY and frame.header["died"] and not os.path.exists("told"):
        open("told", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
Worker._send = _send
"""


async def test_a_death_that_is_told_twice_is_not_that_of_the_next_cell(session: Session) -> None:
    """The one who told it dies in the same moment, and the next cell comes before the next one says so."""
    assert (await session.execute(TOLD_TWICE)).status == "ok"
    assert (await session.execute("import os; os._exit(1)", timeout=10)).rolled_back
    await passed(0.004)
    result = await session.execute("kept = 5")
    assert (result.status, result.rolled_back) == ("ok", False)
    assert (await session.execute("print(kept)")).stdout == "5\n"


async def test_a_timer_that_a_cell_forgets_does_not_ring_between_two(session: Session) -> None:
    code = """
import signal, time
def late(*_): raise TimeoutError("too late")
signal.signal(signal.SIGALRM, late)
signal.setitimer(signal.ITIMER_REAL, {}, {})
number += 1
"""
    await session.execute("number = 0")
    done = 0
    for pause, again in [(0.001, 0), (0.003, 0), (0.02, 0), (0.002, 0.002)] * 3:
        result = await session.execute(code.format(pause, again))
        assert result.status in ("ok", "error") and result.notices == (), result
        done += result.status == "ok"
        await passed(0.01)
    now = int((await session.execute("print(number)")).stdout)
    assert done <= now <= 12


MOCKS = {
    "listdir": "os.listdir = Mock(side_effect=[['1'], ['2']])",
    "lseek": "os.lseek = Mock(side_effect=[0, 0])",
    "fstat": "os.fstat = Mock(side_effect=[])",
    "close": "os.close = Mock(side_effect=[])",
    "setitimer": "signal.setitimer = Mock(side_effect=[0] * 3)",
    "pthread_sigmask": "signal.pthread_sigmask = Mock(side_effect=[()])",
    "valid_signals": "signal.valid_signals = Mock(side_effect=[])",
    "current_frames": "sys._current_frames = Mock(side_effect=[])",
    "len": "import builtins; builtins.len = lambda _: 0",
}


@pytest.mark.parametrize("mock", MOCKS)
async def test_a_mock_that_a_cell_forgets_loses_no_session(session: Session, mock: str) -> None:
    await session.execute("kept = 42; import os, signal, sys; from unittest.mock import Mock")
    await session.execute(MOCKS[mock], timeout=5)
    for _ in range(4):
        assert (await session.execute("os._exit(1)", timeout=5)).rolled_back
        assert (await session.execute("print(kept)", timeout=5)).stdout == "42\n"


MUTE = """
from rlm_agent.worker import chain
chain.Worker._send = lambda *_: None
chain._fork_blocker = lambda: "it has no say"
"""


async def test_a_cell_that_gives_no_result_is_undone_when_its_time_is_up(session: Session) -> None:
    await session.execute("kept = 42")
    assert (await session.execute(MUTE, timeout=0.5)).rolled_back
    assert (await session.execute("print(kept)", timeout=5)).stdout == "42\n"
