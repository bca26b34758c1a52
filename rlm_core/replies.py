"""The broker's answer to a call, as a message."""

from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core import limits
from rlm_core.broker.call import Answer, Failure


def reply_message(call_id: str, result: Answer | Failure) -> pb.CallReply:
    if isinstance(result, Failure):
        code = pb.CallErrorCode.Value(f"CALL_ERROR_CODE_{result.code}")
        return pb.CallReply(
            call_id=call_id, failure=pb.CallFailure(code=code, message=_clean(result.message))
        )
    text = result.text.encode("utf-8", "surrogatepass")
    if len(text) > limits.MAX_REPLY:
        failure = pb.CallFailure(
            code=pb.CALL_ERROR_CODE_TOO_LARGE,
            message=f"the answer has {len(text):,} bytes; a cell can take at most {limits.MAX_REPLY:,}",
        )
        return pb.CallReply(call_id=call_id, failure=failure)
    usage = result.usage
    return pb.CallReply(
        call_id=call_id,
        answer=pb.CallAnswer(
            text=text,
            model=_clean(result.model),
            usage=pb.CallUsage(
                input_tokens=max(0, usage.input_tokens),
                output_tokens=max(0, usage.output_tokens),
                cached_tokens=max(0, usage.cached_tokens),
                reasoning_tokens=max(0, usage.reasoning_tokens),
                cost_usd=usage.cost or 0.0,
            ),
        ),
    )


def _clean(text: str) -> str:
    """A str field of the wire is UTF-8."""
    return text[: limits.MAX_FAILURE_CHARS].encode("utf-8", "backslashreplace").decode()


class Replies:
    """Of one session, by call. The oldest are dropped beyond a number, and beyond a size if they are more
    than an agent may have open: those were handed on long ago.
    """

    def __init__(self) -> None:
        self._of_call: dict[str, pb.CallReply] = {}
        self._bytes = 0

    def get(self, call_id: str) -> pb.CallReply | None:
        return self._of_call.get(call_id)

    def add(self, call_id: str, reply: pb.CallReply) -> None:
        self.remove(call_id)
        self._of_call[call_id] = reply
        self._bytes += len(reply.answer.text)
        while self._is_full():
            self.remove(next(iter(self._of_call)))

    def _is_full(self) -> bool:
        number = len(self._of_call)
        large = self._bytes > limits.MAX_REPLIES_BYTES and number > limits.MAX_AGENT_CALLS
        return large or number > limits.MAX_OPEN_CALLS

    def remove(self, call_id: str) -> None:
        reply = self._of_call.pop(call_id, None)
        if reply is not None:
            self._bytes -= len(reply.answer.text)

    def clear(self) -> None:
        self._of_call.clear()
        self._bytes = 0
