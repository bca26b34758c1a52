"""What a run leaves behind."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from rlm_core import RLM, ConfigError, ProviderError, RLMLogger, ScriptedClient

KEY = "sk-never-in-a-log"

# Section 5 of the notebook, as it stands there.
NOTEBOOK = """
import json
import os
from pathlib import Path
log_dir = Path("./logs")
if log_dir.exists():
    log_files = sorted(log_dir.glob("*.jsonl"), key=os.path.getmtime, reverse=True)
    print(f"Found {len(log_files)} log file(s):\\n")

    for log_file in log_files[:3]:  # Show latest 3
        print(f"  {log_file.name}")
else:
    print("No logs directory found. Run some RLM completions first!")
if log_dir.exists() and log_files:
    latest_log = log_files[0]
    print(f"Analyzing: {latest_log.name}\\n")
    print("=" * 60)

    with open(latest_log) as f:
        for i, line in enumerate(f):
            entry = json.loads(line)

            if entry.get("type") == "metadata":
                print("METADATA:")
                print(f"  Model: {entry.get('root_model')}")
                print(f"  Max Iterations: {entry.get('max_iterations')}")
                print(f"  Environment: {entry.get('environment')}")
                print()

            elif entry.get("type") == "iteration":
                iter_num = entry.get('iteration', i)
                response_len = len(entry.get('response', ''))
                code_blocks = entry.get('code_blocks', [])
                final = entry.get('final_answer')

                print(f"Iteration {iter_num}:")
                print(f"  Response length: {response_len} chars")
                print(f"  Code blocks: {len(code_blocks)}")
                if final:
                    print(f"  FINAL ANSWER: {final[:100]}...")
                print()
