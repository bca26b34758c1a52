"""Packages for cells, as their user names them: what an index has under a name, and nothing else.

An address or a file would be built where the image is made, which for most environments is this machine: pip
takes `--only-binary` for what an index offers, and runs the `setup.py` of what comes from elsewhere.
"""

import re
from collections.abc import Sequence

from packaging.requirements import InvalidRequirement, Requirement

ARCHIVES = re.compile(r"\.(whl|zip|tar|t[bglx]z|tar\.\w+)$", re.IGNORECASE)
"""Of names that pip looks for among files first."""


def checked(entries: Sequence[str]) -> tuple[str, ...]:
    """The same in one form (PEP 508).

    Raises:
        ValueError: an address, a file, an option of pip, or no requirement at all.
    """
    return tuple(map(_checked, entries))


def _checked(entry: str) -> str:
    try:
        requirement = Requirement(entry)
    except InvalidRequirement:
        raise ValueError(f"{entry!r} is no requirement such as numpy==2.4.6") from None
    text = str(requirement)
    exact = any(each.operator == "===" for each in requirement.specifier)  # it takes any text, paths too
    is_file = ARCHIVES.search(f"{requirement.name}{requirement.specifier}")
    if requirement.url is not None or exact or is_file:
        raise ValueError(f"{entry!r} may be an address or a file, which is run to be built")
    if not text.isprintable():
        raise ValueError(f"{entry!r} has characters that are not for print")
    return text
