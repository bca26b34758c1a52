"""N: the network, the metadata service, and sockets of others. {port} is a server of the test on the host's
loopback, {abstract} and {path} are unix sockets of the host's."""

from tests.attacks.case import ISOLATED, Case

CONNECT = """
def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(3)
        sock.connect(address)
"""

CASES = [
    Case(
        "N01",
        "open an internet socket, as for 169.254.169.254 or fd00:ec2::254",
        """
print("OUTCOME", first_ok(attempt(lambda: socket.socket(family, kind).close()) for family in (2, 10) for kind in (1, 2)))""",
        "EPERM",
        ISOLATED - {"runsc"},
    ),
    Case(
        "N02",
        "connect to a server on the host: loopback, and the bridge's gateway",
        CONNECT
        + 'print("OUTCOME", first_ok(attempt(connect, 2, (host, {port})) for host in ("127.0.0.1", "172.17.0.1")))',
        "unreachable",
    ),
    Case(
        "N03",
        "a network interface besides loopback",
        """
names = {line.partition(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]}
print("OUTCOME", "ok" if names - {"lo"} else "none")""",
        "none",
        control="",
    ),
    Case(
        "N03b",
        "listen to what others send over the loopback, as root of a user namespace",
        """
def listen():
    attempt(syscall, 272, 0x10000000)
    socket.socket(17, 3, 0x300)
def listen_to_tcp():
    attempt(syscall, 272, 0x10000000)
    socket.socket(2, 3, 6)
print("OUTCOME", first_ok(tried_in_child(each) for each in (listen, listen_to_tcp)))""",
        "EPERM",
        control='print("OUTCOME", attempt(socket.socket, 17, 3, 0x300))',
    ),
    Case(
        "N04, N05",
        "send a datagram, as a name lookup does",
        'print("OUTCOME", attempt(lambda: socket.socket(2, 2).sendto(b"x", ("127.0.0.1", {port}))))',
        "unreachable",
        ISOLATED - {"runsc"},
    ),
    Case(
        "N06",
        "an abstract unix socket of the host (containerd-shim, CVE-2020-15257)",
        CONNECT + 'print("OUTCOME", attempt(connect, 1, "\\0{abstract}"))',
        "not visible",
    ),
    Case(
        "N07",
        "a unix socket in a folder of the host",
        CONNECT + 'print("OUTCOME", attempt(connect, 1, "{path}"))',
        "not mounted",
    ),
    Case(
        "N08",
        "listen, to be taken for an agent",
        """
def listen():
    with socket.socket(2) as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
print("OUTCOME", attempt(listen))""",
        "no path reaches the host",
        ISOLATED - {"runsc"},
    ),
    Case(
        "N10",
        "a server on the host's IPv6 loopback",
        CONNECT + 'print("OUTCOME", attempt(connect, 10, ("::1", {port6})))',
        "unreachable",
    ),
]
