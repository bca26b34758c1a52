"""The REPL's query functions for programs that a cell starts: `from rlm_agent.repl import llm_query`.

They find the session by the environment variable that every process of a session inherits.
"""

import os

from rlm_agent.worker.query import SOCKET_VARIABLE, LMReply, Queries

__all__ = ["LMReply", "llm_query", "llm_query_batched", "rlm_query", "rlm_query_batched"]

_queries = Queries(os.environ.get(SOCKET_VARIABLE, ""))
llm_query = _queries.llm_query
llm_query_batched = _queries.llm_query_batched
rlm_query = _queries.rlm_query
rlm_query_batched = _queries.rlm_query_batched
