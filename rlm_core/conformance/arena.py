"""Where checks run: sandboxes of one environment, the same one for all that leave it as it was."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import Environment, Sandbox, make_environment
from rlm_core.observer import Observer
from rlm_core.session import Session
from rlm_core.types import TokenUsage

Handle = Callable[[Call], Awaitable[Answer | Failure]]


async def echo(call: Call) -> Answer | Failure:
    """The sub-LM of most checks: says what it was asked; prompts that begin with `fail` fail."""
    if call.prompt.startswith("fail"):
        return Failure("PROVIDER", f"no answer to {call.prompt}")
    return Answer(f"echo {call.prompt}", call.model or "echo", TokenUsage(len(call.prompt), 1))


class Arena:
    """`kwargs` are the policy that the environment is checked with, such as an image or a region."""

    def __init__(self, name: str, kwargs: Mapping[str, Any]) -> None:
        """Raises ConfigError for an unknown environment or a wrong field."""
        self.name = name
        self.kwargs = {"interrupt_grace": 0.5, "cell_timeout": 60.0, **kwargs}
        self.environment = self.make()
        self._shared: Sandbox | None = None

    def make(self, **policy: Any) -> Environment:
        """Another object of the same environment, as another process would have it."""
        return make_environment(self.name, {**self.kwargs, **policy})

    async def sandbox(self) -> Sandbox:
        """The one that checks share; a new one where a check has ended it."""
        if self._shared is not None and await self._shared.epitaph():
            await self.aclose()
        if self._shared is None:
            self._shared = await self.environment.start()
        return self._shared

    @asynccontextmanager
    async def session(
        self, handle: Handle = echo, observer: Observer | None = None
    ) -> AsyncIterator[Session]:
        """A new session in the shared sandbox."""
        sandbox = await self.sandbox()
        async with Session(sandbox, self.environment.spec, handle, observer=observer) as session:
            yield session

    @asynccontextmanager
    async def fresh(self, **policy: Any) -> AsyncIterator[tuple[Sandbox, Session]]:
        """A sandbox of its own with this policy, and a session in it."""
        environment = self.make(**policy)
        sandbox = await environment.start()
        try:
            async with Session(sandbox, environment.spec, echo) as session:
                yield sandbox, session
        finally:
            await sandbox.stop()

    async def aclose(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None:
            await shared.stop()
