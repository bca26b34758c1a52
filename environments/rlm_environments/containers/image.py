"""Images of the sandbox: built on first use, named by a hash of all that is in them, so never stale.

Libraries and packages are fetched by the host's pip, for the image's Python; the build itself has no network.
"""

import difflib
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker.errors

from rlm_core.errors import ConfigError, EngineError
from rlm_core.text import one_line
from rlm_environments.containers.base import (
    DEBIAN,
    DEFAULT,
    Base,
    Say,
    debian_reference,
    ensure_base,
    has_image,
)
from rlm_environments.containers.engine import LABEL, Engine

REPOSITORY = "rlm-sandbox"
MINIMAL, DATA = "minimal", "data"
PIP_SECONDS = 900
SAID_CHARS = 400
"""Of the output of a build, for the error."""
AGENT_PROGRAM = """\
#!{python} -I
import sys

sys.path[:0] = ["/opt/rlm/agent", "/opt/rlm/lib"]
from rlm_agent.container import main

main()
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is to hold."""

    base: str
    """`debian`, or a reference of an image with a Python of 3.11 or newer."""
    packages: tuple[str, ...] = ()
    """For cells, in a virtual environment of their own."""
    variant: str = MINIMAL

    @property
    def tag(self) -> str:
        digest = hashlib.sha256(repr((self.base, self.packages)).encode())
        here = Path(__file__).parent  # how it is laid out and what the base is made of counts too
        for path in (*sources(), here / "image.py", here / "base.py"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return f"{REPOSITORY}:{self.variant}-{digest.hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class BuiltImage:
    tag: str
    base: str
    packages: str
    bytes: int
    current: bool
    """Whether it holds the agent of this version."""


def recipe(image: str | None, packages: Sequence[str], base: str = DEFAULT) -> Recipe:
    """`image` is `minimal` (the default), `data` (with numpy, pandas and scipy), or the base to build on."""
    wanted = tuple(sorted(packages))
    if any(each.startswith("-") for each in wanted):
        raise ConfigError("packages: requirements such as 'numpy==2.4.6', not options of pip")
    if image == DATA:
        data = (agent_folder() / "image" / "packages-data.txt").read_text().split()
        return Recipe(base, tuple(sorted({*wanted, *data})), DATA)
    if image in (None, MINIMAL):
        return Recipe(base, wanted)
    assert image is not None
    _check_base(image)
    return Recipe(image, wanted)


def _check_base(image: str) -> None:
    """Raises ConfigError for a name that was hardly meant as an image to build on."""
    if image.startswith(f"{REPOSITORY}:"):
        raise ConfigError(
            f"image={image!r} is one of ours already: pass 'minimal' or 'data', or another base"
        )
    close = difflib.get_close_matches(image, (MINIMAL, DATA, DEBIAN), 1)
    if close and image not in (MINIMAL, DATA, DEBIAN):
        raise ConfigError(f"image={image!r}: did you mean {close[0]!r}?")


def find(engine: Engine, image: str | None, packages: Sequence[str]) -> str | None:
    """The tag of an image that is there: of the default base, or of Debian's where that was built."""
    for base in (DEFAULT, DEBIAN):
        tag = recipe(image, packages, base).tag
        if has_image(engine, tag):
            return tag
    return None


def usual_base(engine: Engine) -> str:
    """The default one; Debian's where that has been made and the default one has not been pulled."""
    return DEBIAN if not has_image(engine, DEFAULT) and has_image(engine, debian_reference()) else DEFAULT


def build(engine: Engine, what: Recipe, say: Say) -> str:
    """Build it, and give its tag.

    Raises:
        EngineError: the engine or pip could not, and why.
    """
    base = ensure_base(engine, what.base, say)
    if base.python < (3, 11):
        raise EngineError(f"image {what.base!r} has Python {base.python[0]}.{base.python[1]}; 3.11 is needed")
    with tempfile.TemporaryDirectory(prefix="rlm-image-") as folder:
        root = Path(folder) / "rootfs"
        say("fetching the agent's libraries")
        _install(root / "opt/rlm/lib", base, ["--require-hashes", "-r", str(_file("requirements.txt"))])
        site = root / f"opt/venv/lib/python{base.python[0]}.{base.python[1]}/site-packages"
        site.mkdir(parents=True)
        if what.packages:
            say(f"fetching {', '.join(what.packages)}")
            _install(site, base, list(what.packages))
        _lay_out(root, base, site)
        say(f"building {what.tag}")
        _run_build(engine, what, base, root)
    return what.tag


def ls(engine: Engine) -> list[BuiltImage]:
    with engine.errors():
        raw = engine.api.images(filters={"label": f"{LABEL}=image"})
    found: list[BuiltImage] = []
    for each in raw:
        labels = each.get("Labels") or {}
        for tag in (tag for tag in each.get("RepoTags") or [] if tag.startswith(f"{REPOSITORY}:")):
            packages = labels.get("rlm.packages", "")
            what = Recipe(labels.get("rlm.base", ""), tuple(packages.split()), labels.get("rlm.variant", ""))
            found.append(BuiltImage(tag, what.base, packages, int(each.get("Size") or 0), what.tag == tag))
    return sorted(found, key=lambda each: each.tag)


def rm(engine: Engine, tag: str) -> None:
    """Raises ConfigError where there is none of this tag."""
    with engine.errors():
        try:
            engine.api.remove_image(tag)
        except docker.errors.NotFound:
            raise ConfigError(f"no image {tag!r}; see: rlm image ls") from None


def agent_folder() -> Path:
    """Where the agent's sources are; they are files to us, nothing is imported."""
    found = importlib.util.find_spec("rlm_agent")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def sources() -> list[Path]:
    """Everything that goes into an image from here."""
    folder = agent_folder()
    return sorted({*folder.rglob("*.py"), *(folder / "image").glob("*.*"), folder / "image" / "Dockerfile"})


def _file(name: str) -> Path:
    return agent_folder() / "image" / name


def _install(target: Path, base: Base, wanted: list[str]) -> None:
    """Wheels for the image's Python, which is not ours, into a folder."""
    version = f"{base.python[0]}.{base.python[1]}"
    platforms = [f"manylinux{tag}_{base.machine}" for tag in ("_2_28", "_2_17", "2014")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--target", str(target), "--only-binary=:all:", "--no-compile"]
    command += ["--python-version", version, "--implementation", "cp"]
    command += [part for platform in platforms for part in ("--platform", platform)]
    try:
        done = subprocess.run([*command, *wanted], capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired:
        raise EngineError(f"pip did not fetch the packages within {PIP_SECONDS} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            done.stderr[-300:]
        ]
        raise EngineError(f"pip could not fetch packages for the image: {one_line(' '.join(lines), 500)}")


def _lay_out(root: Path, base: Base, site: Path) -> None:
    """The agent, owned by root; and a virtual environment for cells, in which they find rlm_agent.repl."""
    rlm = root / "opt/rlm"
    for path in sources():
        if path.suffix == ".py" and path.parent.name != "image":
            copy = rlm / "agent/rlm_agent" / path.relative_to(agent_folder())
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (rlm / "finish.py").write_bytes(_file("finish.py").read_bytes())
    program = rlm / "bin/agent"
    program.parent.mkdir()
    program.write_text(AGENT_PROGRAM.format(python=base.executable))
    (site / "rlm_agent.pth").write_text("/opt/rlm/agent\n")
    venv = root / "opt/venv"
    home = Path(base.executable).parent
    (venv / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    (venv / "bin").mkdir()
    for name in ("python", "python3"):
        (venv / "bin" / name).symlink_to(base.executable)
    (root / "context").mkdir()


def _run_build(engine: Engine, what: Recipe, base: Base, root: Path) -> None:
    labels = {
        LABEL: "image",
        "rlm.base": what.base,
        "rlm.packages": " ".join(what.packages),
        "rlm.variant": what.variant,
    }
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        tar.add(str(_file("Dockerfile")), "Dockerfile", filter=_as_root)
        tar.add(str(root), "rootfs", filter=_as_root)
    context.seek(0)
    with engine.errors():
        steps: Any = engine.api.build(
            fileobj=context,
            custom_context=True,
            tag=what.tag,
            buildargs={"BASE": base.reference},
            labels=labels,
            network_mode="none",
            rm=True,
            forcerm=True,
            decode=True,
        )
        said = ""
        for step in steps:
            said = (said + str(step.get("stream", "")))[-SAID_CHARS:]
            if "error" in step:
                raise EngineError(f"the image could not be built: {one_line(str(step['error']) + said, 800)}")


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nobody but root may change what is in an image, and everybody may read it."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mtime = 0
    runs = member.isdir() or "/bin/" in member.name
    member.mode = 0o755 if runs else 0o644
    return member
