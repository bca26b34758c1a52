"""The notebook: every cell runs in a Jupyter kernel, against servers on loopback in the place of OpenAI and of the book's."""

import json
import os
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from tests.support.lm_server import lm_server

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "notebook.ipynb"
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""
BOOK = (
    "Title\n*** START OF THE BOOK ***\n"
    + "CHAPTER I\nWell, Prince. " * 50_000
    + "\n*** END OF THE BOOK ***\n"
)


def answer(request: dict[str, Any]) -> str:
    """A root LM that looks first, and a sub-LM that always says the same."""
    messages = request["messages"]
    if len(messages) == 1:
        return "They meet at Anna's."
    if len(messages) == 2:
        return "Let me look.\n```repl\nprint(len(context), context[:20])\n```"
    question = messages[1]["content"]
    if "ALPHA" in question:
        return "```repl\nFINAL(42 + 17 + 99)\n```"
    if "first chapter" in question:
        return "```repl\nFINAL(llm_query('Sum up: ' + context[:100]))\n```"
    if "powers of two" in question:
        return "```repl\noutput = '\\n'.join(str(2 ** n) for n in range(20))\nFINAL_VAR('output')\n```"
    return "```repl\nFINAL(f'a book of {context.count(chr(10))} lines')\n```"


def of_claude(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A message of Anthropic's."""
    message = {"id": "m", "type": "message", "role": "assistant", "model": request["model"]}
    content = [{"type": "text", "text": "```repl\nimport math; FINAL(f'Claude: {math.factorial(10)}')\n```"}]
    usage = {"input_tokens": 1, "output_tokens": 1}
    return 200, {
        **message,
        "content": content,
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": usage,
    }


def test_every_cell_runs_and_says_what_is_true(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "book.txt").write_text(BOOK)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with (
        lm_server(answer) as server,
        lm_server(of_claude) as claude,
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as site,
    ):
        thread = Thread(target=site.serve_forever, args=(0.01,))
        thread.start()
        variables = {
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            "HOME": str(tmp_path),
            "OPENAI_API_KEY": "unused",
            "OPENAI_BASE_URL": server.base_url,
            "ANTHROPIC_API_KEY": "unused",
            "ANTHROPIC_BASE_URL": claude.base_url.removesuffix("/v1"),
            "RLM_BOOK_URL": f"http://127.0.0.1:{site.server_port}/book.txt",
        }
        done = subprocess.run(
            [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(tmp_path / "done.ipynb")],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=100,
        )
        site.shutdown()
        thread.join()
    assert done.returncode == 0, done.stderr
    said_by_all = "".join(
        "".join(output.get("text", ""))
        for cell in json.loads((tmp_path / "done.ipynb").read_text())["cells"]
        for output in cell.get("outputs", ())
    )
    for said in (
        *("Anthropic: key set", "524288", "a book of 50000 lines", "turn 2", "Claude: 3628800"),
        *("They meet at Anna's.", "158", "'gpt-4o-mini'", "code: FINAL(42 + 17 + 99)", "printed: 66"),
    ):
        assert said in said_by_all, (said, said_by_all[-3000:])


def test_it_has_the_ten_sections_of_the_original() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert [line.split(".")[0] for line in text.splitlines() if line.startswith("## ")] == [
        f"## {number}" for number in range(1, 11)
    ]
    assert not any(cell.get("outputs") for cell in cells)
