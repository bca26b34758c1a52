"""A container engine of the test's own, whose disk is small: a mount in memory."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 30


@contextlib.contextmanager
def small_engine(folder: Path, megabytes: int) -> Iterator[str]:
    """Its address. Needs root and dockerd."""
    disk = folder / "disk"
    disk.mkdir()
    config, socket = folder / "daemon.json", folder / "engine.sock"
    fields = {
        "data-root": str(disk / "root"),
        "exec-root": str(folder / "exec"),
        "pidfile": str(folder / "pid"),
        "hosts": [f"unix://{socket}"],
        "bridge": "none",
        "iptables": False,
    }
    config.write_text(json.dumps(fields))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "rlm-test", str(disk)]
    subprocess.run(mount, check=True)
    # In a network namespace of its own: an engine without a bridge removes the one that it finds.
    command = ["unshare", "--net", "dockerd", "--config-file", str(config)]
    try:
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as engine:
            assert engine.stderr is not None
            deadline = time.monotonic() + START_SECONDS
            for line in engine.stderr:
                if "API listen on" in line:
                    break
                assert time.monotonic() < deadline, line
            try:
                yield f"unix://{socket}"
            finally:
                engine.terminate()
                engine.communicate(timeout=START_SECONDS)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
