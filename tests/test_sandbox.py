import contextlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from polyphony.curricula.records import Domain
from polyphony.launch.verbs import doctor
from polyphony.rewards.code import Code
from polyphony.rewards.sandbox import client as sandbox
from polyphony.rewards.sandbox import confine
from polyphony.rewards.sandbox.client import Execution, Limits, Program, describe, isolation
from polyphony.trainer.scoring import Scorer
from tests.conftest import HOUSE
from tests.experiments import attacks

LEVELS = [
    level
    for level in sandbox.LEVELS[sandbox.LEVELS.index(isolation().level) :]
    if level != "bubblewrap" or shutil.which("bwrap")
]
KINDS = [level for level in LEVELS if level != "landlock"]
"""Without the level that is as `limits` but for which files can be opened."""
PRIVATE = [level for level in LEVELS if level in ("namespaces", "bubblewrap")]
PATIENT = Limits(wall_s=60.0, cpu_s=2, memory_bytes=256 << 20)
"""Where an error is expected: on a busy host a second's work takes many."""
SHORT = Limits(wall_s=2.0, cpu_s=1, memory_bytes=256 << 20, output_bytes=1 << 16)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = set(psutil.Process().children(recursive=True))  # workers of other graders may live on
    yield
    deadline = time.monotonic() + 2
    while left := set(psutil.Process().children(recursive=True)) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def run(source, stdin="", level=None, limits=SHORT):
    with Program(source, level=level, limits=limits) as program:
        return program.run(stdin)


def test_the_host_has_a_sandbox_that_says_what_it_keeps():
    assert isolation().level in sandbox.LEVELS
    assert "network no" in str(isolation())


@pytest.mark.parametrize("level", LEVELS)
def test_a_program_reads_prints_and_runs_again(level):
    with Program("print(input()[::-1])", level=level, limits=SHORT) as program:
        assert program.run("abc") == Execution(ended="exit", stdout=b"cba\n")
        assert program.run("né") == Execution(ended="exit", stdout="én\n".encode())


@pytest.mark.parametrize("level", KINDS)
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "import threading; threading.Thread(target=lambda: print('t')).start()",
            Execution(ended="exit", stdout=b"t\n"),
        ),
        ("import atexit; atexit.register(print, 'bye')", Execution(ended="exit", stdout=b"bye\n")),
        ("import sys; print(1); sys.exit()", Execution(ended="exit", stdout=b"1\n")),
        ("print(1); raise SystemExit(3)", Execution(ended="error", stdout=b"1\n")),
        ("print(1); raise SystemExit('no')", Execution(ended="error", stdout=b"1\n")),
        ("print(1, flush=True); 1 / 0", Execution(ended="error", stdout=b"1\n")),
        ("print(1, flush=True); import os; os.abort()", Execution(ended="error", stdout=b"1\n")),
        ("this is no program", Execution(ended="error", stdout=b"")),
        ("\0", Execution(ended="error", stdout=b"")),
        ("if __name__ == '__main__': print(2)", Execution(ended="exit", stdout=b"2\n")),
        ("print(open(0).read())", Execution(ended="exit", stdout=b"\n")),
        ("import math, json, collections; print(math.comb(4, 2))", Execution(ended="exit", stdout=b"6\n")),
    ],
)
def test_a_program_ends_as_it_would_in_the_interpreter(source, expected, level):
    assert run(source, level=level) == expected


ATTACKS = {
    "forks": "import os; os.fork()",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: raise SystemExit(1)",
    "starts a program": "import subprocess; subprocess.run(['/bin/ls'])",
    "opens a socket": "import socket; socket.socket()",
    "resolves a name": "import socket; socket.gethostbyname('localhost')",
    "kills its parent": "import os; os.kill(os.getppid() or 2, 9)",
    "kills everything": "import os; os.kill(-1, 9)",
    "leaves its group": "import os; os.setsid()",
    "lowers its parent's limits": "import os, resource as r; r.prlimit(os.getppid() or 2, r.RLIMIT_CPU, (0, 0))",
    "raises its own limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "writes outside": "open('/usr/polyphony', 'w')",
    "deletes outside": "import shutil, sys; shutil.rmtree(sys.base_prefix)",
    "reads the users": "open('/etc/passwd').read()",
    "reads its parent's memory": "import os; open(f'/proc/{os.getppid() or 2}/mem', 'rb').read(1)",
    "reads its parent's environment": "import os; open(f'/proc/{os.getppid() or 2}/environ').read()",
    "takes memory": "x = 'x' * (1 << 30)",
    "takes memory in steps": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 20))",
    "fills the disk": "f = open('/tmp/f', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "fills the disk in pieces": "for i in range(10**9): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))",
    "signals through a pipe": "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid() or 2)",
    "calls the kernel": "import ctypes; ctypes.CDLL(None, use_errno=True).unshare(0x10000000) and 1 / 0",
    "clears its death signal": "import ctypes; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) and 1 / 0",
    "opens every file": "import os\nwhile True: os.dup(0)",
    "breaks the stack": "import sys\nsys.setrecursionlimit(10**9)\nclass A: __getattr__ = getattr\nA().x",
    "defines too deep an expression": "eval('(' * 10**5 + ')' * 10**5)",
}


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "limits"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_ends_in_an_error(attack, level):
    assert run(ATTACKS[attack], level=level, limits=PATIENT).ended == "error"


