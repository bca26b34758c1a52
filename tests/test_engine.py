"""The engine of containers: one line each where it is not there or not ours to use, and what is known of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rlm_environments.containers.engine import _is_mended

from rlm_core.environment import make_environment
from rlm_core.errors import EngineError

pytestmark = pytest.mark.needs("docker")


@pytest.mark.parametrize(
    ("host", "said"),
    [("unix:///nowhere/docker.sock", "no container engine at"), ("tcp://127.0.0.1:9", "no container engine")],
)
async def test_no_engine_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, host: str, said: str) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(EngineError, match=said) as caught:
        await make_environment("docker", {}).start()
    assert "\n" not in str(caught.value)


def test_an_engine_that_we_may_not_use_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As another user, to whom a 0600 socket of root's is closed."""
    program = (
        "import os, sys; os.setuid(65534)\n"
        "from rlm_environments.containers.engine import Engine\n"
        "try: Engine()\nexcept Exception as error: print(type(error).__name__, error)"
    )
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    with socket.socket(socket.AF_UNIX) as listener:
        path = f"/tmp/rlm-test-{os.getpid()}.sock"
        listener.bind(path)
        os.chmod(path, 0o600)  # noqa: PTH101
        listener.listen()
        done = subprocess.run(
            [sys.executable, "-c", "import docker, rlm_environments.containers.engine\n" + program],
            capture_output=True,
            text=True,
            env={**os.environ, "DOCKER_HOST": f"unix://{path}", "HOME": "/tmp"},
        )
        Path(path).unlink()
    assert done.stdout.startswith("EngineError no permission to use the engine at"), done


@pytest.mark.parametrize(
    ("version", "mended"),
    [
        ("1.1.5+ds1", False),
        ("1.2.7", False),
        ("1.2.8", True),
        ("1.3.0", False),
        ("1.3.3", True),
        ("1.4.0", True),
    ],
)
def test_versions_of_runc_with_known_holes_are_told(version: str, mended: bool) -> None:
    assert _is_mended(version) is mended
