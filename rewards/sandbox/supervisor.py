"""The supervisor: runs one untrusted program as often as asked, and tells its parent how each run ended.

One process a program. Frames on stdin and stdout are a word, a length, a newline and that many bytes. It never
holds what a run is expected to print, and tests reach it only after the candidate has been forked, so that no memory
of theirs is the candidate's.

    program <source>, then either, as often as wanted,
    run <stdin>       -> exit | error | timeout | stalled | output | killed | broken, with what the program printed
    or, once,
    tests             -> ready, when the candidate has been forked
    tests <source>    -> verdict or inside, with "passed total"; or timeout | stalled | killed | broken
    or, once,
    inside <source>   -> verdict, with "passed total"; or timeout | stalled | killed | broken

A run that the clock ended is `stalled` where it had not had its processor time: it slept, or the host was busy. One is
`killed` by somebody else where it can not have done that itself.
"""

import builtins
import importlib
import os
import signal
import sys
import time

import confine
import messages
import program_side
import running
import test_side

# names that a class in the style of LeetCode expects to find: that site imports them for every program
_FROM = {
    "typing": "Any Callable DefaultDict Deque Dict FrozenSet Generator Generic Iterable Iterator List Literal Mapping"
    " NamedTuple Optional Sequence Set Tuple Type TypeVar Union",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
    "itertools": "accumulate chain combinations combinations_with_replacement count cycle groupby islice pairwise"
    " permutations product repeat starmap takewhile zip_longest",
    "functools": "cache cmp_to_key lru_cache partial reduce total_ordering",
    "math": "ceil comb factorial floor gcd inf isqrt lcm log log2 perm pi sqrt",
    "copy": "deepcopy",
    "dataclasses": "dataclass field",
    "string": "ascii_lowercase ascii_uppercase digits",
}
_MODULES = "bisect collections copy datetime functools heapq itertools json math operator random re string sys typing"
_PLACES = {name: (module, name) for module, names in _FROM.items() for name in names.split()}
_PLACES = {**{name: (name, None) for name in _MODULES.split()}, **_PLACES}


def provide(code):
    """Make those of the names that the code uses known as if they were built in: its own definitions come first."""
    for name in names_of(code) & set(_PLACES):
        module, member = _PLACES[name]
        value = importlib.import_module(module)
        setattr(builtins, name, getattr(value, member) if member else value)


def names_of(code):
    """Return the names that code uses, of attributes too, its functions' included."""
    inner = [names_of(part) for part in code.co_consts if isinstance(part, type(code))]
    return set(code.co_names).union(*inner)


CHUNK = 1 << 16
BUILD_S = 20.0
"""Longest time that setting up the sandbox may take before the host counts as refusing it. A host that refuses says so at
once; one with many busy processes was seen to take more than three seconds."""

INNOCENT_CPU_S = 0.3
"""Less than this of processor time, and a killed program did not do it by its own limit. The kernel counts a second of that
by ticks, which on a busy host are more than the time that the program had."""
CPU_SHARE = 0.9
"""A run that had this share of its processor time had its chance. Below this many seconds no limit of its own ends it."""
LEAVE_S = 0.05
"""What the code under test takes, at most, to notice that the tests have ended."""


def read_frame(stream):
    """Return the next (word, content); (None, b"") at the end."""
    header = stream.readline().split()
    return (header[0].decode(), stream.read(int(header[1]))) if header else (None, b"")


def write_frame(stream, word, content, unlisted=0):
    """Send one message: a word, a length, the number of system calls off the allow-list, and that many bytes."""
    stream.write(b"%s %d %d\n%s" % (word.encode(), len(content), unlisted, content))
    stream.flush()


