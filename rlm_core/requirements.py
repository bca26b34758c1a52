"""Packages for cells, as their user names them: what an index has under a name, and nothing else.

An address would be fetched and built where the image is made, which for most environments is this machine:
pip takes `--only-binary` for what an index offers, and runs the `setup.py` of what it gets from an address.
"""

from collections.abc import Sequence

from packaging.requirements import InvalidRequirement, Requirement


def checked(entries: Sequence[str]) -> tuple[str, ...]:
    """The same in one form (PEP 508), which pip can't take for anything else.

    Raises:
        ValueError: an address, a path, an option of pip, or no requirement at all.
    """
    return tuple(map(_checked, entries))


def _checked(entry: str) -> str:
    try:
        requirement = Requirement(entry)
    except InvalidRequirement:
        raise ValueError(f"{entry!r} is no requirement such as numpy==2.4.6") from None
    if requirement.url is not None:
        raise ValueError(f"{entry!r} names an address; what comes from there would be run to build it")
    return str(requirement)
