"""Waiting, where there is no event to wait for."""

import asyncio


async def passed(seconds: float) -> None:
    """Wait so long: for what has no event of its own, or must not come."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    loop.call_later(seconds, over.set_result, None)
    await over
