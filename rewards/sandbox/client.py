"""Run untrusted code: isolated as well as the host allows, within limits, leaving nothing behind.

Every program gets a process of its own (`supervisor`), so one that crashes takes nothing with it. In the sandbox there
is no network, no other process, no way to start one, and none of the host's files but /usr, /lib and Python.
Nothing is written to disk. A program never meets what it is expected to print, nor the source of its tests.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import sysconfig
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from polyphony.rewards.sandbox import confine
from polyphony.rewards.sandbox.server import ForkServer, in_bubblewrap, shared_server
from polyphony.rewards.workers import is_readable_by

Level = Literal["namespaces", "bubblewrap", "landlock", "limits"]
LEVELS: tuple[Level, ...] = ("namespaces", "bubblewrap", "landlock", "limits")
_GRACE_S = 30.0
"""What the sandbox's own work may take on a busy host before its caller stops waiting for it."""


class SandboxError(RuntimeError):
    """The sandbox itself failed; this says nothing about the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one run of a program may use. The program is killed, or the system call refused, where it asks for more."""

    wall_s: float = 6.0
    cpu_s: int = 4
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    """The largest file; all files of a run together may have four times as much, in memory."""
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"sandbox limit {name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Isolation:
    """What the sandbox of this host keeps from a program, for `doctor`."""

    level: Level
    network: str
    processes: str
    files: str

    def __str__(self) -> str:
        return f"{self.level}: network {self.network}; processes {self.processes}; files {self.files}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How one run ended: `exit` with status 0, `error` with another, killed for its `timeout` or for its `output`.

    `stalled` is a timeout before it had its processor time: it slept or waited, or the host was busy.
    """

    ended: Literal["exit", "error", "timeout", "stalled", "output"]
    stdout: bytes
    unlisted: int = field(default=0, compare=False)
    """System calls of the program so far that are not on the allow-list; 0 too where the kernel does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TestResult:
    """How many of the tests' checks hold. `total` 0: the tests are no Python, check nothing, or can not be run here."""

    passed: int
    total: int
    needs_inside: bool = False
    """Whether the tests ask for what only a run inside the program's process can say; the count is that of no such run."""
    ended: Literal["exit", "timeout", "stalled"] = "exit"
    unlisted: int = 0
    """Both as of an `Execution`."""


class Program:
    """A program in its sandbox, to be run on inputs or questioned by tests; used as a context.

    Example: `with Program("print(input()[::-1])") as program: program.run("abc").stdout == b"cba\\n"`
    """

    def __init__(
        self, source: str, *, limits: Limits | None = None, level: Level | None = None, site_packages: bool = False
    ) -> None:
        self._source = source.encode(errors="replace")
        self._limits = limits or Limits()
        self._level: Level = level or isolation().level
        self._packages = sysconfig.get_path("purelib") if site_packages else ""

    def __enter__(self) -> Program:
        self._own_server: ForkServer | None = None
        if self._level == "bubblewrap":  # its folder in memory must not outlive the program
            size = 4 * self._limits.file_bytes
            self._own_server = ForkServer(in_bubblewrap(packages=self._packages, size_bytes=size))
        settings = [f"{name}={getattr(self._limits, name)}" for name in Limits.__slots__]
        settings += [f"level={self._level}", f"packages={self._packages}", f"user={_user(self._level, self._packages)}"]
        self._server = self._own_server or shared_server()
        try:
            self._requests, self._replies = self._server.start("\n".join(settings))
        except OSError:
            self._server.is_ending()  # so that the next program finds another
            raise
        try:
            self._send("program", self._source)
        except SandboxError as error:
            self.__exit__(SandboxError, error, None)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._requests)  # at which the supervisor ends
        os.close(self._replies)
        if isinstance(error, SandboxError):
            self._server.is_ending()  # as above
        if self._own_server:
            self._own_server.close()

    def run(self, stdin: str) -> Execution:
        """Run the program as a script on one input. Raises SandboxError where the sandbox could not be set up."""
        self._send("run", stdin.encode(errors="replace"))
        ended, stdout, unlisted = self._receive()
        self._refuse(ended)
        assert ended in ("exit", "error", "timeout", "stalled", "output")
        return Execution(ended=ended, stdout=stdout, unlisted=unlisted)

    def test(self, tests: str) -> TestResult:
        """Import the program and run tests against it from another process; once, after which it has ended.

        A program that crashes, hangs, or ends the process fails the tests. Raises SandboxError as `run` does.
        """
        self._send("tests", b"")
        if self._receive()[0] != "ready":
            raise SandboxError(f"the host refused a sandbox at level {self._level}")
        self._send("tests", tests.encode(errors="replace"))
        return self._result(*self._receive())

    def test_inside(self, tests: str) -> TestResult:
        """Import the program and run tests in its own process, where it may answer for itself; once."""
        self._send("inside", tests.encode(errors="replace"))
        return self._result(*self._receive())

    def _result(self, ended: str, count: bytes, unlisted: int) -> TestResult:
        if not count:
            self._refuse(ended)
        passed, total = map(int, count.split())
        result = TestResult(passed=passed, total=total, needs_inside=ended == "inside", unlisted=unlisted)
        return replace(result, ended=ended) if ended in ("timeout", "stalled") else result

    def _refuse(self, ended: str) -> None:
        if ended == "killed":
            raise SandboxError("something outside killed the program")
        if ended == "broken":
            raise SandboxError(f"the host refused a sandbox at level {self._level}")

    def _send(self, word: str, content: bytes) -> None:
        unsent = memoryview(b"%s %d\n%s" % (word.encode(), len(content), content))
        try:
            while unsent:
                unsent = unsent[os.write(self._requests, unsent) :]
        except BrokenPipeError:
            raise SandboxError("the sandbox ended before it was asked") from None

    def _receive(self) -> tuple[str, bytes, int]:
        """Return how it ended, what comes with that, and the unlisted system calls."""
        data, deadline = b"", time.monotonic() + self._limits.wall_s + _GRACE_S
        while b"\n" not in data or len(data) < data.index(b"\n") + 1 + int(data.split(None, 2)[1]):
            if not is_readable_by(self._replies, deadline):
                raise SandboxError("the sandbox did not answer")
            chunk = os.read(self._replies, 1 << 16)
            if not chunk:
                raise SandboxError("the sandbox ended before it answered")
            data += chunk
        header, _, content = data.partition(b"\n")
        word, _, unlisted = header.split()
        return word.decode(), content, int(unlisted)


