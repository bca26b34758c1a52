"""The attack catalogue, in every environment, each case with its control. Writes docs/security-matrix.md."""

import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks import escape, leaks, matrix, network, resources, tampering
from tests.attacks.arena import SPECS, Arena, unsandboxed
from tests.attacks.case import Case

CASES: list[Case] = [
    *escape.CASES,
    *network.CASES,
    *resources.CASES,
    *tampering.CASES,
    *leaks.CASES,
]


held: dict[tuple[str, str, str], bool] = {}


def named(case: Case) -> str:
    return f"{case.id} {case.title}"


class Host:
    """What the attacks look for on the host: servers, sockets, a key."""

    def __init__(self, folder: Path) -> None:
        self.secret = secrets.token_hex(12)
        secret_file = folder / "key"
        secret_file.write_text(self.secret)
        self.listeners = [socket.create_server(("127.0.0.1", 0))]
        self.listeners.append(socket.create_server(("::1", 0), family=socket.AF_INET6))
        abstract = f"rlm-test-{secrets.token_hex(6)}"
        path = f"/tmp/rlm-test-{secrets.token_hex(6)}.sock"
        for name in (f"\0{abstract}", path):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(name)
            listener.listen()
            self.listeners.append(listener)
        self._path = Path(path)
        half = len(self.secret) // 2
        self.words = {
            "{port}": str(self.listeners[0].getsockname()[1]),
            "{port6}": str(self.listeners[1].getsockname()[1]),
            "{abstract}": abstract,
            "{path}": path,
            "{file}": str(secret_file),
            "{half1}": self.secret[:half],
            "{half2}": self.secret[half:],
            "{hostname}": socket.gethostname(),
            "{user_home}": str(Path.home()),
        }

    def aim(self, code: str, arena: Arena | None = None) -> str:
        for word, value in {**self.words, **(arena.words if arena else {})}.items():
            code = code.replace(word, value)
        return code

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        self._path.unlink()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    made = Host(tmp_path_factory.mktemp("host"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def arenas() -> Iterator[dict[str, Arena]]:
    opened: dict[str, Arena] = {}
    yield opened
    for arena in opened.values():
        arena.close()


@pytest.mark.parametrize("case", [case for case in CASES if case.control != ""], ids=named)
def test_unsandboxed_the_attack_succeeds(case: Case, host: Host) -> None:
    shot = unsandboxed(host.aim(case.control or case.code))
    assert shot.outcome == "ok", shot


@pytest.mark.parametrize(
    ("environment", "case"),
    [
        pytest.param(name, case, marks=pytest.mark.needs(name))
        for name in SPECS
        for case in CASES
        if name in case.applies
    ],
    ids=lambda each: named(each) if isinstance(each, Case) else each,
)
def test_the_sandbox_holds(environment: str, case: Case, host: Host, arenas: dict[str, Arena]) -> None:
    if environment not in arenas:
        arenas[environment] = Arena(environment)
    victims = arenas[environment]
    if environment in case.ends:
        arena = Arena(environment)
        shot = arena.attack(case, host.aim(case.code, arena))
        arena.close()
        assert shot.status in (*case.statuses, "lost"), shot
    else:
        shot = victims.attack(case, host.aim(case.code, victims))
        assert shot.status in case.statuses, shot
    assert (shot.outcome == "ok") is case.inert, shot
    assert victims.others_are_well()
    held[environment, case.id, case.title] = True


def test_the_matrix_is_current() -> None:
    """Written anew when everything was tried; in CI what is committed must be what was found."""
    tried = {(name, case.id, case.title) for name in SPECS for case in CASES if name in case.applies}
    if set(held) != tried:
        return  # a part of the suite, or of the environments
    found = matrix.text(CASES, held)
    current = matrix.PATH.read_text() if matrix.PATH.exists() else ""
    matrix.PATH.write_text(found)
    assert found == current, "docs/security-matrix.md was out of date; it is written now: commit it"


@pytest.mark.parametrize("name", matrix.TESTS)
def test_what_the_matrix_points_to_is_there(name: str) -> None:
    file, _, test = matrix.TESTS[name][1].partition("::")
    assert f"def {test}(" in (Path(__file__).parent / file).read_text()
