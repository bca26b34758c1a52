"""The bare async client that ours is measured beside: OpenAI's SDK, called as its documentation shows.

With the faster of the two HTTP libraries that it can use: with the other one it takes about three times as
long, and every ratio to it would look better.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai


@asynccontextmanager
async def bare_client(base_url: str) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Gives what makes one call."""
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key="k", http_client=openai.DefaultAioHttpClient(), max_retries=0
    ) as client:
        yield lambda: client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
