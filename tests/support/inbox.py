"""What comes on a stream of messages, for a test that reads it one by one."""

import asyncio

from rlm_agent.rpc.messages import MessageStream


class Inbox:
    def __init__(self, stream: MessageStream) -> None:
        self.stream = stream
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        stream.hear(self._messages.put_nowait, lambda: self._messages.put_nowait(None))

    async def read(self) -> bytes | None:
        """The next message; None at the end."""
        return await self._messages.get()

    async def write(self, message: bytes) -> None:
        await self.stream.write(message)
