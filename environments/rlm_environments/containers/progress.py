"""What is being done while somebody waits for an image."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

log = logging.getLogger("rlm_environments.docker")
Say = Callable[[str], None]


@contextmanager
def steps() -> Iterator[Say]:
    """Tell each step as it begins: beside a spinner on a terminal, and in the log elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: log.warning("%s", text)
        return
    with console.status("building an image, which is needed once") as status:
        yield status.update
