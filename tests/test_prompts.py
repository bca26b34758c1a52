"""The first request, word for word."""

import json
from pathlib import Path

import pytest

from rlm_core import RLM, ScriptedClient
from rlm_core.prompts import PromptConfig, first_messages

SNAPSHOT = Path(__file__).parent / "snapshots" / "first_request.json"


def test_the_first_request_is_the_committed_one() -> None:
    """After a change on purpose: delete the file, run this test, and read the new one."""
    lm = ScriptedClient(["```repl\nFINAL(1)\n```"])
    RLM(backend=lm).completion("Line one.\n" * 500, root_prompt="How many lines?")
    (request,) = lm.requests
    messages = [dict(message) for message in request.messages]
    if not SNAPSHOT.exists():
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(json.dumps(messages, indent=1) + "\n")
        pytest.fail("the snapshot was missing and has been written: read it")
    assert messages == json.loads(SNAPSHOT.read_text())


def test_hints_follow_the_sub_lms_window() -> None:
    system = first_messages(PromptConfig(), "x", "q", 4_096)[0]["content"]
    assert "about 16,000 characters" in system and "about 9,800" in system
    assert "about 100,000 are read best" in first_messages(PromptConfig(), "x", "q", 1_000_000)[0]["content"]


def test_a_custom_system_prompt_is_taken_as_it_is() -> None:
    config = PromptConfig('Use {"a": {"b": 1}} and {custom_tools_section}', orchestrator=False)
    assert first_messages(config, "x", "q", 1000)[0]["content"] == config.system_prompt


def test_a_prologue_comes_after_the_task() -> None:
    messages = first_messages(PromptConfig(user_prologue="tip"), "x", None, 1000)
    assert [m["role"] for m in messages] == ["system", "user", "user"] and messages[2]["content"] == "tip"
    assert "The request is in `context` itself" in messages[1]["content"]
