"""Run once, while an image is built: takes rights away, and compiles what is imported at a start.

With the argument `rights`, in a machine that is used once, it does the first alone.
"""

import compileall
import errno
import os
import py_compile
import stat
import sys
import sysconfig
from pathlib import Path

COMPILED = ("/opt/rlm", "/opt/venv", sysconfig.get_path("stdlib"))
"""Images of Python come without compiled files, which would cost a tenth of a second at every start."""


def main() -> None:
    take_rights()
    if sys.argv[1:] != ["rights"]:
        compile_all()


def take_rights() -> None:
    """No program gives its user rights, and nothing outside of /tmp is everybody's to write to: what one
    session leaves there, another one or root could run."""
    device = Path("/").lstat().st_dev
    for folder, folders, files in os.walk("/"):
        # What is in /tmp goes with its session.
        folders[:] = [each for each in folders if take_from(f"{folder.rstrip('/')}/{each}", device)]
        for each in files:
            take_from(f"{folder.rstrip('/')}/{each}", device)


def take_from(path: str, device: int) -> bool:
    """Whether it is of the image, and no folder that is mounted, as /proc is. (Files of one image may be of
    several devices, by the way it is stored.)"""
    try:
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode) and (found.st_dev != device or path == "/tmp"):
            return False
        wrong = stat.S_IWOTH if stat.S_ISDIR(found.st_mode) else stat.S_IWOTH | stat.S_ISUID | stat.S_ISGID
        if (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)) and found.st_mode & wrong:
            os.chmod(path, stat.S_IMODE(found.st_mode) & ~wrong)  # noqa: PTH101
    except FileNotFoundError:
        return False  # it was somebody's for a moment
    except OSError as error:
        if error.errno == errno.EROFS:
            return False  # a file that is mounted, which nobody can write to
        sys.exit(f"the rights of {path} can't be taken away: {error.strerror}")
    return True


def compile_all() -> None:
    for folder in COMPILED:
        # Not by time: the clock of a build says nothing about the files.
        compileall.compile_dir(
            folder, quiet=2, legacy=False, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )


if __name__ == "__main__":
    main()
