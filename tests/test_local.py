"""The local environment: nothing of the host leaks in, nothing of a run stays."""

import asyncio
import os
import secrets
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlm_core import limits
from rlm_core.environment import make_environment, parse_spec
from rlm_core.errors import ConfigError, PolicyNotEnforceable, SandboxLost
from rlm_core.session import Session
from tests.conftest import echo
from tests.support.processes import descendants, gone

SECRET = f"sk-do-not-find-me-{secrets.token_hex(8)}"

READ_EVERYTHING = """
import os, pathlib
found = []
def look(where, data):
    if SECRET.encode() in data: found.append(where)
look("environ", repr(dict(os.environ)).encode())
me, pids = os.getpid(), []
pid = me
while pid > 1:   # this process and every one above it, up to the agent
    stat = open(f"/proc/{pid}/stat").read()
    if "rlm_agent" not in open(f"/proc/{pid}/cmdline").read(): break
    pids.append(pid)
    pid = int(stat.rpartition(")")[2].split()[1])
for pid in pids:
    for name in ("environ", "cmdline", "maps"):
        try: look(f"{pid}/{name}", open(f"/proc/{pid}/{name}", "rb").read())
        except OSError: pass
    try:
        memory = open(f"/proc/{pid}/mem", "rb")
        for line in open(f"/proc/{pid}/maps"):
            if " rw-p " not in line: continue
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            memory.seek(start)
            try: look(f"{pid}/mem", memory.read(end - start))
            except OSError: pass
    except OSError: pass
for fd in os.listdir("/proc/self/fd"):
    try: look(f"fd {fd} {os.readlink('/proc/self/fd/' + fd)}", os.pread(int(fd), 1 << 20, 0))
    except OSError: pass
base = pathlib.Path.cwd().parents[2]
for folder, _, names in os.walk(base):
    for path in (os.path.join(folder, name) for name in names):
        try: os.path.isfile(path) and look(path, open(path, "rb").read())
        except OSError: pass   # it has gone since
print(len(pids) >= 3, found)
"""


async def test_no_key_is_anywhere_a_cell_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, SECRET)
    environment = make_environment("local", {})
    sandbox = await environment.start()
    try:
        async with Session(sandbox, environment.spec, echo) as session:
            # Put together here, so that the search does not find itself.
            code = f"SECRET = {SECRET[:5]!r} + {SECRET[5:]!r}\n{READ_EVERYTHING}"
            control = await session.execute(
                f"import os\nos.environ['LEAK'] = {SECRET[:5]!r} + {SECRET[5:]!r}\n{code}"
            )
            assert "'environ'" in control.stdout  # the search finds what is there
        async with Session(sandbox, environment.spec, echo) as session:
            result = await session.execute(
                code.replace('(f"{pid}/mem"', "(f\"{pid}/mem\" if pid != me else 'own'")
            )
        assert result.stdout.startswith("True"), result.stdout + result.stderr
        hits = result.stdout.partition("[")[2]
        assert not hits.replace("'own'", "").strip("], \n"), result.stdout
    finally:
        await sandbox.stop()


async def test_the_agents_token_is_in_no_environment_and_no_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = make_environment("local", {})
    sandbox = await environment.start()
    try:
        agent = Path(f"/proc/{sandbox.pid}")  # type: ignore[attr-defined]
        for name in ("environ", "cmdline"):
            assert sandbox.token.encode() not in (agent / name).read_bytes()
    finally:
        await sandbox.stop()


async def test_the_environment_is_an_allow_list_and_what_the_user_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOMETHING", "of the host")
    environment = make_environment("local", {"env": {"PASSED": "yes"}})
    sandbox = await environment.start()
    async with Session(sandbox, environment.spec, echo) as session:
        result = await session.execute(
            "import os; print(sorted(os.environ)); print(os.environ['PASSED'], os.getcwd())"
        )
    await sandbox.stop()
    names, second = result.stdout.splitlines()
    assert "SOMETHING" not in names and "PASSED" in names
    assert set(eval(names)) <= {
        "GLIBC_TUNABLES", "GRPC_VERBOSITY", "HOME", "LANG", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS", "PASSED", "PATH", "RLM_SESSION_SOCKET", "LC_CTYPE",
    }  # fmt: skip
    assert second.startswith("yes /") and second.endswith(f"/work/{session.id}")


