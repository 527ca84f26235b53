"""What stays open at each level of the sandbox: attacks of five kinds, run at every level that this host has.

`python -m tests.experiments.attacks` prints the table that stands in `rewards/README.md`; with `--before CHECKOUT`, one of
e9572e9, its last column too: at which levels each reached its aim in the sandbox of then. A program says REACHED where it
got at what it wanted; what it leaves behind is looked for from outside; a forged verdict is one that tests give it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from polyphony.rewards.sandbox import client
from polyphony.rewards.sandbox.client import Limits, Program, SandboxError

LIMITS = Limits(wall_s=1.5, cpu_s=2, memory_bytes=512 << 20)
SECRET = "polyphony-attack-secret"
"""In the environment and the memory of the process that asks for the verdicts."""
MARK = Path("/tmp/polyphony-attack-mark")
"""Lies on the host while attacks run."""
LEFT = Path("/tmp/polyphony-attack-left")
"""What an attack tries to leave there."""

_READS = {
    "the users of the host": "print(open('/etc/passwd').read()[:9])",
    "a file of the host's /tmp": f"print(open('{MARK}').read())",
    "the names in a folder of the host": "os.listdir('/etc')",
    "whether a file of the host is there": "os.stat('/etc/passwd')",
    "that a file of the host is looked at, by inotify": (
        "assert libc.inotify_add_watch(libc.inotify_init(), b'/etc', 1) >= 0"
    ),
    "a secret of its own environment": f"assert '{SECRET}' in str(os.environ)",
    "a secret of the trainer's environment": (
        "texts = [open(f'/proc/{p}/environ').read() for p in pids() if readable(f'/proc/{p}/environ')]\n"
        f"assert any('{SECRET}' in text for text in texts)"
    ),
    "the memory of another process": "assert any(readable(f'/proc/{p}/mem') for p in pids())",
    "the memory of another process, by process_vm_readv": (
        "class V(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]\n"
        "b = ctypes.create_string_buffer(8)\n"
        "for p in [os.getppid(), *pids()]:\n"
        "    m = open(f'/proc/{p}/maps').readline().split('-')[0] if readable(f'/proc/{p}/maps') else '400000'\n"
        "    if libc.process_vm_readv(p, ctypes.byref(V(ctypes.addressof(b), 8)), 1, "
        "ctypes.byref(V(int(m, 16), 8)), 1, 0) == 8: break\n"
        "else: 1 / 0"
    ),
    "the command of the trainer": "assert any(b'python' in open(f'/proc/{p}/cmdline', 'rb').read() for p in pids())",
    "the working folder of another process": "assert any(os.readlink(f'/proc/{p}/cwd') for p in pids())",
    "a descriptor of another process": "assert any(libc.syscall(438, libc.syscall(434, p, 0), 0, 0) >= 0 for p in pids())",
    "a host on the network": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "an abstract socket of the host": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0polyphony-attack')",
    "shared memory of others": "assert libc.shmget(0x504F, 64, 0o1600) >= 0",
    "keys of the kernel's ring": "assert libc.syscall(250, 0, -3, 1) >= 0",
    "the messages of the kernel": "b = ctypes.create_string_buffer(64)\nassert libc.klogctl(3, b, 64) >= 0",
}
_WRITES = {
    "a file into the host's /tmp": f"open('{LEFT}', 'w').write('x')",
    "a file into the Python installation": "open(sys.base_prefix + '/polyphony-attack', 'w')",
    "a file into /dev/shm": "open('/dev/shm/polyphony-attack', 'w').write('x')",
    "a folder beside Python": "os.mkdir(sys.base_prefix + '/polyphony-attack')",
    "a link to a file of the host": f"os.link('{MARK}', '{LEFT}')",
    "a symbolic link": f"os.symlink('/etc/passwd', '{LEFT}')",
    "another name for a file": f"os.rename('{MARK}', '{LEFT}')",
    "the end of a file": f"os.truncate('{MARK}', 0)",
    "the mode of a file": "os.chmod(os.__file__, 0o644)",
    "the owner of a file": "os.chown(os.__file__, os.getuid(), os.getgid())",
    "the times of a file": "os.utime(os.__file__)",
    "the times of a file, by futimesat": "assert libc.futimesat(-100, os.__file__.encode(), None) == 0",
    "an attribute of a file": "assert libc.setxattr(os.__file__.encode(), b'user.x', b'x', 1, 0) == 0",
    "an attribute of a file, by setxattrat": (
        "args = (ctypes.c_uint64 * 2)(0, 1)\nargs[0] = ctypes.addressof(ctypes.create_string_buffer(b'x'))\n"
        "r = libc.syscall(463, -100, os.__file__.encode(), 0, b'user.x', ctypes.byref(args), 16)\n"
        "assert r == 0 or ctypes.get_errno() not in (1, 38)"
    ),
    "the flags of a file (FS_IOC_SETFLAGS)": (
        "import fcntl\nf = open(os.__file__)\ng = fcntl.ioctl(f, 0x80086601, bytes(8))\nfcntl.ioctl(f, 0x40086602, g)"
    ),
    "a lock on a file of the host (flock)": "import fcntl\nfcntl.flock(open(os.__file__), fcntl.LOCK_EX)",
    "a lock on a file of the host (fcntl)": "import fcntl\nfcntl.lockf(open(os.__file__), fcntl.LOCK_SH)",
    "a lease on a file of the host": "import fcntl\nfcntl.fcntl(open(os.__file__), 1024, fcntl.F_RDLCK)",
    "a device node": "os.mknod('/tmp/n', 0o600 | 0o20000, os.makedev(1, 3))\nopen('/tmp/n').read(0)",
    "a named pipe for others": f"os.mkfifo('{LEFT}')",
    "a socket's name for others": f"import socket\nsocket.socket(socket.AF_UNIX).bind('{LEFT}')",
    "to a socket of the host by a pair of datagrams": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', '/dev/log')"
    ),
    "the name of the host": "import socket\nsocket.sethostname(socket.gethostname() or 'x')",
    "the root of its file system": "os.chroot('/usr')",
}
_RESOURCES = {
    "another process": "os.fork()",
    "another process, by vfork": "import subprocess\nsubprocess.run(['/bin/true'])",
    "2,000 threads at a time": (
        "import threading\nthreading.stack_size(1 << 15)\ne = threading.Event()\n"
        "for _ in range(2000): threading.Thread(target=e.wait, daemon=True).start()"
    ),
    "more memory than its limit": "x = bytearray(600 << 20)",
    "320 MiB of files": (
        "for i in range(20):\n    f = open(f'/tmp/{i}', 'wb', 0)\n"
        "    for _ in range(16): assert f.write(bytes(1 << 20)) == 1 << 20"
    ),
    "320 MiB of shared memory files": (
        "for i in range(20):\n    f = open(f'/dev/shm/{i}', 'wb', 0)\n"
        "    for _ in range(16): assert f.write(bytes(1 << 20)) == 1 << 20"
    ),
    "a file larger than its limit": "f = open('/tmp/f', 'wb', 0)\nos.posix_fallocate(f.fileno(), 0, 64 << 20)",
    "memory that has no name (memfd)": "f = os.memfd_create('x')\nos.write(f, bytes(1 << 20))",
    "memory of System V": "assert libc.shmget(0, 64 << 20, 0o1600) >= 0",
    "more descriptors than its limit": "x = [os.dup(0) for _ in range(100)]",
    "a higher limit": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))",
    "a higher priority": "os.nice(-5)",
    "real-time scheduling": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "a core of its own": "os.sched_setaffinity(0, {0})",
    "the kernel's rings (io_uring)": "b = ctypes.create_string_buffer(256)\nassert libc.syscall(425, 8, b) >= 0",
    "a program in the kernel (bpf)": "assert libc.syscall(321, 0, ctypes.create_string_buffer(128), 128) >= 0",
    "locked memory": "assert libc.mlockall(3) == 0",
    "a thread with descriptors of its own": (  # a kernel that is asked says that it makes no sense, and not that it may not
        "assert libc.syscall(56, 0x10100, 0, 0, 0, 0) == -1 and ctypes.get_errno() not in (1, 38)"
    ),
    "sockets of another family": "import socket\nsocket.socketpair(30, socket.SOCK_SEQPACKET)",
}
_PERSISTENCE = {
    "a process that outlives its case": "if not os.fork():\n    time.sleep(30)",
    "a session of its own": "os.setsid()",
    "a file for its next case": (
        "first = not os.path.exists('/tmp/next')\nopen('/tmp/next', 'w').write('x')\nassert not first"
    ),
    "a deep folder for its next case": (
        "first = not os.path.exists('/tmp/deep')\n"
        "if first:\n    os.mkdir('/tmp/deep')\n    os.chdir('/tmp/deep')\n"
        "    for _ in range(1500):\n        os.mkdir('d')\n        os.chdir('d')\n"
        "    os.chmod('/tmp/deep', 0)\nassert not first"
    ),
    "a file at the root for its next case": (
        "first = not os.path.exists('/next')\nopen('/next', 'w').write('x')\nassert not first"
    ),
    "a module for every interpreter": "open(os.path.dirname(os.__file__) + '/site-packages/usercustomize.py', 'w')",
    "a message queue": "assert libc.msgget(0x504F, 0o1600) >= 0",
    "a semaphore with a name": "assert libc.syscall(240, b'polyphony', 0o102, 0o600, None) >= 0",
    "a life after its parent's": "assert libc.prctl(1, 0, 0, 0, 0) == 0",
    "a timer that ends its parent": "import signal\nos.kill(os.getppid() or 2, signal.SIGCONT)",
    "a tracer on its parent": "assert libc.ptrace(16, os.getppid() or 2, 0, 0) == 0",
    "a signal at its parent by a pipe": "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid() or 2)",
}
_TESTS = "assert f(2) == 4\nassert f(5) == 10"
_LIAR = "class E({}):\n    def __eq__(s, o): return True\n    def __hash__(s): return 4\ndef f(x): return E({})"
_FORGED = {
    "an object that equals everything": _LIAR.format("object", ""),
    "a number that equals everything": _LIAR.format("int", "3"),
    "a patched AssertionError": "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): return 0",
    "the end of the process": "import os\ndef f(x): os._exit(0)",
    "the end of an iteration": "def f(x): raise StopIteration",
    "a word in every descriptor": (
        "for fd in range(64):\n    try: os.write(fd, b'verdict 3\\n2 2\\n')\n    except OSError: pass\ndef f(x): return 0"
    ),
    "a patched harness": (
        "for m in list(sys.modules.values()):\n    for k in dir(m):\n"
        "        if 'same' in k or 'hold' in k or 'check' in k:\n"
        "            try: setattr(m, k, lambda *a: True)\n            except Exception: pass\ndef f(x): return 0"
    ),
    "the tests in its memory": (
        "import gc\ndef f(x):\n"
        "    found = [o for o in gc.get_objects() if isinstance(o, (list, dict)) and asked() in str(o)[:500]]\n"
        "    return {2: 4, 5: 10}[x] if found else None"
    ),
    "the tests in the memory of another process": (
        "import re\ndef f(x):\n    for p in pids():\n        try:\n            mem = open(f'/proc/{p}/mem', 'rb', 0)\n"
        "            for line in open(f'/proc/{p}/maps'):\n"
        "                a, b = (int(n, 16) for n in line.split()[0].split('-'))\n"
        "                if 'r' in line.split()[1] and b - a < 1 << 26:\n                    mem.seek(a)\n"
        "                    if asked().encode() in mem.read(b - a): return {2: 4, 5: 10}[x]\n"
        "        except (OSError, ValueError, OverflowError): pass"
    ),
    "the frames of its caller": (
        "import inspect\ndef f(x):\n    seen = str([i.frame.f_locals for i in inspect.stack()])\n"
        "    return {2: 4, 5: 10}[x] if asked() in seen else None"
    ),
    "a trace of its caller": "sys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(x): return 0",
    "another module in the tests' place": (
        "import types\nsys.modules['tests'] = sys.modules['running'] = types.ModuleType('running')\ndef f(x): return 0"
    ),
    "a message of an object that equals everything": (
        "def f(x):\n    frame = sys._getframe()\n"
        "    while not hasattr(frame.f_locals.get('self'), 'channel'): frame = frame.f_back\n"
        "    channel = frame.f_locals['self'].channel\n    while True:\n"
        "        channel.send({'value': {'named': ['unittest.mock', 'ANY']}, 'changed': []})\n        channel.receive()"
    ),
    "a message of an exception that ends the tests": (
        "def f(x):\n    frame = sys._getframe()\n"
        "    while not hasattr(frame.f_locals.get('self'), 'channel'): frame = frame.f_back\n"
        "    channel = frame.f_locals['self'].channel\n    while True:\n"
        "        channel.send({'raise': ['SystemExit', 'BaseException'], 'text': '', 'args': []})\n"
        "        channel.receive()"
    ),
    "an answer that is no message": (
        "def f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, b'{' * (1 << 20) + b'\\n')\n"
        "        except OSError: pass\n    time.sleep(9)"
    ),
    "a signal to the tests": "import signal\ndef f(x):\n    for p in [os.getppid(), *pids()]: os.kill(p, signal.SIGKILL)",
}
_PRELUDE = (
    "import ctypes, os, sys, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "def asked(): return chr(97) + 'ssert f(2) == 4'\n"  # which its own source does not hold
    "def pids():\n"
    "    try: return [int(n) for n in os.listdir('/proc') if n.isdigit() and int(n) != os.getpid()]\n"
    "    except OSError: return []\n"
    "def readable(path):\n    try: return bool(open(path, 'rb', 0).read(0) is not None)\n    except OSError: return False\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """What a program tries; `tests` where it wants their pass and not a thing."""

    kind: str
    name: str
    source: str
    tests: str | None = None

    def reaches(self, level: client.Level, sandbox: Callable[..., Any] = Program) -> bool:
        """Say whether it gets what it wants at this level, or leaves a file behind; what persists is asked for twice."""
        try:
            with sandbox(self.source, level=level, limits=LIMITS) as program:
                if self.tests is not None:
                    verdict = program.test(self.tests)
                    has_reached = bool(verdict.total) and verdict.passed == verdict.total
                else:
                    said = [program.run("").stdout for _ in range(2 if self.kind == "persistence" else 1)]
                    has_reached = any(b"REACHED" in text for text in said)
        except SandboxError:  # a program that breaks its sandbox would have no verdict in place of a wrong answer
            has_reached = True
        return self._leaves_a_file() or (self.kind == "persistence" and self._leaves_a_process()) or has_reached

    def _leaves_a_file(self) -> bool:
        left = [LEFT, *map(Path, ("/dev/shm/polyphony-attack", sys.base_prefix + "/polyphony-attack"))]
        found = [path for path in left if path.exists() or path.is_symlink()] or MARK.read_text() != SECRET
        for path in left:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        return bool(found)

    def _leaves_a_process(self) -> bool:
        """Say whether anything is left of the supervisor that served it, which ends with all it started."""
        deadline = time.monotonic() + 5
        while any(process.children() for process in psutil.Process().children() if _is_server(process)):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.002)
        return False


def _is_server(process: psutil.Process) -> bool:
    try:
        return any(word.endswith(("sandbox/__main__.py", "jail/__main__.py")) for word in process.cmdline())
    except psutil.Error:
        return False


def _programs(kind: str, sources: dict[str, str]) -> list[Attack]:
    """What wants to leave a name on the host is judged by that alone: in a folder of its own it may have it."""
    ends = {name: "" if str(LEFT) in source else "\nprint('REACHED')" for name, source in sources.items()}
    return [Attack(kind=kind, name=name, source=_PRELUDE + source + ends[name]) for name, source in sources.items()]


ATTACKS = [
    *_programs("reads", _READS),
    *_programs("writes", _WRITES),
    *_programs("resources", _RESOURCES),
    *_programs("persistence", _PERSISTENCE),
    *(Attack(kind="forged verdicts", name=n, source=_PRELUDE + s, tests=_TESTS) for n, s in _FORGED.items()),
]


@contextlib.contextmanager
def bait():
    """Put what attacks look for where a trainer has it: in files, and in the environment of a process of its user."""
    os.environ["POLYPHONY_ATTACK"] = SECRET
    MARK.write_text(SECRET)
    stands_for_it = subprocess.Popen(["sleep", "3600"])
    try:
        yield
    finally:
        stands_for_it.kill()
        stands_for_it.wait()
        del os.environ["POLYPHONY_ATTACK"]
        MARK.unlink(missing_ok=True)


@contextlib.contextmanager
def before(checkout: Path):
    """Yield what makes a program of that checkout's sandbox; called as `Program` is."""
    sys.path.insert(0, str(checkout))
    sandbox: Any = importlib.import_module("rewards.sandbox")
    jailer: Any = importlib.import_module("rewards.jailer")
    with tempfile.TemporaryDirectory() as folder:
        as_it_was, without_landlock = jailer._JAIL, Path(folder) / "jail"
        shutil.copytree(as_it_was, without_landlock)
        with (without_landlock / "confine.py").open("a") as file:
            file.write("\ncan_hide_files = lambda: False\n")

        @contextlib.contextmanager
        def program(source: str, *, level: client.Level, limits: client.Limits):
            """`limits` was Landlock too where the kernel has it."""
            jail = without_landlock if level == "limits" else as_it_was
            if jail != jailer._JAIL:
                while jailer._shared:
                    jailer._shared.popitem()[1].close()
                jailer._JAIL = jail
            its_own = sandbox.Limits(wall_s=limits.wall_s, cpu_s=limits.cpu_s, memory_bytes=limits.memory_bytes)
            try:
                with sandbox.Program(source, level="limits" if level == "landlock" else level, limits=its_own) as made:
                    yield made
            except sandbox.SandboxError as error:
                raise SandboxError(str(error)) from error

        yield program