@pytest.mark.parametrize("level", KINDS)
@pytest.mark.parametrize(
    ("source", "ended"),
    [
        ("import time; time.sleep(60)", "stalled"),
        ("import os, time; os.close(1); time.sleep(60)", "stalled"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", "stalled"),
        ("while True: pass", ("timeout", "stalled")),  # the latter where others take its processor
        ("while True: print('x' * 1000)", "output"),
    ],
)
def test_a_program_that_does_not_end_is_ended(source, ended, level):
    start = time.monotonic()
    result = run(source, level=level, limits=Limits(wall_s=0.5, output_bytes=1 << 12))
    assert result.ended == ended or result.ended in ended
    assert len(result.stdout) <= 1 << 12
    assert time.monotonic() - start < 3


def test_a_deadline_holds_for_a_program_that_asks_without_end():
    asked, ask = os.pipe()
    os.write(ask, b"x")  # never read: there is always a next question
    nothing, _ = os.pipe()
    watch = confine.Listener()
    watch._listeners.add(asked)
    watch._poll.register(asked)
    assert not watch.wait(nothing, time.monotonic() + 0.1)
    assert not watch.has_begun(1, time.monotonic() + 0.1)
    watch.theirs.send(b"+")
    assert watch.has_begun(1, 0.0)
    watch.close()
    for fd in (ask, nothing, _):
        os.close(fd)


def test_processor_time_ends_before_the_clock_does():
    start = time.monotonic()
    assert run("while True: pass", limits=Limits(wall_s=60, cpu_s=1)).ended == "timeout"
    assert time.monotonic() - start < 30


def test_threads_are_bounded_by_the_address_space():
    source = (
        "import threading, time\nn = 0\ntry:\n"
        "    while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1\n"
        "except Exception: print(n < 1000, flush=True); import os; os._exit(0)"
    )
    assert run(source, limits=PATIENT).stdout == b"True\n"


@pytest.mark.parametrize("level", PRIVATE)
def test_a_private_folder_is_empty_writable_and_gone_afterwards(level):
    source = (
        "import os, shutil\nprint(os.listdir('.'))\nopen('mark', 'w').write('x')\n"
        "shutil.rmtree(os.getcwd(), ignore_errors=True)\nprint(os.path.exists('mark'))"
    )
    with Program(source, level=level, limits=SHORT) as program:
        assert program.run("") == program.run("") == Execution(ended="exit", stdout=b"[]\nFalse\n")
    assert not Path("/tmp/mark").exists()


@pytest.mark.parametrize("level", PRIVATE)
def test_of_the_host_only_python_is_there(level):
    names = run("import os; print(*os.listdir('/'))", level=level).stdout.decode().split()
    assert not set(names) & {"etc", "home", "proc", "sys", "var", "work", "mnt"}
    assert "usr" in names


def test_nothing_of_the_environment_is_handed_on(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    names = set(run("import os; print(*os.environ)").stdout.decode().split())
    ours = {"PATH", "HOME", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "PYTHONUTF8"}
    assert ours <= names <= ours | {"LC_CTYPE", "PWD"}


def test_sets_have_the_same_order_every_time():
    source = "print(*{'a', 'b', 'c', 'd', 'e', 'f'})"
    assert len({run(source).stdout for _ in range(4)}) == 1


def test_limits_that_allow_nothing_are_refused():
    with pytest.raises(ValueError, match="sandbox limit wall_s must be > 0, got 0"):
        Limits(wall_s=0)


def test_doctor_names_the_isolation_of_this_host():
    (finding,) = doctor.sandbox()
    assert finding.what == str(isolation())
    assert finding.verdict == ("slow" if isolation().level == "limits" else "ok")


@pytest.mark.parametrize(
    ("level", "verdict"), [("namespaces", "ok"), ("bubblewrap", "ok"), ("landlock", "ok"), ("limits", "slow")]
)
def test_doctor_says_what_would_make_the_sandbox_stronger(level, verdict, monkeypatch):
    found = sandbox.Isolation(level=level, network="none", processes="..", files="..")
    monkeypatch.setattr(sandbox, "isolation", lambda: found)
    (finding,) = doctor.sandbox()
    assert (finding.verdict, finding.what.split(":")[0]) == (verdict, level)
    assert ("bubblewrap" in finding.fix) == (verdict == "slow")


def test_doctor_goes_on_where_no_sandbox_works(monkeypatch):
    def none():
        raise sandbox.SandboxError("no sandbox works on this host")

    monkeypatch.setattr(sandbox, "isolation", none)
    (finding,) = doctor.sandbox()
    assert (finding.verdict, finding.what) == ("slow", "no sandbox works on this host")
    assert "`code`" in finding.fix


@pytest.fixture
def only_limits(monkeypatch):
    monkeypatch.setattr(sandbox, "LEVELS", ("limits",))
    isolation.cache_clear()
    yield
    isolation.cache_clear()


def test_without_isolation_code_refuses_to_run_unless_the_recipe_says_so(only_limits):
    domain = Domain(name="programs", kind="structured", reward="code")
    with pytest.raises(
        ValueError, match=r"domains\.programs\.reward: code: this host offers neither .*sandbox: limits"
    ):
        Scorer([domain])
    with pytest.raises(ValueError, match=r"this host offers neither"):
        Scorer([replace(domain, reward={"name": "weighted", "parts": {"a": {"reward": "code"}}})])
    with pytest.raises(sandbox.SandboxError, match="this host offers neither"):
        Code()([""], ["print(1)"], tests=[[{"input": "", "output": "1"}]])
    code = Scorer([replace(domain, reward={"name": "code", "sandbox": "limits"})]).rewards["programs"]
    assert code([""], ["print(1)"], tests=[[{"input": "", "output": "1"}]]) == [1.0]
    with pytest.raises(ValueError, match="code: sandbox is limits or left out, got 'none'"):
        Code(sandbox="none")


def test_what_a_user_without_power_can_not_keep_from_a_program_is_said(monkeypatch):
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 1000)
    assert "may read the trainer's environment and memory, expected values among them" in str(describe("limits"))
    assert "expected values" not in str(describe("landlock"))


def test_a_program_of_root_is_another_user_where_python_is_open_to_all(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 0)
    monkeypatch.setattr(sandbox.os, "__file__", "/usr/bin/env")
    assert "of another user than the trainer's" in str(describe("limits"))
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "os.py").touch()
    monkeypatch.setattr(sandbox.os, "__file__", str(closed / "os.py"))
    assert "of the trainer's user" in str(describe("limits"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the power to be another user")
def test_another_user_is_what_a_program_is(monkeypatch):
    monkeypatch.setattr(sandbox, "_user", lambda level, packages: confine.ANOTHER)
    source = "import os; print(os.getuid(), os.getgid(), os.getgroups())"
    assert run(source, level="limits").stdout.decode().split() == ["65533", "65533", "[]"]


IMPORTS = (
    "import importlib, sys, warnings\nwarnings.simplefilter('ignore')\n"
    "skipped = {'antigravity', 'this', 'idlelib', 'turtledemo', 'turtle', 'test'}\n"
    "for name in sorted(sys.stdlib_module_names - skipped):\n"
    "    try: importlib.import_module(name)\n    except ImportError: pass\n"
    "import asyncio\nasyncio.run(asyncio.sleep(0))\n"
    "from concurrent.futures import ThreadPoolExecutor\nprint(sum(ThreadPoolExecutor(8).map(int, '123')))"
)


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "limits"])
def test_the_standard_library_makes_no_call_that_is_not_listed(level):
    found = run(IMPORTS, level=level, limits=Limits(wall_s=60, cpu_s=50, memory_bytes=4 << 30))
    assert (found, found.unlisted) == (Execution(ended="exit", stdout=b"6\n"), 0)


