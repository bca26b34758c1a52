"""Cells that break the worker that runs them: the next one runs all the same, and what broke it is taken back."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import Sandbox
from rlm_core.session import Session
from tests.conftest import SPEC, echo
from tests.support.processes import child_of
from tests.support.waiting import passed

SURVIVED = {
    "exit code of our own": ("import os; os._exit(90)", "rolled_back"),
    "an alarm left behind": ("import signal; signal.alarm(1); import time", "ok"),
    "no files allowed": ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (0, 4096))", "ok"),
    "no files allowed, for good": (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))",
        "ok",
    ),
    "an int among the names": ("globals()[5] = 1", "ok"),
    "a class that hides": ("class P:\n  @property\n  def __class__(self): raise RuntimeError\np = P()", "ok"),
    "a type without a name": (
        "class M(type):\n  @property\n  def __name__(cls): return 5\nclass T(metaclass=M): pass\nt = T()",
        "ok",
    ),
    "an answer without a text": ("class B:\n  def __str__(self): 1/0\nanswer['content'] = B()", "ok"),
    "long names": ("globals()['x' * 300_000] = 1", "ok"),
    "many long names": ("globals().update({'中' * 190 + str(n): n for n in range(400)})", "ok"),
    "an error of emoji": ("raise ValueError('😀' * 40_000)", "error"),
    "a lone surrogate": ("globals()['\\ud800'] = '\\ud800'", "ok"),
    "a hook that raises": ("import os\nos.register_at_fork(before=lambda: 1/0)", "ok"),
    "tracing": ("import sys\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)", "ok"),
    "the folder is gone": ("import os, shutil\nshutil.rmtree(os.getcwd())", "ok"),
    "nobody's children": ("import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)", "ok"),
    "output that does not block": ("import os\nos.set_blocking(1, False)", "ok"),
    "a link that does not block": (
        "import os\nfor fd in range(3, 64):\n  try: os.set_blocking(fd, False)\n  except OSError: pass",
        "ok",
    ),
    "no way to wait": ("import os\nos.waitpid = os.WIFSIGNALED = os.WTERMSIG = os.WEXITSTATUS = None", "ok"),
    "no way to receive": ("import array, socket\narray.array = socket.CMSG_SPACE = None", "ok"),
    "a watchdog left behind": ("import faulthandler\nfaulthandler.dump_traceback_later(1, exit=True)", "ok"),
    "a polite end for the root": (
        "import os\nparent = lambda pid: int(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1])\n"
        "for number in (1, 15): os.kill(parent(os.getppid()), number)",
        "ok",
    ),
    "mocks": (
        "import json\nfrom unittest.mock import MagicMock\njson.dumps = json.loads = MagicMock()",
        "ok",
    ),
    "more mocks": (
        "import json\nfrom unittest.mock import MagicMock\njson.JSONEncoder = MagicMock()",
        "ok",
    ),
    "output that goes elsewhere": (
        "import os\nnull = os.open(os.devnull, os.O_WRONLY)\nfor fd in (200, 201): os.dup2(null, fd)",
        "rolled_back",
    ),
    "no output to go back to": ("import os\nos.closerange(200, 202)", "rolled_back"),
    "a worker that does not listen": (
        "from rlm_agent.worker.link import PacketLink\nPacketLink.receive = lambda self: 1 / 0",
        "ok",
    ),
    "a worker that knows no frame": (
        "from rlm_agent.frames import Kind\nKind._value2member_map_.clear()",
        "ok",
    ),
    "no builtins": ("__builtins__ = None", "ok"),
    "no exec": ("import builtins\nbuiltins.exec = None", "ok"),
    "no lines": ("import linecache\nlinecache.cache = None", "ok"),
    "no signals": ("import signal\nsignal.signal = None", "ok"),
    "no depth": (
        "import sys\nfor n in range(1, 200):\n  try: sys.setrecursionlimit(n); break\n  except RecursionError: pass",
        "ok",
    ),
    "collector off": (
        "import gc, os, random; gc.disable(); gc.collect = random.setstate = os.fork = None",
        "ok",
    ),
}


@pytest.mark.parametrize("case", SURVIVED)
async def test_what_a_cell_breaks_does_not_break_the_next(session: Session, case: str) -> None:
    code, status = SURVIVED[case]
    await session.execute("kept = 42")
    result = await session.execute(code)
    assert result.status in (status, "ok"), result.stderr
    if case.endswith("left behind"):
        await session.execute("import time; time.sleep(0)")
        await passed(1.3)  # its second
    assert (await session.execute("print(kept)")).stdout == "42\n"
    large = await session.execute("print('q' * 3_000_000)")
    assert (large.status, large.stdout_bytes) == ("ok", 3_000_001), large.stderr
    assert (await session.execute("import os; os._exit(1)")).rolled_back
    assert (await session.execute("print(kept)")).stdout == "42\n"
    assert await session.variables() is not None


async def test_a_cell_that_dies_at_once_after_one_that_wants_to_die_with_its_parent(session: Session) -> None:
    await session.execute("kept = 42")
    assert (await session.execute("import ctypes\nctypes.CDLL(None).prctl(1, 9, 0, 0, 0)")).status == "ok"
    assert (await session.execute("import os; os._exit(1)")).rolled_back
    assert (await session.execute("print(kept)")).stdout == "42\n"


async def test_a_checkpoint_that_dies_between_cells_is_missed_before_the_next(session: Session) -> None:
    await session.execute("kept = 42")
    await session.execute(
        "import os, time\nme = os.getpid()\nif os.fork() == 0:\n"
        "  os.setsid(); time.sleep(0.3); os.kill(me, 9); os._exit(0)"
    )
    await passed(0.8)
    assert (await session.execute("import os; os._exit(1)")).rolled_back
    assert (await session.execute("print(kept)")).stdout == "42\n"


async def test_output_that_does_not_block_since_the_last_cell_does_in_the_next(session: Session) -> None:
    folder = await session.execute(
        "import os, subprocess, sys\nleft = subprocess.Popen([sys.executable, '-c', 'import os, time; "
        'time.sleep(0.5); os.set_blocking(1, False); open("set", "w").close(); time.sleep(60)\'])\n'
        "print(os.getcwd())"
    )
    while not await asyncio.to_thread(Path(folder.stdout.strip(), "set").exists):
        await passed(0.01)
    large = await session.execute("print('q' * 20_000_000)\nleft.kill()")
    assert (large.status, large.stdout_bytes) == ("ok", 20_000_001), large.stderr


async def test_the_rehearsal_asks_nothing_of_an_answer(session: Session) -> None:
    await session.execute(
        "said = []\nclass Told:\n  def __str__(self): said.append(1); return 'x'\nanswer['content'] = Told()"
    )
    assert (await session.execute("print(len(said))")).stdout == "1\n"


LEFT_TO_THE_REHEARSAL = {
    "a stream": """
