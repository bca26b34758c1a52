"""The packages that a build may install: without a network it has those that this machine's pip fetches."""

import argparse
import asyncio
import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

WHEELS = ".mirror"
"""Beside the files of the build."""
OFFLINE = f"PIP_NO_INDEX=1 PIP_FIND_LINKS=/{WHEELS}"


class NotFetched(Exception):
    """With what pip has said."""


def put_pip(folder: Path) -> None:
    """Where a Python of Debian looks for it: every base of Modal's has one, and maybe no program `python`."""
    found = importlib.util.find_spec("pip")
    assert found is not None and found.origin is not None
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copytree(Path(found.origin).parent, folder / f"usr/local/lib/python{version}/dist-packages/pip")


async def with_packages(lines: list[str], folder: Path) -> list[str]:
    """The same commands of a Dockerfile, where what they install is in `folder`.

    Raises:
        NotFetched: there is no such package.
    """
    if not any(" -m pip install " in line for line in lines):
        return lines
    done: list[str] = []
    for line in lines:
        before, pip, after = line.removeprefix("RUN ").partition(" -m pip install ")
        if pip:
            await _fetch(after.partition(" && ")[0], folder)
            done += ["COPY . /", f"RUN {OFFLINE} {before}{pip}{after} && rm -rf /{WHEELS}"]
        elif line.startswith("COPY "):  # with all the rest, then
            _, source, target = line.split()
            (folder / target.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder / source.lstrip("/"), folder / target.lstrip("/"))
        else:
            done.append(line)
    return done


async def _fetch(wanted: str, folder: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-r", dest="file")
    parser.add_argument("--target")  # of no meaning to a download, as the next
    parser.add_argument("--no-compile", action="store_true")
    known, rest = parser.parse_known_args(shlex.split(wanted))
    if known.file:
        rest += ["-r", str(folder / known.file.lstrip("/"))]
    command = ["-m", "pip", "download", "--quiet", "--dest", str(folder / WHEELS), *rest]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise NotFetched(output.decode())
