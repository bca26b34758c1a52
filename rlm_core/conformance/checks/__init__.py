"""All checks. Importing this package registers them, in the order in which they run."""

from rlm_core.conformance.checks import (  # noqa: I001 - the order of the report
    state,
    context,
    output,
    transaction,
    calls,
    fork,
    runs,
    lifecycle,
    policy,
    errors,
)

__all__ = [
    "calls",
    "context",
    "errors",
    "fork",
    "lifecycle",
    "output",
    "policy",
    "runs",
    "state",
    "transaction",
]