import os, sys
class Stream:
    def write(self, text): return len(text)
    def flush(self): pass
    def __del__(self): ran_in.append(os.getpid())
ran_in, here, sys.stdout = [], os.getpid(), Stream()
""",
    "an answer": """
import os
class Answer(dict):
    def keys(self): ran_in.append(os.getpid()); raise ValueError
ran_in, here, answer = [], os.getpid(), Answer()
""",
}


@pytest.mark.parametrize("case", LEFT_TO_THE_REHEARSAL)
async def test_what_a_cell_leaves_in_our_places_runs_in_that_cell_and_never_again(
    session: Session, case: str
) -> None:
    result = await session.execute(LEFT_TO_THE_REHEARSAL[case])
    assert not result.rolled_back
    for _ in range(2):
        assert (await session.execute("print(ran_in == [here])")).stdout == "True\n"


async def test_the_rehearsal_collects_no_garbage_of_a_cell_that_has_ended(session: Session) -> None:
    """One that had no time for its own, as its answer is none; it does not end."""
    await session.execute(
        "import gc, re, time\nclass Endless:\n  def __init__(self): self.me = self\n"
        "  def __del__(self): time.sleep(600)"
    )
    await session.execute("gc.disable()\nendless, data = Endless(), bytearray(100 << 20)")
    result = await session.execute("del endless\nkept = 42\nFINAL(re.match('a', 'a'))")
    assert "is no answer" in result.stderr
    assert (await session.execute("print(kept)", timeout=2)).stdout == "42\n"


async def test_garbage_of_earlier_cells_is_collected(session: Session) -> None:
    await session.execute(
        "ended = []\nclass Large:\n  def __init__(self): self.me, self.data = self, bytearray(10 << 20)\n"
        "  def __del__(self): ended.append(1)"
    )
    for made in range(1, 61):
        assert (await session.execute("large = Large()")).status == "ok"
        left = made - int((await session.execute("print(len(ended))")).stdout)
        assert left < 15, "it does not grow with what has been collected"


async def test_garbage_is_collected_where_cells_have_no_checkpoint(session: Session) -> None:
    await session.execute(
        "import os, threading\ndef megabytes():\n"
        "  return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGESIZE') >> 20\n"
        "def circles(): return [(lambda each: each.append(each) or each)([]) for _ in range(400_000)]"
    )
    sizes = [int((await session.execute("print(megabytes())")).stdout)]
    for _ in range(3):
        sizes.append(int((await session.execute("data = circles(); print(megabytes())")).stdout))
    await session.execute("threading.Thread(target=threading.Event().wait, daemon=True).start()")
    for _ in range(6):
        sizes.append(int((await session.execute("data = circles(); print(megabytes())")).stdout))
    assert sizes[-1] - sizes[0] < 3.2 * (sizes[1] - sizes[0]), "what the cells before have left is gone"


async def test_a_cells_default_timeout_is_not_that_of_its_calls(sandbox: Sandbox) -> None:
    async def slow(call: Call) -> Answer | Failure:
        await passed(0.3)
        return await echo(call)

    async with Session(sandbox, SPEC, slow) as session:
        result = await session.execute(
            "import socket\nsocket.setdefaulttimeout(0.05)\nprint(llm_query('on'))"
        )
        assert result.stdout == "echo on\n"
        async with await session.fork() as other:
            await passed(0.3)
            assert (await other.execute("print(llm_query('off'))")).stdout == "echo off\n"


async def test_a_handler_of_ended_children_stays(session: Session) -> None:
    await session.execute("import os, signal\nseen = []\nsignal.signal(17, lambda *_: seen.append(1))")
    assert (await session.execute("os._exit(1)")).rolled_back
    await session.execute("if (pid := os.fork()) == 0: os._exit(0)\nos.waitpid(pid, 0)")
    assert (await session.execute("print(len(seen))")).stdout == "1\n"


# Kills the checkpoint of the next cell while its standby gets ready, which takes as long as a collection.
KILL_THE_NEXT_CHECKPOINT = """
import gc, os, time
me = os.getpid()
gc.callbacks.append(lambda phase, info: phase == "start" and os.getpid() != me and time.sleep(0.4))
if os.fork() == 0:
    os.setsid()
    time.sleep(0.15)
    os.kill(me, 9)
    os._exit(0)
