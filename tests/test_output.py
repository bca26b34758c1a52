"""What a cell prints: captured, live, bounded, and its true length told."""

import asyncio
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

from rlm_core.session import Session
from tests.conftest import Recorder


async def test_output_of_python_c_code_and_subprocesses_is_captured(session: Session) -> None:
    code = """
import ctypes, subprocess, sys, os
print("python")
ctypes.CDLL(None).puts(b"c code")
ctypes.CDLL(None).fflush(None)
subprocess.run(["echo", "subprocess"])
os.write(2, b"raw\\n")
print("error", file=sys.stderr)
"""
    result = await session.execute(code)
    assert result.stdout == "python\nc code\nsubprocess\n"
    assert result.stderr == "raw\nerror\n"


async def test_c_code_that_does_not_flush_is_captured_in_its_own_cell(session: Session) -> None:
    assert (
        await session.execute("import ctypes; _ = ctypes.CDLL(None).puts(b'held back')")
    ).stdout == "held back\n"
    assert (await session.execute("print('next')")).stdout == "next\n"


async def test_output_arrives_while_the_cell_runs(session: Session, recorder: Recorder) -> None:
    code = (
        "import os, time\nprint('first')\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('second')"
    )
    running = asyncio.create_task(session.execute(code))
    await recorder.saw("first")
    assert not running.done() and "second" not in recorder.text
    await session.interrupt()
    assert "first" in (await running).stdout


async def test_output_before_a_death_is_kept(session: Session) -> None:
    result = await session.execute("print('last words', flush=True)\nimport os; os._exit(1)")
    assert result.rolled_back and result.stdout == "last words\n"


async def test_head_and_tail_are_kept_and_the_true_length_told(session: Session) -> None:
    result = await session.execute("for n in range(200_000): print(n)")
    assert result.stdout.startswith("0\n1\n2\n") and result.stdout.endswith("199998\n199999\n")
    assert result.stdout_bytes == sum(len(str(n)) + 1 for n in range(200_000))
    assert f"of {result.stdout_bytes:,} bytes left out" in result.stdout
    assert len(result.stdout) < 300_000


async def test_output_up_to_the_limit_is_whole(session: Session) -> None:
    result = await session.execute("print('é' * 100_000)")
    assert result.stdout == "é" * 100_000 + "\n"


async def test_bytes_that_are_no_text_and_surrogates_are_shown(session: Session) -> None:
    result = await session.execute("import os\nos.write(1, b'\\xff\\n')\nprint('\\ud800')")
    assert result.stdout == "\ufffd\n\\ud800\n"


async def test_output_of_leftover_processes_is_dropped_between_cells(
    session: Session, tmp_path: Path
) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    os.mkfifo(go)
    os.mkfifo(done)
    command = f"cat {go}; echo late; echo > {done}"
    await session.execute(f"import subprocess\np = subprocess.Popen({command!r}, shell=True)")
    await asyncio.to_thread(go.write_text, "")
    await asyncio.to_thread(done.read_text)  # it has printed, and no cell runs
    assert (await session.execute("print('mine')")).stdout == "mine\n"


def test_a_gigabyte_printed_costs_the_host_under_32_mb() -> None:
    program = textwrap.dedent(
        """
        import asyncio, resource
        from rlm_core.environment import make_environment
        from rlm_core.session import Session

        async def main():
            environment = make_environment("local", {})
            sandbox = await environment.start()
            async with Session(sandbox, environment.spec, None) as session:
                await session.execute("print('warm')")
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                code = "import os; data = b'x' * (1 << 20)\\nfor _ in range(1024): os.write(1, data)"
                result = await session.execute(code)
                after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                print(result.stdout_bytes, after - before)
            await sandbox.stop()

        asyncio.run(main())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True
    )
    written, kilobytes = map(int, done.stdout.split())
    assert written == 1 << 30
    assert kilobytes < 32 << 10, f"{kilobytes} kB (page size {resource.getpagesize()})"