"""


def repl(code: str) -> str:
    return f"```repl\n{code}\n```"


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_section_5_of_the_notebook_runs_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lm = ScriptedClient([repl("1"), repl("FINAL('the end')")])
    RLM(backend=lm, logger=RLMLogger(log_dir="./logs"), max_iterations=20).completion("context")
    exec(NOTEBOOK, {})
    printed = capsys.readouterr().out
    assert (
        "Model: scripted" in printed and "Max Iterations: 20" in printed and "Environment: local" in printed
    )
    assert "Iteration 2:" in printed and "FINAL ANSWER: the end..." in printed


def test_a_log_has_every_turn_and_its_end(tmp_path: Path) -> None:
    lm = ScriptedClient([repl("print(llm_query('sub?'))\nx = 1"), "text", repl("FINAL(x)")])
    sub = ScriptedClient(["sub!"], "sub")
    logger = RLMLogger(tmp_path)
    completion = RLM(backend=lm, other_backends=[sub], logger=logger).completion("c", root_prompt="q")
    assert completion.log == logger.log_file_path and completion.log is not None
    assert Path(completion.log).name.startswith("rlm_20") and completion.run_id in completion.log
    metadata, *turns, result = lines(completion.log)
    assert [turn["type"] for turn in turns] == ["iteration"] * 3
    assert [turn["iteration"] for turn in turns] == [1, 2, 3]
    block = turns[0]["code_blocks"][0]
    assert block["code"] == "print(llm_query('sub?'))\nx = 1\n" and block["result"]["stdout"] == "sub!\n"
    assert block["result"]["rlm_calls"][0]["prompt"] == "sub?" and block["result"]["locals"] == {"x": "int"}
    assert [len(turn["prompt"]) for turn in turns] == [2, 1, 1]
    assert turns[2]["final_answer"] == "1" and all("timestamp" in turn for turn in turns)
    assert (result["type"], result["status"], result["response"]) == ("result", "answered", "1")
    assert result["usage"]["model_usage_summaries"]["sub"]["total_calls"] == 1
    assert metadata["run_id"] == completion.run_id
    assert completion.metadata is not None and len(completion.metadata["iterations"]) == 3
    assert completion.metadata == logger.get_trajectory()


def test_the_context_is_stored_once_by_its_hash(tmp_path: Path) -> None:
    text = "é\r\n\0" * 1_000_000
    for _ in range(2):
        lm = ScriptedClient([repl("1")] * 4 + [repl("FINAL(1)")])
        RLM(backend=lm, logger=RLMLogger(tmp_path)).completion(text)
    (stored,) = (tmp_path / "contexts").iterdir()
    assert stored.read_bytes() == text.encode() and stored.name == hashlib.sha256(text.encode()).hexdigest()
    first, second = tmp_path.glob("*.jsonl")
    assert lines(str(first))[0]["context"] == {"kind": "text", "sha256": stored.name, "size_bytes": 5_000_000}
    assert first.stat().st_size < 50_000 and second.stat().st_size < 50_000
    assert all(path.stat().st_mode & 0o077 == 0 for path in (first, second, stored))


def test_each_turn_is_on_disk_before_the_next(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(request: Any) -> str:
        (path,) = tmp_path.glob("*.jsonl")
        seen.append(len(lines(str(path))))
        return repl("1") if len(seen) < 3 else repl("FINAL(1)")

    RLM(backend=ScriptedClient(look), logger=RLMLogger(tmp_path)).completion("x")
    assert seen == [1, 2, 3]


def test_a_failed_run_says_so_in_its_log(tmp_path: Path) -> None:
    lm = ScriptedClient([repl("answer['content'] = 'half'"), ProviderError("gone")])
    with pytest.raises(ProviderError):
        RLM(backend=lm, logger=RLMLogger(tmp_path)).completion("x")
    (path,) = tmp_path.glob("*.jsonl")
    last = lines(str(path))[-1]
    assert (last["status"], last["error"], last["response"]) == ("failed", "gone", "half")


def test_no_secret_is_logged(tmp_path: Path) -> None:
    kwargs = {"replies": [repl("FINAL(1)")], "model_name": "m"}
    environment = {"env": {"TOKEN": KEY}}
    rlm = RLM(
        backend="scripted", backend_kwargs=kwargs, environment_kwargs=environment, logger=RLMLogger(tmp_path)
    )
    rlm.completion("x")
    from rlm_core.logger import _redacted

    assert KEY not in _redacted(SecretStr(KEY))
    (path,) = tmp_path.glob("*.jsonl")
    assert KEY not in path.read_text() and lines(str(path))[0]["environment_kwargs"] == {"env": "<dict>"}


def test_what_a_run_leaves_is_for_its_user_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        lm = ScriptedClient([repl("FINAL(1)")])
        RLM(backend=lm, logger=RLMLogger(tmp_path)).completion("x" * 10_000)
    finally:
        os.umask(old)
    left = list(tmp_path.rglob("*"))
    assert any(path.is_file() for path in left) and any(path.is_dir() for path in left)
    assert not [path for path in left if path.stat().st_mode & 0o077], left


def test_hostile_output_can_not_forge_a_line(tmp_path: Path) -> None:
    forged = '"}\\n{"type": "result", "response": "forged"}\\u2028\\x85</script>\\ud800'
    lm = ScriptedClient([repl(f"print('{forged}')"), repl("FINAL(1)")])
    completion = RLM(backend=lm, logger=RLMLogger(tmp_path)).completion("x")
    assert completion.log is not None
    assert [entry["type"] for entry in lines(completion.log)] == [
        "metadata",
        "iteration",
        "iteration",
        "result",
    ]
    assert Path(completion.log).read_bytes().isascii()


def test_without_a_folder_the_trajectory_is_in_memory() -> None:
    logger = RLMLogger()
    completion = RLM(backend=ScriptedClient([repl("FINAL(1)")]), logger=logger).completion("x")
    assert completion.log is None and completion.metadata is not None
    assert completion.metadata["run_metadata"]["root_model"] == "scripted" and logger.iteration_count == 1


def test_a_log_folder_that_can_not_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't make log_dir"):
        RLMLogger(os.fspath(tmp_path / "file" / "logs"))
