"""The user's tools: functions of the host that cells call, and plain values that are data in the REPL.

A call travels to the host as JSON, its arguments are checked against the function's signature, and its result
travels back as JSON. Nothing of the host's is ever sent into the sandbox but that.
"""

import asyncio
import contextlib
import functools
import inspect
import json
import keyword
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import pydantic
import pydantic_core
from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core.broker.call import Answer, Failure
from rlm_core.context import encode
from rlm_core.errors import ConfigError
from rlm_core.foreign import Places
from rlm_core.text import one_line, printable
from rlm_core.types import TokenUsage

log = logging.getLogger("rlm_core.tools")

RESERVED = re.compile(
    r"(llm|rlm)_query(_batched)?|SHOW_VARS|ToolError|FINAL|FINAL_VAR|answer|parent_context|(context|history)(_\d+)?"
)
MAX_NAME_CHARS = 100
MAX_DESCRIPTION_CHARS = 2_000
MAX_ARGUMENT_CHARS, MAX_ARGUMENT_VALUES = 1 << 20, 10_000
"""Of the JSON of one call's arguments, and of the values in it."""


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    value: Any
    description: str
    """For the LM: signature and what it is for, or type and what it is."""
    function: Callable[..., Any] | None = None
    """The value, with its arguments checked; None for plain data."""

    @classmethod
    def of(cls, name: str, entry: Any) -> "Tool":
        """Raises ConfigError for a name or a value that can't be one."""
        _check_name(name)
        described = isinstance(entry, dict) and "tool" in entry and entry.keys() <= {"tool", "description"}
        value = entry["tool"] if described else entry
        text = str(entry.get("description") or "") if described else ""
        if callable(value):
            return cls(name, value, _describe_function(name, value, text), _checked(name, value))
        try:
            encode(value)
        except ConfigError as error:
            raise ConfigError(f"custom tool {name!r} is neither a function nor plain data: {error}") from None
        kind = f"`{name}`: a {type(value).__name__}"
        return cls(name, value, one_line(f"{kind}. {text}" if text else kind, MAX_DESCRIPTION_CHARS))

    def binding(self) -> pb.Binding:
        if self.function is not None:
            return pb.Binding(name=self.name, tool=self.description)
        encoded = encode({"value": self.value})
        assert isinstance(encoded.content, str)
        text = encoded.content.removeprefix('{"value":').removesuffix("}")
        return pb.Binding(name=self.name, value=text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Tools:
    """Of one level of runs."""

    tools: Mapping[str, Tool] = field(default_factory=dict)

    @classmethod
    def of(cls, custom_tools: Mapping[str, Any] | None) -> "Tools":
        """From the argument of `RLM`: functions, values, or {"tool": …, "description": …}, by name.

        Raises:
            ConfigError: one of them can't be a tool.
        """
        return cls({name: Tool.of(name, entry) for name, entry in (custom_tools or {}).items()})

    @property
    def descriptions(self) -> tuple[str, ...]:
        return tuple(tool.description for tool in self.tools.values())

    def bindings(self, inherited: "Tools | None" = None) -> list[pb.Binding]:
        """What a new session is given; one that is a fork has its parent's, which may not be its own."""
        others = inherited.tools if inherited is not None else {}
        removed = [pb.Binding(name=name, removed=True) for name in others.keys() - self.tools.keys()]
        fresh = [tool for name, tool in self.tools.items() if others.get(name) is not tool]
        return [*removed, *(tool.binding() for tool in fresh)]

    async def call(self, name: str, arguments: str, places: Places | None = None) -> Answer | Failure:
        """Call a function; what goes wrong is told to the cell. A function takes one of the `places`."""
        tool = self.tools.get(name)
        if tool is None or tool.function is None:
            return Failure("INVALID", f"there is no tool {name[:MAX_NAME_CHARS]!r}")
        if len(arguments) > MAX_ARGUMENT_CHARS:
            return Failure("TOO_LARGE", f"a tool's arguments take at most {MAX_ARGUMENT_CHARS:,} characters")
        try:
            args, kwargs = _parse(arguments)
        except OverflowError:
            return Failure("TOO_LARGE", f"a tool's arguments have at most {MAX_ARGUMENT_VALUES:,} values")
        except (ValueError, RecursionError, KeyError, TypeError):
            return Failure("INVALID", "the arguments of a tool are a JSON object with args and kwargs")
        try:
            result = await (places or Places(1)).call(tool.function, *args, **kwargs)
            text = pydantic_core.to_json(result, inf_nan_mode="constants").decode()
        except pydantic_core.PydanticSerializationError as error:
            return Failure("INVALID", f"what {name} returned is not JSON: {one_line(str(error), 300)}")
        except Exception as error:  # noqa: BLE001 - its cell's to hear
            if _is_of_arguments(error, tool.function):
                return Failure("INVALID", await asyncio.to_thread(_wrong_arguments, name, error))
            told = printable(one_line(f"{type(error).__name__}: {error}", 1_000))
            log.info("tool %s failed: %s", name, told)  # which may have words of the cell's in it
            return Failure("PROVIDER", told)
        return Answer(text, "", TokenUsage())


def _parse(arguments: str) -> tuple[list[Any], dict[str, Any]]:
    parsed = json.loads(arguments, parse_constant=_no_number)
    args, kwargs = parsed["args"], parsed["kwargs"]
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise TypeError
    if _is_large(parsed):
        raise OverflowError
    return args, kwargs


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON's")


def _is_large(value: Any) -> bool:
    """Whether there are more values in it than a call may have: pydantic makes an error of each that is
    wrong, with the interpreter to itself."""
    left, queue = MAX_ARGUMENT_VALUES, [value]
    while queue and left > 0:
        each = queue.pop()
        if isinstance(each, (dict, list)):
            left -= len(each)
            queue.extend(each.values() if isinstance(each, dict) else each)
    return left <= 0


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name[0] == "_":
        raise ConfigError(f"a custom tool's name must be one of a Python variable, not {name!r:.100}")
    if len(name) > MAX_NAME_CHARS:
        raise ConfigError(f"a custom tool's name has at most {MAX_NAME_CHARS} characters: {name[:40]}…")
    if RESERVED.fullmatch(name):
        raise ConfigError(f"custom tool {name!r}: the REPL has that name for itself; choose another")


def _checked(name: str, value: Callable[..., Any]) -> Callable[..., Any]:
    """With arguments that fit its annotations, as far as JSON's types can be made to."""
    known = inspect.isroutine(value)
    function: Callable[..., Any] = value if known else getattr(value, "__call__")  # noqa: B004, B009
    if isinstance(value, functools.partial) or inspect.isclass(value):
        function = _as_function(value)
    try:
        inspect.signature(function)
    except ValueError:
        return function  # of C code that does not tell
    config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    try:
        return pydantic.validate_call(config=config)(function)
    except (pydantic.PydanticUserError, NameError) as error:
        if getattr(error, "code", "") == "validate-call-type":
            return function  # of C code: it checks its arguments itself
        raise ConfigError(f"custom tool {name!r}: {one_line(str(error), 300)}") from None


def _as_function(value: Any) -> Callable[..., Any]:
    """Of a class, or of a partial without what its caller has given, which may be a limit of its own."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return value(*args, **kwargs)

    hints = value.func if isinstance(value, functools.partial) else value.__init__
    with contextlib.suppress(ValueError):  # of C code that does not tell
        setattr(function, "__signature__", _signature(value))  # noqa: B010 - it is a protocol of inspect's
        function.__annotations__ = dict(getattr(hints, "__annotations__", {}))
        function.__module__ = getattr(hints, "__module__", function.__module__)
    return function


def _signature(value: Callable[..., Any]) -> inspect.Signature:
    """Raises ValueError where it is not known."""
    found = inspect.signature(value)
    given = value.keywords.keys() if isinstance(value, functools.partial) else ()
    return found.replace(parameters=[each for name, each in found.parameters.items() if name not in given])


def _is_of_arguments(error: Exception, function: Callable[..., Any]) -> TypeGuard[pydantic.ValidationError]:
    """Whether they did not fit; a function may validate something itself, and pydantic names what it was."""
    is_named = isinstance(error, pydantic.ValidationError) and error.title
    return bool(is_named) and is_named == getattr(function, "__qualname__", None)


def _wrong_arguments(name: str, error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{name}: {where}: {first['msg']}"


def _describe_function(name: str, value: Callable[..., Any], text: str) -> str:
    try:
        signature = str(_signature(value))
    except (ValueError, TypeError):
        signature = "(…)"
    about = text or inspect.getdoc(value) or ""
    return one_line(
        f"`{name}{signature}`: {about}" if about else f"`{name}{signature}`", MAX_DESCRIPTION_CHARS
    )
