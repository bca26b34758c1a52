"""An LM on loopback that bills: it plays the root LMs of a tree by their plans, and answers sub-calls."""

import asyncio
import re
from dataclasses import dataclass

from aiohttp import web

from tests.support.counting_lm import CountingLM
from tests.support.lm_server import completion

PLAN = re.compile(r"plan (\d+)\b")


@dataclass(frozen=True)
class Plan:
    """What the tree of a run does, and how it goes."""

    runs: tuple[tuple[str, ...], ...]
    """Of each: the code of its cells, in order; then it ends. A run is asked "plan N", with its number."""
    failing: frozenset[int] = frozenset()
    """Requests, by their number, that fail: for nothing."""
    lengths: tuple[int, ...] = (10,)
    """Tokens of the answers, in turn; never more than the request allows."""
    slow: frozenset[int] = frozenset()
    """Requests that are answered a little later."""


class BillingLM(CountingLM):
    """`billed`: tokens of each request that was worked on, whether its answer arrived or not."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(lambda request: None)
        self.plan = plan
        self.billed: list[int] = []
        self.usd = 0.0
        """At 1 USD per million tokens of prompts and 2 of answers."""

    async def _serve(self, request: web.Request) -> web.Response:
        body = await request.json()
        number = self.begun
        self._count(0, 1)
        if number in self.plan.failing:
            error = {"error": {"message": "not now"}}
            return web.json_response(error, status=503, headers={"Retry-After-Ms": "1"})
        prompt = sum(len(each["content"].encode()) for each in body["messages"]) // 3
        wanted = self.plan.lengths[number % len(self.plan.lengths)]
        output = min(wanted, body.get("max_tokens", wanted))
        self.billed.append(prompt + output)
        self.usd += (prompt + 2 * output) / 1e6
        if number in self.plan.slow:
            await asyncio.sleep(0.01)
        usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        return web.json_response(completion(self._text(body["messages"]), "m", usage=usage))

    def _text(self, messages: list[dict[str, str]]) -> str:
        if len(messages) == 1:
            return "an answer"
        (number,) = {int(found) for found in PLAN.findall(messages[1]["content"])} or {0}
        cells = self.plan.runs[number]
        turn = sum(each["role"] == "assistant" for each in messages)
        return f"```repl\n{cells[turn] if turn < len(cells) else 'FINAL(1)'}\n```"
