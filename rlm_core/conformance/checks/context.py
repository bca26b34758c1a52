"""The text comes in exactly, whatever is in it and whatever its size."""

import hashlib
from typing import Any

from rlm_core.conformance.arena import Arena
from rlm_core.conformance.check import check, expect
from rlm_core.context import encode

LARGE = 100_000_000
AWKWARD = 'NUL \0, CRLF \r\n, CR \r, surrogate \udc80, emoji \U0001f600, quotes """ \'\'\' \\, end"'


@check("context.text")
async def text(arena: Arena) -> None:
    """Text arrives exactly: NUL, line ends, quotes, backslashes, emoji, lone surrogates."""
    async with arena.session() as session:
        await session.put_context(AWKWARD)
        expect((await session.execute("print(ascii(context))")).stdout, ascii(AWKWARD) + "\n")


@check("context.kinds")
async def kinds(arena: Arena) -> None:
    """Bytes, lists and dicts arrive as what they are."""
    values: list[Any] = [bytes(range(256)), ["a", {"b": [1, 2.5, None, True]}], {"file.txt": "text"}, "", b""]
    async with arena.session() as session:
        for value in values:
            await session.put_context(value)
            expect((await session.execute("print(ascii(context))")).stdout, ascii(value) + "\n")


@check("context.many")
async def many(arena: Arena) -> None:
    """`context` is the latest of context_0, context_1, …"""
    async with arena.session() as session:
        for value in ("first", "second"):
            await session.put_context(value)
        expect(
            (await session.execute("print(context_0, context_1, context)")).stdout, "first second second\n"
        )


@check("context.large")
async def large(arena: Arena) -> None:
    """A text of 100 MB arrives whole."""
    value = "0123456789abcdé" * (LARGE // 16)
    encoded = encode(value)
    wanted = hashlib.sha256(value.encode()).hexdigest()
    code = "import hashlib; print(len(context), hashlib.sha256(context.encode()).hexdigest())"
    async with arena.session() as session:
        await session.put_context(encoded)
        expect((await session.execute(code)).stdout, f"{len(value)} {wanted}\n")
