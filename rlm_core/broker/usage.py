"""Adds up what calls used, by model."""

from rlm_core.types import ModelUsageSummary, TokenUsage, UsageSummary


class UsageMeter:
    def __init__(self) -> None:
        self._models: dict[str, ModelUsageSummary] = {}

    def add(self, model: str, usage: TokenUsage) -> None:
        total = self._models.setdefault(model, ModelUsageSummary(0, 0, 0))
        total.total_calls += 1
        total.total_input_tokens += usage.input_tokens
        total.total_output_tokens += usage.output_tokens
        total.total_cached_tokens += usage.cached_tokens
        total.total_reasoning_tokens += usage.reasoning_tokens
        if usage.cost is not None:
            total.total_cost = (total.total_cost or 0.0) + usage.cost

    def summary(self) -> UsageSummary:
        return UsageSummary({name: ModelUsageSummary(**vars(each)) for name, each in self._models.items()})
