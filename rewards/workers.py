"""Processes that answer one small job at a time and can be killed: for libraries that may never come back.

A symbolic comparison can run for ever inside C code, where no exception and no thread can end it; a process ends. The
workers are started as fresh interpreters (never by fork: the caller may hold engines and threads), give up writing,
network and processes before the first job, and end by themselves when the caller is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def is_readable_by(fd: int, deadline: float) -> bool:
    """Wait until `fd` has something to read (or has closed) or `time.monotonic()` reaches the deadline.

    By `poll`, since `select` refuses descriptors above 1023.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0, math.ceil(1000 * (deadline - time.monotonic())))))


START_S = 120.0
"""Importing a symbolic library on a busy host takes seconds; longer than this is a failure to start."""


_WALL_FACTOR, _GRACE_S = 4, 2.0
"""A worker ends itself at its limit of processor time; its caller waits this many times as long, and a little more, before
it kills it: on a busy host a job gets only a part of a processor."""


_LARGE_BYTES = 1 << 30
"""A worker that held more than this when it was killed may have caused that itself."""


_SAME_EVERYWHERE = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
"""Some generators walk through sets: only with one hash seed do all processes make the same questions."""


class JobError(Exception):
    """A job got no answer, by its own doing: it ran out of time or memory, raised, or took its worker down."""


class KilledError(JobError):
    """A job's worker was ended from outside, twice: that says nothing about the job."""


class _NotItsFaultError(JobError):
    """So it seems the first time: the wall clock ran out, or the worker was killed."""


class Workers:
    """`size` processes that answer `target` ("module:function" on a JSON-able job).

    Each job has `timeout_s` of processor time. One that met a limit of the wall clock, or whose worker was killed, is
    tried again alone.
    """

    def __init__(self, target: str, *, size: int, timeout_s: float, memory_bytes: int = 4 << 30) -> None:
        self._arguments = [target, str(timeout_s), str(memory_bytes)]
        self._timeout_s = timeout_s
        self._size = size
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = (
            queue.LifoQueue()
        )  # those that run are taken first
        for _ in range(size):
            self._idle.put(None)  # started when first needed
        atexit.register(self.close)

    def map(self, jobs: Sequence[Any]) -> list[Any]:
        """Return each job's answer, or the JobError that it met, in order."""
        if not jobs:
            return []
        with ThreadPoolExecutor(min(self._size, len(jobs))) as threads:
            answers = list(threads.map(self._answer, jobs))
        return [
            _settled(self._answer(job)) if isinstance(answer, _NotItsFaultError) else answer
            for job, answer in zip(jobs, answers, strict=True)
        ]

    def close(self) -> None:
        """End the processes that are idle; those at work end with their job."""
        while not self._idle.empty():
            _end(self._idle.get())

    def _answer(self, job: Any) -> Any:
        worker, kept = self._idle.get(), None
        if worker is not None and worker.poll() is not None:  # it was killed while it waited: no job's fault
            _end(worker)
            worker = None
        try:
            worker = worker or self._start()
            answer = _ask(worker, job, _WALL_FACTOR * self._timeout_s + _GRACE_S)
            kept = worker
        except JobError as error:
            return error
        finally:
            if kept is None:
                _end(worker)
            self._idle.put(kept)
        return JobError(answer["error"]) if "error" in answer else answer["value"]

    def _start(self) -> subprocess.Popen[bytes]:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "polyphony.rewards.worker_main", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **_same_path(), **_SAME_EVERYWHERE},
            start_new_session=True,
        )
        try:
            # a process counts what the one that started it held as its own peak, so a peak says nothing by itself
            worker.peak_at_start = _read_line(worker, START_S)["value"]  # type: ignore[attr-defined]
        except JobError as error:
            _end(worker)
            raise RuntimeError(f"a worker for {self._arguments[0]} could not start: {error}") from None
        return worker


def _same_path() -> dict[str, str]:
    """Return where else modules are looked for: in a tree that Ray brought, nothing but this variable finds ours."""
    return {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}


def _ask(worker: subprocess.Popen[bytes], job: Any, timeout_s: float) -> Any:
    assert worker.stdin
    try:
        worker.stdin.write(json.dumps(job).encode() + b"\n")
        worker.stdin.flush()
    except BrokenPipeError:
        raise _ended(worker) from None
    return _read_line(worker, timeout_s)


def _read_line(worker: subprocess.Popen[bytes], timeout_s: float) -> Any:
    assert worker.stdout
    fd, data, deadline = worker.stdout.fileno(), b"", time.monotonic() + timeout_s
    while not data.endswith(b"\n"):
        if not is_readable_by(fd, deadline):
            raise _NotItsFaultError(JobError(f"no answer within {timeout_s} s"))
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            raise _ended(worker)
        data += chunk
    return json.loads(data)


def _ended(worker: subprocess.Popen[bytes]) -> JobError:
    """Return what a worker's end says about its job, from the signal and the memory it held."""
    _, status, usage = os.wait4(worker.pid, 0)
    worker.returncode = os.waitstatus_to_exitcode(status)
    if -worker.returncode not in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return JobError("the worker ended: it met its limit of time or memory")
    held = 1024 * usage.ru_maxrss
    has_grown = usage.ru_maxrss > getattr(worker, "peak_at_start", 0)
    why = f"the worker was killed; it held {held >> 20} MiB"
    return _NotItsFaultError(JobError(why) if has_grown and held > _LARGE_BYTES else KilledError(why))


def _settled(answer: Any) -> Any:
    """Return the answer of a second try, whose error is final."""
    return answer.args[0] if isinstance(answer, _NotItsFaultError) else answer


def _end(worker: subprocess.Popen[bytes] | None) -> None:
    if worker is None:
        return
    worker.kill()
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream:
            with contextlib.suppress(BrokenPipeError):  # a job that it never read
                stream.close()


_shared: dict[tuple[Any, ...], Workers] = {}


_lock = threading.Lock()


def shared_workers(target: str, *, size: int | None, timeout_s: float) -> Workers:
    """Return this process's workers for a target, the same for all rewards that ask with the same numbers."""
    key = (os.getpid(), target, size, timeout_s)  # a forked child must not talk to its parent's workers
    with _lock:
        if key not in _shared:
            _shared[key] = Workers(target, size=size or min(os.cpu_count() or 1, 16), timeout_s=timeout_s)
        return _shared[key]
