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


_GRACE_S = 2.0
"""The worker ends itself at its limit; its caller waits this much longer before it kills it."""


_SAME_EVERYWHERE = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
"""Some generators walk through sets: only with one hash seed do all processes make the same questions."""


class JobError(Exception):
    """A job got no answer: it took too long, took too much memory, or took its worker down."""


class Workers:
    """`size` processes that answer `target` ("module:function" on a JSON-able job), each job within `timeout_s`."""

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
            return list(threads.map(self._answer, jobs))

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
            answer = _ask(worker, job, self._timeout_s + _GRACE_S)
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
            _read_line(worker, START_S)
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
        raise JobError("the worker had ended") from None
    return _read_line(worker, timeout_s)


def _read_line(worker: subprocess.Popen[bytes], timeout_s: float) -> Any:
    assert worker.stdout
    fd, data, deadline = worker.stdout.fileno(), b"", time.monotonic() + timeout_s
    while not data.endswith(b"\n"):
        if not is_readable_by(fd, deadline):
            raise JobError(f"no answer within {timeout_s} s")
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            raise JobError("the worker ended: it met its limit of time or memory")
        data += chunk
    return json.loads(data)


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
