"""Files of the host in a session's working folder."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core.environment import Sandbox, make_environment, parse_spec
from rlm_core.errors import ConfigError
from rlm_core.session import Session
from tests.conftest import SPEC, echo
from tests.support.agent import RawHost

READ = "import pathlib\nprint(len(pathlib.Path('data/table.csv').read_bytes()), open('empty').read() == '')"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("local", "bubblewrap", "docker")]
)
async def test_files_are_where_the_policy_says(name: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"\0x" * 1_500_000)
    (tmp_path / "none").touch()
    files = {"data/table.csv": tmp_path / "big", "empty": tmp_path / "none"}
    environment = make_environment(name, {"files": files})
    sandbox = await environment.start()
    async with Session(sandbox, environment.spec, echo) as session:
        result = await session.execute(READ)
        assert result.stdout == "3000000 True\n", result.stderr
    await sandbox.stop()


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", "x" * 2000])
async def test_a_path_that_leaves_the_folder_is_refused(sandbox: Sandbox, path: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    async with Session(sandbox, SPEC, echo) as session:
        with pytest.raises(ConfigError, match="within the working folder"):
            await session.put_file(path, tmp_path / "f")
        assert (await session.execute("print(1)")).stdout == "1\n"


@pytest.mark.parametrize("path", ["fifo", "/dev/zero", "."])
async def test_only_regular_files_are_copied(sandbox: Sandbox, path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    async with Session(sandbox, SPEC, echo) as session, asyncio.timeout(10):
        with pytest.raises(ConfigError, match="files: x: not a regular file"):
            await session.put_file("x", tmp_path / path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"env": {"": "x"}},
        {"env": {"A=B": "x"}},
        {"env": {"A": "\0"}},
        {"env": {"A": "\ud800"}},
        {"env": {"A": "x" * 40_000}},
        {"files": {"\ud800": "/etc/hostname"}},
    ],
    ids=lambda wrong: ascii(wrong)[:30],
)
def test_what_can_not_be_in_a_sandbox_is_a_clear_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))) as caught:
        parse_spec(wrong)
    assert str(caught.value).encode() and "\n" not in str(caught.value)


async def test_a_refusal_is_never_taken_for_a_lost_sandbox(sandbox: Sandbox, tmp_path: Path) -> None:
    """One in a hundred was: gRPC loses the status of a call that ends before all of it was sent."""
    (tmp_path / "f").write_bytes(bytes(3_000_000))
    async with Session(sandbox, SPEC, echo) as session:

        async def put_many() -> None:
            for _ in range(100):
                with pytest.raises(ConfigError, match="within the working folder"):
                    await session.put_file("../x", tmp_path / "f")

        await asyncio.gather(*(put_many() for _ in range(4)))


async def test_a_file_that_is_there_is_not_written_over(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    async with Session(sandbox, SPEC, echo) as session:
        await session.put_file("a", tmp_path / "f")
        await session.put_file("a", tmp_path / "f")  # the same request
        (tmp_path / "f").write_text("longer")
        with pytest.raises(ConfigError, match="FileExistsError"):
            await session.put_file("a", tmp_path / "f")


async def test_a_file_that_can_not_be_read_is_named(sandbox: Sandbox, tmp_path: Path) -> None:
    spec: Any = SPEC.model_copy(update={"files": {"a": tmp_path / "nothing"}})
    with pytest.raises(ConfigError, match=r"files: a: No such file"):
        async with Session(sandbox, spec, echo):
            pass


async def test_more_bytes_than_told_are_refused(sandbox: Sandbox) -> None:
    host = RawHost(sandbox)
    await host.open("s")

    async def parts() -> Any:
        yield pb.PutFileRequest(header=pb.FileHeader(session_id="s", path="a", size_bytes=3))
        yield pb.PutFileRequest(chunk=b"four")

    with pytest.raises(Exception, match="more bytes"):
        await host.stub.PutFile(parts(), metadata=host.metadata, timeout=20)
