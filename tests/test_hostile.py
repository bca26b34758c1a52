"""Cells that attack the machinery itself: each may lose its own session, and nothing else."""

import asyncio
import os
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from rlm_agent.supervisor import Known, Supervisor
from rlm_agent.worker.link import Link

from rlm_core import uploads
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.context import Encoded
from rlm_core.environment import Sandbox, make_environment
from rlm_core.errors import SandboxLost
from rlm_core.session import Session
from rlm_core.types import TokenUsage
from tests.conftest import SPEC, echo
from tests.support.processes import descendants, gone, only, peak_megabytes, removed

LINK = """
import json, os, socket, struct
def link():
    for fd in range(3, 64):
        try: s = socket.socket(fileno=os.dup(fd))
        except OSError: continue
        if s.family == socket.AF_UNIX and s.type == socket.SOCK_SEQPACKET: return s
def send(kind, header, body=b""):
    h = header if isinstance(header, bytes) else json.dumps(header).encode()
    link().send(b"\\x00" + struct.pack("!BII", kind, len(h), len(body)) + h + body)
READY, RESULT = 10, 11
"""

FORGERIES = {
    "pid beyond any": "send(READY, {'pid': 2 ** 40})\nimport time; time.sleep(600)",
    "pid of init": "send(READY, {'pid': 1})\nimport time; time.sleep(600)",
    "pid of the agent's kind": f"send(READY, {{'pid': {os.getpid()}}})\nimport signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)",
    "pid is a bool": "send(READY, {'pid': True})\nimport time; time.sleep(600)",
    "died is a list": "send(READY, {'pid': os.getpid(), 'died': [1]})\nimport time; time.sleep(600)",
    "half a frame": "link().send(b'\\x00' + struct.pack('!BII', RESULT, 1 << 15, 10)); os._exit(1)",
    "result of wrong types": "send(RESULT, {'status': 5, 'error': [], 'notices': {}, 'variables': 7, 'ready': 'yes', 'no_checkpoint': 3}); os._exit(0)",
    "result nested deeply": "send(RESULT, b'[' * 100_000 + b']' * 100_000)",
    "result is NaN": "send(RESULT, b'{\"status\": NaN}'); os._exit(0)",
    "flood of ready": "for _ in range(20_000): send(READY, {'pid': os.getpid()})",
    "unknown kind": "send(99, {})",
}


async def test_no_cell_puts_off_its_end_by_saying_that_it_is_ready(sandbox: Sandbox) -> None:
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nkept = 2\n"
    code += "while True:\n  send(READY, {'pid': os.getpid()})\n  time.sleep(0.05)"
    async with Session(sandbox, SPEC, echo) as session:
        await session.execute("kept = 1")
        result = await asyncio.wait_for(session.execute(LINK + code, timeout=0.2), 20)
        assert result.status == "rolled_back"
        assert (await session.execute("kept")).stdout == "1\n"


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_what_a_worker_forges_never_reaches_another_session(sandbox: Sandbox, forgery: str) -> None:
    async with Session(sandbox, SPEC, echo) as attacker, Session(sandbox, SPEC, echo) as victim:
        await victim.execute("kept = 42")
        try:
            await attacker.execute(LINK + FORGERIES[forgery], timeout=0.5)
            await attacker.execute("1", timeout=5)
        except SandboxLost:
            pass
        assert (await victim.execute("print(kept, llm_query('on'))")).stdout == "42 echo on\n"
    await only(1, below=sandbox.pid)  # type: ignore[attr-defined]


FORGES_IN_THE_NEXT_CELL = """
go, done = os.pipe(), os.pipe()
if os.fork() == 0:
    os.read(go[0], 1)
    send(RESULT, {"cell": "any", "status": "ok", "ready": True, "variables": {}}, b"forged")
    os.write(done[1], b"x")
    os._exit(0)
"""


async def test_a_result_that_another_process_makes_up_is_not_believed(session: Session) -> None:
    await session.execute("kept = 42")
    await session.execute(LINK + FORGES_IN_THE_NEXT_CELL)
    result = await session.execute("os.write(go[1], b'x')\nos.read(done[0], 1)\nprint(kept)")
    assert result.stdout.endswith("42\n") and not result.answer_ready and not result.answer
    assert (await session.execute("print(kept)")).stdout == "42\n"


async def test_a_result_beside_the_true_one_is_not_taken_for_the_next_cells(session: Session) -> None:
    cell = "answer.update(content='of the first', ready=True)\n"
    forged = "send(RESULT, {'cell': 'any', 'status': 'ok', 'variables': {}})"
    own = await session.execute(LINK + cell + forged)
    assert own.answer == "of the first"
    following = await session.execute("answer.update(content='', ready=False)\nprint('second')")
    assert (following.stdout, following.answer) == ("second\n", "")


