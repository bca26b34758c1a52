"""Every command and snippet of the README and the docs runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlm_core.clients import known_backends
from tests.support.lm_server import lm_server

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent
ANSWER = "```repl\nFINAL('Pierre')\n```"


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(README) if name == language]


def environment(**extra: str) -> dict[str, str]:
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": "/nonexistent", "LANG": "C.UTF-8", **extra}


def test_the_readmes_commands_are_these_and_each_is_run() -> None:
    """`make test` is what CI runs, `make demo` and the others are run below."""
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert commands[:2] == ["make demo", "make test"]
    assert commands[2] == "pip install ."
    assert commands[3].startswith("rlm run ") and len(commands) == 4
    assert ".ci/engine\nmake lint\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def test_make_demo_runs(tmp_path: Path) -> None:
    """In a copy without the rest of the tree's state, with the virtual environment that is there."""
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), "demo"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "Right: the same as computed from the whole text" in done.stdout


def test_the_python_snippet_runs(tmp_path: Path) -> None:
    (tmp_path / "war_and_peace.txt").write_text("Pierre. " * 1000)
    (snippet,) = blocks("python")
    with lm_server(lambda request: ANSWER) as server:
        done = subprocess.run(
            [sys.executable, "-c", snippet],
            cwd=tmp_path,
            env=environment(OPENAI_BASE_URL=server.base_url),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Pierre {'model_usage_summaries': {'gpt-5-mini'")
    assert "Unclosed" not in done.stderr  # nobody closed it
    assert len(list((tmp_path / "logs").glob("rlm_*.jsonl"))) == 1


@pytest.mark.parametrize(("index", "printed"), [(0, "Natásha"), (1, "275000")], ids=["limits", "tools"])
def test_the_snippets_about_runs_run(index: int, printed: str, tmp_path: Path) -> None:
    snippet = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "runs.md").read_text(), re.M | re.S)[
        index
    ]
    code = "population(context)" if index else "context.split()[2]"
    with lm_server(lambda request: f"```repl\nFINAL({code})\n```") as server:
        done = subprocess.run(
            [sys.executable, "-c", snippet],
            cwd=tmp_path,
            env=environment(OPENAI_BASE_URL=server.base_url),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stdout.strip().strip(".")) == (0, printed), done.stderr


def test_the_table_of_backends_is_whole() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    assert sorted(set(re.findall(r"^\| `(\w+)` \|", page, re.M)) - {"backend"}) == known_backends()


def test_the_shell_snippet_runs(tmp_path: Path) -> None:
    (tmp_path / "war_and_peace.txt").write_text("Pierre. " * 1000)
    (line,) = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("rlm run")]
    with lm_server(lambda request: ANSWER) as server:
        env = environment(OPENAI_BASE_URL=server.base_url)
        command = shlex.split(line)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "Pierre\n"), done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_the_examples_run(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_what_the_docs_point_at_exists() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    tree = next(
        text for text in re.findall(r"^```\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    )
    for name in re.findall(r"([\w/]+\.py)", tree):
        assert (
            list(ROOT.glob(f"*/{name}")) or list(ROOT.glob(f"*/*/{name}")) or list(ROOT.glob(f"*/*/*/{name}"))
        ), name


def test_the_installed_wheel_runs_a_cell_from_its_own_files(tmp_path: Path) -> None:
    """`pip install` of what we would publish, with its dependencies taken from this environment."""
    wheels, target = tmp_path / "dist", tmp_path / "site"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = wheels.glob("rlm_sandbox-*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next((venv / "lib").glob("python3*/site-packages"))
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "test.pth").write_text(f"{target}\n{dependencies}\n")
    program = (
        "from rlm_core import RLM, ScriptedClient\nimport rlm_core\n"
        "lm = ScriptedClient(['```repl\\nimport rlm_agent; FINAL(rlm_agent.__file__)\\n```'])\n"
        "print(RLM(backend=lm).completion('x').response, rlm_core.__file__)"
    )
    done = subprocess.run(
        [str(venv / "bin" / "python"), "-c", program],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(target)) for path in done.stdout.split()), done.stdout


SANDBOXES = (ROOT / "docs" / "sandboxes.md").read_text()


@pytest.mark.needs("docker")
@pytest.mark.parametrize(
    "command",
    [line for name, text in BLOCK.findall(SANDBOXES) if name == "bash" for line in text.splitlines()],
)
def test_the_commands_about_sandboxes_run(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        shlex.split(command),
        cwd=tmp_path,
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.needs("docker")
@pytest.mark.parametrize("number", [0, 1])
def test_the_snippets_about_sandboxes_run(number: int, tmp_path: Path) -> None:
    (tmp_path / "war_and_peace.txt").write_text("Pierre. " * 1000)
    snippet = [text for name, text in BLOCK.findall(SANDBOXES) if name == "python"][number]
    with lm_server(lambda request: ANSWER) as server:
        done = subprocess.run(
            [sys.executable, "-c", snippet],
            cwd=tmp_path,
            env={**os.environ, **environment(OPENAI_BASE_URL=server.base_url, OPENAI_API_KEY="not a key")},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.stdout == "Pierre\n", done.stderr
