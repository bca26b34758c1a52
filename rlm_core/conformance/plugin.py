"""The pytest plugin: a test with the marker `rlm_environment` and the fixture `rlm_check` becomes a test of
each check."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from rlm_core.conformance.runner import Outcome

MARKER = "rlm_environment"


class RunCheck(Protocol):
    """What the fixture gives."""

    def __call__(self, told: "Callable[[Outcome], None]" = ...) -> "Outcome": ...


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{MARKER}(name, **policy): the environment that rlm_check runs against"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rlm_check" in metafunc.fixturenames:
        from rlm_core.conformance.runner import select

        chosen = select()
        metafunc.parametrize("rlm_check", chosen, ids=[each.name for each in chosen], indirect=True)


@pytest.fixture(scope="module")
def _rlm_arenas() -> Iterator[dict[str, Any]]:
    arenas: dict[str, Any] = {}
    yield arenas
    if arenas:
        from rlm_core.portal import portal

        for arena in arenas.values():
            portal().run(arena.aclose())


@pytest.fixture
def rlm_check(request: pytest.FixtureRequest, _rlm_arenas: dict[str, Any]) -> "RunCheck":
    """Call it to run the check. A known failure is an expected one; one that passes, fails.

    It tells of the outcome before it judges it: `rlm_check(told)`.
    """
    from rlm_core.conformance.arena import Arena
    from rlm_core.conformance.runner import Outcome, allow, run_one
    from rlm_core.portal import portal

    marker = request.node.get_closest_marker(MARKER)
    if marker is None or not marker.args:
        raise pytest.UsageError(f"rlm_check needs @pytest.mark.{MARKER}(name, **policy)")
    key = repr((marker.args, marker.kwargs))

    async def run() -> Outcome:
        if key not in _rlm_arenas:
            arena = Arena(marker.args[0], marker.kwargs)
            allow(type(arena.environment))
            _rlm_arenas[key] = arena
        return await run_one(request.param, _rlm_arenas[key])

    def judge(told: Callable[[Outcome], None] = lambda outcome: None) -> Outcome:
        outcome: Outcome = portal().run(run())
        told(outcome)
        if outcome.status == "known failure":
            pytest.xfail(outcome.detail)
        if not outcome.ok:
            pytest.fail(f"{outcome.check.says} {outcome.status}: {outcome.detail}", pytrace=False)
        return outcome

    return judge
