"""Calls out of a cell: concurrent, bounded, cancelled with their cell, never believed."""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from rlm_agent import limits as agent_limits
from rlm_agent.calls import Calls
from rlm_agent.cell import Cell
from rlm_agent.frames import Frame, Kind
from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import Sandbox
from rlm_core.session import Session
from rlm_core.types import TokenUsage
from tests.conftest import SPEC, echo

RAW = """
import os, socket, struct, json
def connect():
    s = socket.socket(socket.AF_UNIX); s.connect(os.environ["RLM_SESSION_SOCKET"]); s.settimeout(60); return s
def frame(kind, header, body=b""):
    h = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("!BII", kind, len(h), len(body)) + h + body
"""


async def test_a_reply_is_a_str_that_says_whether_it_is_one(session: Session) -> None:
    result = await session.execute(
        "r = llm_query('hi', model='m')\nprint(r, isinstance(r, str), r.ok, r.error, r.model, r.usage)\n"
        "f = llm_query('fail now')\nprint(f, f.ok, f.error)"
    )
    assert result.stdout == (
        "echo hi True True None m {'input_tokens': 2, 'output_tokens': 1}\n"
        "Error: no answer to fail now False no answer to fail now\n"
    )


async def test_one_failure_in_a_batch_fails_one_slot(session: Session) -> None:
    result = await session.execute("print([r.ok for r in llm_query_batched(['a', 'fail', 'c'])])")
    assert result.stdout == "[True, False, True]\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("llm_query(3)", "must be a str, not int"),
        ("llm_query('x', model=3)", "model must be a str or None"),
        ("llm_query('x', model='m' * 10_000)", "at most 128 characters"),
        ("llm_query_batched('abc')", "must be a list of str"),
        ("llm_query_batched(['x'] * 1_000_000)", "at most 10,000"),
    ],
)
async def test_wrong_arguments_raise_in_the_cell(session: Session, code: str, message: str) -> None:
    result = await session.execute(code)
    assert result.error is not None and message in result.error.message


async def test_calls_do_without_the_environment(session: Session) -> None:
    result = await session.execute(
        "import multiprocessing, os, sys, subprocess\nos.environ.clear()\n"
        "print(llm_query('one'))\n"
        "with multiprocessing.Pool(1) as pool: print(pool.map(llm_query, ['two'])[0])\n"
        "code = 'from rlm_agent.repl import llm_query; print(llm_query(\"three\"))'\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)"
    )
    one, two, three = result.stdout.strip().splitlines()
    assert (one, two) == ("echo one", "echo two") and "RLM_SESSION_SOCKET is not set" in three
    assert (await session.execute("print(llm_query('four'))")).stdout == "echo four\n"


async def test_an_over_long_prompt_says_how_long_it_may_be(session: Session) -> None:
    result = await session.execute("print(llm_query('é' * 3_000_000))")
    assert "3,000,000 characters (6,000,000 bytes); at most 4,194,304 bytes" in result.stdout


async def test_calls_work_from_threads_forks_and_programs(session: Session) -> None:
    code = """
import multiprocessing, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(20) as pool: print(sorted(pool.map(llm_query, [f"t{n:02}" for n in range(40)]))[-1])
with multiprocessing.Pool(2) as pool: print(pool.map(llm_query, ["p1", "p2"]))
program = "from rlm_agent.repl import llm_query; print(llm_query('s1'))"
print(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout)
print(llm_query("own"))
"""
    result = await session.execute(code)
    assert result.stdout == "echo t39\n['echo p1', 'echo p2']\necho s1\n\necho own\n", result.stderr


async def test_a_batch_is_concurrent(sandbox: Sandbox) -> None:
    together = asyncio.Barrier(50)

    async def meet(call: Call) -> Answer | Failure:
        await together.wait()
        return Answer(call.prompt, "m", TokenUsage())

    async with Session(sandbox, SPEC, meet) as session:
        result = await session.execute("print(llm_query_batched([str(n) for n in range(50)])[49])")
    assert result.stdout == "49\n"


async def test_interrupting_a_cell_cancels_its_calls(sandbox: Sandbox) -> None:
    cancelled: list[str] = []
    started = asyncio.Event()

    async def never(call: Call) -> Answer | Failure:
        if call.prompt != "stuck":
            return await echo(call)
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(call.id)
            raise
        raise AssertionError

    async with Session(sandbox, SPEC, never) as session:
        running = asyncio.create_task(session.execute("x = 1\nllm_query('stuck')"))
        await started.wait()
        await session.interrupt()
        assert (await running).status == "interrupted"
        assert len(cancelled) == 1
        assert (await session.execute("print(x, llm_query('free'))")).stdout == "1 echo free\n"


