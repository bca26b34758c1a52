"""The contract: versions, tokens, ids that make a repeated request the same request, limits."""

import asyncio

import grpc
import grpc.aio
import pytest
from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core import limits
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import Sandbox
from rlm_core.errors import RLMError, SandboxLost
from rlm_core.session import Session
from rlm_core.transport.errors import KINDS, from_rpc_error
from rlm_core.transport.stream import Stream, Take
from rlm_core.types import TokenUsage
from tests.conftest import SPEC, Recorder, echo
from tests.support.agent import RawHost
from tests.support.relay import Relay


async def status_of(work: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await work  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""


def test_every_grpc_status_is_mapped() -> None:
    assert set(KINDS) == set(grpc.StatusCode)
    for code in grpc.StatusCode:
        error = from_rpc_error(
            grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "\x1b[31mred")
        )
        assert isinstance(error, RLMError) and "\x1b" not in str(error) and "\\x1b" in str(error)


async def test_a_connection_that_breaks_twice_in_a_row_can_be_closed(sandbox: Sandbox) -> None:
    async with asyncio.timeout(20), Session(sandbox, SPEC, echo) as session:
        for _ in range(2):
            session.break_connection()
            await asyncio.sleep(0)
        assert (await session.execute("print(1)")).stdout == "1\n"
        session.break_connection()


