"""A context arrives exactly as it was given."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlm_agent.worker import context as sandbox_half

from rlm_core import context
from rlm_core.context import describe, encode, read_path
from rlm_core.environment import Sandbox
from rlm_core.errors import ConfigError
from rlm_core.session import Session
from tests.conftest import SPEC, echo

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None))  # surrogates included
    | st.binary()
)
KEYS = (
    st.text(st.characters(codec=None))
    | st.integers()
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(KEYS, inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.just("__rlm__"), inner)
    ),
    max_leaves=20,
)


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down: 1, 1.0 and True differ."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, j) and same(v, w) for (k, v), (j, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    return bool(a == b)


@given(VALUES)
def test_any_value_comes_back_the_same(value: Any) -> None:
    encoded = encode(value)
    assert same(sandbox_half.decode(memoryview(b"".join(encoded.chunks())), encoded.kind), value)


TEXTS = [
    "",
    "\x00",
    "a\r\nb\rc\n",
    "\ud800 lone \udfff",
    "\ud83d\ude00",
    'ends with """',
    "'",
    "\\",
    "e\u0301 ﷽ 🙂",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("streamed", [False, True], ids=["file", "stream"])
async def test_texts_arrive_exactly(sandbox: Sandbox, text: str, streamed: bool) -> None:
    if streamed:
        sandbox.shared_folder = None
    async with Session(sandbox, SPEC, echo) as session:
        await session.put_context(text)
        result = await session.execute("print(ascii(context)); assert context is context_0")
        assert result.stdout == ascii(text) + "\n"


async def test_int_keys_and_str_keys_stay_apart(session: Session) -> None:
    await session.put_context({1: "int", "1": "str", "nested": [{2: (b"\xff", None)}]})
    result = await session.execute("print(context)")
    assert result.stdout == "{1: 'int', '1': 'str', 'nested': [{2: (b'\\xff', None)}]}\n"


async def test_contexts_are_numbered_and_context_is_the_latest(session: Session) -> None:
    assert [await session.put_context(value) for value in ("a", b"b", ["c"])] == [0, 1, 2]
    result = await session.execute("print(context_0, context_1, context_2, context)")
    assert result.stdout == "a b'b' ['c'] ['c']\n"


@pytest.mark.parametrize("streamed", [False, True], ids=["file", "stream"])
async def test_three_hundred_megabytes_arrive_exactly(sandbox: Sandbox, streamed: bool) -> None:
    text = "".join(f"{number:09x}\n" for number in range(30_000)) * 1000
    assert len(text) == 300_000_000
    if streamed:
        sandbox.shared_folder = None
    async with Session(sandbox, SPEC, echo) as session:
        await session.put_context(text)
        result = await session.execute("import hashlib; print(hashlib.sha256(context.encode()).hexdigest())")
    assert result.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, {2, 3}]}, r"context\['a'\]\[1\] is a set"),
        ({("a", 1): 1}, "key of type tuple"),
        ([object()], r"context\[0\] is a object"),
    ],
)
def test_what_can_not_be_sent_is_refused_by_its_place(value: Any, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        encode(value)


def test_a_file_and_a_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes("é\r\n".encode())
    (tmp_path / "sub" / "b.bin").write_bytes(b"\xff\x00")
    assert read_path(tmp_path / "a.txt") == "é\r\n"
    assert read_path(tmp_path) == {"a.txt": "é\r\n", "sub/b.bin": b"\xff\x00"}
    with pytest.raises(ConfigError, match="No such file"):
        read_path(tmp_path / "missing")


@given(VALUES)
def test_a_first_look_never_fails_and_is_bounded(value: Any) -> None:
    assert len(describe(value).encode()) < 20_000


def test_a_first_look_at_a_long_text_has_length_head_and_tail() -> None:
    look = describe("HEAD" + "x" * 100_000 + "```\nTAIL")
    assert "100,012 characters" in look and "HEAD" in look and "TAIL" in look and "````text" in look


def test_a_folder_is_read_without_what_is_hidden_and_within_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b/c.txt", ".env", ".git/config", "b/.secret"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_path(tmp_path) == {"a.txt": "a.txt", "b/c.txt": "b/c.txt"}
    assert read_path(tmp_path / ".env") == ".env"  # which was asked for by its name
    monkeypatch.setattr(context, "MAX_CONTEXT", 11)
    with pytest.raises(ConfigError, match="has 2 files with 12 bytes; at most 11: name less of it"):
        read_path(tmp_path)
    with pytest.raises(ConfigError, match="has 1 files"):
        (tmp_path / "a.txt").write_text("x" * 12)
        read_path(tmp_path / "a.txt")
