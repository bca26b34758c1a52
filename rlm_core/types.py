"""What a run gives back. Names and `to_dict` are those of the original library (`rlms` 0.1.3)."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Of one LM call, in tokens; cost in USD where the provider tells it."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cost: float | None = None
    cache_write_tokens: int = 0
    """Of the input, written to the provider's prompt cache, which some ask more for."""


@dataclass
class ModelUsageSummary:
    total_calls: int
    total_input_tokens: int
    total_output_tokens: int
    total_cost: float | None = None
    total_cached_tokens: int = 0
    total_reasoning_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelUsageSummary":
        return cls(**data)


@dataclass
class UsageSummary:
    """Usage by model, of a whole run."""

    model_usage_summaries: dict[str, ModelUsageSummary] = field(default_factory=dict)

    @property
    def total_cost(self) -> float | None:
        """USD; None when no provider told a cost."""
        costs = [
            each.total_cost for each in self.model_usage_summaries.values() if each.total_cost is not None
        ]
        return sum(costs) if costs else None

    @property
    def total_input_tokens(self) -> int:
        return sum(each.total_input_tokens for each in self.model_usage_summaries.values())

    @property
    def total_output_tokens(self) -> int:
        return sum(each.total_output_tokens for each in self.model_usage_summaries.values())

    def to_dict(self) -> dict[str, Any]:
        models = {name: each.to_dict() for name, each in self.model_usage_summaries.items()}
        cost = {} if self.total_cost is None else {"total_cost": self.total_cost}
        return {"model_usage_summaries": models, **cost}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "UsageSummary":
        models = data.get("model_usage_summaries", {})
        return cls({name: ModelUsageSummary.from_dict(each) for name, each in models.items()})


@dataclass
class RLMChatCompletion:
    """The answer of an RLM, or of one LM call that a cell made."""

    root_model: str
    prompt: Any
    response: str
    usage_summary: UsageSummary
    execution_time: float
    """Seconds."""
    metadata: dict[str, Any] | None = None
    """The trajectory, when a logger captured it: `run_metadata` and `iterations`."""
    error: str | None = None
    status: str = "answered"
    """answered · max_iterations (the response is a best effort) · failed · with on_limit="return" the name of
    the limit: max_budget, max_tokens, max_calls, max_timeout or max_errors."""
    iterations: int = 0
    run_id: str = ""
    log: str | None = None
    """Path of the run's log file."""

    def to_dict(self) -> dict[str, Any]:
        result = asdict(self) | {"usage_summary": self.usage_summary.to_dict()}
        return {key: value for key, value in result.items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RLMChatCompletion":
        return cls(**{**data, "usage_summary": UsageSummary.from_dict(data["usage_summary"])})


@dataclass
class REPLResult:
    """What a cell did. `locals` maps the names of variables to the names of their types."""

    stdout: str
    stderr: str
    locals: dict[str, str]
    execution_time: float
    rlm_calls: list[RLMChatCompletion] = field(default_factory=list)
    final_answer: str | None = None
    status: str = "ok"
    """ok · error · interrupted · timeout · rolled_back."""
    rollback: str | None = None
    """Why every variable is as before the cell."""
    no_checkpoint: str | None = None
    """Why the cell could not have been rolled back."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rlm_calls": [call.to_dict() for call in self.rlm_calls]}


@dataclass
class CodeBlock:
    code: str
    result: REPLResult

    def to_dict(self) -> dict[str, Any]:
        return {"code": self.code, "result": self.result.to_dict()}


@dataclass
class RLMIteration:
    """One turn of the root LM."""

    prompt: Any
    response: str
    code_blocks: list[CodeBlock]
    final_answer: str | None = None
    iteration_time: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "response": self.response,
            "code_blocks": [block.to_dict() for block in self.code_blocks],
            "final_answer": self.final_answer,
            "iteration_time": self.iteration_time,
        }


@dataclass
class RLMMetadata:
    """How a run was set up; never holds a secret."""

    root_model: str
    max_depth: int
    max_iterations: int
    backend: str
    backend_kwargs: dict[str, Any]
    environment_type: str
    environment_kwargs: dict[str, Any]
    other_backends: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "environment": self.environment_type}
