"""What an image is built on: a public image by its digest, or one made from Debian's packages."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker.errors
import requests.exceptions
from docker.types import LogConfig

from rlm_core.errors import EngineError
from rlm_core.text import one_line, printable
from rlm_environments.bundle import LOOK, Python
from rlm_environments.containers.engine import LABEL, Engine, said_by
from rlm_environments.containers.progress import Say

DEFAULT = "python:3.12-slim@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea"
"""The multi-platform index of August 2026."""
DEBIAN = "debian"
DEBIAN_SUITE = "bookworm"
DEBIAN_PACKAGES = (
    "base-files",
    "ca-certificates",
    "coreutils",
    "dash",
    "libgcc-s1",
    "libstdc++6",
    "media-types",
    "python3",
    "python3-minimal",
    "tzdata",
)
DEBIAN_LEAVES_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
USERS = (
    "root:x:0:0:root:/root:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
)
CERTIFICATES = "usr/share/ca-certificates/mozilla/"
BUNDLE = "etc/ssl/certs/ca-certificates.crt"
"""Made by a script of the package, which does not run."""
GROUPS = "root:x:0:\nnogroup:x:65534:\n"
MIRRORS = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources"))
BUILD_SECONDS = 900
LOOK_MEMORY, LOOK_PIDS = 256 << 20, 64
"""For the Python of somebody's image, which is run once."""


@dataclass(frozen=True, slots=True)
class Base:
    """An image with a Python, as it is in the engine."""

    reference: str
    id: str
    """What the reference meant: a tag may be moved."""
    python: Python


def ensure_base(engine: Engine, name: str, say: Say) -> Base:
    """Make or pull it where it is not there, and look at its Python.

    Raises:
        EngineError: it can't be had, and what else can be done.
    """
    reference = _debian(engine, say) if name == DEBIAN else name
    if not has_image(engine, reference):
        _pull(engine, reference, say)
    with engine.errors():
        found: Any = engine.api.inspect_image(reference)  # type: ignore[no-untyped-call]
    _refuse_ways_out(reference, found["Config"] or {})
    return Base(reference, str(found["Id"]), _look(engine, reference))


def image_id(engine: Engine, reference: str) -> str | None:
    """What a name means now; None where the engine has no such image."""
    with engine.errors():
        try:
            return str(engine.api.inspect_image(reference)["Id"])  # type: ignore[no-untyped-call]
        except docker.errors.ImageNotFound:
            return None


def _refuse_ways_out(reference: str, config: Mapping[str, Any]) -> None:
    """Raises EngineError for a base that would bring what a sandbox must not have."""
    if config.get("Volumes"):
        paths = ", ".join(config["Volumes"])
        raise EngineError(
            f"image {reference!r} has volumes ({one_line(printable(paths), 200)}): "
            "folders of the engine's own disk, without a limit; take one without VOLUME"
        )
    if config.get("OnBuild"):
        raise EngineError(
            f"image {reference!r} has ONBUILD steps, which may reach the engine's network; take one without"
        )


def has_image(engine: Engine, reference: str) -> bool:
    return image_id(engine, reference) is not None


def _pull(engine: Engine, reference: str, say: Say) -> None:
    say(f"pulling {reference.partition('@')[0]}")
    try:
        repository, _, digest = reference.partition("@")
        if digest:
            engine.api.pull(repository.partition(":")[0], tag=digest)
        else:
            engine.api.pull(repository, tag=None if ":" in repository.rpartition("/")[2] else "latest")
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        raise EngineError(
            f"the image {reference.partition('@')[0]} can't be pulled ({one_line(said_by(error), 200)}); "
            "without a registry, take one that the engine has, or make one of Debian's packages: "
            "rlm image build --base debian"
        ) from None


def _look(engine: Engine, reference: str) -> Python:
    """Run its Python once, without a network."""
    with engine.errors():
        host = engine.api.create_host_config(
            network_mode="none",
            read_only=True,
            cap_drop=["ALL"],
            mem_limit=LOOK_MEMORY,
            pids_limit=LOOK_PIDS,
            log_config=LogConfig(type="json-file", config={"max-size": "64k", "max-file": "1"}),
        )
        made = engine.api.create_container(
            reference, ["-I", "-c", LOOK], entrypoint="python3", host_config=host, labels={LABEL: "build"}
        )
        try:
            engine.api.start(made)
            engine.api.wait(made, timeout=60)
            output = engine.api.logs(made, stderr=False)
        except docker.errors.APIError as error:
            why = one_line(said_by(error), 200)
            raise EngineError(f"image {reference!r} has no python3 that starts: {why}") from None
        else:
            state: Any = engine.api.inspect_container(made)["State"]
        finally:
            engine.api.remove_container(made, force=True, v=True)
    found = Python.parse(output)
    if found is not None:
        return found
    if state["OOMKilled"]:
        raise EngineError(
            f"the python3 of image {reference!r} took more than {LOOK_MEMORY >> 20} MB to say what it is"
        )
    raise EngineError(f"image {reference!r} has no python3 that runs")


def debian_reference() -> str:
    recipe = json.dumps([DEBIAN_SUITE, DEBIAN_PACKAGES, DEBIAN_LEAVES_OUT, USERS, BUNDLE])
    return f"rlm-base:{DEBIAN_SUITE}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def _debian(engine: Engine, say: Say) -> str:
    """The image of Debian's Python and what it needs; made by mmdebstrap, not run through a registry."""
    reference = debian_reference()
    if has_image(engine, reference):
        return reference
    program = shutil.which("mmdebstrap")
    if program is None:
        raise EngineError("--base debian needs mmdebstrap: apt-get install mmdebstrap")
    say("making a base image from Debian's packages")
    command = [program, "--variant=extract", f"--include={','.join(DEBIAN_PACKAGES)}"]
    command += [f"--dpkgopt=path-exclude={path}" for path in DEBIAN_LEAVES_OUT]
    with tempfile.TemporaryDirectory(prefix="rlm-base-") as folder:
        archive = Path(folder) / "base.tar"
        mirrors = [str(path) for path in MIRRORS if path.exists()] if _is_suite_of_host() else []
        try:
            done = subprocess.run(
                [*command, DEBIAN_SUITE, str(archive), *mirrors],
                capture_output=True,
                text=True,
                timeout=BUILD_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"mmdebstrap was not done within {BUILD_SECONDS} s") from None
        if done.returncode:
            raise EngineError(f"mmdebstrap failed: {one_line(done.stderr[-600:], 600)}")
        _complete(archive)
        with engine.errors():
            repository, tag = reference.split(":")
            engine.api.import_image_from_file(
                str(archive), repository=repository, tag=tag, changes=[f"LABEL {LABEL}=base"]
            )
    return reference


def _complete(archive: Path) -> None:
    """Add what the packages' own scripts would have made: users, groups, and the bundle of certificates."""
    with tarfile.open(archive) as tar:
        bundle = b"".join(
            file.read()
            for member in tar
            if member.name.endswith(".crt")
            and CERTIFICATES in member.name
            and (file := tar.extractfile(member))
        )
    if not bundle:
        raise EngineError("Debian's ca-certificates has no certificates where they were")
    with tarfile.open(archive, "a") as tar:
        for name, data in (("etc/passwd", USERS.encode()), ("etc/group", GROUPS.encode()), (BUNDLE, bundle)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _is_suite_of_host() -> bool:
    """The host's own sources of packages serve when it is of the same suite."""
    try:
        return f"VERSION_CODENAME={DEBIAN_SUITE}" in Path("/etc/os-release").read_text()
    except OSError:
        return False
