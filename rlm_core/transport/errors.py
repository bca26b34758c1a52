"""The one table from gRPC's statuses to our errors. A sandbox chooses the text, so it is cut and escaped."""

import grpc
import grpc.aio

from rlm_core.errors import ConfigError, RLMError, SandboxLost, VersionMismatch
from rlm_core.text import one_line, printable

MAX_DETAIL_CHARS = 500
KINDS: dict[grpc.StatusCode, type[RLMError]] = {
    grpc.StatusCode.OK: SandboxLost,
    grpc.StatusCode.CANCELLED: SandboxLost,
    grpc.StatusCode.UNKNOWN: SandboxLost,
    grpc.StatusCode.INVALID_ARGUMENT: ConfigError,
    grpc.StatusCode.DEADLINE_EXCEEDED: SandboxLost,
    grpc.StatusCode.NOT_FOUND: SandboxLost,
    grpc.StatusCode.ALREADY_EXISTS: ConfigError,
    grpc.StatusCode.PERMISSION_DENIED: SandboxLost,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ConfigError,
    grpc.StatusCode.FAILED_PRECONDITION: ConfigError,
    grpc.StatusCode.ABORTED: SandboxLost,
    grpc.StatusCode.OUT_OF_RANGE: ConfigError,
    grpc.StatusCode.UNIMPLEMENTED: VersionMismatch,
    grpc.StatusCode.INTERNAL: SandboxLost,
    grpc.StatusCode.UNAVAILABLE: SandboxLost,
    grpc.StatusCode.DATA_LOSS: SandboxLost,
    grpc.StatusCode.UNAUTHENTICATED: SandboxLost,
}
RECONNECTABLE = frozenset(
    # INTERNAL is what the gRPC library itself says of some connections that broke.
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL}
)


def from_rpc_error(error: grpc.aio.AioRpcError) -> RLMError:
    kind = KINDS[error.code()]
    detail = one_line(printable(error.details() or "no detail"), MAX_DETAIL_CHARS)
    if kind is SandboxLost:
        return SandboxLost(f"the agent in the sandbox did not answer ({error.code().name}): {detail}")
    return kind(detail)