@functools.cache
def isolation() -> Isolation:
    """Return the strongest isolation that works here, found by running a program in it once per process.

    Raises SandboxError where not even the weakest does: on another system than Linux on x86-64 or arm64.
    """
    for level in LEVELS:
        if level == "bubblewrap" and not shutil.which("bwrap"):
            continue
        try:
            with Program("print(6 * 7)", level=level) as program:
                works = program.run("") == Execution(ended="exit", stdout=b"42\n")
        except (SandboxError, OSError):
            works = False
        if works:
            return describe(level)
    raise SandboxError("no sandbox works on this host: it must be Linux on x86-64 or arm64 with seccomp")


def require_isolation(*, may_be_limits: bool) -> Isolation:
    """Return this host's isolation. Raises SandboxError where only limits are left, unless they are asked for."""
    found = isolation()
    if found.level == "limits" and not may_be_limits:
        raise SandboxError(
            "this host offers neither user namespaces nor bubblewrap nor Landlock, and `polyphony doctor` says what then "
            "stays open to a program; to run programs all the same, say reward: {name: code, sandbox: limits}"
        )
    return found


def describe(level: Level) -> Isolation:
    """Return what a level keeps from a program on this host."""
    if level in ("namespaces", "bubblewrap"):
        files = "a private folder in memory; of the host's only /usr, /lib and Python, read-only"
        return Isolation(level=level, network="none", processes="sees only itself, starts none", files=files)
    readable = "only /usr, /lib and Python" if level == "landlock" else "all that its user may read"
    values = "of another user than the trainer's" if _user(level, "") >= 0 else "of the trainer's user"
    if level == "limits" and os.geteuid() != 0 and _user(level, "") < 0:
        values += ", so that it may read the trainer's environment and memory, expected values among them"
    return Isolation(
        level=level,
        network="no sockets (seccomp)",
        processes=f"{values}; sees the host's, can signal none, starts none (seccomp)",
        files=f"can read {readable}, and of all others whether they are there; can write none",
    )


def _user(level: Level, packages: str) -> int:
    """Return the user that a program is to be: another where there is the power to and Python is open to all, else -1."""
    if level not in ("landlock", "limits") or os.geteuid() != 0:
        return -1
    return confine.ANOTHER if all(map(_is_open_to_all, filter(None, (os.__file__, packages)))) else -1


def _is_open_to_all(path: str) -> bool:
    place = Path(path).resolve()
    return bool(place.stat().st_mode & stat.S_IROTH) and all(p.stat().st_mode & stat.S_IXOTH for p in place.parents)
