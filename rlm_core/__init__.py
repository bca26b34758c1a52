"""Recursive Language Models over texts of any length, with their code in a sandbox.

from rlm_core import RLM, RLMLogger
"""

from rlm_core.cell import CellError, CellResult
from rlm_core.clients import LMClient, LMRequest, LMResponse, ScriptedClient
from rlm_core.environment import Capabilities, Environment, Sandbox, SandboxSpec
from rlm_core.errors import (
    BudgetExceededError,
    CallFailed,
    CallLimitExceededError,
    CancellationError,
    ConfigError,
    EmptyReply,
    EngineError,
    ErrorThresholdExceededError,
    LimitExceeded,
    LogError,
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
    TimeoutExceededError,
    TokenLimitExceededError,
    UsageError,
    VersionMismatch,
)
from rlm_core.logger import RLMLogger
from rlm_core.observer import Observer
from rlm_core.pool import SandboxPool
from rlm_core.rlm import RLM
from rlm_core.types import (
    CodeBlock,
    ModelUsageSummary,
    REPLResult,
    RLMChatCompletion,
    RLMIteration,
    RLMMetadata,
    TokenUsage,
    UsageSummary,
)

__all__ = [
    "RLM",
    "BudgetExceededError",
    "CallFailed",
    "CallLimitExceededError",
    "CancellationError",
    "Capabilities",
    "CellError",
    "CellResult",
    "CodeBlock",
    "ConfigError",
    "EmptyReply",
    "EngineError",
    "Environment",
    "ErrorThresholdExceededError",
    "LMClient",
    "LMRequest",
    "LMResponse",
    "LimitExceeded",
    "LogError",
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
    "Sandbox",
    "SandboxLost",
    "SandboxPool",
    "SandboxSpec",
    "ScriptError",
    "ScriptedClient",
    "TimeoutExceededError",
    "TokenLimitExceededError",
    "TokenUsage",
    "UsageError",
    "UsageSummary",
    "VersionMismatch",
]