@pytest.mark.parametrize("module", ["numpy.linalg", "scipy.optimize", "pandas"])
def test_what_is_installed_beside_python_makes_no_call_that_is_not_listed(module):
    limits = Limits(wall_s=60, cpu_s=50, memory_bytes=4 << 30)
    source = f"import {module}, numpy as np\nprint(np.linalg.eigvalsh(np.ones((64, 64)) @ np.eye(64)).sum().round(6))"
    with Program(source, limits=limits, site_packages=True) as program:
        found = program.run("")
    assert (found, found.unlisted) == (Execution(ended="exit", stdout=b"64.0\n"), 0)


@pytest.mark.parametrize("level", LEVELS)
def test_calls_that_are_not_listed_are_refused_and_counted(level):
    source = (
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for call in (lambda: libc.inotify_init(), lambda: libc.flock(0, 1), lambda: libc.syscall(463, 0, 0)):\n"
        "    assert call() == -1 and ctypes.get_errno() == errno.ENOSYS\nprint(1)"
    )
    found = run(source, level=level)
    assert (found.ended, found.stdout, found.unlisted) == ("exit", b"1\n", 3)


@pytest.mark.parametrize("level", KINDS)
def test_threads_are_counted_ended_ones_too(level):
    source = (
        "import threading\nn = 0\ntry:\n    while n < 3000:\n        t = threading.Thread(target=int)\n        t.start()\n"
        "        t.join()\n        n += 1\nexcept RuntimeError: print(n)"
    )
    assert run(source, level=level, limits=Limits(wall_s=60.0, cpu_s=20)).stdout == f"{confine.MOST_THREADS}\n".encode()


