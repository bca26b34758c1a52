"""The conformance suite against the real clouds: `make test-cloud`. It costs money, and needs keys.

Not part of `make test`: the file's name is not a test's.
"""

import os
from pathlib import Path

import pytest

from rlm_core.conformance.plugin import RunCheck

pytestmark = pytest.mark.timeout(3600)


def needs(key: str, login: str) -> pytest.MarkDecorator:
    """The account's key, or the file that the provider's own command leaves."""
    there = key in os.environ or Path(login).expanduser().exists()
    return pytest.mark.skipif(not there, reason=f"set {key} to run it")


needs_modal = needs("MODAL_TOKEN_ID", "~/.modal.toml")
needs_prime = needs("PRIME_API_KEY", "~/.prime/config.json")


@needs_modal
@pytest.mark.rlm_environment("modal", memory="2GiB")
def test_modal(rlm_check: RunCheck) -> None:
    rlm_check()


@needs_modal
@pytest.mark.rlm_environment("modal", memory="2GiB", transport="stdio")
def test_modal_without_a_port(rlm_check: RunCheck) -> None:
    rlm_check()


@needs_prime
@pytest.mark.rlm_environment("prime", memory="2GiB")
def test_prime(rlm_check: RunCheck) -> None:
    rlm_check()
