"""The Docker environment beyond the catalogue: its life, its errors, and what it leaves behind."""

import asyncio
import contextlib
import getpass
import os
import random
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme
from rlm_agent.folders import CONTEXT_FOLDER, NOTE, SHORTCUT
from rlm_environments.containers import profile
from rlm_environments.containers.engine import Engine
from rlm_environments.containers.shortcut import Shortcut
from rlm_environments.docker import DockerEnvironment, DockerSandbox

from rlm_core import limits
from rlm_core.cell import CellResult
from rlm_core.environment import make_environment
from rlm_core.errors import ConfigError, EngineError, PolicyNotEnforceable, SandboxLost
from rlm_core.session import Session
from tests.conftest import Recorder, echo
from tests.support.engine_relay import EngineRelay
from tests.support.small_engine import small_engine
from tests.support.ssh_server import ssh_server
from tests.support.waiting import passed

pytestmark = pytest.mark.needs("docker")
SMALL: dict[str, Any] = {"memory": "512MiB", "pids": 100, "disk": "64MiB", "interrupt_grace": 0.3}


@pytest.fixture
def engine() -> Engine:
    return Engine.connect()


def environment(**kwargs: Any) -> DockerEnvironment:
    made = make_environment("docker", {**SMALL, **kwargs})
    assert isinstance(made, DockerEnvironment)
    return made


@pytest_asyncio.fixture
async def container() -> AsyncIterator[DockerSandbox]:
    running = await environment().start()
    yield running
    await running.stop()


def is_there(engine: Engine, sandbox_id: str) -> bool:
    return bool(engine.api.containers(all=True, filters={"label": f"rlm.session={sandbox_id}"}))


async def gone_within(engine: Engine, sandbox_id: str, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while await asyncio.to_thread(is_there, engine, sandbox_id):  # noqa: ASYNC110 - the engine tells no sooner
            await asyncio.sleep(0.1)


async def test_a_cell_a_call_a_context_and_a_crash(container: DockerSandbox) -> None:
    async with Session(container, environment().spec, echo) as session:
        await session.put_context("In the beginning\0\udc80")
        result = await session.execute("kept = 1\nprint(len(context), llm_query('hi'))")
        assert result.stdout == "18 echo hi\n"
        assert (await session.execute("import os; os._exit(3)")).rolled_back
        assert (await session.execute("print(kept)")).stdout == "1\n"


async def test_a_stopped_sandbox_leaves_nothing(engine: Engine) -> None:
    sandbox = await environment().start()
    folder = sandbox.shared_folder
    assert folder is not None and is_there(engine, sandbox.id)
    await sandbox.stop()
    await sandbox.stop()
    assert not is_there(engine, sandbox.id)
    assert not folder.parent.exists()


async def test_a_session_of_a_sandbox_that_was_stopped_says_so_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sandbox = await environment().start()
    async with Session(sandbox, environment().spec, echo) as session:
        cell = asyncio.ensure_future(session.execute("import signal; print(1); signal.pause()"))
        await asyncio.sleep(0)
        await sandbox.stop()
        with pytest.raises(SandboxLost, match=r"^the sandbox has been stopped$"):
            await cell
    assert not caplog.records


async def test_the_policy_as_the_engine_has_it(container: DockerSandbox, engine: Engine) -> None:
    found = engine.api.inspect_container(container.container)
    host = found["HostConfig"]
    assert host["NetworkMode"] == "none" and found["Config"]["NetworkDisabled"]
    assert host["ReadonlyRootfs"] and not host["Privileged"]
    assert sorted(host["CapAdd"]) == ["KILL", "SETGID", "SETUID"] and host["CapDrop"] == ["ALL"]
    assert host["Memory"] == host["MemorySwap"] == 512 << 20
    assert host["PidsLimit"] == 100 + profile.RESERVED_PIDS
    assert host["LogConfig"]["Type"] == "none"
    assert host["IpcMode"] == host["CgroupnsMode"] == "private"
    assert [(each["Destination"], each["RW"]) for each in found["Mounts"]] == [("/context", False)]
    assert not host["Binds"] and not host["Devices"] and host["AutoRemove"]
    assert found["Config"]["Hostname"] == "sandbox" and not found["Config"]["Tty"]
    own = {name.partition("=")[0] for name in found["Config"]["Env"]}
    assert not own & set(os.environ) - {"PATH", "LANG", "HOME", "USER"}


async def test_only_the_agent_takes_the_shortcut_past_the_engine(container: DockerSandbox) -> None:
    assert container._shortcut.transport is not None
    assert container.shared_folder is not None
    assert [each.name for each in container.shared_folder.iterdir()] == [NOTE]
    path = f"{CONTEXT_FOLDER}/{SHORTCUT}"
    async with Session(container, environment().spec, echo) as session:
        result = await session.execute(f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})")
    assert result.error is not None and result.error.type == "FileNotFoundError"


