"""A gRPC channel through a provider's tunnel, which ends TLS and speaks HTTP/2 to the agent."""

from collections.abc import Sequence

import grpc
import grpc.aio

from rlm_core.transport.unix import CHANNEL_OPTIONS

ACROSS_THE_INTERNET = [
    # A connection that dies on its way is noticed within a minute, also while a cell says nothing.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 1),
]


def tls_channel(host: str, port: int, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
    """The certificate is checked against gRPC's own list of authorities, or against the file that
    GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names."""
    merged = dict([*CHANNEL_OPTIONS, *ACROSS_THE_INTERNET, *options])
    return grpc.aio.secure_channel(
        f"{host}:{port}", grpc.ssl_channel_credentials(), options=[*merged.items()]
    )
