"""What starts the agent in a provider's machine: as root, with packages of others beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rlm_environments import guest


@pytest.mark.parametrize("site", [False, True], ids=["as it is", "control: with site"])
def test_what_a_package_has_for_the_start_of_python_is_not_run(site: bool, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python3.*/site-packages")
    (packages / "hostile.pth").write_text(f"import os; os.mkdir({str(tmp_path / 'was run')!r})\n")
    command = [part for part in guest.command(60, "MODAL_") if not (site and part == "-S")]
    command = ["/bin/true" if part == guest.AGENT else part for part in command]
    path = {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}"}
    subprocess.run([str(tmp_path / "venv/bin" / command[0]), *command[1:]], check=True, env=path)
    assert (tmp_path / "was run").exists() == site
