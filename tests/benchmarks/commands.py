"""The command from outside: how long it takes to help, to debug, to demonstrate, and how much memory that needs."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from polyphony.launch.measures.result import Result, Target, Timing, repeated

HELP_REPETITIONS = 5
MEMORY_EVERY_S = 0.2
"""Between two looks at the memory: a peak shorter than that is missed."""
GIB = 2**30
HOUSE = Path(__file__).resolve().parents[2]
RECIPES = HOUSE / "launch" / "recipes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one run of the command took."""

    seconds: Timing
    """The processor's are of the command and the processes it waited for."""
    peak_gib: float
    """Resident memory of the whole process tree; pages that processes share count once for each."""


def measure(arguments: Sequence[str]) -> Cost:
    """Run `polyphony` with these arguments to its end. Raises RuntimeError, with what it said, if it fails."""
    command = [sys.executable, "-P", "-m", "polyphony.launch.cli", *arguments]
    with tempfile.TemporaryFile() as said:
        started, cpu_started = time.perf_counter(), _cpu_of_children()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, cwd=HOUSE)
        ended = threading.Event()
        peaks: list[int] = []
        watch = threading.Thread(target=_watch, args=(process.pid, ended, peaks))
        watch.start()
        try:
            process.wait()  # without a timeout, which would poll and find the end late
            seconds = time.perf_counter() - started
        finally:
            ended.set()
            watch.join()
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"polyphony {' '.join(arguments)} failed:\n{said.read().decode(errors='replace')}")
    return Cost(seconds=Timing(seconds, _cpu_of_children() - cpu_started), peak_gib=max(peaks) / GIB)


def bench_help(*, short: bool = False) -> list[Result]:
    """Time `polyphony --help`: a command that imports torch to say how it is used is a nuisance."""
    seconds = [measure(["--help"]).seconds for _ in range(1 if short else HELP_REPETITIONS)]
    return [repeated("help", "s", seconds, target=Target(relation="<=", limit=0.5))]


def bench_debug(*, short: bool = False) -> list[Result]:
    """Time the debug recipe, from the shell's prompt to the shell's prompt."""
    changes = ["--dry-run"] if short else []
    with tempfile.TemporaryDirectory() as folder:
        cost = measure(["train", str(RECIPES / "debug.yaml"), *changes, "--out", f"{folder}/run"])
    note = f"peak memory {cost.peak_gib:.2f} GiB"
    return [repeated("debug", "s", [cost.seconds], target=Target(relation="<=", limit=60), note=note)]


def bench_demo() -> list[Result]:
    """Time the demo and weigh it."""
    with tempfile.TemporaryDirectory() as folder:
        cost = measure(["demo", "--out", f"{folder}/demo"])
    return [
        repeated("demo", "s", [cost.seconds], target=Target(relation="<=", limit=240)),
        repeated("demo_memory", "GiB", [cost.peak_gib], target=Target(relation="<=", limit=6)),
    ]


def _cpu_of_children() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _watch(pid: int, ended: threading.Event, peaks: list[int]) -> None:
    while True:
        peaks.append(_tree_memory(pid))
        if ended.wait(MEMORY_EVERY_S):
            return


def _tree_memory(pid: int) -> int:
    """Return the resident bytes of a process and all below it; one that ended meanwhile counts nothing."""
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_memory_of(process) for process in tree)


def _memory_of(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


BENCHMARKS = {"help": bench_help, "debug": bench_debug, "demo": bench_demo}
