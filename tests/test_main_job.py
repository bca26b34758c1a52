"""The main job, in every environment by the same command."""

import subprocess
import sys
from pathlib import Path

import pytest


def run_the_demo(environment: str, folder: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "rlm"),
        "demo",
        "--env",
        environment,
        "--log-dir",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "Right: the same as computed from the whole text" in done.stdout


@pytest.mark.parametrize(
    "environment",
    [
        "local",
        pytest.param("bubblewrap", marks=pytest.mark.needs("bubblewrap")),
        pytest.param("docker", marks=pytest.mark.needs("docker")),
    ],
)
def test_the_demo_is_right(environment: str, tmp_path: Path) -> None:
    run_the_demo(environment, tmp_path)


@pytest.mark.needs("docker")
@pytest.mark.usefixtures("modal")
def test_the_demo_is_right_at_modal(tmp_path: Path) -> None:
    run_the_demo("modal", tmp_path)


@pytest.mark.needs("docker")
@pytest.mark.usefixtures("prime")
def test_the_demo_is_right_at_prime(tmp_path: Path) -> None:
    run_the_demo("prime", tmp_path)
