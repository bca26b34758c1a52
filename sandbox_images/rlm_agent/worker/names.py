"""The names that the REPL gives to a cell, restored after it when a cell took one for itself."""

import re
from collections.abc import Collection
from typing import Any

from rlm_agent import limits
from rlm_agent.worker import context, variables
from rlm_agent.worker.query import Queries
from rlm_agent.worker.tool import Tool, ToolError

QUERY_NAMES = ("llm_query", "llm_query_batched", "rlm_query", "rlm_query_batched")
NO_VALUE = object()
MUTE = re.compile(r"<[^>]*\b(object|at 0x[0-9a-f]+)\b.*>", re.DOTALL)
"""What an object looks like that has no text of its own: `<re.Match object; …>`, `<generator …>`."""


class Names:
    def __init__(self, namespace: dict[str, Any], queries: Queries) -> None:
        self._namespace = namespace
        self._queries = queries
        self._answer: dict[str, Any] = {"content": "", "ready": False}
        self._textless: Any = NO_VALUE
        """An answer whose text could not be had."""
        self._values: dict[str, Any] = {name: getattr(queries, name) for name in QUERY_NAMES}
        self._values |= {
            "history": [],
            "answer": self._answer,
            "FINAL": self.FINAL,
            "FINAL_VAR": self.FINAL_VAR,
            "SHOW_VARS": self.SHOW_VARS,
            "ToolError": ToolError,
        }
        namespace.update(self._values)

    @property
    def reserved(self) -> Collection[str]:
        return self._values.keys()

    def FINAL(self, value: Any) -> None:
        """Give the final answer."""
        self._answer.update(content=value, ready=True)

    def FINAL_VAR(self, name_or_value: Any) -> None:
        """Give the final answer as the value of a variable, by its name, or as a value itself.

        Raises:
            NameError: a name that no variable has; never an answer by itself.
        """
        value = name_or_value
        if isinstance(value, str) and value.strip().isidentifier():
            value = self._namespace.get(value.strip(), NO_VALUE)
            if value is NO_VALUE:
                raise NameError(
                    f"FINAL_VAR: there is no variable {name_or_value!r}; assign it first, "
                    f"or use FINAL(...) to give a text. {self.SHOW_VARS()}"
                )
        self.FINAL(value)

    def SHOW_VARS(self) -> str:
        """Name and type of every variable made so far."""
        found = variables.visible(self._namespace, self.reserved)
        if not found:
            return "No variables yet."
        return "Variables: " + ", ".join(f"{k} ({variables.type_name(v)})" for k, v in found.items())

    def add_context(self, index: int, value: Any) -> None:
        """Bind `context_<index>`, and `context` to it: there is something new to be answered."""
        self.bind(f"context_{index}", value)
        self.bind("context", value)
        self._reopen_answer()

    def begin_child(self, prompt: str) -> None:
        """For a session forked in the middle of a call: the prompt is its context, the answer is open."""
        parent_context = self._values.get("context")
        for name in [name for name in self._values if name.startswith("context_")]:
            del self._values[name]
            self._namespace.pop(name, None)  # the cell may have deleted it
        self.bind("parent_context", parent_context)
        self.add_context(0, prompt)

    def _reopen_answer(self) -> None:
        self._answer.clear()
        self._answer.update(content="", ready=False)

    def bind(self, name: str, value: Any) -> None:
        self._values[name] = self._namespace[name] = value

    def bind_all(self, bindings: list[list[str]]) -> None:
        """Name, kind and text of each; kinds are those of the wire's Binding."""
        for name, kind, text in bindings:
            if kind == "removed":
                self._values.pop(name, None)
                self._namespace.pop(name, None)
            elif kind == "tool":
                self.bind(name, Tool(self._queries, name, text))
            else:
                value = context.decode(memoryview(text.encode("utf-8", "surrogatepass")), "json")
                if kind == "items":
                    self._values[name].extend(value)
                else:
                    self.bind(name, value)

    def restore(self) -> list[str]:
        """Put every name back; a value that a cell gave to one is kept under `<name>_`.

        Returns remarks for the model.
        """
        self._accept_rebound_answer()
        notices: list[str] = []
        for name, value in self._values.items():
            found = self._namespace.get(name, NO_VALUE)
            if found is value:
                continue
            self._namespace[name] = value
            if found is not NO_VALUE:
                self._namespace[f"{name}_"] = found
                notices.append(f"`{name}` belongs to the REPL and was restored; your value is in `{name}_`.")
        return notices[: limits.MAX_NOTICES]

    def _accept_rebound_answer(self) -> None:
        """`answer = {"content": …, "ready": True}` means what it says."""
        found: Any = self._namespace.get("answer")
        if found is self._answer or not issubclass(type(found), dict):
            return
        is_one = True  # also where its own methods fail: not again in the next cell
        try:
            is_one = bool({"content", "ready"} & found.keys())
            if is_one:
                self._answer.update(found)
        finally:
            if is_one:
                self._namespace["answer"] = self._answer

    def final_answer(self) -> tuple[bool, str]:
        """Whether `answer` is ready, and its content as text.

        Raises:
            ValueError: the content is too long to be sent, or an object that says nothing of what it holds.
            BaseException: what its `__str__` raised. It stays in all cases, but is no longer ready, and is
                not asked again until it is.
        """
        ready, content = bool(self._answer.get("ready")), self._answer.get("content", "")
        if content is self._textless and not ready:
            return False, ""  # it would hold up every cell
        self._textless = NO_VALUE
        try:
            text = content if type(content) is str else str(content)
            if type(content) is not str and MUTE.fullmatch(text):
                raise ValueError(
                    f"{text[:100]} is no answer: give what it holds, as match.group() of a match"
                )
            if len(text.encode("utf-8", "surrogatepass")) > limits.MAX_ANSWER:
                raise ValueError(
                    f"the answer has {len(text):,} characters; at most {limits.MAX_ANSWER:,} bytes"
                )
        except BaseException as error:  # an interrupt, too: it may take for ever
            self._answer["ready"] = False
            self._textless = content
            if ready or not isinstance(error, Exception):
                raise
            return False, ""
        return ready, text