async def test_a_connection_that_breaks_again_and_again_is_given_up(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_RECONNECTS", 2)
    connect = sandbox.stream

    def broken(take: Take) -> Stream:
        stream = connect(take)
        stream.cut()
        return stream

    async with asyncio.timeout(20), Session(sandbox, SPEC, echo) as session:
        monkeypatch.setattr(sandbox, "stream", broken)
        session.break_connection()
        with pytest.raises(SandboxLost, match="its connection broke 3 times before anything came on it"):
            await session.execute("1")


async def test_answers_go_together_in_messages_that_an_agent_takes(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    write = Session._write_now

    async def measured(self: Session, message: pb.ConnectRequest) -> None:
        sizes.append(message.ByteSize())
        await write(self, message)

    monkeypatch.setattr(Session, "_write_now", measured)
    asked, all_asked = 0, asyncio.Event()

    async def answer(call: Call) -> Answer | Failure:
        nonlocal asked
        asked += 1
        if asked == 256:
            all_asked.set()
        await all_asked.wait()
        if call.prompt == "large":
            return Answer("x" * (limits.MAX_REPLY - 100), "m", TokenUsage())
        return Failure("PROVIDER", "\udc80" * limits.MAX_FAILURE_CHARS)

    async with Session(sandbox, SPEC, answer) as session:
        prompts = ["small"] * 254 + ["large", "small"]
        result = await session.execute(f"print(sum(not each.ok for each in llm_query_batched({prompts})))")
    assert result.stdout == "255\n", result
    assert max(sizes) <= limits.MAX_BATCH_BYTES + limits.MAX_REPLY + 1_000


async def test_a_call_while_many_answers_are_on_their_way_waits_for_them(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_UNSENT_BYTES", 1_000)
    monkeypatch.setattr(limits, "MAX_BATCH_BYTES", 1)
    all_asked, first_sent, another_came = asyncio.Event(), asyncio.Event(), asyncio.Event()
    begun: list[str] = []
    waiting: list[bool] = []
    write, take_call = Session._write_now, Session._take_call

    async def late(self: Session, message: pb.ConnectRequest) -> None:
        if message.HasField("replies"):
            if first_sent.is_set():
                await another_came.wait()
                waiting.append(begun.count("another") == 0)
            first_sent.set()
        await write(self, message)

    def taken(self: Session, call: pb.Call) -> None:
        take_call(self, call)
        if call.prompt == b"another":
            another_came.set()

    monkeypatch.setattr(Session, "_write_now", late)
    monkeypatch.setattr(Session, "_take_call", taken)

    async def answer(call: Call) -> Answer | Failure:
        begun.append(call.prompt)
        if begun.count("one") == 8:
            all_asked.set()
        if call.prompt == "one":
            await first_sent.wait()
        elif call.prompt == "first":
            await all_asked.wait()
        return Answer(call.prompt * 300, "m", TokenUsage())

    code = """
import threading
answers = []
many = threading.Thread(target=lambda: answers.extend(llm_query_batched(["one"] * 8)))
many.start()
small = [llm_query("first"), llm_query("another")]
many.join()
print(len(answers), *{len(each) for each in answers}, *map(len, small))
"""
    async with Session(sandbox, SPEC, answer) as session:
        result = await session.execute(code)
    assert result.stdout == "8 900 1500 2100\n", result
    assert waiting[:6] == [True] * 6  # while more than 1,000 of the 7,200 bytes were there


async def test_versions_are_exchanged_and_a_mismatch_names_both(sandbox: Sandbox) -> None:
    host = RawHost(sandbox)
    response = await host.open("s1")
    assert response.agent_build.startswith("0.1.0+") and response.capabilities.fork
    code, detail = await status_of(host.open("s2", version=7))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "protocol 7" in detail and response.agent_build in detail and "speaks 3" in detail


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_without_the_token_nothing_answers(sandbox: Sandbox, token: str) -> None:
    stranger = RawHost(sandbox, token)
    assert (await status_of(stranger.open("s1")))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert (await status_of(stranger.ask("Health", pb.HealthRequest())))[0] is grpc.StatusCode.UNAUTHENTICATED
    stranger.dial()  # and writes nothing, which the refusal could overtake
    with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
        await stranger.read()


async def test_opening_twice_is_one_session_and_closing_twice_is_fine(sandbox: Sandbox) -> None:
    host = RawHost(sandbox)
    await asyncio.gather(host.open("s1"), host.open("s1"))
    health = await host.ask("Health", pb.HealthRequest())
    assert list(health.session_ids) == ["s1"]
    for _ in range(2):
        await host.ask("CloseSession", pb.CloseSessionRequest(session_id="s1"))
    code, detail = await status_of(host.ask("ListVariables", pb.ListVariablesRequest(session_id="s1")))
    assert code is grpc.StatusCode.NOT_FOUND and "s1" in detail


@pytest.mark.parametrize("session_id", ["", "../x", "a/b", "x" * 65, "a\0b"])
async def test_a_session_id_is_never_a_path(sandbox: Sandbox, session_id: str) -> None:
    assert (await status_of(RawHost(sandbox).open(session_id)))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_cell_that_is_asked_for_twice_runs_once(sandbox: Sandbox) -> None:
    host = RawHost(sandbox)
    await host.open("s1")
    await host.attach("s1")
    await host.execute("c1", "n = globals().get('n', 0) + 1; print(n)")
    first = (await host.read_until("finished"))[1]
    await host.execute("c1", "n = globals().get('n', 0) + 1; print(n)")
    again, last = await host.read_until("finished")
    assert [message.event.stdout for message in again] == [b"1\n"] and last == first
    await host.execute("c2", "print(n)")
    assert (await host.read_until("stdout"))[1].event.stdout == b"1\n"


async def test_a_cell_id_with_other_code_is_an_error(sandbox: Sandbox) -> None:
    host = RawHost(sandbox)
    await host.open("s1")
    await host.attach("s1")
    await host.execute("c1", "1")
    await host.read_until("finished")
    await host.execute("c1", "2")
    with pytest.raises(grpc.aio.AioRpcError, match="other code"):
        await host.read()


async def test_events_go_on_from_their_offset_and_calls_are_delivered_again(sandbox: Sandbox) -> None:
    host = RawHost(sandbox)
    await host.open("s1")
    await host.attach("s1")
    code = "print('one')\nr = llm_query('q')\nprint(r)"
    await host.execute("c1", code)
    before, message = await host.read_until("call")
    events = [each.event.index for each in before if each.HasField("event")]
    while 1 not in events:  # stdout and call_started
        events.append((await host.read()).event.index)
    host.break_off()

    await host.attach("s1")
    await host.execute("c1", code, from_event=2)
    _, again = await host.read_until("call")
    assert again.call == message.call
    reply = pb.CallReply(call_id=again.call.call_id, answer=pb.CallAnswer(text=b"answer"))
    await host.stream.write(pb.ConnectRequest(replies=pb.CallReplies(replies=[reply, reply])))
    # a repeated reply is dropped
    forged = pb.CallReply(call_id="c1/99", answer=pb.CallAnswer(text=b"forged"))
    await host.stream.write(pb.ConnectRequest(replies=pb.CallReplies(replies=[forged])))
    before, last = await host.read_until("finished")
    assert [each.event.index for each in before] == list(range(2, 2 + len(before)))
    assert b"answer\n" in [each.event.stdout for each in before]
    assert last.event.finished.status == pb.CELL_STATUS_OK


async def test_a_host_that_loses_its_connection_goes_on_without_a_loss(
    sandbox: Sandbox, recorder: Recorder
) -> None:
    answered = 0

    async def count(call: object) -> object:
        nonlocal answered
        answered += 1
        return await echo(call)  # type: ignore[arg-type]

    relay = Relay(sandbox)
    async with relay, Session(sandbox, SPEC, count, observer=recorder) as session:  # type: ignore[arg-type]
        code = (
            "import os, time\nprint('begun', llm_query('a'))\n"
            "while not os.path.exists('go'): time.sleep(0.01)\nprint('ended', llm_query('b'))\nx = 1"
        )
        running = asyncio.create_task(session.execute(code))
        await recorder.saw("begun")
        relay.cut()
        (folder,) = (sandbox.shared_folder.parent / "work").iterdir()  # type: ignore[union-attr]
        (folder / "go").touch()
        result = await running
        assert result.stdout == "begun echo a\nended echo b\n"
        assert answered == 2
        relay.cut()
        assert (await session.execute("print(x)")).stdout == "1\n"


async def test_a_newer_connection_takes_the_session_over(sandbox: Sandbox) -> None:
    old, new = RawHost(sandbox), RawHost(sandbox)
    await old.open("s1")
    await old.attach("s1")
    await old.execute("c1", "1")
    await old.read_until("finished")
    await new.attach("s1")
    await new.execute("c2", "print('new')")
    await new.read_until("finished")
    with pytest.raises(grpc.aio.AioRpcError, match="took this session over"):
        while True:
            await old.read()


async def test_an_oversized_message_is_refused_and_the_session_lives(sandbox: Sandbox) -> None:
    host = RawHost(sandbox)
    await host.open("s1")
    request = pb.ReadVariableRequest(session_id="s1", name="x" * (limits.MAX_MESSAGE + 1))
    assert (await status_of(host.ask("ReadVariable", request)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    await host.attach("s1")
    await host.execute("c1", "print('alive')")
    assert (await host.read_until("stdout"))[1].event.stdout == b"alive\n"


async def test_a_context_must_keep_to_its_header(sandbox: Sandbox) -> None:
    host = RawHost(sandbox)
    await host.open("s1")
    header = pb.ContextHeader(session_id="s1", kind=pb.CONTEXT_KIND_TEXT, size_bytes=4)

    async def put(*chunks: bytes, header: pb.ContextHeader = header) -> object:
        async def parts() -> object:
            yield pb.PutContextRequest(header=header)
            for chunk in chunks:
                yield pb.PutContextRequest(chunk=chunk)

        return await host.stub.PutContext(parts(), metadata=host.metadata)

    for wrong in ((b"abc",), (b"abcde",), (b"x" * (limits.CHUNK + 1),)):
        assert (await status_of(put(*wrong)))[0] is grpc.StatusCode.INVALID_ARGUMENT
    for name in ("../../etc/passwd", "/etc/passwd", "missing"):
        stolen = pb.ContextHeader(session_id="s1", kind=pb.CONTEXT_KIND_TEXT, shared_file=name)
        assert (await status_of(put(header=stolen)))[0] is grpc.StatusCode.INVALID_ARGUMENT
    await put(b"ab", b"cd")
    await put(b"ab", b"cd")  # the same request: nothing changes
    code, detail = await status_of(put(b"\xff\xfe!!", header=_second(header)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "UnicodeDecodeError" in detail
    await host.attach("s1")
    await host.execute("c1", "print(context)")
    assert (await host.read_until("stdout"))[1].event.stdout == b"abcd\n"


def _second(header: pb.ContextHeader) -> pb.ContextHeader:
    other = pb.ContextHeader()
    other.CopyFrom(header)
    other.index = 1
    return other


async def test_one_sessions_death_is_not_anothers(sandbox: Sandbox) -> None:
    async with Session(sandbox, SPEC, echo) as one, Session(sandbox, SPEC, echo) as two:
        await two.execute("x = 1")
        with pytest.raises(SandboxLost):
            await one.execute("import os; os.kill(os.getppid(), 9); os.kill(os.getpid(), 9)")
        with pytest.raises(SandboxLost):
            await one.execute("1")
        assert (await two.execute("print(x)")).stdout == "1\n"


async def test_a_worker_that_forges_frames_on_its_own_link_loses_only_its_session(sandbox: Sandbox) -> None:
    code = """
import os, socket
for fd in range(3, 64):
    try: s = socket.socket(fileno=os.dup(fd))
    except OSError: continue
    if s.family == socket.AF_UNIX and s.type == socket.SOCK_SEQPACKET:
        s.send(b"\\x00" + b"\\xff" * 40)
"""
    async with Session(sandbox, SPEC, echo) as one, Session(sandbox, SPEC, echo) as two:
        with pytest.raises(SandboxLost, match="frame"):
            await one.execute(code)
        assert (await two.execute("print('on')")).stdout == "on\n"


@pytest.mark.parametrize("code", ["import time; time.sleep(600)", "while True: pass"])
async def test_an_interrupt_that_overtakes_its_cell_is_not_lost(sandbox: Sandbox, code: str) -> None:
    host = RawHost(sandbox)
    await host.open("overtaken")
    await host.attach("overtaken")
    await host.ask("InterruptCell", pb.InterruptCellRequest(session_id="overtaken", cell_id="c1"))
    await host.execute("c1", code)
    _, ended = await host.read_until("finished")
    assert ended.event.finished.status in (pb.CELL_STATUS_INTERRUPTED, pb.CELL_STATUS_ROLLED_BACK)
    await host.execute("c2", "print('next')")
    _, ended = await host.read_until("finished")
    assert ended.event.finished.status == pb.CELL_STATUS_OK
