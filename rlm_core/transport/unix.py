"""A gRPC channel over a unix socket in a private folder."""

from pathlib import Path

import grpc.aio

from rlm_core import limits

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE),
    ("grpc.max_send_message_length", limits.MAX_MESSAGE),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy of the environment is for the network, never for a socket.
    ("grpc.enable_http_proxy", 0),
]


def unix_channel(path: Path) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"unix:{path}", options=CHANNEL_OPTIONS)