async def test_a_call_after_its_cell_is_refused(session: Session, tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    code = f"""
import threading
def late():
    open({str(go)!r}).read()  # until the host opens and closes it
    replies.append(llm_query("late"))
replies = []
thread = threading.Thread(target=late); thread.start()
"""
    await session.execute(code)
    await asyncio.to_thread(go.write_text, "")
    # The thread's call comes between cells: nobody pays for it.
    # Listing makes the worker look; the thread runs in the meantime.
    async with asyncio.timeout(20):
        while "Error" not in (text := await session.read_variable("replies")):
            pass
    assert "no cell is running" in text


async def test_refusals_that_nobody_reads_close_the_connection(session: Session) -> None:
    code = (
        RAW
        + """
s = connect()
refused = b"".join(frame(20, {"id": n, "kind": "no"}) for n in range(1000))
sent = 0
try:
    while sent < 100_000_000: s.sendall(refused); sent += len(refused)
    print("all was taken")
except OSError:
    print("closed")
print(llm_query("fine"))
"""
    )
    assert (await session.execute(code)).stdout == "closed\necho fine\n"


async def test_a_name_that_no_message_can_hold_is_refused_also_in_a_queue(session: Session) -> None:
    """More calls than may be open wait; what is wrong is found when their turn has come."""
    code = (
        RAW
        + """
s = connect()
calls = b"".join(frame(20, {"id": n, "kind": "llm"}, b"x") for n in range(1_100))
s.sendall(calls + frame(20, b'{"id":5000,"kind":"llm","model":"\\ud800"}'))
said = b""
while b'"id":5000' not in said: said += s.recv(1 << 20)
print(b"not a valid call" in said, llm_query("fine"))
"""
    )
    result = await session.execute(code, timeout=30)
    assert result.stdout == "True echo fine\n", result


async def test_forged_and_repeated_ids_and_malformed_frames_only_hurt_their_connection(
    session: Session,
) -> None:
    code = (
        RAW
        + """
def closed(data):
    s = connect(); s.sendall(data)
    try:
        return s.recv(1) == b""
    except OSError:
        return True
print("garbage", closed(b"\\xff" * 64))
print("unknown kind", closed(frame(99, {})))
print("not json", closed(frame(20, b"{nope")))
print("deep json", closed(frame(20, b"[" * 100_000)))
print("no id", closed(frame(20, {"kind": "llm"})))
print("worker kind", closed(frame(11, {"id": 1, "cell": "c1", "status": "ok"})))
print("long header", closed(frame(20, {"id": 1, "kind": "llm", "a": ["x"] * 3_000})))
print("long id", closed(frame(20, {"id": 1 << 70, "kind": "llm"})))
print("oversized", closed(struct.pack("!BII", 20, 10, 1 << 30)))
print("twice", closed(frame(20, {"id": 1, "kind": "llm"}, b"slow") * 2))
s = connect(); s.sendall(frame(20, {"id": 5, "kind": "root", "call_id": "c1/1", "depth": 0}, b"x"))
print("bad kind", b"not a valid call" in s.recv(1000))
print(llm_query("fine"))
"""
    )
    result = await session.execute(code)
    lines = result.stdout.splitlines()
    assert all(line.endswith("True") for line in lines[:-1]), result.stdout + result.stderr
    assert len(lines) == 12 and lines[-1] == "echo fine"
    assert (await session.execute("print('on')")).stdout == "on\n"


async def test_a_flood_of_calls_does_not_reach_the_host_all_at_once(sandbox: Sandbox) -> None:
    in_flight = most = 0
    gate = asyncio.Event()

    async def slow(call: Call) -> Answer | Failure:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        if most >= 200:
            gate.set()
        await gate.wait()
        in_flight -= 1
        return Answer("ok", "m", TokenUsage())

    code = (
        RAW
        + """
import threading
done = []
def flood():
    s = connect()
    data = b"".join(frame(20, {"id": n, "kind": "llm"}, b"x") for n in range(1000))
    threading.Thread(target=s.sendall, args=(data,), daemon=True).start()
    got = 0
    while got < 20_000: got += len(s.recv(1 << 16))
    done.append(1)
threads = [threading.Thread(target=flood) for _ in range(10)]
[t.start() for t in threads]; [t.join() for t in threads]
print(len(done))
"""
    )
    async with Session(sandbox, SPEC, slow) as session, Session(sandbox, SPEC, echo) as other:
        flooded = asyncio.create_task(session.execute(code))
        assert (await other.execute("print(llm_query('meanwhile'))")).stdout == "echo meanwhile\n"
        assert (await flooded).stdout == "10\n"
    assert most <= 1024


async def test_callers_that_come_when_there_are_too_many_calls_cost_the_agent_no_memory(
    sandbox: Sandbox,
) -> None:
    agent = sandbox.pid  # type: ignore[attr-defined]
    code = (
        RAW
        + f"""
import time
def resident(): return int(open("/proc/{agent}/statm").read().split()[1]) * 4096
first = connect()
first.sendall(b"".join(frame(20, {{"id": n, "kind": "llm"}}) for n in range(1024)))
time.sleep(0.5)  # until they are all open
before, others = resident(), []
blob = b"".join(frame(20, {{"id": n}}) for n in range(15_000))
for _ in range(25):
    others.append(connect())
    others[-1].setblocking(False)
    others[-1].send(blob)
time.sleep(1)
print((resident() - before) >> 20)
"""
    )

    async def never(call: Call) -> Answer | Failure:
        await asyncio.Event().wait()
        raise AssertionError

    async with Session(sandbox, SPEC, never) as session:
        assert int((await session.execute(code)).stdout) < 30


async def test_calls_wait_in_one_connection_and_else_in_their_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_limits, "MAX_PENDING_CALLS", 4)
    taken: asyncio.Queue[str] = asyncio.Queue()

    def up(message: Any) -> None:
        if not isinstance(message, pb.AgentMessage):
            taken.put_nowait(message().call.call_id)

    calls = Calls(up)
    calls.begin_cell(Cell("c", "", 1_000))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    await calls.listen(listener)
    callers = [await asyncio.open_unix_connection(tmp_path / "socket") for _ in range(5)]
    for number, (_, writer) in enumerate(callers):
        several = range(number * 7, number * 7 + 7)
        writer.write(b"".join(Frame(Kind.CALL, {"id": n, "kind": "llm"}).encode() for n in several))
    async with asyncio.timeout(20):
        for _ in range(35):
            call_id = await taken.get()
            assert sum(bool(each._waiting) for each in calls._connections) <= 1
            calls.reply(pb.CallReply(call_id=call_id, answer=pb.CallAnswer(text=b"x")))
    for _, writer in callers:
        writer.close()
    await calls.close()


