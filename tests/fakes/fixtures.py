"""The services of providers, as fixtures: one of each for all tests, and the variables that lead to it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.prime import KEY, LABEL, FakePrime


@pytest.fixture(scope="session")
def prime_service() -> Iterator[FakePrime]:
    with FakePrime() as fake:
        yield fake
    left = subprocess.run(
        ["docker", "ps", "-q", "--filter", f"label={LABEL}"], capture_output=True, text=True
    )
    assert left.stdout == ""


@pytest.fixture
def prime(
    prime_service: FakePrime, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> FakePrime:
    monkeypatch.setenv("PRIME_API_BASE_URL", prime_service.url)
    monkeypatch.setenv("PRIME_API_KEY", KEY)
    monkeypatch.setenv("PRIME_TEAM_ID", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    prime_service.requests.clear()
    return prime_service
