"""What a worker is given to do, against one that lies and one that does not read."""

import asyncio
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from rlm_agent import limits
from rlm_agent.chain import Chain, Ended, Work
from rlm_agent.errors import SessionGone
from rlm_agent.frames import Frame, Kind, packets
from rlm_agent.result import Death

FULL = b"#" * (4 << 16)
"""More than a link takes."""


class Worker:
    """The other end of the link, and the supervisor of a session that has no processes."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self._deaths = 0
        supervision: Any = self
        self.chain = Chain("session", supervision, self.lost.append)
        self._link = self.chain.worker_link
        self._link.setblocking(False)
        self.chain.hear()

    async def signal(self, session_id: str, pid: int, number: int) -> None: ...

    async def resume(self, session_id: str) -> None: ...

    async def end(self, session_id: str) -> None: ...

    def say(self, kind: Kind, **header: object) -> None:
        for packet in packets(Frame(kind, header).encode()):
            self._link.send(packet)

    def ready(self, **header: object) -> None:
        self.say(Kind.READY, pid=os.getpid(), **{"cell": "", "died": None, **header})

    def do(self, name: str, body: bytes = b"") -> tuple[Work, "asyncio.Future[Ended]"]:
        """It, and how it will have ended."""
        ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        work = Work(Frame(Kind.EXECUTE, {"cell": name}, body), ended.set_result, 1.0)
        self.chain.do(work)
        return work, ended

    async def fill(self) -> None:
        """Answer cells without reading them, until not even a small one goes into the link any more."""
        for size in (50_000, 1_000, 0):
            _, ended = self.do("cell", b"#" * size)
            while not self.chain._unsent:
                self.say(Kind.RESULT, cell="cell", status="ok")
                self.ready(cell="cell")
                await ended
                await self.chain.started()
                _, ended = self.do("cell", b"#" * size)
            await self.die(ended)

    async def answer(self, name: str) -> None:
        """One more cell, to its end."""
        _, ended = self.do(name)
        self.say(Kind.RESULT, cell=name, status="ok")
        self.ready(cell=name)
        await ended
        await self.chain.started()

    async def die(self, ended: "asyncio.Future[Ended]") -> None:
        """Of what it has been given, it says."""
        self._deaths += 1
        self.ready(cell="cell", died={"pid": self._deaths, "exit": 1, "begun": True})
        assert isinstance(await ended, Death)
        await self.chain.started()

    async def drain(self) -> list[bytes]:
        """What is read of the files that come, until nothing comes for a while."""
        found: list[bytes] = []
        loop = asyncio.get_running_loop()
        while True:
            arrived = asyncio.Event()
            loop.add_reader(self._link, arrived.set)
            try:
                await asyncio.wait_for(arrived.wait(), 0.2)
            except TimeoutError:
                return found
            finally:
                loop.remove_reader(self._link)
            _, ancillary, _, _ = self._link.recvmsg(1 << 17, socket.CMSG_SPACE(64))
            for _, _, payload in ancillary:
                (fd,) = struct.unpack("i", payload)
                found.append(os.pread(fd, 100, 0))
                os.close(fd)


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[Worker]:
    made = Worker()
    made.ready()
    await made.chain.started()
    yield made
    await made.chain.close()


def _file(path: Path, text: str) -> int:
    path.write_text(text)
    return os.open(path, os.O_RDONLY)


class Restless(Worker):
    """Says that it is ready whenever it is signalled, and never ends."""

    def __init__(self) -> None:
        super().__init__()
        self.kills = 0

    async def signal(self, session_id: str, pid: int, number: int) -> None:
        self.kills += number == signal.SIGKILL
        self.ready()


async def test_a_cell_can_not_put_off_its_end_by_saying_again_that_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "READY_SECONDS", 0.3)
    restless = Restless()
    restless.ready()
    await restless.chain.started()
    work, ended = restless.do("cell")
    restless.chain.interrupt(work)
    outcome = await asyncio.wait_for(ended, 10)
    await restless.chain.close()
    assert isinstance(outcome, SessionGone)
    assert restless.kills >= 2


@pytest.mark.parametrize("is_killed", [True, False])
async def test_a_cell_whose_memory_the_kernel_took_says_so(
    worker: Worker, is_killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = 1  # of an earlier cell
    monkeypatch.setattr("rlm_agent.chain.out_of_memory_kills", lambda: kills)
    worker.ready()
    await worker.answer("cell")
    _, ended = worker.do("cell")
    kills += is_killed
    worker.ready(cell="cell", died={"pid": 5, "signal": 9, "begun": True})
    outcome = await ended
    assert isinstance(outcome, Death)
    assert ("more memory than the sandbox has" in outcome.detail) is is_killed


@pytest.mark.parametrize("end", ["it says that it died of it", "cancelled"])
async def test_a_file_that_was_not_sent_in_time_is_never_sent(
    worker: Worker, end: str, tmp_path: Path
) -> None:
    """Its number may be a file of another session's by then."""
    await worker.fill()
    fd = _file(tmp_path / "own", "a context of its own")

    async def put() -> Ended:
        try:
            return await worker.chain.outcome(Frame(Kind.CONTEXT, {"cell": "context_0"}), 1.0, 0, [fd])
        finally:
            os.close(fd)

    putting = asyncio.create_task(put())
    await asyncio.sleep(0)
    assert worker.chain._unsent
    if end == "cancelled":
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
    else:
        await worker.die(putting)
    other = _file(tmp_path / "other", "another session's")
    assert other == fd
    assert await worker.drain() == []
    os.close(other)
    own = _file(tmp_path / "own", "a context of its own")
    loading = asyncio.create_task(
        worker.chain.outcome(Frame(Kind.CONTEXT, {"cell": "context_1"}), 1.0, 0, [own])
    )
    assert await worker.drain() == [b"a context of its own"]
    worker.say(Kind.RESULT, cell="context_1", status="ok")
    assert isinstance(await loading, Frame) and not worker.lost
    os.close(own)


async def test_a_full_link_takes_the_rest_when_it_can(worker: Worker) -> None:
    _, ended = worker.do("cell", 3 * FULL)
    _, later = worker.do("later")
    assert await worker.drain() == []
    worker.say(Kind.RESULT, cell="cell", status="ok")
    worker.ready(cell="cell")
    await ended
    await worker.chain.started()
    worker.say(Kind.RESULT, cell="later", status="ok")
    assert isinstance(await later, Frame)


async def test_what_waits_behind_other_work_ends_at_once_when_it_is_interrupted(worker: Worker) -> None:
    _, first = worker.do("first")
    work, second = worker.do("second")
    worker.chain.interrupt(work)
    assert second.result() is None and not first.done()
    worker.chain.interrupt(work)  # it has ended
    worker.say(Kind.RESULT, cell="first", status="ok")
    assert isinstance(await first, Frame) and worker.chain.interrupt_reason == ""


async def test_whoever_waits_hears_that_all_is_lost(worker: Worker) -> None:
    _, first = worker.do("first")
    _, second = worker.do("second")
    worker.chain.lose("it is over")
    _, third = worker.do("third")
    for ended in (first, second, third):
        assert isinstance(ended.result(), SessionGone) and str(ended.result()) == "it is over"
    assert worker.lost == ["it is over"]
