"""Every environment does what every environment has to. Writes the table in docs/environments.md."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rlm_environments.local import LocalEnvironment

from rlm_core.conformance.check import CHECKS
from rlm_core.conformance.plugin import RunCheck
from rlm_core.conformance.runner import Outcome, allow, select
from rlm_core.errors import ConfigError

PATH = Path(__file__).resolve().parents[1] / "docs" / "environments.md"
BEGIN, END = "<!-- written by tests/test_conformance.py -->\n", "<!-- to here -->\n"
COLUMNS = ("local", "bubblewrap", "docker", "modal", "modal, stdio", "prime")
outcomes: dict[tuple[str, str], Outcome] = {}


def note(environment: str) -> Callable[[Outcome], None]:
    def told(outcome: Outcome) -> None:
        outcomes[environment, outcome.check.name] = outcome

    return told


@pytest.mark.rlm_environment("local")
def test_local(rlm_check: RunCheck) -> None:
    rlm_check(note("local"))


@pytest.mark.needs("bubblewrap")
@pytest.mark.rlm_environment("bubblewrap")
def test_bubblewrap(rlm_check: RunCheck) -> None:
    rlm_check(note("bubblewrap"))


@pytest.mark.needs("docker")
@pytest.mark.rlm_environment("docker", memory="1GiB")
def test_docker(rlm_check: RunCheck) -> None:
    rlm_check(note("docker"))


@pytest.mark.needs("docker")
@pytest.mark.usefixtures("modal")
@pytest.mark.rlm_environment("modal", memory="1GiB", lease=3.0)
def test_modal(rlm_check: RunCheck) -> None:
    rlm_check(note("modal"))


@pytest.mark.needs("docker")
@pytest.mark.usefixtures("modal")
@pytest.mark.rlm_environment("modal", memory="1GiB", lease=3.0, transport="stdio")
def test_modal_stdio(rlm_check: RunCheck) -> None:
    rlm_check(note("modal, stdio"))


@pytest.mark.needs("docker")
@pytest.mark.usefixtures("prime")
@pytest.mark.rlm_environment("prime", memory="1GiB", lease=3.0)
def test_prime(rlm_check: RunCheck) -> None:
    rlm_check(note("prime"))


def test_the_table_is_current() -> None:
    """Written anew when everything was tried; in CI what is committed must be what was found."""
    committed = PATH.read_text().partition(BEGIN)[2]
    assert re.findall(r"^\| `([a-z_.]+)` \|", committed, re.M) == list(CHECKS)
    if set(outcomes) != {(column, name) for column in COLUMNS for name in CHECKS}:
        return  # a part of the suite, or of the environments
    current = PATH.read_text()
    head, tail = current.partition(BEGIN)[0], current.partition(END)[2]
    found = f"{head}{BEGIN}{table()}{END}{tail}"
    PATH.write_text(found)
    assert found == current, "docs/environments.md was out of date; it is written now: commit it"


def table() -> str:
    lines = [f"| check | what holds | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}\n"]
    reasons: list[str] = []
    for check in CHECKS.values():
        words = []
        for column in COLUMNS:
            outcome = outcomes[column, check.name]
            if outcome.status in ("passed", "refused"):
                words.append({"passed": "yes", "refused": "refused"}[outcome.status])
                continue
            reason = outcome.detail
            if reason not in reasons:
                reasons.append(reason)
            word = {"not applicable": "–", "known failure": "**no**"}[outcome.status]
            words.append(f"{word} ({reasons.index(reason) + 1})")
        lines.append(f"| `{check.name}` | {check.says} | {' | '.join(words)} |\n")
    lines.append("\n")
    lines += [
        f"{number}. {reason[:1].upper()}{reason[1:].rstrip('.')}.\n"
        for number, reason in enumerate(reasons, 1)
    ]
    return "".join(lines)


def test_the_command_runs_the_checks_that_are_asked_for() -> None:
    rlm = Path(sys.executable).parent / "rlm"
    done = subprocess.run(
        [rlm, "conformance", "local", "state.*", "calls.one", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and {line["status"] for line in lines} == {"passed"}
    assert [line["check"] for line in lines] == [each.name for each in select(["state.*", "calls.one"])]


def test_a_check_that_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no check is named 'nothing.\*'; groups: state"):
        select(["nothing.*"])


def test_a_known_failure_of_a_check_that_there_is_not_is_named() -> None:
    kind = type("Odd", (LocalEnvironment,), {"known_failures": {"state.nothing": "a slip of the pen"}})
    with pytest.raises(ConfigError, match=r"no check is named state\.nothing"):
        allow(kind)


FAILING = """
import pytest
from rlm_environments.local import LocalEnvironment
from rlm_core.environment import PolicyNotEnforceable

class Broken(LocalEnvironment):
    name = "broken"
    known_failures = {"state.echo": "it has no REPL", "state.main": "it is said to fail"}

@pytest.fixture(autouse=True)
def broken(monkeypatch):
    from rlm_core.conformance import arena
    monkeypatch.setattr(arena, "make_environment", lambda name, kwargs: Broken(arena_spec(kwargs)))
    from rlm_core.session import Session
    whole = Session.execute
    async def execute(self, code, **kwargs):
        return await whole(self, code.replace("'a'", "'b'").replace("20", "21"), **kwargs)
    monkeypatch.setattr(Session, "execute", execute)

def arena_spec(kwargs):
    from rlm_core.environment import parse_spec
    return parse_spec(kwargs)

@pytest.mark.rlm_environment("broken")
def test_it(rlm_check):
    rlm_check()
"""


def test_a_check_that_fails_fails_and_a_known_failure_is_expected_and_has_to_fail(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA", "-k", "state."]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    assert "FAILED test_broken.py::test_it[state.variables]" in done.stdout, done.stdout
    assert "XFAIL test_broken.py::test_it[state.echo]" in done.stdout
    assert "FAILED test_broken.py::test_it[state.main]" in done.stdout  # known to fail, and does not
    assert "PASSED test_broken.py::test_it[state.sessions]" in done.stdout
