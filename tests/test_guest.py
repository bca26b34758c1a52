"""What starts the agent in a provider's machine: as root, with packages of others beside it."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from rlm_environments import bundle, guest


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


def test_rights_are_taken_from_files_and_folders_and_from_nothing_else(tmp_path: Path) -> None:
    take_from = runpy.run_path(str(bundle.image_file("finish.py")))["take_from"]
    device = tmp_path.lstat().st_dev
    file, folder, target, link = (tmp_path / name for name in ("file", "folder", "target", "link"))
    for path, mode in ((file, 0o6777), (target, 0o666)):
        path.touch()
        path.chmod(mode)
    folder.mkdir()
    folder.chmod(0o1777)
    link.symlink_to(target)
    (tmp_path / "dangling").symlink_to("nowhere")
    undecodable = os.fsencode(tmp_path) + b"/\xff"
    Path(os.fsdecode(undecodable)).touch()
    for path in (file, folder, link, tmp_path / "dangling", Path(os.fsdecode(undecodable))):
        assert take_from(str(path), device)
    assert file.stat().st_mode & 0o7777 == 0o775 and folder.stat().st_mode & 0o7777 == 0o1775
    assert target.stat().st_mode & 0o777 == 0o666  # a link is not followed
    assert not take_from(str(tmp_path / "gone"), device) and not take_from("/tmp", Path("/tmp").stat().st_dev)
    folder.chmod(0o777)
    assert not take_from(str(folder), device + 1) and folder.stat().st_mode & 0o777 == 0o777
