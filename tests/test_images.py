"""The images of containers: what a base may bring along and take, and that none is used that is stale."""

import contextlib
import gc
import io
import tarfile
from collections.abc import Iterator, Mapping

import pytest
from rlm_environments import bundle
from rlm_environments.bundle import Python
from rlm_environments.containers import base, image
from rlm_environments.containers.engine import Engine

from rlm_core.environment import make_environment
from rlm_core.errors import EngineError

pytestmark = pytest.mark.needs("docker")
NAME = "rlm-test-base:1"


@pytest.fixture
def engine() -> Engine:
    return Engine.connect()


@contextlib.contextmanager
def somebodys(engine: Engine, lines: str, files: Mapping[str, str] | None = None) -> Iterator[str]:
    """An image on Debian's base with these lines of a Dockerfile, and files by their paths in it."""
    dockerfile = f"FROM {base.debian_reference()}\nUSER root\n{lines}\n"
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        for number, (path, text) in enumerate((files or {}).items()):
            dockerfile += f"COPY file{number} {path}\n"
            add(tar, f"file{number}", text)
        add(tar, "Dockerfile", dockerfile)
    build = engine.api.build(
        fileobj=io.BytesIO(context.getvalue()), custom_context=True, tag=NAME, rm=True, forcerm=True
    )
    list(build)
    try:
        yield NAME
    finally:
        engine.api.remove_image(NAME, force=True)


def add(tar: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(text)
    tar.addfile(entry, io.BytesIO(text.encode()))


async def test_an_image_that_can_not_be_pulled_says_what_else_there_is(engine: Engine) -> None:
    with pytest.raises(EngineError, match="--base debian"):
        image.build(engine, image.recipe("127.0.0.1:9/nothing:1", ()), print)


COMPILEALL = "/usr/lib/python3.11/compileall.py"
GREEDY = {
    "memory when it is looked at": (
        "/usr/lib/python3/dist-packages/hog.pth",
        "import os; os.memory = b'x' * (1 << 29)",
        "took more than",
    ),
    "memory in the build": (COMPILEALL, "memory = b'x' * (1 << 29)", "could not be built"),
    "time in the build": (
        COMPILEALL,
        "import time\nwhile True: print('on and on', flush=True); time.sleep(0.1)",
        "not built within 10 s: .*on and on",
    ),
    "time without a word": (COMPILEALL, "import time; time.sleep(60)", "said nothing for 10 s"),
    "a terminal": (COMPILEALL, "print('\\x1b[2J\\x1b]0;title\\x07'); 1 / 0", r"\\x1b\[2J"),
}


# The SDK leaves the connection of a build that it gives up to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("case", GREEDY)
def test_what_a_base_takes_has_a_limit(case: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "BUILD_MEMORY", 256 << 20)
    monkeypatch.setattr(image, "BUILD_SECONDS", 10)
    path, line, said = GREEDY[case]
    with somebodys(engine, "", {path: line + "\n"}) as name, pytest.raises(EngineError, match=said) as caught:
        image.build(engine, image.recipe(name, ()), print)
    assert str(caught.value).isprintable()
    caught.value.__traceback__ = None
    del caught
    gc.collect()


@pytest.mark.parametrize(
    ("line", "said"),
    [("VOLUME /data", "has volumes .*/data"), ("ONBUILD ADD http://127.0.0.1:9/x /x", "has ONBUILD")],
)
def test_a_base_that_would_bring_a_way_out_is_refused(line: str, said: str, engine: Engine) -> None:
    with somebodys(engine, line) as name, pytest.raises(EngineError, match=said):
        image.build(engine, image.recipe(name, ()), print)


async def test_a_health_check_of_the_base_does_not_run_beside_the_cells(engine: Engine) -> None:
    with somebodys(engine, 'HEALTHCHECK --interval=1s CMD ["/usr/bin/python3", "-c", "1"]') as name:
        sandbox = await make_environment("docker", {"image": name}).start()
        try:
            found = engine.api.inspect_container(sandbox.container)  # type: ignore[attr-defined]
            assert "Health" not in found["State"] and found["Config"]["Healthcheck"]["Test"] == ["NONE"]
        finally:
            await sandbox.stop()
            image.rm(engine, image.recipe(name, ()).tag)


def test_a_stale_image_is_never_used(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    current = image.find(engine, None, ())
    assert current is not None
    sources = bundle.sources()
    monkeypatch.setattr(image, "sources", lambda: sources[1:])
    assert image.find(engine, None, ()) is None


def test_an_image_on_a_name_that_means_another_base_by_now_is_stale(engine: Engine) -> None:
    with somebodys(engine, "", {"/one": "1"}) as name:
        tag = image.build(engine, image.recipe(name, ()), print)
        assert image.find(engine, name, ()) == tag
    assert image.find(engine, name, ()) == tag  # the engine need not keep the base
    with somebodys(engine, "", {"/two": "2"}):
        assert image.find(engine, name, ()) is None
        assert image.build(engine, image.recipe(name, ()), print) == tag
        assert image.find(engine, name, ()) == tag
    image.rm(engine, tag)


@pytest.mark.parametrize(
    "output",
    [
        "",
        "[]",
        "[[Infinity, 1], '/x', 'm']".replace("'", '"'),
        "[" * 100_000,
        '[[3, 11], "/usr/bin/\\u0000python3", "x86_64"]',
        '[[3, 11], "python3", "x86_64"]',
        f'[[3, 11], "/{"x" * 5_000}", "x86_64"]',
    ],
    ids=["nothing", "too little", "infinity", "deep", "nul", "relative", "long"],
)
def test_what_a_base_says_of_its_python_is_not_believed(output: str) -> None:
    assert Python.parse(output) is None
