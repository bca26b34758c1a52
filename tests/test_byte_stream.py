"""A sandbox over a byte stream: what its agent may say, and what it costs the host."""

from pathlib import Path

from rlm_environments.byte_stream import STDERR_BYTES, ByteStreamSandbox


class Bare(ByteStreamSandbox):
    async def stop(self) -> None:
        await self.close_link()

    def kill(self) -> None:
        self.link.remove_folder()


async def test_an_agent_that_goes_on_after_breaking_the_protocol_costs_nothing(tmp_path: Path) -> None:
    sandbox = Bare(tmp_path / "link", 60.0)
    sandbox.on_stdout(b"x" * 1_000_000)  # no greeting is as long
    sandbox.has_ended("it broke the protocol")
    for _ in range(10_000):
        sandbox.on_stdout(b"x" * 1_000)
        sandbox.has_ended("again")
    assert sandbox.ended.is_set() and len(sandbox._stderr) <= STDERR_BYTES
    assert "\n" not in await sandbox.epitaph()
    await sandbox.stop()
