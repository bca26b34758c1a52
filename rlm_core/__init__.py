"""Recursive Language Models over texts of any length, with their code in a sandbox.

from rlm_core import RLM, RLMLogger
"""

from rlm_core.clients import LMClient, LMRequest, LMResponse, ScriptedClient
from rlm_core.environment import SandboxSpec
from rlm_core.errors import (
    CallFailed,
    ConfigError,
    EmptyReply,
    MissingExtra,
    PolicyNotEnforceable,
    ProviderError,
    ProviderOverloaded,
    ProviderRefused,
    ProviderRejected,
    ProviderUnreachable,
    RLMError,
    RunFailed,
    SandboxLost,
    ScriptError,
    UsageError,
    VersionMismatch,
)
from rlm_core.logger import RLMLogger
from rlm_core.observer import Observer
from rlm_core.rlm import RLM
from rlm_core.types import (
    CodeBlock,
    ModelUsageSummary,
    REPLResult,
    RLMChatCompletion,
    RLMIteration,
    RLMMetadata,
    UsageSummary,
)

__all__ = [
    "RLM",
    "CallFailed",
    "CodeBlock",
    "ConfigError",
    "EmptyReply",
    "LMClient",
    "LMRequest",
    "LMResponse",
    "MissingExtra",
    "ModelUsageSummary",
    "Observer",
    "PolicyNotEnforceable",
    "ProviderError",
    "ProviderOverloaded",
    "ProviderRefused",
    "ProviderRejected",
    "ProviderUnreachable",
    "REPLResult",
    "RLMChatCompletion",
    "RLMError",
    "RLMIteration",
    "RLMLogger",
    "RLMMetadata",
    "RunFailed",
    "SandboxLost",
    "SandboxSpec",
    "ScriptError",
    "ScriptedClient",
    "UsageError",
    "UsageSummary",
    "VersionMismatch",
]
