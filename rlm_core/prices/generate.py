"""Makes prices.toml anew from the figures that `genai-prices` collects (https://github.com/pydantic/genai-prices).

Run it by `make prices`; it needs the dependency group `prices`.
"""

import datetime
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

from genai_prices.data import providers
from genai_prices.types import ClauseAnd, ClauseEquals, ClauseOr, ClauseStartsWith, TieredPrices

TARGET = Path(__file__).parent / "prices.toml"
PROVIDERS = ("anthropic", "deepseek", "google", "groq", "mistral", "openai", "x-ai")
FIELDS = {
    "input": "input_mtok",
    "cached_input": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
    "output": "output_mtok",
}
HEAD = """\
# USD per million tokens, made by `make prices` from genai-prices {version} (MIT), {date}. Not to be edited:
# prices of your own go into RLM(prices=…).
#
# names: the model is called so. prefixes: its name begins so; the longest one counts.
# above: another price for the whole request when its prompt has more tokens than that.

date = "{date}"
"""


def _words(match: Any) -> tuple[list[str], list[str]]:
    """Names and prefixes of a rule; others of its conditions are left out."""
    if isinstance(match, ClauseEquals):
        return [match.equals], []
    if isinstance(match, ClauseStartsWith):
        return [], [match.starts_with]
    names: list[str] = []
    prefixes: list[str] = []
    parts = match.or_ if isinstance(match, ClauseOr) else match.and_ if isinstance(match, ClauseAnd) else []
    for part in parts:
        more_names, more_prefixes = _words(part)
        names += more_names
        prefixes += more_prefixes
    return names, prefixes


def _prices(model: Any, today: datetime.date) -> list[Any]:
    """Those that hold today; more than one where they depend on the hour."""
    if not isinstance(model.prices, list):
        return [model.prices]
    dated = [each for each in model.prices if _has_begun(each.constraint, today)]
    begun = [each for each in dated if hasattr(each.constraint, "start_date")]
    return [each.prices for each in (begun[-1:] or dated)]


def _has_begun(constraint: Any, today: datetime.date) -> bool:
    return not hasattr(constraint, "start_date") or constraint.start_date <= today


def _tiers(value: Any) -> dict[int, Decimal]:
    if value is None:
        return {}
    if isinstance(value, TieredPrices):
        return {0: value.base, **{tier.start: tier.price for tier in value.tiers}}
    return {0: value}


def _figures(prices: list[Any]) -> dict[int, dict[str, Decimal]]:
    """By the least number of tokens; the highest where the hour decides."""
    found: dict[int, dict[str, Decimal]] = {}
    for field, attribute in FIELDS.items():
        for price in prices:
            for start, amount in _tiers(getattr(price, attribute, None)).items():
                tier = found.setdefault(start, {})
                tier[field] = max(amount, tier.get(field, Decimal(0)))
    return found


def _entry(model: Any, today: datetime.date) -> str:
    figures = _figures(_prices(model, today))
    base = figures.pop(0, {})
    if "input" not in base or "output" not in base:
        return ""
    names, prefixes = _words(model.match)
    lines = ["[[models]]", f"names = {sorted({model.id, *names})!r}"]
    if prefixes:
        lines.append(f"prefixes = {sorted(set(prefixes))!r}")
    lines += [f"{field} = {float(amount)!r}" for field, amount in base.items()]
    for start, tier in sorted(figures.items()):
        inner = ", ".join(f"{field} = {float(amount)!r}" for field, amount in tier.items())
        lines.append(f"above = [{{ tokens = {start}, {inner} }}]")
        break  # no model of these has more than one
    return "\n".join(lines).replace("'", '"') + "\n"


def main() -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    parts = [HEAD.format(version=version("genai-prices"), date=today.isoformat())]
    for provider in providers:
        if provider.id not in PROVIDERS:
            continue
        sources = " ".join(provider.pricing_urls or [])
        parts.append(f"# {provider.name}: {sources}\n")
        parts += [entry for model in provider.models if (entry := _entry(model, today))]
    TARGET.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
