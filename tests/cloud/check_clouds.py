"""The conformance suite against the real clouds: `make test-cloud`. It costs money, and needs keys.

Not part of `make test`: the file's name is not a test's.
"""

import os
from collections.abc import Callable

import pytest

from rlm_core.conformance.runner import Outcome

KEYS = {"prime": "PRIME_API_KEY"}


@pytest.mark.skipif(KEYS["prime"] not in os.environ, reason="set PRIME_API_KEY to run it")
@pytest.mark.rlm_environment("prime", memory="2GiB")
@pytest.mark.timeout(3600)
def test_prime(rlm_check: Callable[[], Outcome]) -> None:
    rlm_check()