class Supervisor:
    """One program and the limits it runs under."""

    def __init__(self, source, settings):
        self.source = source
        self.level = settings["level"]
        self.wall_s = float(settings["wall_s"])
        self.output_bytes = int(settings["output_bytes"])
        self.memory_bytes, self.file_bytes = int(settings["memory_bytes"]), int(settings["file_bytes"])
        self.cpu_s = int(settings["cpu_s"])
        self.packages = [path for path in settings["packages"].split(":") if path]
        self.user = int(settings["user"])
        self.unlisted = 0
        sys.set_int_max_str_digits(0)  # a long integer is a fair answer; the clock bounds what it costs
        confine.become_subreaper()
        if self.level in ("landlock", "limits"):
            confine.disable_dumps()

    def run(self, stdin):
        """Run the program on one input; return how it ended and what it printed."""
        given = os.memfd_create("stdin")
        os.write(given, stdin)
        os.lseek(given, 0, os.SEEK_SET)
        printed, output = os.pipe()
        watch = confine.Listener()
        pid = self._fork(lambda: _run_main(self.source), given, output, watch, [])
        for fd in (given, output):
            os.close(fd)
        begun, deadline = self._begin(1, watch)
        text, ended = self._read(printed, deadline, watch)
        if ended == "exit" and not _ends_by(pid, deadline, watch):
            ended = "timeout"  # it closed its output and went on
        codes, cpu_s = self._end([pid], watch, kill=ended != "exit")
        os.close(printed)
        if not begun:
            return "broken", text
        if ended == "timeout":
            return self._late(cpu_s), text
        if ended == "exit" and self._is_killed(codes, cpu_s):
            return "killed", text
        if ended == "exit" and self._is_exhausted(codes, cpu_s):
            return "timeout", text
        return (ended if ended != "exit" or codes == [0] else "error"), text

    def _begin(self, processes, watch):
        """Wait until so many processes have begun; say whether they have, and when their time is over.

        Said by the sandbox before untrusted code runs; without it the host refused the sandbox, and nothing was run. The
        clock starts only then: on a busy host the sandbox alone can take seconds.
        """
        watch.theirs.close()
        begun = watch.has_begun(processes, time.monotonic() + BUILD_S)
        return begun, time.monotonic() + (self.wall_s if begun else 0)

    def _late(self, cpu_s):
        return "stalled" if cpu_s < CPU_SHARE * min(self.cpu_s, self.wall_s) else "timeout"

    def _is_killed(self, codes, cpu_s):
        """Say whether a process was killed from outside. As the first of its namespace it can not send itself that
        signal; what it can is lower its limit of processor time, to a second at least."""
        return self.level == "namespaces" and -signal.SIGKILL in codes and cpu_s < INNOCENT_CPU_S

    def _is_exhausted(self, codes, cpu_s):
        """Say whether a process met its limit of processor time, at which the kernel kills it."""
        return -signal.SIGKILL in codes and cpu_s >= INNOCENT_CPU_S

    def tests(self, read_tests):
        """Let tests, read once the candidate is alone with its code, question it; return how it ended and the count."""
        nothing = os.open("/dev/null", os.O_RDWR)
        theirs, ours = os.pipe(), os.pipe()
        watch = confine.Listener()

        def answer():
            module = self._defined()
            program_side.Candidate(messages.Channel(ours[0], theirs[1]), vars(module)).serve()

        first = self._fork(answer, nothing, nothing, watch, [ours[0], theirs[1]])
        os.close(ours[0])
        os.close(theirs[1])
        tests = read_tests()
        verdict, written = os.pipe()
        nonce = os.urandom(16).hex()

        def question():
            word, count = running.run_tests(tests, test_side.Link(messages.Channel(theirs[0], ours[1])))
            # only now, and by a pipe that the candidate's process does not have
            os.write(written, f"{nonce}{word} {count}".encode())
            return 0

        second = self._fork(question, nothing, nothing, watch, [theirs[0], ours[1], written])
        for fd in (theirs[0], ours[1], written, nothing):
            os.close(fd)
        begun, deadline = self._begin(2, watch)
        text, ended = self._read(verdict, deadline, watch)
        if ended == "exit":
            _ends_by(first, time.monotonic() + LEAVE_S, watch)  # at the tests' end, if nobody killed it before
        codes, cpu_s = self._end([second, first], watch, kill=True)
        os.close(verdict)
        if ended == "exit" and self._is_killed(codes, cpu_s):
            return "killed", b""
        if ended == "exit" and text.startswith(nonce.encode()):
            word, _, count = text[len(nonce) :].decode().partition(" ")
            return ("timeout" if word == "verdict" and self._is_exhausted(codes, cpu_s) else word), count.encode()
        if not begun:
            return "broken", b""
        if ended == "timeout":
            return self._late(cpu_s), b"0 1"
        return ("timeout" if self._is_exhausted(codes, cpu_s) else "verdict"), b"0 1"

    def inside(self, tests):
        """Run tests in the process of the code that they question, which may answer for itself; return as `tests` does."""
        nothing = os.open("/dev/null", os.O_RDWR)
        watch = confine.Listener()
        verdict, written = os.pipe()

        def answer():
            os.write(written, running.run_inside(tests, self._defined()).encode())
            return 0

        pid = self._fork(answer, nothing, nothing, watch, [written])
        for fd in (nothing, written):
            os.close(fd)
        begun, deadline = self._begin(1, watch)
        text, ended = self._read(verdict, deadline, watch)
        codes, cpu_s = self._end([pid], watch, kill=ended != "exit")
        os.close(verdict)
        count = text.split()
        if not begun:
            return "broken", b""
        if ended == "timeout":
            return self._late(cpu_s), b"0 1"
        if self._is_killed(codes, cpu_s):
            return "killed", b""
        if self._is_exhausted(codes, cpu_s):
            return "timeout", b"0 1"
        is_count = ended == "exit" and len(count) == 2 and all(part.isdigit() and len(part) < 9 for part in count)
        return "verdict", text if is_count else b"0 1"

    def _defined(self):
        """Return a module with what the code defines."""
        module = _module("solution")
        code = compile(self.source, "solution.py", "exec")
        provide(code)
        exec(code, vars(module))
        return module

    def _end(self, pids, watch, *, kill):
        """End what was forked, and keep what was seen of it; return as `_end` does."""
        self.unlisted += watch.unlisted
        watch.close()  # first: one that had not begun when its time was over can not begin any more
        found = _end(pids, kill=kill)
        if self.level == "bubblewrap":
            _empty("/tmp", [sys.base_prefix, *self.packages])
        return found

    def _read(self, fd, deadline, watch):
        """Return what comes out of a pipe until it closes, the time is over or it is too much, and which it was."""
        chunks, size = [], 0
        while size <= self.output_bytes:
            if not watch.wait(fd, deadline):
                return b"".join(chunks), "timeout"
            chunk = os.read(fd, CHUNK)
            if not chunk:
                return b"".join(chunks), "exit"
            chunks.append(chunk)
            size += len(chunk)
        return b"".join(chunks)[: self.output_bytes], "output"

    def _fork(self, inside, stdin, stdout, watch, keep):
        """Run `inside` in a sandboxed child with only the given descriptors; return the pid to wait for."""
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            confine.die_with_parent()
            for source, target in ((stdin, 0), (stdout, 1)):
                os.dup2(source, target)
            os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
            _close_all_but({0, 1, 2, watch.theirs.fileno(), *keep})
            if self.level == "namespaces":
                confine.enter_namespaces()
                inner = os.fork()
                if inner:
                    _close_all_but({0})
                    code = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
                    if code == -signal.SIGKILL:
                        os.kill(os.getpid(), signal.SIGKILL)  # which no exit status is taken for
                    os._exit(code & 0xFF)
            watch.begin(self._confine())
            status = inside()
        finally:
            os._exit(status)

    def _confine(self):
        """Isolate this process; return the listener for calls that the filter does not decide."""
        if self.user >= 0:
            confine.change_user(self.user)
        confine.die_with_parent()
        if self.level == "namespaces":
            confine.mount_private_root(_readable(self.packages), 4 * self.file_bytes)
        elif self.level == "bubblewrap":
            os.mkdir(f"/tmp/{os.getpid()}")  # each run its own, in the one memory folder that ends with the supervisor
            os.chdir(f"/tmp/{os.getpid()}")
        elif self.level == "landlock":
            confine.restrict_files(_readable(self.packages))
        confine.limit_resources(cpu_s=self.cpu_s, memory_bytes=self.memory_bytes, file_bytes=self.file_bytes)
        confine.drop_capabilities()
        sys.path[:] = [path for path in sys.path if path != os.path.dirname(__file__)] + self.packages
        writes = self.level in ("namespaces", "bubblewrap")
        return confine.filter_and_watch(confine.WRITTEN if writes else confine.READ)


