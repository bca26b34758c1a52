"""Small, pure helpers for text."""

import unicodedata
from urllib.parse import urlsplit, urlunsplit

from rlm_core import limits


def printable(text: str) -> str:
    """Text that can't steer a terminal: control and bidi characters become visible escapes."""
    if text.isprintable():
        return text
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in {"Cc", "Cf", "Cs"} else _escape(char)
        for char in text
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "backslashreplace").decode()


def told(text: str) -> str:
    """A short text of an agent's, as it may be shown: bounded, and without control characters."""
    return printable(text[: limits.MAX_TEXT_CHARS])


def shorten(text: str, limit: int) -> str:
    """At most about `limit` characters, from the head and the tail; says how much is left out."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return (
        f"{text[:half]}\n… [{len(text) - 2 * half:,} of {len(text):,} characters left out] …\n{text[-half:]}"
    )


def one_line(text: str, limit: int) -> str:
    """The text on one line, cut at `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def without_surrogates(text: str) -> str:
    """A lone surrogate can't be sent; as an escape it means the same inside a string of code."""
    return text.encode("utf-8", "backslashreplace").decode()


def without_userinfo(url: str) -> str:
    """A URL without the name and password before its host."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "<not a URL>"
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
