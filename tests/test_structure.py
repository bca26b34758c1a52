"""How the repository is put together: dependencies, names, sizes, and what must never be imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "rlm_core"
ENVIRONMENTS = ROOT / "environments" / "rlm_environments"
AGENT = ROOT / "sandbox_images" / "rlm_agent"
SOURCES = [
    path
    for folder in (CORE, ENVIRONMENTS, AGENT, ROOT / "tests", ROOT / "benchmarks")
    for path in folder.rglob("*.py")
    if "_pb2" not in path.name
]
SDKS = ("openai", "anthropic", "google.genai", "litellm", "portkey_ai", "xllamacpp", "docker", "modal")
UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def imported(folder: Path) -> set[str]:
    return {name for path in folder.rglob("*.py") if "_pb2" not in path.name for name in imports(path)}


def test_the_orchestrator_knows_the_wire_contract_and_no_environment() -> None:
    ours = {name for name in imported(CORE) if name.startswith(("rlm_agent", "rlm_environments"))}
    assert {name.rpartition(".")[0] or name for name in ours} <= {"rlm_agent.rpc", "rlm_agent.rpc.v1"}


def test_no_code_but_the_environments_asks_which_environment_it_is() -> None:
    names = {path.stem for path in ENVIRONMENTS.glob("*.py")} | {"modal"}
    for path in CORE.rglob("*.py"):
        compared = [
            side
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq))
            for side in (node.left, *node.comparators)
        ]
        assert not {side.value for side in compared if isinstance(side, ast.Constant)} & names, path


def test_the_agent_needs_the_standard_library_and_grpc_only() -> None:
    outside = {name.partition(".")[0] for name in imported(AGENT)} - set(sys.stdlib_module_names)
    assert outside == {"grpc", "google", "rlm_agent"} or outside == {"grpc", "rlm_agent"}


def test_worker_and_supervisor_never_load_grpc() -> None:
    program = "import sys, rlm_agent.supervisor, rlm_agent.repl; print([m for m in sys.modules if 'grpc' in m or 'google' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("folder", [CORE, ENVIRONMENTS], ids=lambda folder: folder.name)
def test_the_host_can_not_unpickle(folder: Path) -> None:
    assert not {name.partition(".")[0] for name in imported(folder)} & UNPICKLERS


def test_the_host_unpacks_no_archive() -> None:
    assert not imported(CORE) & {"tarfile", "zipfile"}
    sources = [path.read_text() for path in (*CORE.rglob("*.py"), *ENVIRONMENTS.rglob("*.py"))]
    assert not [text for text in sources if ".extractall(" in text or "unpack_archive" in text]


def test_importing_the_library_loads_no_sdk_and_starts_nothing() -> None:
    program = f"import sys, threading, rlm_core; print([m for m in {SDKS} if m in sys.modules], threading.active_count())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] 1\n"


def test_no_init_file_makes_a_folder_a_top_level_package() -> None:
    for name in ("environments", "proto", "sandbox_images"):
        assert not (ROOT / name / "__init__.py").exists()
    assert all((folder / "py.typed").exists() for folder in (CORE, ENVIRONMENTS, AGENT))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_fit_a_head_and_functions_a_screen(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name
            assert node.returns is not None, node.name
        if isinstance(node, ast.ExceptHandler) and isinstance(node.body[0], ast.Pass) and len(node.body) == 1:
            assert not (isinstance(node.type, ast.Name) and node.type.id == "Exception"), "swallowed"


def test_the_generated_code_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "proto" / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_three_packages_and_the_text(tmp_path: Path) -> None:
    import zipfile

    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "rlm_core/rlm.py",
        "rlm_core/py.typed",
        "rlm_core/demo/kjv.txt.xz",
        "rlm_environments/local.py",
        "rlm_agent/__main__.py",
        "rlm_agent/image/Dockerfile",
        "rlm_agent/image/requirements.txt",
        "rlm_environments/containers/seccomp.toml",
        "rlm_agent/rpc/v1/agent_pb2.pyi",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests", "proto", "benchmarks"))]