"""


async def test_there_are_never_two_workers(session: Session) -> None:
    await session.execute("kept = 42")
    await session.execute(KILL_THE_NEXT_CHECKPOINT)
    await passed(1.5)  # both would be ready by then
    first = await session.execute("v0 = 0\nprint(kept)")
    assert first.stdout == "42\n" and any("died after an earlier cell" in each for each in first.notices)
    for n in range(1, 5):
        names = await session.execute(
            f"v{n} = {n}\nprint([name for name in sorted(globals()) if name[0] == 'v'])"
        )
        assert names.stdout == f"{[f'v{m}' for m in range(n + 1)]}\n"


async def test_standbys_that_end_by_themselves_are_not_made_without_end(
    session: Session, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    await session.execute(
        f"import os\nos.register_at_fork(after_in_child=lambda: open({str(made)!r}, 'a').write('x') and None)\n"
        "from rlm_agent.worker import link\nlink.PacketLink.receive = lambda self: os._exit(3)"
    )
    await passed(2)
    assert 1 < len(made.read_text()) < 20  # hundreds, if nothing held them back


HANGING_HOOKS = {
    "before": "import os, time\nos.register_at_fork(before=lambda: time.sleep(600))",
    "in the child": "import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(600))",
}


@pytest.mark.parametrize("hook", HANGING_HOOKS)
async def test_a_fork_hook_that_hangs_costs_its_own_cell(session: Session, hook: str) -> None:
    await session.execute("kept = 42")
    await session.execute(HANGING_HOOKS[hook])
    result = await session.execute("print(kept)")
    assert result.stdout == "42\n"
    assert any("died after an earlier cell" in notice for notice in result.notices)


PARENTS_HOOKS = {
    "hangs": "import os, time\nos.register_at_fork(after_in_parent=lambda: time.sleep(600))",
    "exits late": "import os, time\nos.register_at_fork(after_in_parent=lambda: (time.sleep(0.5), os._exit(1)))",
}


@pytest.mark.parametrize("hook", PARENTS_HOOKS)
async def test_a_process_that_can_be_no_checkpoint_does_not_take_the_place_of_one(
    session: Session, hook: str
) -> None:
    await session.execute("kept = 42")
    await session.execute(PARENTS_HOOKS[hook])
    result = await session.execute("print(kept)")
    assert any("died after an earlier cell" in notice for notice in result.notices)
    assert (await session.execute("import os; os._exit(1)")).rolled_back
    assert (await session.execute("print(kept)")).stdout == "42\n"


async def test_a_process_that_a_hook_has_stopped_becomes_a_checkpoint_all_the_same(session: Session) -> None:
    await session.execute(
        "import os, signal, time\nos.register_at_fork("
        "after_in_parent=lambda: time.sleep(0.3), after_in_child=lambda: os.kill(os.getppid(), signal.SIGSTOP))"
    )
    assert (await session.execute("kept = 42")).notices == ()
    result = await session.execute("print(kept)")
    assert (result.stdout, result.notices) == ("42\n", ())


async def test_nobody_is_ended_for_a_checkpoint_that_is_none(session: Session) -> None:
    """The hook hangs at the second fork: of the process that takes a cell back, and then of its child."""
    await session.execute("kept = 42")
    await session.execute(
        "import os, time\nforks = 0\n"
        "def hook():\n    global forks\n    forks += 1\n    if forks == 2: time.sleep(600)\n"
        "os.register_at_fork(after_in_parent=hook)"
    )
    assert (await session.execute("import os; os._exit(1)")).rolled_back
    for n in range(3):
        assert (await session.execute("kept += 1\nprint(kept)")).stdout == f"{43 + n}\n"


async def test_a_process_in_which_no_standby_can_live_is_given_up_for_the_one_before(
    session: Session,
) -> None:
    await session.execute("kept = 42")
    await session.execute("import os, sys\nos.register_at_fork(after_in_child=lambda: os._exit(1))")
    result = await session.execute("print(kept)")
    assert result.stdout == "42\n"
    assert any("died after an earlier cell" in notice for notice in result.notices)


async def test_each_cell_that_breaks_the_process_is_taken_back(session: Session) -> None:
    await session.execute("kept = 0")
    for n in range(1, 8):
        assert (
            await session.execute("import rlm_agent.frames\nrlm_agent.frames.parse = None")
        ).status == "ok"
        result = await session.execute("kept += 1\nprint(kept)")
        assert (result.stdout, result.stderr) == (f"{n}\n", "")
        assert ["unable to run another cell" in notice for notice in result.notices] == [True]


async def test_a_worker_that_dies_idle_does_not_take_the_cell_with_it(sandbox: Sandbox) -> None:
    async with Session(sandbox, SPEC, echo) as session:
        for n in range(5):
            pids = await session.execute(f"import os\nx{n} = os.getppid()\nprint(os.getpid())")
            os.kill(await child_of(int(pids.stdout)), signal.SIGKILL)
            result = await session.execute(f"y{n} = 1\nprint(x{n} > 1, llm_query('on'))")
            assert (result.stdout, result.notices) == ("True echo on\n", ())
