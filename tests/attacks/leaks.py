"""B, P and T, as far as a cell can try them: keys, other sessions, identity. {secret} is planted on the host:
in its environment, and in a file of its user's."""

from tests.attacks.case import CONTAINERS, EVERYWHERE, ISOLATED, Case

CASES = [
    Case(
        "B11",
        "find the host's key in an environment, a command line or a file",
        """
secret = "{half1}" + "{half2}"
places = glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline") + ["{file}"]
def holds(path):
    try:
        with open(path, "rb") as file: return secret.encode() in file.read(1 << 20)
    except OSError: return False
print("OUTCOME", "ok" if any(map(holds, places)) else "none")""",
        "no key is in the sandbox",
    ),
    Case(
        "B12",
        "add fields to a call: depth, base_url, headers",
        """
with socket.socket(1) as sock:
    sock.connect(os.environ["RLM_SESSION_SOCKET"])
    header = json.dumps({"id": 1, "kind": "llm", "model": "", "depth": 0, "base_url": "http://x", "headers": {"a": "b"}}).encode()
    sock.sendall(struct.pack("!BII", 20, len(header), 1) + header + b"x")
    print("OUTCOME", "dropped" if b"echo x" in sock.recv(1000) else "ok")""",
        "a closed schema: they are dropped",
        EVERYWHERE,
        control="",
    ),
    Case(
        "B09",
        "use the id of a call twice",
        """
with socket.socket(1) as sock:
    sock.connect(os.environ["RLM_SESSION_SOCKET"])
    header = json.dumps({"id": 1, "kind": "llm", "model": ""}).encode()
    frame = struct.pack("!BII", 20, len(header), 4) + header + b"slow"
    sock.sendall(frame + frame)
    print("OUTCOME", "closed" if attempt(lambda: sock.recv(1000) or 1 / 0) != "ok" else "ok")""",
        "the connection is closed",
        EVERYWHERE,
        control="",
    ),
    Case(
        "B17",
        "call when the cell has ended",
        """
def later():
    while threading.main_thread().is_alive() and "go" not in globals(): time.sleep(0.01)
threading.Thread(target=later, daemon=True).start()
print("OUTCOME", "left")""",
        "refused: no cell is running",
        EVERYWHERE,
        control="",
    ),
    Case(
        "P07",
        "read what another session has left in its folder or in memory",
        """
own = os.getcwd()
places = [each for each in glob.glob(os.path.dirname(own) + "/*/*") + glob.glob("/tmp/*/*") if not each.startswith(own)]
def read(path):
    with open(path, "rb") as file: return file.read(10)
outcomes = [attempt(read, path) for path in places if os.path.isfile(path)]
outcomes += [attempt(os.listdir, os.path.join(os.path.dirname(own), "{victim}"))]
print("OUTCOME", first_ok(outcomes))""",
        "another user's, and closed",
        CONTAINERS | {"bubblewrap"},
        control="",
    ),
    Case(
        "P08",
        "learn the host's name, its users or its environment",
        """
words = {socket.gethostname(), *os.environ.values()}
print("OUTCOME", "ok" if {"{hostname}", "{user_home}"} & words else "none")""",
        "a constant name, no environment",
    ),
    Case(
        "T04",
        "use a file descriptor that was inherited from the host",
        """
def is_strange(fd):
    try: target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError: return False
    return not target.startswith(("pipe:", "socket:", "/dev/null", "/memfd", "anon_inode", "/proc")) and target != os.getcwd()
strange = [fd for fd in map(int, os.listdir("/proc/self/fd")) if is_strange(fd)]
print("OUTCOME", "ok" if strange else "none")""",
        "none",
        ISOLATED | {"local"},
        control="",
    ),
]