def _readable(packages):
    paths = ["/usr", "/lib", "/lib64", "/bin", "/dev/null"]
    for path in (sys.base_prefix, *packages):
        if not any(path == known or path.startswith(known + "/") for known in paths):
            paths.append(path)
    return [path for path in paths if os.path.exists(path)]


def _close_all_but(keep):
    low = 0
    for fd in [*sorted(keep), 1 << 20]:
        if low < fd:  # CPython 3.11 takes closerange(0, 0) for everything
            os.closerange(low, fd)
        low = fd + 1


def _ends_by(pid, deadline, watch):
    process = os.pidfd_open(pid)
    ended = watch.wait(process, deadline)
    os.close(process)
    return ended


def _empty(folder, keep):
    """Remove all that a run left in the folder, however deep or closed, but for the paths to keep."""
    for path in (f"{folder}/{name}" for name in os.listdir(folder)):
        if any(kept.startswith(path + "/") for kept in keep):
            _empty(path, keep)
        elif path not in keep:
            os.spawnl(os.P_WAIT, "/bin/chmod", "chmod", "-R", "u+rwx", path)
            os.spawnl(os.P_WAIT, "/bin/rm", "rm", "-rf", path)
            if os.path.lexists(path):
                raise OSError(f"what a run left in {path} can not be removed")


