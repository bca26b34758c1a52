"""Run by a janitor when its host has been killed: `python -m rlm_environments.containers.reap FOLDER`.

Removes what can't end by itself: containers that were made and not started, and the host's folder. Those that
run end when their lease is over.
"""

import contextlib
import shutil
import sys
from pathlib import Path

from rlm_core.errors import EngineError
from rlm_environments.containers.engine import Engine


def main() -> None:
    folder = sys.argv[1]
    host = Path(folder).name
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(EngineError):
        engine = Engine.connect()
        with engine.errors():
            left = engine.api.containers(all=True, filters={"label": f"rlm.host={host}", "status": "created"})
            for each in left:
                engine.api.remove_container(each["Id"], force=True, v=True)


if __name__ == "__main__":
    main()
