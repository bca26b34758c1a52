"""What goes into a sandbox, laid out as files: the agent, its pinned libraries, and packages for cells.

An image of a container engine is built from it; where a provider builds no images for us, it is uploaded.
"""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlm_core.errors import EngineError
from rlm_core.text import one_line

PIP_SECONDS = 900
_packing = threading.Lock()
LOOK = "import json, os, sys; print(json.dumps([sys.version_info[:2], sys.executable, os.uname().machine]))"
"""Run with a sandbox's Python: what `Python` has to know of it."""
LIBRARIES = "opt/rlm/lib"
"""Of the agent, by their hashes; cells have another folder."""
VENV = "opt/venv"
MAX_PATH = 500
WHEELS = ("--only-binary=:all:", "--no-compile")
"""Nothing of a package that an index has is run before it is in the sandbox; addresses are refused
(rlm_core/requirements.py). An index of one's own may have packages that need one by its address."""
AGENT_PROGRAM = """\
#!{python} -I
import sys

sys.path[:0] = ["/opt/rlm/agent", "/opt/rlm/lib"]
from rlm_agent.container import main

main()
"""


@dataclass(frozen=True, slots=True)
class Python:
    """Of a sandbox."""

    version: tuple[int, int]
    executable: str
    machine: str

    @classmethod
    def parse(cls, output: str | bytes) -> "Python | None":
        """Of what LOOK has printed; None when that is something else."""
        try:
            (major, minor), executable, machine = json.loads(output)
            python = cls((int(major), int(minor)), str(executable), str(machine))
        except (ValueError, TypeError, OverflowError, RecursionError):
            return None
        path = python.executable  # empty where it does not know itself where it is
        return python if path.startswith("/") and path.isprintable() and len(path) < MAX_PATH else None


def agent_folder() -> Path:
    """Where the agent's sources are; they are files to us, nothing is imported."""
    found = importlib.util.find_spec("rlm_agent")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def sources() -> list[Path]:
    """Everything that goes into a sandbox from here."""
    folder = agent_folder()
    return sorted({*folder.rglob("*.py"), *(folder / "image").glob("*.*"), folder / "image" / "Dockerfile"})


def image_file(name: str) -> Path:
    return agent_folder() / "image" / name


def lay_out(root: Path, python: Python, packages: Sequence[str]) -> None:
    """Write all of it below `root`, as it is below `/` in the sandbox.

    Raises:
        EngineError: pip could not fetch a library or a package.
    """
    _install(root / LIBRARIES, python, ["--require-hashes", "-r", str(image_file("requirements.txt"))])
    if packages:
        _install(root / site(python), python, packages)
    lay_out_agent(root, python)
    (root / VENV / "bin").mkdir()
    for name in ("python", "python3"):
        # Relative: newer tarfile modules unpack no links to absolute paths.
        (root / VENV / "bin" / name).symlink_to(os.path.relpath(python.executable, f"/{VENV}/bin"))


def site(python: Python) -> str:
    """Where packages for cells go."""
    major, minor = python.version
    return f"{VENV}/lib/python{major}.{minor}/site-packages"


def lay_out_agent(root: Path, python: Python) -> None:
    """Write what is ours, plain files all of it: without libraries, packages and links to the Python."""
    rlm = root / "opt/rlm"
    for path in sources():
        if path.suffix == ".py" and path.parent.name != "image":
            copy = rlm / "agent/rlm_agent" / path.relative_to(agent_folder())
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (rlm / "finish.py").write_bytes(image_file("finish.py").read_bytes())
    venv = root / VENV
    for folder in (rlm / "bin", root / site(python)):
        folder.mkdir(parents=True, exist_ok=True)
    (rlm / "bin/agent").write_text(AGENT_PROGRAM.format(python=python.executable))
    (root / site(python) / "rlm_agent.pth").write_text("/opt/rlm/agent\n")
    home = Path(python.executable).parent
    (venv / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():  # whatever the umask, only root may write to it there
            path.chmod(0o644)


def tarball(python: Python, packages: Sequence[str]) -> bytes:
    """All of it as a tar file, which the user's cache keeps by a hash of what is in it."""
    digest = hashlib.sha256(repr((python, tuple(packages))).encode())
    for path in (*sources(), Path(__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    kept = _cache() / f"bundle-{digest.hexdigest()[:32]}.tar.gz"
    with _packing:  # several starts at once need it made once
        if not kept.exists():
            _pack(kept, python, packages)
    return kept.read_bytes()


def _pack(kept: Path, python: Python, packages: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="rlm-bundle-") as folder:
        root = Path(folder) / "root"
        lay_out(root, python, packages)
        buffer = io.BytesIO()
        # Without a time: whoever packs the same gets the same bytes, by which a provider keeps an image.
        with (
            gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as packed_file,
            tarfile.open(fileobj=packed_file, mode="w") as tar,
        ):
            for name in ("opt/rlm", "opt/venv"):
                tar.add(str(root / name), name, filter=as_root)
    number, part = tempfile.mkstemp(dir=kept.parent, prefix="bundle-")
    with os.fdopen(number, "wb") as file:
        file.write(buffer.getvalue())
    Path(part).rename(kept)  # whole or not at all, whoever else makes the same


def as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nobody but root may change what is in a sandbox, and everybody may read it."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mtime = 0
    runs = member.isdir() or "/bin/" in member.name
    member.mode = 0o755 if runs else 0o644
    return member


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "rlm-sandbox"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _install(target: Path, python: Python, wanted: Sequence[str]) -> None:
    """Wheels for the sandbox's Python, which is not ours, into a folder."""
    version = f"{python.version[0]}.{python.version[1]}"
    platforms = [f"manylinux{tag}_{python.machine}" for tag in ("_2_28", "_2_17", "2014")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--target", str(target), *WHEELS]
    command += ["--python-version", version, "--implementation", "cp"]
    command += [part for platform in platforms for part in ("--platform", platform)]
    try:
        # Where there are no files: pip takes those first.
        with tempfile.TemporaryDirectory(prefix="rlm-pip-") as empty:
            done = subprocess.run(
                [*command, *wanted], capture_output=True, text=True, timeout=PIP_SECONDS, cwd=empty
            )
    except subprocess.TimeoutExpired:
        raise EngineError(f"pip did not fetch the packages within {PIP_SECONDS} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            done.stderr[-300:]
        ]
        raise EngineError(f"pip could not fetch packages for the sandbox: {one_line(' '.join(lines), 500)}")
