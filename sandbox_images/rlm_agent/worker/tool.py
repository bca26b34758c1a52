"""A function of the host's that cells call like any other."""

import json
from typing import Any

from rlm_agent.worker.query import Queries


class ToolError(Exception):
    """The tool raised, or could not be called like this; the message is the host's."""


class Tool:
    """Arguments and result travel as JSON; what JSON has not got is an error."""

    def __init__(self, queries: Queries, name: str, description: str) -> None:
        self._queries = queries
        self.__name__ = name
        self.__doc__ = description

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            body = json.dumps({"args": args, "kwargs": kwargs}).encode()
        except (TypeError, ValueError) as error:
            raise TypeError(f"{self.__name__}: arguments must be made of JSON's types: {error}") from None
        reply = self._queries.call_tool(self.__name__, body)
        if not reply.ok:
            raise ToolError(reply.error)
        return json.loads(reply)

    def __reduce__(self) -> tuple[type["Tool"], tuple[Queries, str, str]]:
        return Tool, (self._queries, self.__name__, self.__doc__ or "")

    def __repr__(self) -> str:
        return f"<tool {self.__doc__}>"
