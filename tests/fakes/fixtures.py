"""The services of providers, as fixtures: one of each for all tests, and the variables that lead to it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import prime as fake_prime
from tests.fakes.machines import Containers, Machines
from tests.fakes.modal.access import TOKEN
from tests.fakes.modal.service import FakeModal
from tests.fakes.prime import FakePrime


def _nothing_left(machines: Machines) -> None:
    """Every sandbox was ended by who started it, or by its service."""
    assert isinstance(machines, Containers)
    left = subprocess.run(
        ["docker", "ps", "-q", "--filter", f"label={machines.label}"], capture_output=True, text=True
    )
    assert left.stdout == ""


@pytest.fixture(scope="session")
def prime_service() -> Iterator[FakePrime]:
    with FakePrime() as fake:
        yield fake
    _nothing_left(fake.boxes)


@pytest.fixture
def prime(
    prime_service: FakePrime, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> FakePrime:
    lead_to_prime(prime_service, monkeypatch, tmp_path_factory.getbasetemp())
    prime_service.requests.clear()
    return prime_service


def lead_to_prime(service: FakePrime, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("PRIME_API_BASE_URL", service.url)
    monkeypatch.setenv("PRIME_API_KEY", fake_prime.KEY)
    monkeypatch.setenv("PRIME_TEAM_ID", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture(scope="session")
def modal_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeModal]:
    roots = tmp_path_factory.mktemp("modal") / "roots.pem"
    with FakeModal() as fake:
        fake.authority.cert_pem.write_to_path(str(roots))
        # gRPC reads it once in a process, with its first channel of this kind.
        os.environ["GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"] = str(roots)
        yield fake
    _nothing_left(fake.machines)


@pytest.fixture
def modal(modal_service: FakeModal, monkeypatch: pytest.MonkeyPatch) -> FakeModal:
    lead_to_modal(modal_service, monkeypatch)
    modal_service.requests.clear()
    return modal_service


def lead_to_modal(service: FakeModal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODAL_SERVER_URL", service.url)
    monkeypatch.setenv("MODAL_TOKEN_ID", TOKEN[0])
    monkeypatch.setenv("MODAL_TOKEN_SECRET", TOKEN[1])
    monkeypatch.setenv("MODAL_CONFIG_PATH", os.devnull)
