"""Removes a folder that hostile code has filled: any depth, any names. Standard library only.

To be run with the rights of whoever filled it, so that no trick with links gains anything.
"""

import contextlib
import os
import stat


def remove_tree(path: str) -> None:
    """Remove a folder and all below it, as far as may be; a file or a link too. Changes the working folder.

    Goes down by chdir and not by recursion: a path may be longer than any call takes, deeper than any stack.
    """
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        parent, name = os.path.split(os.path.abspath(path))
        os.chdir(parent)
        with contextlib.suppress(OSError):
            os.chmod(name, 0o700)
        names = [name]
        os.chdir(name)
        while names:
            below = _empty()
            if below is not None:
                names.append(below)
                os.chdir(below)
                continue
            os.chdir("..")
            os.rmdir(names.pop())


def remove_all_of(user: int, folders: tuple[str, ...]) -> None:
    """Remove what a user owns in folders that all may write to."""
    for folder in folders:
        own: list[str] = []
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            own = [each.path for each in entries if each.stat(follow_symlinks=False).st_uid == user]
        for path in own:
            remove_tree(path)


def _empty() -> str | None:
    """Remove the files of the current folder; the name of a folder in it, None when there is none left."""
    with os.scandir(".") as entries:
        for each in entries:
            if each.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    os.chmod(each.name, 0o700)
                return each.name
            os.unlink(each.name)
    return None
