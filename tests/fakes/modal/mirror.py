"""The packages that a build may install: without a network it has those that this machine's pip fetches."""

import argparse
import asyncio
import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

PIP, WHEELS = ".mirror/pip", ".mirror/wheels"
"""Beside the files of the build."""
OFFLINE = f"PYTHONPATH=/{PIP} PIP_NO_INDEX=1 PIP_FIND_LINKS=/{WHEELS}"


class NotFetched(Exception):
    """With what pip has said."""


async def with_packages(lines: list[str], folder: Path) -> list[str]:
    """The same commands of a Dockerfile, where what they install is in `folder`.

    Raises:
        NotFetched: there is no such package.
    """
    done: list[str] = []
    for line in lines:
        before, pip, wanted = line.partition("RUN python -m pip install ")
        if pip:
            await _fetch(wanted, folder)
            done += ["COPY . /", f"{before}RUN {OFFLINE} {pip[4:]}{wanted} && rm -rf /.mirror"]
        else:
            done.append(line)
    return done


async def _fetch(wanted: str, folder: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-r", dest="file")
    parser.add_argument("--target")  # of no meaning to a download, as the next two
    parser.add_argument("--upgrade", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    known, rest = parser.parse_known_args(shlex.split(wanted))
    if known.file:
        rest += ["-r", str(folder / known.file.lstrip("/"))]
    found = importlib.util.find_spec("pip")
    assert found is not None and found.origin is not None
    await asyncio.to_thread(shutil.copytree, Path(found.origin).parent, folder / PIP / "pip")
    command = ["-m", "pip", "download", "--quiet", "--dest", str(folder / WHEELS), *rest]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise NotFetched(output.decode())
