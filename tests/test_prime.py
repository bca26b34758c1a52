"""environment="prime": the real SDK, unchanged, against a service of ours on loopback."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from rlm_environments.prime import PrimeEnvironment

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import make_environment
from rlm_core.errors import ConfigError, EngineError, PolicyNotEnforceable, SandboxLost
from rlm_core.session import Session
from tests.conftest import Recorder, echo
from tests.fakes.prime import FakePrime
from tests.support.clouds import (
    ends_at_ctrl_c,
    reaped_by_command,
    run_the_snippet_of,
    what_the_doctor_says_of,
)

pytestmark = [pytest.mark.needs("docker"), pytest.mark.usefixtures("prime")]


def environment(**kwargs: Any) -> PrimeEnvironment:
    made = make_environment("prime", {"memory": "1GiB", "lease": 3.0, **kwargs})
    assert isinstance(made, PrimeEnvironment)
    return made


async def test_what_is_lost_while_the_sdk_attaches_again_is_sent_again(prime: FakePrime) -> None:
    asked: list[str] = []

    async def answer(call: Call) -> Answer | Failure:
        asked.append(call.prompt)
        if len(asked) in (20, 150, 300):
            prime.drop_streams()
        return await echo(call)

    made = environment()
    sandbox = await made.start()
    async with Session(sandbox, made.spec, answer) as session:
        code = "for n in range(400): r = llm_query(str(n)); print(r == f'echo {n}', end=' ')"
        assert (await session.execute(code)).stdout == "True " * 400
    assert asked == [str(n) for n in range(400)]
    await sandbox.stop()


async def test_tokens_that_expire_are_renewed(prime: FakePrime) -> None:
    made = environment()
    sandbox = await made.start()
    async with Session(sandbox, made.spec, echo) as session:
        prime.expire_tokens()
        await session.put_context("x" * 1_000_000)
        assert (await session.execute("print(len(context))")).stdout == "1000000\n"
    await sandbox.stop()


@pytest.mark.parametrize("how", ["TERMINATED", "TIMEOUT"])
async def test_a_sandbox_that_the_service_ends_under_a_cell_is_one_clear_line(
    prime: FakePrime, recorder: Recorder, how: str
) -> None:
    made = environment()
    sandbox = await made.start()
    async with Session(sandbox, made.spec, echo, observer=recorder) as session:
        cell = asyncio.ensure_future(session.execute("print('on')\nimport time; time.sleep(600)"))
        await recorder.saw("on")
        await asyncio.to_thread(prime.terminate, sandbox._box, how)
        with pytest.raises(SandboxLost) as caught:
            await cell
    assert "\n" not in str(caught.value)
    await sandbox.stop()


@pytest.mark.parametrize(
    ("status", "message"), [(402, "no funds"), (401, "PRIME_API_KEY"), (422, r"Prime refused: .*422")]
)
async def test_a_refusal_is_one_clear_line(prime: FakePrime, status: int, message: str) -> None:
    prime.refuse_next = [status]
    with pytest.raises(EngineError, match=message) as caught:
        await environment().start()
    assert "\n" not in str(caught.value)


async def test_without_a_key_it_says_which_variable_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRIME_API_KEY")
    with pytest.raises(ConfigError, match="PRIME_API_KEY"):
        await environment().start()


async def test_nothing_of_a_sandbox_is_exposed_and_it_has_no_network(prime: FakePrime) -> None:
    sandbox = await environment().start()
    asked = prime.machines[sandbox._box].request
    assert asked["network_allowlist"] == [] and "network_denylist" not in asked
    assert not asked.get("environment_vars") and not asked.get("secrets")
    await sandbox.stop()
    assert not [each for each in prime.requests if "expose" in each or "network" in each]
    full = await environment(network="full").start()
    assert "network_allowlist" not in prime.machines[full._box].request
    await full.stop()


def test_what_it_can_not_hold_is_refused() -> None:
    with pytest.raises(PolicyNotEnforceable, match="runtime"):
        environment(runtime="runsc")
    with pytest.raises(ConfigError, match="no_such"):
        environment(no_such=1)


async def test_a_start_that_is_cancelled_while_the_request_is_on_its_way_leaves_nothing(
    prime: FakePrime,
) -> None:
    def running() -> set[str]:
        return {each.id for each in prime.machines.values() if each.status in ("PENDING", "RUNNING")}

    before = running()
    prime.create_seconds = 0.5
    start = asyncio.ensure_future(environment().start())
    async with asyncio.timeout(20):
        while not any(each == "POST /api/v1/sandbox" for each in prime.requests):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    start.cancel()
    await asyncio.wait([start])
    prime.create_seconds = 0.0
    assert start.cancelled()
    assert len(prime.machines) > len(before) and running() == before


def test_the_doctor_starts_nothing_that_costs_money(prime: FakePrime) -> None:
    before = len(prime.machines)
    what_the_doctor_says_of("prime")
    assert len(prime.machines) == before


def test_the_snippet_of_the_docs_runs(prime: FakePrime, tmp_path: Path) -> None:
    run_the_snippet_of("Prime", tmp_path)
    assert any("my-project" in each.request["labels"] for each in prime.machines.values())


@pytest.mark.parametrize("stage", ["POST /api/v1/sandbox", "batchGet", "upload", "CommandSession/Start"])
async def test_ctrl_c_at_any_moment_of_a_start_leaves_nothing(
    prime: FakePrime, stage: str, tmp_path: Path
) -> None:
    def running() -> set[str]:
        return {each.id for each in prime.machines.values() if each.status in ("PENDING", "RUNNING")}

    before = running()
    await ends_at_ctrl_c("prime", prime.requests, stage, tmp_path)
    assert running() == before


async def test_the_command_ends_what_another_process_has_started() -> None:
    sandbox = await environment().start()
    await asyncio.to_thread(reaped_by_command, "prime", sandbox.id)
    await sandbox.stop()


async def test_a_request_that_is_told_to_wait_is_made_again(prime: FakePrime) -> None:
    """Ten seconds later: the SDK's own pause."""
    prime.refuse_next = [429]
    sandbox = await environment().start()
    await sandbox.stop()
    assert sum(each == "POST /api/v1/sandbox" for each in prime.requests) == 2
