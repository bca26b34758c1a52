"""The conformance suite against the real clouds: `make test-cloud`. It costs money, and needs keys.

Not part of `make test`: the file's name is not a test's.
"""

import os

import pytest

from rlm_core.conformance.plugin import RunCheck

pytestmark = pytest.mark.timeout(3600)


def needs(key: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(key not in os.environ, reason=f"set {key} to run it")


@needs("MODAL_TOKEN_ID")
@pytest.mark.rlm_environment("modal", memory="2GiB")
def test_modal(rlm_check: RunCheck) -> None:
    rlm_check()


@needs("MODAL_TOKEN_ID")
@pytest.mark.rlm_environment("modal", memory="2GiB", transport="stdio")
def test_modal_without_a_port(rlm_check: RunCheck) -> None:
    rlm_check()


@needs("PRIME_API_KEY")
@pytest.mark.rlm_environment("prime", memory="2GiB")
def test_prime(rlm_check: RunCheck) -> None:
    rlm_check()