@pytest.mark.parametrize("turns", [1, 2, 3])
async def test_a_cancelled_start_leaves_nothing_that_the_next_one_trips_over(
    tmp_path: Path, turns: int
) -> None:
    """The number of its socket is that of the next one's, which the loop has to listen to again."""

    def named(name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / name))
        return listener

    calls = Calls(lambda _: None)
    first = named("first")
    number = first.fileno()
    listening = asyncio.ensure_future(calls.listen(first))
    for _ in range(turns):
        await asyncio.sleep(0)
    listening.cancel()
    await asyncio.wait([listening])
    await calls.close()
    assert first.fileno() == -1
    second, others = named("second"), Calls(lambda _: None)
    assert second.fileno() == number
    await others.listen(second)
    reader, writer = await asyncio.open_unix_connection(tmp_path / "second")
    writer.write(b"no frame" * 8)
    async with asyncio.timeout(5):
        assert await reader.read(1) == b""
    writer.close()
    await others.close()


async def test_a_client_that_never_reads_its_replies_harms_nobody(session: Session) -> None:
    code = (
        RAW
        + """
s = connect()
s.sendall(b"".join(frame(20, {"id": n, "kind": "llm"}, b"x" * 1000) for n in range(500)))
print(llm_query("other thread"))
"""
    )
    assert (await session.execute(code)).stdout == "echo other thread\n"


NESTED = """
import signal, gc
got = []
signal.signal(signal.SIGALRM, lambda *_: got.append(llm_query("inner")))
class Last:
    def __del__(self): got.append(llm_query("last"))
signal.setitimer(signal.ITIMER_REAL, 0.05)
outer = llm_query_batched(["slow", "slow too"])
last = Last(); del last
print([str(each) for each in outer], [str(each) for each in got], llm_query("after"))
"""


async def test_a_call_within_a_call_has_a_connection_of_its_own(sandbox: Sandbox) -> None:
    async def answer(call: Call) -> Answer | Failure:
        if call.prompt == "inner":
            inner.set()
        elif call.prompt.startswith("slow"):
            await inner.wait()
        return await echo(call)

    inner = asyncio.Event()
    async with Session(sandbox, SPEC, answer) as session:
        result = await session.execute(NESTED)
    assert result.stdout == "['echo slow', 'echo slow too'] ['echo inner', 'echo last'] echo after\n", result
