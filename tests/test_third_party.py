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
        policy = ["-o", "host=127.0.0.1"]
        policy += [part for each in options for part in ("-o", f"ssh_options={each}")]

        def rlm(command: str) -> subprocess.CompletedProcess[str]:
            program = str(Path(sys.executable).parent / "rlm")
            variables = {**os.environ, "PYTHONPATH": str(target)}
            arguments = [program, command, "ssh", "--json", *policy]
            return subprocess.run(arguments, capture_output=True, text=True, timeout=280, env=variables)

        looked, done = rlm("doctor"), rlm("conformance")
    assert [each["works"] for each in json.loads(looked.stdout)["environments"]] == [True], looked.stdout
    found = [json.loads(line) for line in done.stdout.splitlines()]
    bad = [each for each in found if each["status"] not in ("passed", "refused", "not applicable")]
    assert found and not bad and done.returncode == 0, (bad, done.stderr[-2000:])
    refused = {each["check"] for each in found if each["status"] == "refused"}
    assert refused == {
        f"policy.{name}"
        for name in ("network", "cpus", "pids", "disk", "image", "packages", "runtime", "lease")
    }


BROKEN = """
from typing import ClassVar
from rlm_core.environment import Capabilities, Environment
class Raises(Environment):
    name: ClassVar[str] = "raises"
    capabilities: ClassVar = Capabilities(isolated=False, enforces=frozenset(), summary="x", lists=True)
    async def start(self): raise KeyError("oops")
    async def running(self): raise KeyError("oops")
class Bare(Environment):
    name: ClassVar[str] = "bare"
    capabilities: ClassVar = Raises.capabilities
class Nothing: pass
"""
POINTS = """
[rlm.environments]
raises = broken_environments:Raises
bare = broken_environments:Bare
missing = broken_environments:Nope
nothing = broken_environments:Nothing
absent = no_such_module_of_mine:Nope
"""
SAID = {
    "raises": "KeyError('oops')",
    "bare": "broken_environments:Bare has no start",
    "missing": "can't be loaded: AttributeError",
    "nothing": "is no subclass of Environment",
    "absent": "can't be loaded: ModuleNotFoundError(\"No module named 'no_such_module_of_mine'",
}


def test_environments_that_are_broken_are_named_and_hide_no_other(tmp_path: Path) -> None:
    (tmp_path / "broken_environments.py").write_text(BROKEN)
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(POINTS)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        rlm = str(Path(sys.executable).parent / "rlm")
        return subprocess.run([rlm, *arguments], capture_output=True, text=True, timeout=100, env=env)

    report = {each["name"]: each for each in json.loads(run("doctor", "--json").stdout)["environments"]}
    assert report["local"]["works"]
    for name, said in SAID.items():
        assert said in report[name]["problem"], name
    listing = run("sandbox", "ls")
    assert listing.returncode == 1 and "rlm: raises: KeyError('oops')" in listing.stderr
    assert "Traceback" not in listing.stderr
    demo = run("demo", "--env", "absent")
    assert demo.returncode == 2 and SAID["absent"] in demo.stderr


def test_the_guides_commands_are_those_that_were_run() -> None:
    guide = (EXAMPLE.parents[1] / "docs" / "guides" / "write-an-environment.md").read_text()
    commands = guide.partition("```bash\n")[2].partition("```")[0].splitlines()
    assert commands == [
        "pip install ./examples/ssh_environment",
        "rlm doctor ssh -o host=build.example",
        "rlm conformance ssh -o host=build.example",
    ]
    entry = guide.partition("```toml\n")[2].partition("```")[0]
    assert entry in (EXAMPLE / "pyproject.toml").read_text()


def test_it_is_about_a_hundred_lines() -> None:
    assert len((EXAMPLE / "rlm_ssh_environment.py").read_text().splitlines()) <= 150
