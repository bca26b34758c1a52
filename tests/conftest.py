"""Fixtures: a real agent in a real process for every session, and no way out to the network."""

import asyncio
import ipaddress
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import Sandbox, SandboxSpec, make_environment
from rlm_core.observer import Observer
from rlm_core.session import Session
from rlm_core.types import TokenUsage
from tests.fakes.fixtures import modal, modal_service, prime, prime_service
from tests.support.machine import IN_CI, missing

__all__ = ["modal", "modal_service", "prime", "prime_service"]

SPEC = SandboxSpec(interrupt_grace=0.2, cell_timeout=30)
KEYS = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY")


def _only_loopback(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: a test that dials anything but loopback or a unix socket fails at once."""
    if event != "socket.connect" or not isinstance(args[1], tuple):
        return
    host = args[1][0]
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        raise AssertionError(f"a test dialled {host}")


if "RLM_TEST_CLOUD" not in os.environ:  # `make test-cloud`, which is asked for
    sys.addaudithook(_only_loopback)


left_out: dict[str, int] = {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what this machine can't run; not in CI, where it fails then."""
    for marker in item.iter_markers("needs"):
        (name,) = marker.args
        why = "" if name == "local" else missing(name)
        if why and IN_CI:
            pytest.fail(f"{name}: {why}")
        if why:
            left_out[f"{name}: {why}"] = left_out.get(f"{name}: {why}", 0) + 1
            pytest.skip(why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for why, count in left_out.items():
        terminalreporter.write_line(f"left out {count} tests of {why}")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


async def echo(call: Call) -> Answer | Failure:
    """The sub-LM of most tests: says what it was asked."""
    if call.prompt.startswith("fail"):
        return Failure("PROVIDER", f"no answer to {call.prompt}")
    return Answer(
        f"echo {call.prompt}",
        call.model or "echo",
        TokenUsage(input_tokens=len(call.prompt), output_tokens=1),
    )


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    running = await make_environment("local", {}).start()
    yield running
    await running.stop()


class Recorder(Observer):
    """Keeps what a session told while it ran, and wakes who waits for output."""

    def __init__(self) -> None:
        self.text = ""
        self._changed = asyncio.Event()

    def output(self, text: str, *, is_error: bool) -> None:
        self.text += text
        self._changed.set()

    async def saw(self, text: str) -> None:
        async with asyncio.timeout(20):
            while text not in self.text:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest_asyncio.fixture
async def session(sandbox: Sandbox, recorder: Recorder) -> AsyncIterator[Session]:
    async with Session(sandbox, SPEC, echo, observer=recorder) as opened:
        yield opened
