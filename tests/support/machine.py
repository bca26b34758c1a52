"""What this machine has for the tests of the sandboxes. In CI a missing part is a failure, never a skip."""

import os
import shutil
from functools import cache
from pathlib import Path

from rlm_environments.containers import image
from rlm_environments.containers.base import DEBIAN
from rlm_environments.containers.engine import Engine

from rlm_core.errors import RLMError
from tests.support.ssh_server import SSHD

IN_CI = bool(os.environ.get("CI"))


@cache
def missing(name: str) -> str:
    """Why tests of an environment can't run here, in one line; empty when they can."""
    if name == "bubblewrap":
        return "" if shutil.which("bwrap") else "no bubblewrap: apt-get install bubblewrap"
    if name == "sshd":
        return "" if Path(SSHD).exists() else "no SSH server: apt-get install openssh-server"
    try:
        engine = Engine.connect()
        if name == "runsc" and "runsc" not in engine.info.runtimes:
            return "the container engine has no runtime runsc (gVisor)"
        _build(engine)
    except RLMError as error:
        return str(error)
    return ""


def _build(engine: Engine) -> None:
    """The image that the tests use, of Debian's packages where the usual base is not there."""
    if image.find(engine, None, ()) is None:
        from_debian = shutil.which("mmdebstrap") is not None
        base = DEBIAN if from_debian else image.usual_base(engine)
        image.build(engine, image.recipe(None, (), base), print)
