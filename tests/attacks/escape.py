"""E: namespaces, capabilities, mounts, sockets, proc and sysfs, devices, the kernel's surface."""

from tests.attacks.case import EVERYWHERE, HOST_KERNEL, Case

EPERM, EPERM_OR_MISSING = "EPERM", "EPERM or ENOSYS"
UNREACHED = {
    "bpf": "reached(321, 99, 0, 0)",
    "perf_event_open": "reached(298, 0, 0, -1, -1, 0)",
    "userfaultfd": "reached(323, 0x7fffffff)",
    "keyctl": "reached(250, 0, -3, 0)",
    "add_key": "reached(248, 0, 0, 0, 0, 0)",
    "quotactl": "reached(179, 0xffff, 0, 0, 0)",
    "swapon": "reached(167, b'/nowhere', 0)",
    "acct": "reached(163, b'/nowhere')",
    "reboot": "reached(169, 0, 0, 0)",
    "sethostname": "reached(170, 1, -1)",
    "umount": "reached(166, b'/nowhere', 0)",
    "chroot": "reached(161, b'/nowhere')",
    "kcmp": "reached(312, os.getpid(), os.getpid(), 0, 0, 0)",
    "settimeofday": "reached(164, 1, 0)",
    "mount": "reached(165, 0, b'/nowhere', 0, 0, 0)",
    "pivot_root": "reached(155, b'/nowhere', b'/nowhere')",
    "open_by_handle_at": "reached(304, -1, 0, 0)",
    "shmget": "reached(29, 0, 4096, 0o1000)",
    "mq_open": "reached(240, 1, 0, 0, 0)",
    "process_madvise": "reached(440, -1, 0, 0, 0, 0)",
    "syslog": "reached(103, 10, 0, 0)",
    "fsopen": "reached(430, b'nothing', 0)",
    "name_to_handle_at": "reached(303, -1, 0, 0, 0, 0)",
}