def _end(pids, *, kill):
    """Wait for the children, killed first where asked, and all that they leave.

    Return the exit codes of those that had ended by themselves, and the seconds of processor time of all.
    """
    codes, cpu_s = [], 0.0
    for pid in pids:
        ended, status, used = os.wait4(pid, os.WNOHANG if kill else 0)
        if ended:
            codes.append(os.waitstatus_to_exitcode(status))
            cpu_s += used.ru_utime + used.ru_stime
        else:
            os.kill(pid, signal.SIGKILL)
    while True:
        try:
            _, _, used = os.wait4(-1, 0)
        except ChildProcessError:
            return codes, cpu_s
        cpu_s += used.ru_utime + used.ru_stime


def _module(name):
    module = type(sys)(name)
    sys.modules[name] = module
    return module


def _run_main(source):
    """Run the code as a script and return its exit status, as the interpreter would."""
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115 (open for as long as the program is)
    sys.argv = ["solution.py"]
    status = 0
    try:
        exec(compile(source, "solution.py", "exec"), vars(_module("__main__")))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        status = 1
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # the interpreter too waits for threads that were never joined
    import atexit

    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status & 0xFF


def main(settings):
    """Read the source and its cases from the host, run each, answer each, until the host hangs up."""
    builtins.exit = builtins.quit = sys.exit  # as `site` would, whose start-up time is not paid
    requests, replies = open(0, "rb"), open(1, "wb")  # noqa: SIM115 (until this process ends)
    _, source = read_frame(requests)
    supervisor = Supervisor(source, dict(line.split("=", 1) for line in settings.split("\n")))
    while True:
        word, content = read_frame(requests)
        if word is None:
            return
        if word == "run":
            write_frame(replies, *supervisor.run(content), supervisor.unlisted)
        elif word == "inside":
            write_frame(replies, *supervisor.inside(content), supervisor.unlisted)
        else:
            # sent only after this: what the parent reads ahead of the fork is in the candidate's memory too
            found = supervisor.tests(lambda: write_frame(replies, "ready", b"") or read_frame(requests)[1])
            write_frame(replies, *found, supervisor.unlisted)
