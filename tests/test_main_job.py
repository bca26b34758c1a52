"""The main job, in every environment by the same command."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "environment",
    [
        "local",
        pytest.param("bubblewrap", marks=pytest.mark.needs("bubblewrap")),
        pytest.param("docker", marks=pytest.mark.needs("docker")),
        pytest.param("prime", marks=[pytest.mark.needs("docker"), pytest.mark.usefixtures("prime")]),
    ],
)
def test_the_demo_is_right(environment: str, tmp_path: Path) -> None:
    rlm = Path(sys.executable).parent / "rlm"
    command = [rlm, "demo", "--env", environment, "--log-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "Right: the same as computed from the whole text" in done.stdout