CASES = [
    Case(
        "E01",
        "a cell may gain privileges, or calls the kernel unfiltered",
        """
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines() if ":" in line)
held = status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2"
print("OUTCOME", "held" if held else "ok")""",
        "NoNewPrivs=1, Seccomp=2; the session refuses to start otherwise",
        HOST_KERNEL,
    ),
    Case(
        "E01b",
        "a cell has capabilities",
        """
lines = open("/proc/self/status").read().splitlines()
held = [line.split()[1] for line in lines if line.startswith(("CapInh", "CapPrm", "CapEff", "CapAmb"))]
print("OUTCOME", "ok" if any(int(each, 16) for each in held) else "none")""",
        "CapEff=0; the session refuses to start otherwise",
    ),
    Case(
        "E02",
        "unshare a user namespace, and in it a network",
        'print("OUTCOME", tried_in_child(syscall, 272, 0x50000000))',
        "EPERM",
    ),
    Case(
        "E02b",
        "clone3 into a new user namespace",
        """
flags = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
def clone():
    if syscall(435, flags, 88) == 0: os._exit(0)
print("OUTCOME", tried_in_child(clone))""",
        "ENOSYS",
    ),
    Case(
        "E07",
        "setns into the namespaces of the first process",
        """
def enter():
    with open(f"/proc/{whose}/ns/uts") as name: syscall(308, name.fileno(), 0)
whose = 1
print("OUTCOME", tried_in_child(enter))""",
        EPERM,
        control="""
def enter():
    with open("/proc/self/ns/uts") as name: syscall(308, name.fileno(), 0)
print("OUTCOME", tried_in_child(enter))""",
    ),
    *[
        Case("E09", f"{name}()", f'print("OUTCOME", {code})', EPERM_OR_MISSING, HOST_KERNEL)
        for name, code in UNREACHED.items()
    ],
    Case(
        "E10",
        "io_uring, which goes round the filter",
        'print("OUTCOME", reached(425, 1, 0))',
        "ENOSYS or EPERM",
        HOST_KERNEL,
    ),
    Case(
        "E11",
        "AF_VSOCK, which is in no namespace and reaches the hypervisor",
        'print("OUTCOME", attempt(lambda: socket.socket(40, socket.SOCK_STREAM).close()))',
        EPERM,
    ),
    Case(
        "E12",
        "the 32-bit system calls of int 0x80, to go round a 64-bit filter",
        """
import mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
outcome = in_child(ctypes.CFUNCTYPE(ctypes.c_int)(address))
print("OUTCOME", outcome)""",
        "killed by SIGSYS",
        HOST_KERNEL,
    ),
    Case(
        "E13",
        "AF_ALG with splice, which wrote to the page cache (Copy Fail), and splice itself (Dirty Pipe)",
        """
def splice():
    (a, b), (c, d) = os.pipe(), os.pipe()
    os.write(b, b"x")
    syscall(275, a, 0, d, 0, 1, 0)
print("OUTCOME", first_ok([attempt(lambda: socket.socket(38, socket.SOCK_SEQPACKET).close()), attempt(splice)]))""",
        EPERM_OR_MISSING,
        HOST_KERNEL,
    ),
    Case(
        "E14",
        "packet, raw, ICMP, netlink and XDP sockets",
        """
kinds = [(17, 3, 0), (2, 3, 255), (2, 2, 1), (2, 3, 1), (16, 3, 0), (44, 3, 0)]
print("OUTCOME", first_ok(attempt(lambda: socket.socket(*kind).close()) for kind in kinds))""",
        EPERM,
        HOST_KERNEL,
    ),
    Case(
        "E15",
        "write core_pattern, modprobe or sysrq-trigger, which are the host's root",
        """
names = ("sys/kernel/core_pattern", "sys/kernel/modprobe", "sysrq-trigger", "sys/kernel/hostname")
print("OUTCOME", first_ok(attempt(lambda: os.close(os.open("/proc/" + name, os.O_WRONLY))) for name in names))""",
        "EACCES or EROFS",
    ),
    Case(
        "E17",
        "kernel memory and devices",
        """
names = ("/proc/kcore", "/dev/mem", "/dev/kmsg", "/dev/kvm", "/dev/vsock", "/dev/fuse", "/dev/vda", "/dev/sda", "/dev/net/tun")
print("OUTCOME", first_ok(attempt(lambda: os.close(os.open(name, os.O_RDWR))) for name in names))""",
        "ENOENT or EACCES",
        HOST_KERNEL,
    ),
    Case(
        "E21",
        "a writable mount of the host",
        """
own = {"tmpfs", "devpts", "mqueue", "proc", "sysfs", "cgroup", "cgroup2", "devtmpfs"}
def writable(line):
    left, _, right = line.partition(" - ")
    path = left.split()[4]
    return right.split()[0] not in own and "rw" in left.split()[5].split(",") and os.access(path, os.W_OK)
print("OUTCOME", "ok" if any(map(writable, open("/proc/self/mountinfo"))) else "none")""",
        "there is none",
    ),
    Case(
        "E24",
        "ptrace, process_vm_readv and pidfd_getfd",
        """
def read_memory():
    buffer = ctypes.create_string_buffer(8)
    vector = struct.pack("QQ", ctypes.addressof(buffer), 8)
    syscall(310, os.getpid(), vector, 1, vector, 1, 0)
outcomes = [tried_in_child(syscall, 101, 0, 0, 0, 0), attempt(read_memory)]
outcomes.append(attempt(lambda: os.close(syscall(438, os.pidfd_open(os.getpid()), 1, 0))))
print("OUTCOME", first_ok(outcomes))""",
        EPERM,
        HOST_KERNEL,
    ),
    Case(
        "E26",
        "native code: a program from memory, and executable pages",
        """
import mmap
fd = os.memfd_create("program")
os.write(fd, open(os.path.realpath(sys.executable), "rb").read() if sys.executable else b"")
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b82a000000c3"))
answer = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print("OUTCOME", "ok" if answer == 42 else answer)""",
        "allowed, and inert",
        EVERYWHERE,
        inert=True,
    ),
    Case(
        "E27",
        "personality(ADDR_NO_RANDOMIZE) and modify_ldt",
        'print("OUTCOME", first_ok([tried_in_child(syscall, 135, 0x0040000), reached(154, 0, 0, 0)]))',
        EPERM,
        HOST_KERNEL,
    ),
    Case(
        "E28",
        "write outside the quota: /, /dev, /run and other places",
        """
places = [name for name in ("/", "/dev", "/dev/pts", "/run", "/var", "/home", "/root", "/usr", "/etc", "/opt", "/proc", "/sys", "/context", "/sys/fs/cgroup")]
def write(place):
    path = f"{place}/rlm-attack-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.unlink(path)
print("OUTCOME", first_ok(attempt(write, place) for place in places))""",
        "EROFS",
    ),
    Case(
        "E29",
        "change the agent's code or the interpreter's",
        """
import json as module
folders = [os.path.dirname(module.__file__), *glob.glob("/opt/rlm/agent/rlm_agent"), *[os.path.dirname(each) for each in glob.glob("/opt/venv/lib/*/site-packages")]]
def change(folder):
    path = f"{folder}/rlm_attack.pth"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.unlink(path)
print("OUTCOME", first_ok(attempt(change, folder) for folder in folders))""",
        "read-only",
    ),
    Case(
        "E30",
        "climb Python's object graph",
        """
found = [each for each in ().__class__.__base__.__subclasses__() if each.__name__ == "Popen"]
print("OUTCOME", "ok" if found and found[0](["true"]).wait() == 0 else "none")""",
        "allowed, and inert: Python is never the boundary",
        EVERYWHERE,
        inert=True,
    ),
    Case(
        "E31",
        "become root, or take a capability",
        """
def take():
    if libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 1, 1, 0, 0, 0, 0)): raise OSError(ctypes.get_errno(), "")
print("OUTCOME", first_ok([attempt(os.setuid, 0), attempt(os.setgroups, [0]), attempt(take)]))""",
        EPERM,
    ),
    Case(
        "E32",
        "make a device node or a set-user-id program",
        """
path = f"/tmp/rlm-node-{os.getpid()}"
def make():
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(253, 0))
    os.unlink(path)
print("OUTCOME", attempt(make))""",
        EPERM,
        HOST_KERNEL,
    ),
]
