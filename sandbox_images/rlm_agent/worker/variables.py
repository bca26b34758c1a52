"""What a session tells about its variables: always bounded, whatever a `__repr__` does."""

import reprlib
from collections.abc import Collection
from types import ModuleType
from typing import Any

from rlm_agent import limits

REPR_CHARS = 200

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = REPR_CHARS


def visible(namespace: dict[str, Any], reserved: Collection[str]) -> dict[str, Any]:
    """The user's own variables, oldest first."""
    found: dict[str, Any] = {}
    for name, value in list(namespace.items()):
        if (
            isinstance(name, str)
            and name not in reserved
            and len(name) <= limits.MAX_NAME_CHARS
            and not name.startswith("_")
            and not issubclass(type(value), ModuleType)  # its __class__ may be anything
        ):
            found[name] = value
            if len(found) == limits.MAX_VARIABLES:
                break
    return found


def type_name(value: Any) -> str:
    name: str = type.__dict__["__name__"].__get__(type(value))  # past a metaclass that has one of its own
    return name[: limits.MAX_NAME_CHARS]


def short_repr(value: Any) -> str:
    """At most REPR_CHARS characters; says so when the object's own repr fails."""
    try:
        text = _short.repr(value)
    except Exception as error:
        text = f"<{type_name(value)}: repr failed with {type(error).__name__}>"
    return text if len(text) <= REPR_CHARS else text[: REPR_CHARS - 1] + "…"


def full_text(value: Any) -> bytes:
    """The text of a str, the bytes of bytes, the repr of anything else."""
    if isinstance(value, bytes):
        return value
    text = value if isinstance(value, str) else repr(value)
    return text.encode("utf-8", "surrogatepass")
