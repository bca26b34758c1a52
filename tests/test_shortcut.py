"""The unix socket past the engine: one connection, and then nobody listens."""

import asyncio
import contextlib
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from rlm_environments.containers.shortcut import Shortcut

from rlm_core.errors import SandboxLost


class Heard:
    def __init__(self) -> None:
        self.data = b""
        self.lost = 0
        self.changed = asyncio.Event()

    def on_data(self, data: memoryview) -> None:
        self.data += data
        self.changed.set()

    def on_lost(self) -> None:
        self.lost += 1
        self.changed.set()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest_asyncio.fixture
async def shortcut(heard: Heard, tmp_path: Path) -> AsyncIterator[Shortcut]:
    made = Shortcut(heard.on_data, lambda full: None, heard.on_lost)
    made.listen(tmp_path / "s")
    yield made
    made.close()


async def test_the_socket_is_the_groups_and_tells_nothing_of_our_folders(
    shortcut: Shortcut, tmp_path: Path
) -> None:
    names, mode = await asyncio.to_thread(_look, tmp_path / "s")
    assert mode == 0o660 and str(tmp_path) not in names


def _look(path: Path) -> tuple[str, int]:
    return Path("/proc/net/unix").read_text(), stat.S_IMODE(path.stat().st_mode)


async def test_the_first_is_let_in_and_no_second(shortcut: Shortcut, heard: Heard, tmp_path: Path) -> None:
    path = tmp_path / "s"
    ends = [await asyncio.open_unix_connection(str(path))]
    with contextlib.suppress(ConnectionError, FileNotFoundError):
        ends.append(await asyncio.open_unix_connection(str(path)))
    transport = await shortcut.connection(is_made=True)
    assert transport is not None and not path.exists()
    transport.write(b"hello")
    assert await ends[0][0].read(5) == b"hello"
    with contextlib.suppress(ConnectionResetError):
        assert all([await reader.read() == b"" for reader, _ in ends[1:]])
    assert heard.lost == 0
    ends[0][1].write(b"there")
    await heard.changed.wait()
    assert heard.data == b"there"
    heard.changed.clear()
    for _, writer in ends:
        writer.close()
    await heard.changed.wait()
    assert heard.lost == 1 and shortcut.transport is None


async def test_one_that_is_lost_before_it_is_asked_for_is_none(
    shortcut: Shortcut, heard: Heard, tmp_path: Path
) -> None:
    _, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
    writer.close()
    await heard.changed.wait()
    assert await shortcut.connection(is_made=True) is None


async def test_an_agent_that_has_made_none_is_not_waited_for(shortcut: Shortcut, tmp_path: Path) -> None:
    assert await shortcut.connection(is_made=False) is None
    assert not (tmp_path / "s").exists()


async def test_an_agent_that_says_falsely_that_it_has_made_one_is_not_waited_for(shortcut: Shortcut) -> None:
    with pytest.raises(SandboxLost, match="says that it has connected"):
        await shortcut.connection(is_made=True)


async def test_after_the_end_nobody_is_let_in(shortcut: Shortcut, heard: Heard, tmp_path: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
    shortcut.close()
    writer.write(b"late")
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    assert shortcut.transport is None and heard.data == b"" and heard.lost == 0
    writer.close()
