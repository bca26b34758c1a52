"""environment="modal": the real SDK, unchanged, against a service of ours on loopback."""

from typing import Any

import pytest
from rlm_environments.modal import ModalEnvironment

from rlm_core.environment import make_environment
from rlm_core.session import Session
from tests.conftest import echo
from tests.fakes.modal.service import FakeModal

pytestmark = [pytest.mark.needs("docker"), pytest.mark.usefixtures("modal")]


def environment(**kwargs: Any) -> ModalEnvironment:
    made = make_environment("modal", {"memory": "1GiB", "lease": 3.0, **kwargs})
    assert isinstance(made, ModalEnvironment)
    return made


@pytest.mark.parametrize("transport", ["h2", "stdio"])
async def test_both_ways_to_the_agent(modal: FakeModal, transport: str) -> None:
    made = environment(transport=transport)
    sandbox = await made.start()
    async with Session(sandbox, made.spec, echo) as session:
        result = await session.execute("print(llm_query('on'))")
        assert result.stdout == "echo on\n"
    await sandbox.stop()