async def test_a_checkpoint_that_a_cell_has_stopped_takes_over_all_the_same(session: Session) -> None:
    await session.execute("kept = 42")
    assert (await session.execute("import os\nos.kill(os.getppid(), 19)\nkept = 0\nos._exit(1)")).rolled_back
    assert (await session.execute("print(kept)")).stdout == "42\n"


@pytest.mark.needs("runsc")
async def test_so_it_does_where_the_kernel_tells_of_no_death() -> None:
    """gVisor has no pidfd: when the time of the cell is up, whoever is stopped goes on."""
    environment = make_environment("docker", {"runtime": "runsc", "interrupt_grace": 0.2})
    sandbox = await environment.start()
    try:
        async with Session(sandbox, environment.spec, echo) as session:
            await session.execute("kept = 42")
            code = "import os\nos.kill(os.getppid(), 19)\nkept = 0\nos._exit(1)"
            assert (await session.execute(code, timeout=0.5)).rolled_back
            assert (await session.execute("print(kept)")).stdout == "42\n"
    finally:
        await sandbox.stop()


async def test_a_cell_that_leaves_the_sessions_process_group_is_still_stopped(session: Session) -> None:
    await session.execute("kept = 42")
    code = "import os, signal, time\nos.setpgid(0, os.getppid()); os.setsid(); signal.signal(2, signal.SIG_IGN)\ntime.sleep(600)"
    assert (await session.execute(code, timeout=0.3)).rolled_back
    assert (await session.execute("print(kept)")).stdout == "42\n"


async def test_killing_the_root_ends_the_session_and_all_it_started() -> None:
    environment = make_environment("local", {})
    sandbox = await environment.start()
    async with Session(sandbox, SPEC, echo) as session:
        code = "import os, subprocess\np = subprocess.Popen(['sleep', '300'], start_new_session=True)\nprint(p.pid, flush=True)\nos.kill(os.getsid(0), 9)"
        with pytest.raises(SandboxLost):
            async with asyncio.timeout(20):
                await session.execute(code)
                while True:  # until the supervisor has heard of it
                    await session.execute("1")
    await only(1, below=sandbox.pid)  # type: ignore[attr-defined]
    await sandbox.stop()


@pytest.mark.parametrize("victim", ["agent", "supervisor"])
async def test_a_killed_agent_or_supervisor_is_a_clear_error_and_leaves_nothing(victim: str) -> None:
    sandbox = await make_environment("local", {}).start()
    pid: int = sandbox.pid  # type: ignore[attr-defined]
    async with Session(sandbox, SPEC, echo) as session:
        await session.execute("import signal, time; signal.signal(2, signal.SIG_IGN)")
        running = asyncio.create_task(session.execute("import os\nos.fork() or os.setsid()\ntime.sleep(600)"))
        await session.interrupt()  # answered: the cell has begun
        below = descendants(pid)
        os.kill(pid if victim == "agent" else min(below), signal.SIGKILL)
        with pytest.raises(SandboxLost, match=r"agent has ended|supervisor"):
            await running
    await sandbox.stop()
    assert all(gone(each) for each in below)


async def test_a_stopped_agent_does_not_hold_up_its_host() -> None:
    sandbox = await make_environment("local", {}).start()
    pid: int = sandbox.pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(30):
        await sandbox.stop()
    assert gone(pid)


async def test_a_caller_that_ignores_its_fork_holds_up_nobody_else(sandbox: Sandbox) -> None:
    code = """
import os, socket, struct, json, time
s = socket.socket(socket.AF_UNIX); s.connect(os.environ["RLM_SESSION_SOCKET"])
h = json.dumps({"id": 1, "kind": "rlm"}).encode()
s.sendall(struct.pack("!BII", 20, len(h), 1) + h + b"x")
time.sleep(600)
"""
    forking = asyncio.Event()

    async def fork(call: Call) -> Answer | Failure:
        forking.set()
        child = await attacker.fork(call_id=call.id)
        await child.aclose()
        return Answer("no", "m", TokenUsage())

    async with Session(sandbox, SPEC, fork) as attacker:
        running = asyncio.create_task(attacker.execute(code))
        await forking.wait()
        async with asyncio.timeout(5):
            async with Session(sandbox, SPEC, echo) as other:
                assert (await other.execute("print(1)")).stdout == "1\n"
        await attacker.interrupt()
        await running


