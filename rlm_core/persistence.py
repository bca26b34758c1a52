"""A sandbox and a session that outlive a completion: contexts, variables and histories add up."""

import asyncio
import logging

from rlm_core import repl_history
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import Sandbox, SandboxSource
from rlm_core.errors import RLMError, SandboxLost
from rlm_core.run import Run
from rlm_core.session import Session
from rlm_core.tasks import finish_first
from rlm_core.types import RLMChatCompletion

log = logging.getLogger("rlm_core.persistence")


class PersistentRepl:
    """Of one `RLM`; one completion after the other."""

    def __init__(self, source: SandboxSource) -> None:
        self._source = source
        self._turn = asyncio.Lock()
        self._sandbox: Sandbox | None = None
        self._session: Session | None = None
        self._run: Run | None = None
        self.contexts = self.histories = 0

    async def complete(self, run: Run) -> RLMChatCompletion:
        """Raises what `Run.complete` raises; a sandbox that is lost takes its variables with it, and the next
        completion starts a new one."""
        async with self._turn:
            self._run = run
            try:
                session = await run.in_time(self._open())
                run.earlier = (self.contexts, self.histories)
                self.contexts += 1
                completion = await run.complete_in(session, self._source, forked=False)
            except SandboxLost:
                await finish_first(self._close())
                raise
            finally:
                self._run = None
            try:
                await self._keep_history(session, run)
            except RLMError as error:  # the answer is there, and was paid for
                log.warning("the conversation is not kept in the REPL: %s", error)
                await finish_first(self._close())
            return completion

    async def aclose(self) -> None:
        async with self._turn:
            await self._close()

    async def _open(self) -> Session:
        if self._session is None:
            self._sandbox = await self._source.start()
            session = Session(self._sandbox, self._source.spec, self._handle)
            try:
                await session.open()
            except BaseException:
                await finish_first(self._close())
                raise
            self._session = session
        return self._session

    async def _handle(self, call: Call) -> Answer | Failure:
        if self._run is None:
            return Failure("REFUSED", "no completion is running")
        return await self._run.handle(call)

    async def _keep_history(self, session: Session, run: Run) -> None:
        names = (
            [f"history_{self.histories}"]
            if run.config.compaction
            else [f"history_{self.histories}", "history"]
        )
        await repl_history.bind(session, names, run.messages)
        self.histories += 1

    async def _close(self) -> None:
        sandbox, session = self._sandbox, self._session
        self._sandbox = self._session = None
        self.contexts = self.histories = 0
        try:
            if session is not None:
                await session.aclose()
        finally:
            if sandbox is not None:
                await sandbox.stop()
