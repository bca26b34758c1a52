"""A gRPC channel over a unix socket in a private folder."""

import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc.aio

from rlm_core import limits

MAX_BASE_BYTES = 107 - len("/rlm-12345678/12345678/calls/0123456789abcdef")
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE),
    ("grpc.max_send_message_length", limits.MAX_MESSAGE),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy of the environment is for the network, never for a socket.
    ("grpc.enable_http_proxy", 0),
]


def unix_channel(path: Path, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
    """`options` take the place of the usual ones of the same name."""
    return grpc.aio.insecure_channel(f"unix:{path}", options=[*dict([*CHANNEL_OPTIONS, *options]).items()])


def free_name() -> Path:
    """Of a folder that is still to be made, and leaves room for sockets: the kernel takes 107 bytes."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > MAX_BASE_BYTES:
        base = "/tmp"
    return Path(base, f"rlm-{secrets.token_hex(4)}")