async def test_the_folder_is_private_and_gone_afterwards() -> None:
    sandbox = await make_environment("local", {}).start()
    folder = sandbox.shared_folder.parent  # type: ignore[union-attr]
    assert folder.stat().st_mode & 0o777 == 0o700
    await sandbox.stop()
    await sandbox.stop()
    assert not folder.exists()
    assert gone(sandbox.pid)  # type: ignore[attr-defined]


async def test_inherited_fds_are_closed(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        sandbox = await make_environment("local", {}).start()
        async with Session(sandbox, parse_spec({}), echo) as session:
            code = "import os\nfor fd in range(256):\n  if os.path.lexists(f'/proc/self/fd/{fd}'): print(os.readlink(f'/proc/self/fd/{fd}'))"
            result = await session.execute(code)
        await sandbox.stop()
    assert str(tmp_path) not in result.stdout and "socket" in result.stdout


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGTERM])
def test_a_host_that_is_killed_leaves_no_process_and_no_file(deadly: signal.Signals) -> None:
    program = textwrap.dedent(
        """
        import asyncio
        from rlm_core.environment import make_environment
        from rlm_core.observer import Observer
        from rlm_core.session import Session

        class Seen(Observer):
            def __init__(self):
                self.seen = asyncio.Event()

            def output(self, text, *, is_error):
                self.seen.set()

        async def main():
            environment = make_environment("local", {})
            sandbox = await environment.start()
            observer = Seen()
            async with Session(sandbox, environment.spec, None, observer=observer) as session:
                code = "import os, time; os.fork() or os.setsid(); os.fork(); print('up')\\nwhile True: time.sleep(60)"
                running = asyncio.create_task(session.execute(code))
                await observer.seen.wait()
                print(sandbox.pid, sandbox.shared_folder.parent, flush=True)
                await running

        asyncio.run(main())
        """
    )
    host = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    pid_text, folder = host.stdout.readline().split()
    agent = int(pid_text)
    with os.fdopen(os.pidfd_open(agent), "rb") as ended:
        below = descendants(agent)
        host.send_signal(deadly)
        host.wait(10)
        host.stdout.close()
        assert select.select([ended], [], [], 20)[0], "the agent still runs"
    assert len(below) >= 4
    assert all(gone(pid) for pid in below)
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"network": "none"}, PolicyNotEnforceable, "can't enforce network='none'"),
        ({"cpus": 1}, PolicyNotEnforceable, "cpus"),
        ({"image": "x"}, PolicyNotEnforceable, "image"),
        ({"nonsense": 1}, ConfigError, "nonsense.*known: network"),
        ({"memory": "much"}, ConfigError, "memory"),
        ({"cell_timeout": -1}, ConfigError, "cell_timeout"),
    ],
)
def test_a_policy_that_can_not_be_held_does_not_start(
    kwargs: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_environment("local", kwargs)


def test_an_unknown_environment_says_what_is_known() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown environment 'lokal', did you mean 'local'.*known: .*local"
    ):
        make_environment("lokal", {})


async def test_an_agent_that_is_stopped_holds_up_a_cell_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its code is more than what goes into the connection."""
    monkeypatch.setattr(limits, "CELL_GRACE_SECONDS", 0.5)
    environment = make_environment("local", {"interrupt_grace": 0.1})
    sandbox = await environment.start()
    async with Session(sandbox, environment.spec, echo) as session:
        os.kill(sandbox.pid, signal.SIGSTOP)  # type: ignore[attr-defined]
        try:
            async with asyncio.timeout(10):
                with pytest.raises(SandboxLost, match="did not end a cell"):
                    await session.execute("#" * limits.MAX_CODE, timeout=0.1)
        finally:
            os.kill(sandbox.pid, signal.SIGCONT)  # type: ignore[attr-defined]
    await sandbox.stop()


async def test_a_cell_hears_that_its_sandbox_has_been_stopped() -> None:
    environment = make_environment("local", {})
    sandbox = await environment.start()
    async with Session(sandbox, environment.spec, echo) as session:
        running = asyncio.create_task(session.execute("import time; time.sleep(600)"))
        await asyncio.sleep(0)
        await sandbox.stop()
        with pytest.raises(SandboxLost, match="the sandbox has been stopped"):
            await running
