"""Run once, while an image is built: takes set-user-id bits off, and compiles what is imported at a start."""

import compileall
import os
import py_compile
import stat
import sysconfig
from pathlib import Path

COMPILED = ("/opt/rlm", "/opt/venv", sysconfig.get_path("stdlib"))
"""Images of Python come without compiled files, which would cost a tenth of a second at every start."""


def main() -> None:
    device = Path("/").lstat().st_dev
    for folder, folders, files in os.walk("/"):
        # What is mounted, as /proc, is not of the image.
        folders[:] = [each for each in folders if Path(folder, each).lstat().st_dev == device]
        for path in (Path(folder, name) for name in files):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue  # it was somebody's for a moment
            if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
                path.chmod(stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))
    for folder in COMPILED:
        # Not by time: the clock of a build says nothing about the files.
        compileall.compile_dir(
            folder, quiet=2, legacy=False, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )


main()