def levels() -> list[client.Level]:
    """Return the levels that this host has."""
    found = []
    for level in client.LEVELS:
        if level == "bubblewrap" and not shutil.which("bwrap"):
            continue
        with contextlib.suppress(SandboxError, OSError), Program("print(1)", level=level) as program:
            if program.run("").stdout == b"1\n":
                found.append(level)
    return found


def table(
    here: Sequence[client.Level],
    report: Callable[[str], None] = print,
    *,
    but: Sequence[str] = (),
    before: Callable[..., Any] | None = None,
) -> dict[tuple[str, str], set[client.Level]]:
    """Run all attacks but those of some kinds, report a line each; return by attack the levels where it reached its aim.

    With `before`, each line ends with the levels where it did so in that sandbox.
    """
    report("| kind | attack | " + " | ".join(here) + (" | before |" if before else " |"))
    report("|---|---|" + "---|" * (len(here) + bool(before)))
    open_to: dict[tuple[str, str], set[client.Level]] = {}
    for attack in (attack for attack in ATTACKS if attack.kind not in but):
        reached: set[client.Level] = {level for level in here if attack.reaches(level)}
        open_to[attack.kind, attack.name] = reached
        cells = ["reached" if level in reached else "-" for level in here]
        if before:
            then = [level for level in here if attack.reaches(level, before)]
            cells.append("all" if then == list(here) else ", ".join(then) or "-")
        report(f"| {attack.kind} | {attack.name} | " + " | ".join(cells) + " |")
    return open_to


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="a checkout of e9572e9")
    checkout = parser.parse_args().before
    with bait(), before(checkout) if checkout else contextlib.nullcontext() as made:
        counts = table(levels(), partial(print, flush=True), before=made)
    print(
        f"\n{len(counts)} attacks; reached: "
        + ", ".join(f"{x} {sum(x in r for r in counts.values())}" for x in levels())
    )
