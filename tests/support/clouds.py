"""What is tried of every provider's environment, beside the conformance suite."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.lm_server import lm_server

DOCS = Path(__file__).resolve().parents[2] / "docs" / "environments.md"


def what_the_doctor_says_of(name: str) -> None:
    """It looks there, and tells that it started nothing."""
    rlm = str(Path(sys.executable).parent / "rlm")
    done = subprocess.run([rlm, "doctor", "--json"], capture_output=True, text=True, timeout=100)
    report = {each["name"]: each for each in json.loads(done.stdout)["environments"]}[name]
    assert report["works"] and "costs money" in report["notes"][0], report


def run_the_snippet_of(heading: str, folder: Path) -> None:
    """The program below this heading of docs/environments.md, with a scripted LM."""
    (folder / "war_and_peace.txt").write_text("Pierre. " * 1000)
    section = DOCS.read_text().partition(f"## {heading}\n")[2]
    snippet = section.partition("```python\n")[2].partition("```")[0]
    with lm_server(lambda request: "```repl\nimport six; FINAL('Pierre')\n```") as server:
        env = {**os.environ, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "not a key"}
        command = [sys.executable, "-c", snippet]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == "Pierre\n", done.stderr
