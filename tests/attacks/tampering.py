"""A: the agent, the worker's own machinery, and what outlives a cell. {agent} is the agent's pid on the host."""

from tests.attacks.case import CONTAINERS, EVERYWHERE, HOST_KERNEL, ISOLATED, Case

OTHERS = """
def others():
    for path in glob.glob("/proc/[0-9]*"):
        try:
            with open(path + "/status") as file: status = file.read()
        except OSError: continue  # it has gone
        if int(status.partition("\\nUid:")[2].split()[0]) != os.getuid(): yield int(path[6:])
"""

CASES = [
    Case(
        "A01",
        "kill or stop the agent and the first process",
        OTHERS + 'print("OUTCOME", first_ok(attempt(os.kill, pid, 0) for pid in (1, *others())))',
        "EPERM",
    ),
    Case(
        "A02",
        "read the memory, environment, files or maps of the agent",
        OTHERS
        + """
names = ("environ", "mem", "maps", "fd/0", "cwd/x", "root/x", "stack", "auxv")
def read(pid, name):
    with open(f"/proc/{pid}/{name}", "rb") as file: file.read(1)
tried = [attempt(read, pid, name) for pid in (1, *others()) for name in names]
print("OUTCOME", first_ok(each if each != "ENOENT" else "EACCES" for each in tried))""",
        "EPERM or EACCES (gVisor shows environ, auxv and maps, in which there is nothing)",
        HOST_KERNEL,
        control="""
pid = os.fork()
if pid == 0:
    os.setuid(12345); signal.pause()
def read():
    with open(f"/proc/{pid}/environ", "rb") as file: file.read(1)
outcome = attempt(read)
os.kill(pid, 9)
print("OUTCOME", outcome)""",
    ),
    Case(
        "A02b",
        "read or write the memory of the agent, or go through its folders",
        OTHERS
        + """
names = ("mem", "cwd/x", "root/x")
def read(pid, name):
    with open(f"/proc/{pid}/{name}", "rb+") as file: file.read(1)
tried = [attempt(read, pid, name) for pid in (1, *others()) for name in names]
print("OUTCOME", first_ok(each if each != "ENOENT" else "EACCES" for each in tried))""",
        "EPERM or EACCES",
        control="",
    ),
    Case(
        "A03",
        "slow the agent down: renice, change its limits",
        OTHERS
        + """
tried = [first_ok([attempt(os.setpriority, 0, pid, 19), attempt(resource.prlimit, pid, resource.RLIMIT_NOFILE)]) for pid in (1, *others())]
print("OUTCOME", first_ok(tried))""",
        "EPERM",
        HOST_KERNEL,
    ),
    Case(
        "A04",
        "connect to the agent's own socket",
        """
found = glob.glob("/run/rlm/agent/*") + glob.glob("/tmp/rlm-*/agent.sock") + ["/run/rlm/agent/agent.sock"]
def connect(path):
    with socket.socket(1) as sock: sock.connect(path)
print("OUTCOME", first_ok(attempt(connect, path) for path in found))""",
        "EACCES",
        control="",
    ),
    Case(
        "A05",
        "call out on another session's socket",
        """
def call(path):
    with socket.socket(1) as sock:
        sock.settimeout(3)
        sock.connect(path)
        header = json.dumps({"id": 1, "kind": "llm", "model": ""}).encode()
        sock.sendall(struct.pack("!BII", 20, len(header), 1) + header + b"x")
        if not sock.recv(100): raise ConnectionError("closed")
print("OUTCOME", attempt(call, "{victim_socket}"))""",
        "EACCES: nobody else has the right to connect",
        CONTAINERS | {"bubblewrap"},
        control="",
    ),
    Case(
        "A05b",
        "open the context that another session is being given",
        OTHERS
        + """
def read(path):
    with open(path, "rb") as file: file.read(1)
def given():
    for pid in (1, *others()):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                link = f"/proc/{pid}/fd/{fd}"
                name = os.readlink(link)
                if "context" in name: yield from (link, name)
        except OSError: pass
outcomes, until = ["none"], time.monotonic() + 2
while outcomes == ["none"] and time.monotonic() < until:
    outcomes += [attempt(read, path) for path in given()]
print("OUTCOME", first_ok(outcomes[::-1]))""",
        "its name is not to be had (gVisor shows it), and EACCES",
        CONTAINERS | {"bubblewrap"},
        control="",
        context_waits=True,
    ),
    Case(
        "A06",
        "close and replace every file descriptor",
        "for fd in range(3, 256):\n    try: os.close(fd)\n    except OSError: pass\nprint('OUTCOME', 'closed')",
        "the cell is rolled back or goes on",
        EVERYWHERE,
        statuses=("ok", "rolled_back"),
        control="",
    ),
    Case(
        "A07",
        "replace llm_query, builtins, json, socket and threading",
        "import builtins\nfor module in (json, socket, threading, struct):\n    for name in list(vars(module)):\n        if not name.startswith('__'): setattr(module, name, None)\nbuiltins.len = builtins.isinstance = None\nllm_query = None",
        "its own worker only",
        EVERYWHERE,
        statuses=("ok", "rolled_back", "error", "lost"),
        control="",
        session_may_end=True,
    ),
    Case(
        "A08",
        "poison the imports of later cells: sys.modules, a finder, PYTHON* variables",
        "import sys\nclass Finder:\n    def find_spec(self, name, *_): raise ImportError('poisoned ' + name)\nsys.meta_path.insert(0, Finder())\nfor name in ('json', 'struct', 'ast'): sys.modules[name] = None\nos.environ['PYTHONPATH'] = '/tmp'\nprint('OUTCOME', 'poisoned')",
        "its own worker only",
        EVERYWHERE,
        control="",
        session_may_end=True,
    ),
    Case(
        "A10",
        "act at exit: atexit, __del__, signal handlers",
        "import atexit\natexit.register(lambda: time.sleep(600))\nclass Late:\n    def __del__(self): time.sleep(600)\nlate = Late()\nsignal.signal(15, lambda *_: time.sleep(600))\nprint('OUTCOME', 'left')",
        "its own worker only; ended with the session",
        EVERYWHERE,
        control="",
    ),
    Case(
        "A12",
        "leave daemons behind",
        """
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(1, signal.SIG_IGN); signal.signal(15, signal.SIG_IGN)
            for fd in range(256):
                try: os.close(fd)
                except OSError: pass
            time.sleep(600)
        os._exit(0)
print("OUTCOME", "left")""",
        "killed with the session",
        EVERYWHERE,
        control="",
    ),
    Case(
        "A13",
        "stop itself",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "SIGKILL at the deadline",
        EVERYWHERE,
        statuses=("rolled_back",),
        control="",
        timeout=0.5,
    ),
    *[
        Case(
            "A14",
            f"raise {name}",
            f"class Evil(BaseException):\n    def __str__(self): raise SystemExit\n    __repr__ = __str__\nraise {name}",
            "an error with bounded text",
            EVERYWHERE,
            statuses=("error",),
            control="",
        )
        for name in (
            "KeyboardInterrupt",
            "SystemExit(3)",
            "GeneratorExit",
            "Evil('x')",
            "ValueError('x' * 10**7)",
        )
    ],
    Case(
        "A16",
        "put a sitecustomize or a compiled file where Python looks",
        """
def put(folder):
    path = os.path.join(folder, "sitecustomize.py")
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.unlink(path)
own = {os.getcwd(), ""}
print("OUTCOME", first_ok([attempt(put, folder) for folder in sys.path if folder not in own and os.path.isdir(folder)]))""",
        "EROFS",
        ISOLATED,
    ),
    Case(
        "A17",
        "a forked child that ends the cell a second time",
        "pid = os.fork()\nprint('OUTCOME', 'twice') if pid else None",
        "one result",
        EVERYWHERE,
        control="",
    ),
    Case(
        "A20",
        "change folder, umask, limits and locale",
        "import locale\nos.chdir('/'); os.umask(0o777); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); locale.setlocale(locale.LC_ALL, 'C')\nprint('OUTCOME', 'left')",
        "its own session only",
        EVERYWHERE,
        control="",
    ),
]
