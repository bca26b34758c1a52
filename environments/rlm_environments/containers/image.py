"""Images of the sandbox: built on first use, named by a hash of all that is in them, so never stale.

Libraries and packages are fetched by the host's pip, for the image's Python; the build itself has no network.
"""

import contextlib
import difflib
import hashlib
import io
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker.errors
import urllib3.exceptions

from rlm_core import requirements
from rlm_core.errors import ConfigError, EngineError
from rlm_core.text import one_line, printable
from rlm_environments.bundle import agent_folder, as_root, image_file, lay_out, sources
from rlm_environments.containers.base import (
    BUILD_SECONDS,
    DEBIAN,
    DEFAULT,
    Base,
    debian_reference,
    ensure_base,
    has_image,
    image_id,
)
from rlm_environments.containers.engine import LABEL, Engine
from rlm_environments.containers.progress import Say

REPOSITORY = "rlm-sandbox"
BASE_ID = "rlm.base-id"
MINIMAL, DATA = "minimal", "data"
BUILD_MEMORY = 1 << 30
"""For the Python of the base, which compiles files."""
SAID_CHARS = 400
"""Of the output of a build, for the error."""


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
        for path in (*sources(), here / "image.py", here / "base.py", here.parent / "bundle.py"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return f"{REPOSITORY}:{self.variant}-{digest.hexdigest()[:16]}"

    @property
    def labels(self) -> dict[str, str]:
        return {
            "rlm.base": self.base,
            "rlm.packages": "\n".join(self.packages),  # one may have spaces
            "rlm.variant": self.variant,
        }

    @classmethod
    def of_labels(cls, labels: Mapping[str, str]) -> "Recipe":
        packages = tuple(labels.get("rlm.packages", "").splitlines())
        return cls(labels.get("rlm.base", ""), packages, labels.get("rlm.variant", ""))


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
    try:
        wanted = tuple(sorted(requirements.checked(packages)))
    except ValueError as error:
        raise ConfigError(f"packages: {error}") from None
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
        what = recipe(image, packages, base)
        if has_image(engine, what.tag) and _is_of_this_base(engine, what):
            return what.tag
    return None


def _is_of_this_base(engine: Engine, what: Recipe) -> bool:
    """False when the base's name means another image by now; ours never do."""
    if what.base in (DEFAULT, DEBIAN):
        return True
    with engine.errors():
        labels = engine.api.inspect_image(what.tag)["Config"]["Labels"]  # type: ignore[no-untyped-call]
    return image_id(engine, what.base) in (None, labels.get(BASE_ID))


def usual_base(engine: Engine) -> str:
    """The default one; Debian's where that has been made and the default one has not been pulled."""
    return DEBIAN if not has_image(engine, DEFAULT) and has_image(engine, debian_reference()) else DEFAULT


def build(engine: Engine, what: Recipe, say: Say) -> str:
    """Build it, and give its tag.

    Raises:
        EngineError: the engine or pip could not, and why.
    """
    base = ensure_base(engine, what.base, say)
    if base.python.version < (3, 11):
        raise EngineError(
            f"image {what.base!r} has Python {'.'.join(map(str, base.python.version))}; 3.11 is needed"
        )
    with tempfile.TemporaryDirectory(prefix="rlm-image-") as folder:
        root = Path(folder) / "rootfs"
        say(f"fetching {', '.join(['the libraries of the agent', *what.packages])}")
        lay_out(root, base.python, what.packages)
        (root / "context").mkdir()
        say(f"building {what.tag}")
        _run_build(engine, what, base, root)
    return what.tag


def ls(engine: Engine) -> list[BuiltImage]:
    with engine.errors():
        raw = engine.api.images(filters={"label": f"{LABEL}=image"})
    found: list[BuiltImage] = []
    for each in raw:
        what = Recipe.of_labels(each.get("Labels") or {})
        for tag in (tag for tag in each.get("RepoTags") or [] if tag.startswith(f"{REPOSITORY}:")):
            packages = ", ".join(what.packages)
            found.append(BuiltImage(tag, what.base, packages, int(each.get("Size") or 0), what.tag == tag))
    return sorted(found, key=lambda each: each.tag)


def rm(engine: Engine, tag: str) -> None:
    """Raises ConfigError where there is none of this tag."""
    with engine.errors():
        try:
            engine.api.remove_image(tag)
        except docker.errors.NotFound:
            raise ConfigError(f"no image {tag!r}; see: rlm image ls") from None


def _run_build(engine: Engine, what: Recipe, base: Base, root: Path) -> None:
    labels = {LABEL: "image", BASE_ID: base.id, **what.labels}
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        tar.add(str(image_file("Dockerfile")), "Dockerfile", filter=as_root)
        tar.add(str(root), "rootfs", filter=as_root)
    context.seek(0)
    end = time.monotonic() + BUILD_SECONDS
    with engine.errors(), _stream_errors():
        steps: Any = engine.api.build(
            fileobj=context,
            custom_context=True,
            tag=what.tag,
            buildargs={"BASE": base.reference},
            labels=labels,
            network_mode="none",
            container_limits={"memory": BUILD_MEMORY, "memswap": BUILD_MEMORY},
            rm=True,
            forcerm=True,
            decode=True,
            timeout=BUILD_SECONDS,  # without a word
        )
        said = ""
        for step in steps:
            said = (said + str(step.get("stream", "")))[-SAID_CHARS:]
            if time.monotonic() > end:
                raise EngineError(
                    f"the image was not built within {BUILD_SECONDS} s: {one_line(printable(said), 400)}"
                )
            if "error" in step:
                why = one_line(printable(str(step["error"]) + said), 800)
                raise EngineError(f"the image could not be built: {why}")


@contextlib.contextmanager
def _stream_errors() -> Iterator[None]:
    """Of a response that is read as it comes, which the SDK passes on as they are."""
    try:
        yield
    except urllib3.exceptions.ReadTimeoutError:
        raise EngineError(f"the image was not built: the engine said nothing for {BUILD_SECONDS} s") from None
    except urllib3.exceptions.HTTPError as error:
        raise EngineError(f"the engine broke off the build: {one_line(printable(str(error)), 400)}") from None
