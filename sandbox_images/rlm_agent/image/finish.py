"""Run once, while an image is built: takes rights away, and compiles what is imported at a start.

With the argument `rights`, in a machine that is used once, it does the first alone.
"""

import compileall
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
        # What is mounted, as /proc, is not of the image; what is in /tmp goes with its session.
        paths = [Path(folder, each) for each in folders]
        folders[:] = [path.name for path in paths if path.lstat().st_dev == device and str(path) != "/tmp"]
        for path in (Path(folder, name) for name in (*folders, *files)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue  # it was somebody's for a moment
            wrong = stat.S_IWOTH if stat.S_ISDIR(mode) else stat.S_IWOTH | stat.S_ISUID | stat.S_ISGID
            if (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and mode & wrong:
                path.chmod(stat.S_IMODE(mode) & ~wrong)


def compile_all() -> None:
    for folder in COMPILED:
        # Not by time: the clock of a build says nothing about the files.
        compileall.compile_dir(
            folder, quiet=2, legacy=False, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )


main()
