"""The system call filter: it is small, and what people run in cells passes under it."""

import json

import pytest
from rlm_environments.containers import seccomp

from rlm_core.environment import make_environment
from rlm_core.session import Session
from tests.conftest import echo

NEVER = {
    *(
        "ptrace",
        "process_vm_readv",
        "pidfd_getfd",
        "bpf",
        "perf_event_open",
        "userfaultfd",
        "keyctl",
        "add_key",
    ),
    *("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "open_by_handle_at", "modify_ldt"),
    *("io_uring_setup", "clone3", "splice", "vmsplice", "tee", "shmget", "semget", "msgget", "mq_open"),
    *("init_module", "kexec_load", "reboot", "settimeofday", "clock_settime", "swapon", "acct", "syslog"),
}
PROGRAMS = {
    "numpy": "import numpy as np; assert np.linalg.norm(np.random.rand(300, 300) @ np.random.rand(300, 300)) > 0",
    "pandas": "import pandas as pd; assert pd.DataFrame({'a': [1, 2], 'b': [3, 4]}).groupby('a').sum().b.sum() == 7",
    "scipy": "from scipy import optimize; assert abs(optimize.brentq(lambda x: x * x - 2, 0, 2) - 2 ** 0.5) < 1e-9",
    "multiprocessing": "import multiprocessing as mp\nwith mp.get_context('fork').Pool(2) as pool: assert pool.map(abs, [-1, -2]) == [1, 2]",
    "shared memory": "from multiprocessing import shared_memory as m; s = m.SharedMemory(create=True, size=10); s.close(); s.unlink()",
    "asyncio": "import asyncio\nasync def f():\n    p = await asyncio.create_subprocess_exec('echo', 'x', stdout=-1)\n    return (await p.communicate())[0]\nassert asyncio.run(f()) == b'x\\n'",
    "sqlite": "import sqlite3; d = sqlite3.connect('x.db'); d.execute('create table t(a)'); d.execute('insert into t values (1)'); d.commit(); assert d.execute('select * from t').fetchall() == [(1,)]",
    "threads": "from concurrent.futures import ThreadPoolExecutor as T\nwith T(8) as pool: assert sum(pool.map(abs, range(-9, 0))) == 45",
    "subprocess": "import subprocess; assert subprocess.run('echo $((6 * 7))', shell=True, capture_output=True).stdout == b'42\\n'",
    "files": "import tempfile, pathlib, shutil\nwith tempfile.TemporaryDirectory() as d:\n    p = pathlib.Path(d, 'a'); p.write_text('x'); shutil.copy(p, p.with_name('b')); assert len(list(pathlib.Path(d).iterdir())) == 2",
    "packages of the session": "import subprocess, sys; assert subprocess.run(['python', '-c', 'import numpy, rlm_agent.repl'], capture_output=True).returncode == 0",
    "the agent's libraries stay its own": "import importlib.util; assert importlib.util.find_spec('grpc') is None",
}


@pytest.mark.parametrize("sockets", ["unix", "proxy", "internet"])
def test_what_is_dangerous_is_not_allowed(sockets: seccomp.Sockets) -> None:
    allowed = set(seccomp.allowed())
    conditional = {name for name, _ in seccomp.conditions(sockets)}
    assert not (allowed | conditional) & NEVER
    assert not allowed & conditional, "a call that is allowed in any case has no condition"


@pytest.mark.parametrize(
    ("sockets", "wanted"),
    [
        ("unix", {((0, 1),)}),
        ("proxy", {((0, 1),), ((0, 2), (1, 1))}),
        ("internet", {((0, 1),), ((0, 2),), ((0, 10),)}),
    ],
)
def test_sockets_are_local_unless_there_is_a_network(
    sockets: seccomp.Sockets, wanted: set[tuple[tuple[int, int], ...]]
) -> None:
    rules = [all_of for name, all_of in seccomp.conditions(sockets) if name == "socket"]
    assert {tuple((each.argument, each.value) for each in all_of) for all_of in rules} == wanted


def test_other_architectures_are_not_in_the_engines_profile() -> None:
    profile = json.loads(seccomp.engine_profile("x86_64", "unix"))
    assert profile["architectures"] == ["SCMP_ARCH_X86_64"]
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"


@pytest.mark.needs("docker")
@pytest.mark.timeout(600)
async def test_what_people_run_passes_under_it() -> None:
    """In the data image, which is built with its libraries the first time."""
    environment = make_environment("docker", {"image": "data", "memory": "1GiB"})
    sandbox = await environment.start()
    async with Session(sandbox, environment.spec, echo) as session:
        for name, program in PROGRAMS.items():
            result = await session.execute(program, timeout=60)
            assert result.status == "ok", (name, result.stderr)
            assert result.no_checkpoint is None, name
    await sandbox.stop()
