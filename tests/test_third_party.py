"""An environment from outside the package: installed on its own, found by its entry point, and conformant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ssh_server import ssh_server

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ssh_environment"


@pytest.mark.needs("sshd")
@pytest.mark.timeout(300)
def test_the_example_over_ssh_passes_every_check(tmp_path: Path) -> None:
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(EXAMPLE)], check=True, timeout=100)
    with ssh_server(tmp_path / "server") as port:
        config = tmp_path / "server" / "home" / ".ssh"
        options = [
            f"-p{port}",
            f"-i{config / 'id_ed25519'}",
            f"-oUserKnownHostsFile={config / 'known_hosts'}",
        ]
        rlm = [str(Path(sys.executable).parent / "rlm"), "conformance", "ssh", "--json"]
        done = subprocess.run(
            [
                *rlm,
                "-o",
                "host=127.0.0.1",
                *(part for each in options for part in ("-o", f"ssh_options={each}")),
            ],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "PYTHONPATH": str(target)},
        )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    bad = [each for each in found if each["status"] not in ("passed", "not applicable")]
    assert found and not bad and done.returncode == 0, (bad, done.stderr[-2000:])
    assert sum(each["status"] == "passed" for each in found) > 50


def test_the_guides_commands_are_those_that_were_run() -> None:
    guide = (EXAMPLE.parents[1] / "docs" / "guides" / "write-an-environment.md").read_text()
    commands = guide.partition("```bash\n")[2].partition("```")[0].splitlines()
    assert commands == ["pip install ./examples/ssh_environment", "rlm conformance ssh -o host=build.example"]
    entry = guide.partition("```toml\n")[2].partition("```")[0]
    assert entry in (EXAMPLE / "pyproject.toml").read_text()


def test_it_is_about_a_hundred_lines() -> None:
    assert len((EXAMPLE / "rlm_ssh_environment.py").read_text().splitlines()) <= 150
