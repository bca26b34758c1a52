"""The sync API's way into the library's event loop, interrupted at any moment."""

import subprocess
import sys

INTERRUPTED = """
import asyncio, sys
from rlm_core.portal import Portal

portal, begun, ended = Portal(), 0, 0

async def work():
    global begun, ended
    begun += 1
    try:
        await asyncio.sleep(0.002)
    finally:
        await asyncio.sleep(0)
        ended += 1
    return 42

def interrupt_at(step):
    "The step's instruction of run, and of all that it calls, raises what Ctrl-C does; whether it came to it."
    left = step

    def trace(frame, event, argument):
        nonlocal left
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    made = work()
    sys.settrace(trace)
    try:
        portal.run(made)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
        made.close()
    return left <= 0

step = 1
while interrupt_at(step):
    assert begun == ended, f"step {step} left its work behind"
    assert portal.run(work()) == 42
    step += 1
print("interrupted", step - 1)
"""


def test_an_interrupt_at_any_instruction_leaves_neither_work_nor_a_loop_that_hangs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.removeprefix("interrupted ")) > 100
