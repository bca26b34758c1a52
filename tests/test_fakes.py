"""Our services of providers on a machine without a container engine: their sandboxes are processes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.fixtures import lead_to_modal, lead_to_prime
from tests.fakes.modal.service import FakeModal
from tests.fakes.prime import FakePrime
from tests.fakes.processes import Processes
from tests.test_main_job import run_the_demo

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="namespaces without an engine need root")


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    assert not made.running
    assert not made.folder.exists()  # the service has closed them


def test_prime(processes: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with FakePrime(processes) as service:
        service.minute = 60.0  # the host's own programs are many to look through
        lead_to_prime(service, monkeypatch, tmp_path)
        run_the_demo("prime", tmp_path)
        assert [each.status for each in service.machines.values()] == ["TERMINATED"]


def test_modal(processes: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with FakeModal(processes) as service:
        roots = tmp_path / "roots.pem"
        service.authority.cert_pem.write_to_path(str(roots))
        monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(roots))
        lead_to_modal(service, monkeypatch)
        run_the_demo("modal", tmp_path)
        assert [each.runs for each in service.boxes.values()] == [False]
