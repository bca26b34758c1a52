"""A real SSH server on loopback, with keys of its own and a home folder for its client."""

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

SSHD = "/usr/sbin/sshd"


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[int]:
    """Its port; `folder/home` is the home of a client that may log in as the user who runs the test."""
    home = folder / "home" / ".ssh"
    home.mkdir(parents=True, mode=0o700)
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in (folder / "host", home / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    config = folder / "config"
    keys = f"HostKey {folder}/host\nAuthorizedKeysFile {home}/id_ed25519.pub\n"
    config.write_text(f"{keys}ListenAddress 127.0.0.1\nStrictModes no\nUsePAM no\nPidFile none\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    command = [SSHD, "-D", "-e", "-f", str(config), "-p", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            first = server.stderr.readline()
            assert "listening" in first, first
            yield port
        finally:
            server.terminate()
            server.communicate(timeout=20)
