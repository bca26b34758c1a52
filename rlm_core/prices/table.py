"""The price of a call: `prices.toml`, and prices of the user's own before it."""

import functools
import os
import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlm_core.errors import ConfigError
from rlm_core.types import TokenUsage

MILLION = 1_000_000
Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DATED = re.compile(r"[-@](\d{8}|\d{4}-\d{2}-\d{2}|latest)")
"""What providers add to a model's name for a snapshot of it."""


class Rates(BaseModel):
    """USD per million tokens; what is left out costs what `input` costs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: Usd
    output: Usd
    cached_input: Usd | None = None
    cache_write: Usd | None = None

    def cost(self, usage: TokenUsage) -> float:
        """In USD. Cached and written tokens are among the input tokens, reasoning among the output."""
        plain = max(0, usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens)
        cached = self.input if self.cached_input is None else self.cached_input
        written = self.input if self.cache_write is None else self.cache_write
        read = plain * self.input + usage.cached_tokens * cached + usage.cache_write_tokens * written
        return (read + usage.output_tokens * self.output) / MILLION

    def dearest_input(self) -> float:
        return max(self.input, self.cached_input or 0.0, self.cache_write or 0.0)


class Tier(Rates):
    """Rates of a whole request whose prompt has more tokens than this."""

    tokens: int


class Price(Rates):
    above: tuple[Tier, ...] = ()

    def of(self, usage: TokenUsage) -> float:
        """What a call cost, in USD."""
        tiers = [tier for tier in self.above if usage.input_tokens > tier.tokens]
        return max(tiers, key=lambda tier: tier.tokens, default=self).cost(usage)

    def worst_input(self, tokens: int) -> float:
        """USD that a prompt of at most so many tokens may cost."""
        return tokens * max(rates.dearest_input() for rates in self._possible(tokens)) / MILLION

    def worst_output(self, prompt_tokens: int) -> float:
        """USD that one token of the answer may cost."""
        return max(rates.output for rates in self._possible(prompt_tokens)) / MILLION

    def _possible(self, tokens: int) -> list[Rates]:
        return [self, *(tier for tier in self.above if tokens > tier.tokens)]


class PriceTable:
    """Prices by the name of a model: exactly, or that of which it is a dated snapshot."""

    def __init__(self, own: Mapping[str, Any] | str | os.PathLike[str] | None = None) -> None:
        """`own`: prices by model, as {"my-model": {"input": 0.1, "output": 0.4}} (USD per million tokens, 0
        for what costs nothing), or the path of a TOML file of such tables.

        Raises:
            ConfigError: it can't be read, or says something else.
        """
        table = _read(Path(own)) if isinstance(own, (str, os.PathLike)) else (own or {})
        self._own = {name: _price(name, value) for name, value in table.items()}

    def find(self, model: str) -> Price | None:
        """None for a model that has none."""
        short = model.rpartition("/")[2]  # routers put the provider's name before it
        for name in (model, short, DATED.split(model)[0], DATED.split(short)[0]):
            if name in self._own:
                return self._own[name]
        return _ours().find(model) or _ours().find(short)


class _Ours:
    def __init__(self, text: str) -> None:
        self.names: dict[str, Price] = {}
        self.prefixes: dict[str, Price] = {}
        for entry in tomllib.loads(text)["models"]:
            names, prefixes = entry.pop("names"), entry.pop("prefixes", [])
            price = Price.model_validate(entry)
            self.names |= {name: price for name in names if name not in self.names}
            self.prefixes |= {prefix: price for prefix in prefixes if prefix not in self.prefixes}

    def find(self, model: str) -> Price | None:
        for name in (model, DATED.split(model)[0]):
            if name in self.names:
                return self.names[name]
        found = [prefix for prefix in self.prefixes if model.startswith(prefix)]
        return self.prefixes[max(found, key=len)] if found else None


@functools.cache
def _ours() -> _Ours:
    return _Ours(files("rlm_core.prices").joinpath("prices.toml").read_text())


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"prices: {error.strerror or error}: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"prices: {path}: {error}") from None


def _price(name: str, value: Any) -> Price:
    if isinstance(value, Price):
        return value
    try:
        return Price.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"prices[{name!r}]: {where}: {first['msg']}") from None