async def test_opens_that_are_cancelled_leave_nothing(sandbox: Sandbox) -> None:
    pid: int = sandbox.pid  # type: ignore[attr-defined]
    for step in range(15):
        opening = asyncio.create_task(_open_and_close(sandbox))
        for _ in range(step * 3):
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises((asyncio.CancelledError, SandboxLost)):
            await opening
            raise asyncio.CancelledError
    async with Session(sandbox, SPEC, echo) as session:
        assert (await session.execute("print(1)")).stdout == "1\n"
    await only(1, below=pid)


async def _open_and_close(sandbox: Sandbox) -> None:
    async with Session(sandbox, SPEC, echo):
        pass


async def test_cells_interrupted_at_any_moment_are_never_mixed_up(session: Session) -> None:
    """Deadlines that fall before, into and after cells of about their length."""
    await session.execute("import time; kept = 0")
    for number in range(60):
        code = f"time.sleep(0.01)\nprint('cell {number}')\nkept = {number}"
        result = await session.execute(code, timeout=0.001 * (number % 30 + 1))
        assert result.status in ("ok", "timeout"), result
        assert result.stdout in ("", f"cell {number}\n")
        if result.status == "ok":
            assert (await session.execute("print(kept)")).stdout == f"{number}\n"


async def test_prompts_of_callers_that_have_gone_do_not_pile_up(sandbox: Sandbox) -> None:
    code = """
import os, socket, struct, json
h = json.dumps({"id": 1, "kind": "llm"}).encode()
data = struct.pack("!BII", 20, len(h), 4 << 20) + h + b"x" * (4 << 20)
for _ in range(100):
    s = socket.socket(socket.AF_UNIX); s.connect(os.environ["RLM_SESSION_SOCKET"]); s.sendall(data); s.close()
held = []
for _ in range(100):
    s = socket.socket(socket.AF_UNIX); s.connect(os.environ["RLM_SESSION_SOCKET"])
    try: s.sendall(data[:-1])
    except OSError: continue
    held.append(s)
"""
    async with Session(sandbox, SPEC, echo) as session:
        result = await session.execute(code)
        assert result.status == "ok", result.stderr
        assert peak_megabytes(sandbox.pid) < 400  # type: ignore[attr-defined]


async def test_a_session_that_loses_its_root_does_not_stop_the_tidying_of_another(sandbox: Sandbox) -> None:
    """A folder that takes long to remove is removed by a child of the supervisor, which is no stray."""
    async with Session(sandbox, SPEC, echo) as broken:
        async with Session(sandbox, SPEC, echo) as untidy:
            made = (
                "import os\nfor n in range(40_000): os.close(os.open(str(n), os.O_CREAT))\nprint(os.getcwd())"
            )
            folder = (await untidy.execute(made)).stdout.strip()
        with pytest.raises(SandboxLost):
            orphan = "import os, time\nif os.fork() == 0: os.setsid(); time.sleep(600)\n"
            await broken.execute(f"{orphan}os.kill(os.getsid(0), 9)\ntime.sleep(600)", timeout=5)
            await broken.execute("1", timeout=5)
    await removed(folder)


async def test_a_cell_has_no_pipe_but_its_output(sandbox: Sandbox) -> None:
    """Not that which wakes the supervisor: whoever fills it stops the supervisor for ever."""
    pipes = "import os\nfds = [f'/proc/self/fd/{n}' for n in os.listdir('/proc/self/fd')]\nprint(len({os.readlink(f) for f in fds if os.path.lexists(f) and os.readlink(f).startswith('pipe:')}))"
    async with Session(sandbox, SPEC, echo) as session:
        assert (await session.execute(pipes)).stdout == "2\n"


def test_a_pid_that_is_another_users_now_is_left_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(["sleep", "600"]) as stranger:
        known = Known(stranger.pid, os.getuid() + 1, "/nowhere")
        assert Supervisor(Link(ours))._end_tree(known) == 0
        assert stranger.poll() is None
        assert Supervisor(Link(ours))._end_tree(replace(known, user=os.getuid())) == 0
        assert stranger.wait(10) == -signal.SIGKILL


async def test_the_name_of_a_context_can_not_be_guessed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    write = uploads.write_new

    def noted(path: Path, encoded: Encoded) -> None:
        names.append(path.name)
        write(path, encoded)

    monkeypatch.setattr("rlm_core.session.write_new", noted)
    async with Session(sandbox, SPEC, echo) as session:
        await session.put_context("a secret")
        await session.put_context("another")
        assert len(set(names)) == 2 and all(len(name) == 32 and session.id not in name for name in names)
