"""A sandbox and a session that outlive a completion: contexts, variables and histories add up."""

import asyncio
import logging

from rlm_core import repl_history
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import Sandbox, SandboxSource
from rlm_core.errors import LimitExceeded, RLMError, SandboxLost
from rlm_core.observer import Observer
from rlm_core.run import Run
from rlm_core.session import Session
from rlm_core.tasks import finish_first
from rlm_core.text import one_line
from rlm_core.types import RLMChatCompletion

log = logging.getLogger("rlm_core.persistence")
HISTORY_SECONDS = 10.0
"""After a run, for its conversation to be put into the REPL."""


class _OfTheRun(Observer):
    """What comes out of a cell is told to the run that it is of."""

    def __init__(self, repl: "PersistentRepl") -> None:
        self._repl = repl

    def output(self, text: str, *, is_error: bool) -> None:
        if self._repl.run is not None:
            self._repl.run.observer.output(text, is_error=is_error)


class PersistentRepl:
    """Of one `RLM`; one completion after the other."""

    def __init__(self, source: SandboxSource) -> None:
        self._source = source
        self._turn = asyncio.Lock()
        self._sandbox: Sandbox | None = None
        self._session: Session | None = None
        self.run: Run | None = None
        """That is at work in it."""
        self.contexts = self.histories = 0

    async def complete(self, run: Run) -> RLMChatCompletion:
        """Raises what `Run.complete` raises; a sandbox that is lost takes its variables with it, and the next
        completion starts a new one."""
        return await run.watched(self._complete(run))

    async def _complete(self, run: Run) -> RLMChatCompletion:
        await run.in_time(self._turn.acquire())
        self.run = run
        try:
            session = await run.in_time(self._open())
            run.earlier = (self.contexts, self.histories)
            self.contexts += 1
            try:
                completion = await run.in_session(session, self._source, put_context=True)
            except LimitExceeded:
                await self._keep_history(session, run)
                raise
            await self._keep_history(session, run)
            return completion
        except SandboxLost:
            await finish_first(self._close())
            raise
        finally:
            self.run = None
            self._turn.release()

    async def aclose(self) -> None:
        async with self._turn:
            await self._close()

    async def _open(self) -> Session:
        if self._session is None:
            self._sandbox = await self._source.start()
            session = Session(self._sandbox, self._source.spec, self._handle, observer=_OfTheRun(self))
            try:
                await session.open()
            except BaseException:
                await finish_first(self._close())
                raise
            self._session = session
        return self._session

    async def _handle(self, call: Call) -> Answer | Failure:
        if self.run is None:
            return Failure("REFUSED", "no completion is running")
        return await self.run.handle(call)

    async def _keep_history(self, session: Session, run: Run) -> None:
        """What can't be kept costs no answer, which was paid for, but the REPL."""
        names = [f"history_{self.histories}", *([] if run.config.compaction else ["history"])]
        try:
            async with asyncio.timeout(HISTORY_SECONDS):
                await repl_history.bind(session, names, run.messages)
            self.histories += 1
        except (RLMError, TimeoutError) as error:
            log.warning("the conversation is not kept in the REPL: %s", one_line(str(error), 300))
            await finish_first(self._close())

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