@pytest.mark.parametrize("level", LEVELS)
def test_of_all_attacks_only_those_that_are_listed_reach_anything(level):
    as_with_landlock = ("resources", "persistence") if level == "limits" and "landlock" in LEVELS else ()
    with attacks.bait():
        reached = attacks.table([level], lambda line: None, but=as_with_landlock)
    open_here = {name for (_, name), levels in reached.items() if levels}
    text = (HOUSE / "rewards" / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    listed = {row[1]: dict(zip(sandbox.LEVELS, row[2:6], strict=True)) for row in rows if len(row) == 7}
    assert {attack.name for attack in attacks.ATTACKS} | {"attack"} == set(listed)
    assert {name for name in open_here if listed[name][level] == "-"} == set()


@pytest.mark.parametrize("level", LEVELS)
def test_packages_may_stand_below_tmp(level, tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "away.py").write_text("value = 42")
    monkeypatch.setattr(sandbox.sysconfig, "get_path", lambda name: str(tmp_path / "far"))
    with Program("import away; print(away.value)", level=level, limits=SHORT, site_packages=True) as program:
        assert program.run("") == Execution(ended="exit", stdout=b"42\n")
    assert run("import away", level=level).ended == "error"


def inner_process(threads):
    """The process that runs the program, when it has that many threads."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if not process.children() and process.num_threads() == threads:
                    return process
        time.sleep(0.01)
    raise AssertionError("no program runs")


WAITS = "import threading, time\nfor _ in range(4): threading.Thread(target=time.sleep, args=(1.0,)).start()\nprint(1)"


@pytest.mark.skipif(isolation().level != "namespaces", reason="elsewhere a program can kill itself")
def test_a_program_that_something_else_kills_has_no_verdict():
    with Program(WAITS, limits=SHORT) as program, ThreadPoolExecutor(1) as pool:
        ended = pool.submit(program.run, "")
        inner_process(threads=5).kill()
        with pytest.raises(sandbox.SandboxError, match="something outside killed the program"):
            ended.result()


@pytest.mark.skipif(isolation().level != "namespaces", reason="elsewhere a program can kill itself")
def test_a_program_under_test_that_something_else_kills_has_no_verdict():
    source = WAITS.replace("print(1)", "def f(): time.sleep(1)")
    with Program(source, limits=SHORT) as program, ThreadPoolExecutor(1) as pool:
        result = pool.submit(program.test, "assert f() is None")
        inner_process(threads=5).kill()
        with pytest.raises(sandbox.SandboxError, match="something outside killed the program"):
            result.result()


SUICIDES = {
    "by a signal": "import os; os.kill(os.getpid(), 9)",
    "by a thread's signal": "import signal, threading; signal.pthread_kill(threading.get_ident(), 9)",
    "by its status": "import os; os._exit(247)",
    "by a status of 9": "import os; os._exit(9)",
    "by an abort": "import os; os.abort()",
    "by less processor time": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
    "by a timer": "import signal, time; signal.setitimer(signal.ITIMER_REAL, .01); time.sleep(.2)",
    "by a fault": "import ctypes; ctypes.string_at(0)",
    "by memory": "x = [bytearray(1 << 27) for _ in range(64)]",
    "by its stack": "import sys\nsys.setrecursionlimit(10**9)\nclass A: __getattr__ = getattr\nA().x",
    "by its files": "open('f', 'wb').write(bytes(1 << 26))",
}


@pytest.mark.parametrize("level", KINDS)
@pytest.mark.parametrize("way", SUICIDES)
def test_no_program_escapes_a_verdict_by_its_own_death(way, level):
    if way == "by less processor time" and level != LEVELS[0]:
        return  # a second each; only with namespaces it could be taken for something else's doing
    limits = replace(SHORT, memory_bytes=128 << 20)
    if way == "by a signal" and level == "namespaces":
        assert run(SUICIDES[way] + "; print(1)", level=level, limits=limits).ended == "exit"  # which there does nothing
    else:
        assert run(SUICIDES[way], level=level, limits=limits).ended in ("error", "exit", "timeout", "stalled")
    with Program(f"def f():\n    exec({SUICIDES[way]!r})\n    return 1", level=level, limits=limits) as program:
        assert program.test("assert f() == 2").passed == 0
