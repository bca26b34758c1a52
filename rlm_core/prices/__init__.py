"""What providers ask for tokens, with the date and the source of each figure."""

from rlm_core.prices.table import Price, PriceTable

__all__ = ["Price", "PriceTable"]
