"""R: exhaustion. The sandboxes of these tests have 512 MiB of memory, 100 processes and 64 MiB of files."""

from tests.attacks.case import CONTAINERS, EVERYWHERE, ISOLATED, Case

MEMORY, PROCESSES, DISK = "512MiB", 100, "64MiB"

CASES = [
    Case(
        "R01",
        "hold 300 processes at once",
        """
pids = []
try:
    while len(pids) < 300:
        pid = os.fork()
        if pid == 0: signal.pause()
        pids.append(pid)
    outcome = "ok"
except OSError as error:
    outcome = errno.errorcode[error.errno]
for pid in pids: os.kill(pid, 9)
for pid in pids: os.waitpid(pid, 0)
print("OUTCOME", outcome)""",
        "EAGAIN at the limit, session continues (gVisor: the sandbox may end, of its memory)",
        ISOLATED,
        ends=frozenset({"runsc"}),
    ),
    Case(
        "R01b, R17",
        "a fork bomb that leaves its session and never stops",
        """
while True:
    try:
        if os.fork() == 0: os.setsid()
    except OSError: pass""",
        "the cell is killed; the next session has its processes (gVisor: the sandbox may end)",
        ISOLATED,
        ends=frozenset({"runsc"}),
        statuses=("timeout", "rolled_back", "lost"),
        control="",
        timeout=1.0,
        session_may_end=True,
    ),
    Case(
        "R02",
        "hold 300 threads",
        """
stop = threading.Event()
threads = []
try:
    while len(threads) < 300:
        thread = threading.Thread(target=stop.wait)
        thread.start()
        threads.append(thread)
    outcome = "ok"
except RuntimeError:
    outcome = "RuntimeError"
stop.set()
for thread in threads: thread.join()
print("OUTCOME", outcome)""",
        "RuntimeError",
        ISOLATED,
    ),
    Case(
        "R03",
        "take more memory than allowed",
        """
data = []
try:
    for _ in range(80): data.append(bytearray(os.urandom(1 << 20)) * 10)
    outcome = "ok"
except MemoryError:
    outcome = "MemoryError"
data.clear()
print("OUTCOME", outcome)""",
        "the worker is OOM-killed (bubblewrap, local: MemoryError), the agent survives",
        EVERYWHERE,
        statuses=("ok", "rolled_back"),
    ),
    Case(
        "R07",
        "fill the disk",
        """
def fill():
    with open(f"/tmp/rlm-fill-{os.getpid()}", "wb") as file:
        os.unlink(file.name)
        for _ in range(200): file.write(bytes(1 << 20)); file.flush()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
print("OUTCOME", attempt(fill))""",
        "ENOSPC or EFBIG at the quota, in memory of the sandbox",
        ISOLATED,
    ),
    Case(
        "R07b",
        "make a million files",
        """
folder = f"files-{os.getpid()}"
os.mkdir(folder)
def fill():
    for number in range(30_000): os.close(os.open(f"{folder}/{number}", os.O_CREAT))
outcome = attempt(fill)
import shutil; shutil.rmtree(folder)
print("OUTCOME", outcome)""",
        "ENOSPC",
        CONTAINERS - {"runsc"},
    ),
    Case(
        "R07b",
        "make files without end",
        """
os.mkdir("files")
number = 0
while True:
    os.close(os.open(f"files/{number}", os.O_CREAT))
    number += 1""",
        "the deadline, or the memory of the sandbox, which then ends (gVisor of 2022 counts no files)",
        frozenset({"runsc"}),
        statuses=("timeout", "rolled_back"),
        control="",
        ends=frozenset({"runsc"}),
    ),
    Case(
        "R10",
        "use more CPU than allowed (one)",
        """
import multiprocessing
def spin(until):
    while time.monotonic() < until: pass
started = time.monotonic()
pids = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        spin(started + 1); os._exit(0)
    pids.append(pid)
for pid in pids: os.waitpid(pid, 0)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
share = (used.ru_utime + used.ru_stime) / (time.monotonic() - started)
print("OUTCOME", "ok" if share > 1.25 else "held")""",
        "at most the quota",
        frozenset({"docker"}),
    ),
    Case(
        "R11",
        "never stop, and ignore SIGINT and SIGTERM",
        "signal.signal(2, signal.SIG_IGN); signal.signal(15, signal.SIG_IGN)\nwhile True: pass",
        "SIGKILL at the deadline",
        EVERYWHERE,
        statuses=("rolled_back",),
        control="",
        timeout=0.5,
    ),
    Case(
        "R12",
        "wait in native code that holds the interpreter",
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))\nctypes.PyDLL(None).pause()",
        "SIGKILL at the deadline",
        EVERYWHERE,
        statuses=("rolled_back",),
        control="",
        timeout=0.5,
    ),
    Case(
        "R13",
        "a regular expression that never ends",
        "import re; re.match('(a+)+$', 'a' * 64 + 'b')",
        "the deadline",
        EVERYWHERE,
        statuses=("timeout", "rolled_back"),
        control="",
        timeout=0.5,
    ),
    Case(
        "R14",
        "print without end",
        "while True: sys.stdout.write('x' * 65536); sys.stderr.write('y' * 65536)",
        "head and tail are kept, the rest is counted",
        EVERYWHERE,
        statuses=("timeout", "rolled_back"),
        control="",
        timeout=0.7,
    ),
    Case(
        "R15",
        "a repr that never ends, as the value of the cell",
        "class Endless:\n    def __repr__(self):\n        while True: pass\nEndless()",
        "the deadline",
        EVERYWHERE,
        statuses=("timeout", "rolled_back"),
        control="",
        timeout=0.5,
    ),
    Case(
        "R16",
        "overflow the C stack",
        "ctypes.string_at(0)",
        "the worker dies, the agent lives",
        EVERYWHERE,
        statuses=("rolled_back",),
        control="",
    ),
    Case(
        "R18",
        "keep files in memory up to the limit, so that nothing is left to end their maker with",
        """
def keep(folder):
    with open(f"{folder}/rlm-keep-{os.getpid()}", "wb") as file:
        os.unlink(file.name)
        for _ in range(300): file.write(bytes(1 << 20)); file.flush()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
print("OUTCOME", first_ok([attempt(keep, "/dev/shm"), attempt(keep, "/tmp")]))""",
        "files take less than half of the memory",
        CONTAINERS,
    ),
    Case(
        "R21",
        "leave 200 zombies and orphans",
        """
for _ in range(20):
    for _ in range(10):
        if os.fork() == 0:
            if os.fork() == 0: os._exit(0)
            os._exit(0)
    while True:
        try: os.wait()
        except ChildProcessError: break
def is_zombie(path):
    try: return open(path).read().rpartition(")")[2].split()[0] == "Z"
    except OSError: return False
left = sum(map(is_zombie, glob.glob("/proc/[0-9]*/stat")))
print("OUTCOME", "ok" if left > 50 else "reaped")""",
        "reaped",
        ISOLATED,
        control="",
    ),
    Case(
        "R22",
        "read stdin, or stop in a debugger",
        "try: input()\nexcept EOFError: print('OUTCOME', 'EOFError')",
        "stdin is empty",
        EVERYWHERE,
        control="",
    ),
    Case(
        "R23",
        "take terminals, which all sandboxes of a machine have together",
        'print("OUTCOME", attempt(os.openpty))',
        "there are none",
        ISOLATED,
    ),
]
