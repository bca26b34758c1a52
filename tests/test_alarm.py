"""One alarm of many short works rings when a timer for each would."""

import asyncio
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlm_agent.rpc.alarm import Alarm


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time goes on when it is told to."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.call_soon(self.stop)
        self.run_forever()

    def do(self, alarm: Alarm, seconds: float | None) -> None:
        """Set it, or stop it."""

        async def work() -> None:
            if seconds is None:
                alarm.stop()
            else:
                alarm.set(seconds)

        self.run_until_complete(work())


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    yield clock
    clock.close()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(1, 20)),
        st.tuples(st.just("stop"), st.just(0)),
        st.tuples(st.just("advance"), st.integers(1, 20)),
    ),
    max_size=30,
)


@given(STEPS)
def test_it_rings_once_when_its_first_time_has_come(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    rung: list[float] = []
    expected: list[float] = []
    alarm = Alarm(lambda: rung.append(clock.now))
    due: float | None = None
    for what, seconds in steps:
        if what == "advance":
            for _ in range(seconds):
                clock.advance(1)
                if due is not None and clock.now >= due:
                    expected.append(clock.now)
                    due = None
        elif what == "set":
            clock.do(alarm, seconds)
            due = min(due or math.inf, clock.now + seconds)
        else:
            clock.do(alarm, None)
            due = None
    clock.close()
    assert rung == expected


def test_many_works_leave_one_timer_in_the_loop(clock: Clock) -> None:
    alarm = Alarm(lambda: None)
    timers: list[float] = []
    call_at = clock.call_at

    def counted(when: float, *arguments: object, **options: object) -> asyncio.TimerHandle:
        timers.append(when)
        return call_at(when, *arguments, **options)  # type: ignore[arg-type]

    clock.call_at = counted  # type: ignore[method-assign]
    for _ in range(100):
        clock.do(alarm, 300.0)
        clock.do(alarm, None)
        clock.now += 0.01
    assert timers == [300.0]


def test_a_closed_one_lets_go_of_whoever_is_to_hear_it(clock: Clock) -> None:
    rung: list[None] = []
    alarm = Alarm(lambda: rung.append(None))
    clock.do(alarm, 5.0)
    timer = alarm._timer
    alarm.close()
    assert timer is not None
    assert timer.cancelled()
    clock.advance(10)
    assert not rung


def test_it_can_be_set_from_its_own_ring(clock: Clock) -> None:
    rung: list[float] = []

    def again() -> None:
        rung.append(clock.now)
        if len(rung) < 3:
            alarm.set(2.0)

    alarm = Alarm(again)
    clock.do(alarm, 2.0)
    for _ in range(10):
        clock.advance(1)
    assert rung == [2.0, 4.0, 6.0]