async def test_without_the_shortcut_all_goes_over_stdio(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_here(self: Shortcut, path: Path) -> None:
        raise OSError("no /proc")

    monkeypatch.setattr(Shortcut, "listen", not_here)
    sandbox = await environment().start()
    try:
        assert sandbox._shortcut.transport is None and sandbox.shared_folder is not None
        async with Session(sandbox, environment().spec, echo) as session:
            assert (await session.execute("print(llm_query('hi'))")).stdout == "echo hi\n"
    finally:
        await sandbox.stop()


@pytest.mark.parametrize("cell", ["import time; time.sleep(600)", "while True: pass"])
async def test_a_sandbox_ends_at_the_end_of_its_lifetime(cell: str, engine: Engine) -> None:
    made = environment(lifetime=3)
    sandbox = await made.start()
    async with Session(sandbox, made.spec, echo) as session:
        with pytest.raises(SandboxLost, match=r"lifetime of 3 s is over"):
            await session.execute(cell)
    await sandbox.stop()
    await gone_within(engine, sandbox.id, 10)


@pytest.mark.parametrize("is_left", [True, False], ids=["left", "taken away"])
async def test_another_host_takes_a_sandbox_over(is_left: bool, engine: Engine, recorder: Recorder) -> None:
    first = await environment().start()
    session = Session(first, environment().spec, echo)
    await session.open()
    await session.execute("kept = 42")
    await session.put_context("one")
    busy: asyncio.Task[CellResult] | None = None
    assert first._shortcut.transport is not None
    if is_left:
        await first.let_go()
    else:
        beside = Session(first, environment().spec, echo, observer=recorder)
        await beside.open()
        busy = asyncio.create_task(beside.execute("print('busy')\nimport time; time.sleep(600)"))
        await recorder.saw("busy\n")
    second = await environment().attach(first.id, first.token)
    again = Session(second, environment().spec, echo, session_id=session.id)
    await again.open()
    if busy is not None:
        with pytest.raises(SandboxLost, match="another host has taken the container over"):
            await busy
        await first.stop()  # it is not this one's any more, and stays
    assert (await again.execute("print(kept)")).stdout == "42\n"
    assert await again.put_context("two") == 1
    assert (await again.execute("print(context_0, context)")).stdout == "one two\n"
    await again.aclose()
    await first.let_go()
    await second.stop()
    assert not is_there(engine, first.id)


async def test_who_takes_a_session_over_hears_of_a_cell_that_runs_there(recorder: Recorder) -> None:
    first = await environment().start()
    session = Session(first, environment().spec, echo, observer=recorder)
    await session.open()
    code = "class Bad:\n  def __repr__(self): raise SystemExit\nkept, bad = 42, Bad()\nprint('busy')\n"
    cell = asyncio.create_task(session.execute(code + "import time; time.sleep(600)"))
    await recorder.saw("busy\n")
    second = await environment().attach(first.id, first.token)
    again = Session(second, environment().spec, echo, session_id=session.id)
    await again.open()
    with pytest.raises(SandboxLost, match="another host"):
        await cell
    with pytest.raises(ConfigError, match="still runs: wait for its end, or interrupt it"):
        await again.execute("x = 1")
    await again.interrupt()
    async with asyncio.timeout(20):
        while (await again._introduce()).running_cell:
            await passed(0.01)
    assert (await again.execute("print(kept)")).stdout == "42\n"
    await again.aclose()
    await second.stop()
    await first.stop()


async def test_a_host_with_another_token_takes_nothing_over(
    container: DockerSandbox, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WELCOME_SECONDS", 1.0)
    refused = asyncio.Event()

    async def wait(call: Any) -> Any:
        await refused.wait()
        return await echo(call)

    async with Session(container, environment().spec, wait, observer=recorder) as session:
        running = asyncio.create_task(
            session.execute("print('busy', flush=True)\nfor n in range(30): print(llm_query(str(n)))\nx = 1")
        )
        await recorder.saw("busy\n")
        with pytest.raises(SandboxLost, match="is this its token"):
            await environment().attach(container.id, "mistyped")
        refused.set()
        assert (await running).stdout == "busy\n" + "".join(f"echo {n}\n" for n in range(30))
        assert (await session.execute("print(x)")).stdout == "1\n"


@pytest.mark.parametrize("first", ["engine", "shortcut"])
async def test_a_connection_that_breaks_costs_nothing(
    first: str, container: DockerSandbox, recorder: Recorder
) -> None:
    answered = 0

    async def count(call: Any) -> Any:
        nonlocal answered
        answered += 1
        return await echo(call)

    async with Session(container, environment().spec, count, observer=recorder) as session:
        running = asyncio.create_task(
            session.execute(
                "import time\nfor n in range(40): print(llm_query(str(n)), flush=True); time.sleep(0.02)"
            )
        )
        for number in (3, 13, 23):
            await recorder.saw(f"echo {number}\n")
            assert container._stream is not None
            if first == "shortcut" and number == 3:
                container._shortcut.close()
            else:
                container._stream.transport.abort()
        result = await running
        assert result.stdout == "".join(f"echo {n}\n" for n in range(40))
        assert answered == 40


async def test_a_cell_that_ends_all_that_is_its_own_loses_nothing(container: DockerSandbox) -> None:
    async with Session(container, make_environment("docker", SMALL).spec, echo) as session:
        await session.execute("kept = 42")
        for number in (1, 15):
            await session.execute(f"import os\nos.kill(-1, {number})")
        assert (await session.execute("import os; os._exit(1)")).rolled_back
        assert (await session.execute("print(kept)")).stdout == "42\n"


async def test_memory_that_runs_out_costs_the_cell_and_not_the_session(container: DockerSandbox) -> None:
    async with Session(container, environment().spec, echo) as session:
        await session.execute("kept = bytearray(50 << 20)")
        result = await session.execute("more = [bytearray(b'x') * (1 << 20) for _ in range(2000)]")
        assert result.rolled_back and "more memory" in str(result.rollback)
        assert (await session.execute("print(len(kept))")).stdout == f"{50 << 20}\n"


HOST = """
import asyncio, sys
from rlm_core.environment import make_environment
from rlm_core.session import Session
async def main():
    environment = make_environment("docker", {"lease": 2, "memory": "256MiB"})
    starting = environment.start()
    print("starting", flush=True)
    sandbox = await starting
    print(sandbox.id, flush=True)
    async with Session(sandbox, environment.spec, None) as session:
        await session.execute("import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)")
asyncio.run(main())
"""


async def kill_a_host(moment: float, folder: Path) -> None:
    host = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HOST,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert host.stdout is not None
    await host.stdout.readline()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(host.wait(), moment)
    assert host.returncode is None, "it ended by itself"
    os.kill(host.pid, signal.SIGKILL)
    await host.wait()


def processes_that_name(folder: Path) -> list[str]:
    """Such as a janitor, which has its host's folder as an argument."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(str(path))
    return found


@pytest.mark.timeout(300)
async def test_a_killed_host_leaves_nothing_when_the_lease_is_over(engine: Engine, tmp_path: Path) -> None:
    """Fifty hosts, five at once, killed at any moment of a start or of a cell."""
    before = {each.id for each in await environment().running()}
    chance = random.Random(7)
    for _ in range(10):
        await asyncio.gather(*(kill_a_host(chance.uniform(0.0, 2.5), tmp_path) for _ in range(5)))
    async with asyncio.timeout(40):
        while True:
            left = {each.id for each in await environment().running()} - before
            files = os.listdir(tmp_path)  # noqa: PTH208
            if not left and not files and not processes_that_name(tmp_path):
                break
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("option", ["privileged", "volumes", "network_mode", "cap_add", "devices", "user"])
def test_options_of_the_engine_can_not_be_passed(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        make_environment("docker", {option: True})


async def test_an_unknown_runtime_says_what_there_is() -> None:
    with pytest.raises(PolicyNotEnforceable, match=r"no runtime 'kata'; it has: .*runc"):
        await environment(runtime="kata").start()


async def test_files_that_do_not_fit_the_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match="set memory to"):
        await environment(memory="128MiB", disk="100MiB").start()


async def test_a_remote_engine_gets_the_context_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "In the beginning " * 200_000
    async with EngineRelay() as relay:
        monkeypatch.setenv("DOCKER_HOST", relay.address)
        sandbox = await environment().start()
        assert sandbox.shared_folder is None
        async with Session(sandbox, environment().spec, echo) as session:
            await session.put_context(text)
            result = await session.execute("print(len(context), llm_query('far'))")
            assert result.stdout == f"{len(text)} echo far\n"
        await sandbox.stop()


async def test_an_engine_that_stops_in_the_middle_of_a_run_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, recorder: Recorder
) -> None:
    path = f"/tmp/rlm-test-engine-{os.getpid()}.sock"
    async with EngineRelay(path) as relay:
        monkeypatch.setenv("DOCKER_HOST", relay.address)
        made = environment(lease=2)
        sandbox = await made.start()
        async with Session(sandbox, made.spec, echo, observer=recorder) as session:
            running = asyncio.create_task(
                session.execute("import time\nprint('on', flush=True)\ntime.sleep(600)")
            )
            await recorder.saw("on")
            relay.stop()
            with pytest.raises(SandboxLost, match="no container engine") as caught:
                await running
            assert "\n" not in str(caught.value)
        await sandbox.stop()
    await gone_within(engine, sandbox.id, 20)


async def test_a_sandbox_that_ran_out_of_memory_says_so(engine: Engine, container: DockerSandbox) -> None:
    with pytest.raises(SandboxLost, match=r"ran out of memory.*set memory to more"):
        async with Session(container, environment().spec, echo) as session:
            result = await session.execute(
                "x = bytearray(1 << 30)\nfor i in range(0, 1 << 30, 4096): x[i] = 1"
            )
            assert result.status == "rolled_back"
            engine.api.kill(container.container)
            await session.execute("1")


async def test_a_context_that_the_disk_has_no_room_for_is_one_line_and_the_session_lives(
    container: DockerSandbox, tmp_path: Path
) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(100 << 20)
    container.shared_folder = None
    async with Session(container, environment().spec, echo) as session:
        with pytest.raises(ConfigError, match=r"can't store it.*(too large|No space left)"):
            await session.put_file("big", big)
        assert (await session.execute("print(1)")).stdout == "1\n"


async def test_an_engine_behind_tls_is_remote_and_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), authority.issue_cert("host@test.example")
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    client.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    client.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    async with EngineRelay(tls=server) as relay:
        monkeypatch.setenv("DOCKER_HOST", relay.address)
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
        monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # requests would rather have these
            monkeypatch.delenv(name, raising=False)
        sandbox = await environment().start()
        async with Session(sandbox, environment().spec, echo) as session:
            await session.put_context("x" * 5_000_000)
            result = await session.execute("print(len(context), llm_query('far'))")
            assert result.stdout == "5000000 echo far\n"
        await sandbox.stop()


def test_a_context_of_the_command_line_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONTEXT", "no-such-context")
    with pytest.raises(EngineError, match="no such context"):
        Engine.connect()
    monkeypatch.setenv("DOCKER_CONTEXT", "default")
    assert Engine.connect().is_local


@pytest.mark.needs("sshd")
async def test_an_engine_behind_ssh_is_remote_and_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with ssh_server(tmp_path) as port:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("DOCKER_HOST", f"ssh://{getpass.getuser()}@127.0.0.1:{port}")
        sandbox = await environment().start()
        async with Session(sandbox, environment().spec, echo) as session:
            await session.put_context("x" * 5_000_000)
            result = await session.execute("print(len(context), llm_query('far'))")
            assert result.stdout == "5000000 echo far\n"
        await sandbox.stop()
        await asyncio.to_thread(Engine.connect().api.close)


def test_a_full_disk_of_the_engine_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with small_engine(tmp_path, megabytes=24) as address:
        monkeypatch.setenv("DOCKER_HOST", address)
        done = subprocess.run(
            [Path(sys.executable).parent / "rlm", "image", "build", "--base", "debian"],
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        f"rlm: the disk of the engine at {address} is full: free some, e.g. with docker system prune"
    )


async def test_an_engine_that_can_not_see_our_folder_gets_the_context_streamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = Path("/nonexistent/context")
    monkeypatch.setattr(DockerSandbox, "_make_context_folder", lambda self: elsewhere)
    sandbox = await environment().start()
    assert sandbox.shared_folder is None
    async with Session(sandbox, environment().spec, echo) as session:
        await session.put_context("streamed")
        assert (await session.execute("print(context)")).stdout == "streamed\n"
    await sandbox.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="whoever may not change the group has one of their own")
async def test_the_agent_reads_contexts_as_one_of_the_hosts_group() -> None:
    group = os.getegid()
    os.setegid(64_321)  # in which nobody is, in the container neither
    try:
        sandbox = await environment().start()
        assert sandbox.shared_folder is not None
        async with Session(sandbox, environment().spec, echo) as session:
            await session.put_context("shared")
            assert (await session.execute("print(context)")).stdout == "shared\n"
        await sandbox.stop()
    finally:
        os.setegid(group)
