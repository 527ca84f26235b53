"""A worker process's own side (`-m polyphony.trainer.environments.worker_main`): it holds environments and is asked things.

The first line from stdin says what environments are made of, by domain; each further one is a thing that an instance is
asked. A line says that its turn has come, another answers it as soon as it is done, in any order. The process ends with its
stdin, and takes what it started with it: by a process beside it, as a tool may hold the interpreter's lock and never let go.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import pickle
import select
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

import psutil

from polyphony.trainer.environments.calls import Instance
from polyphony.trainer.environments.keeper import Keeper

PR_SET_CHILD_SUBREAPER = 36
"""Of Linux's prctl."""
AT_ONCE = 16
"""Instances of the process that are at work. Once one of them is late, each begins again in a process of its own."""


def packed(given: Any) -> str:
    """Return what an instance is given, for a line: columns may hold more than JSON knows."""
    return base64.b64encode(pickle.dumps(given)).decode()


def unpacked(text: str) -> Any:
    """Return what was packed; its class, where it is a user's, is imported here."""
    return pickle.loads(base64.b64decode(text))


class EnvironmentWorker:
    """The instances of one process, by seat."""

    def __init__(self, specs: Mapping[str, Any], replies: BinaryIO) -> None:
        self._specs, self._replies = specs, replies
        self._seats: dict[int, Keeper] = {}
        self._idle: dict[str, list[Keeper]] = {name: [] for name in specs}
        self._at_once, self._lock = threading.Semaphore(AT_ONCE), threading.Lock()

    def take(self, job: Mapping[str, Any]) -> None:
        """Begin with a job, or free the seat of an episode that is over."""
        seat, idle = job["seat"], self._idle[job["domain"]]
        if job["what"] == "close":
            if (keeper := self._seats.pop(seat, None)) is not None:
                idle.append(keeper)
            return
        if seat not in self._seats:
            self._seats[seat] = idle.pop() if idle else self._made(**self._specs[job["domain"]])
        self._seats[seat].ask(job["what"], partial(unpacked, job["given"]), partial(self.reply, seat=seat))

    def _made(self, environment: Any, tools: Any) -> Keeper:
        return Keeper(partial(Instance.made, environment, tools), self._at_once)

    def reply(self, **told: Any) -> None:
        """Write a line to whoever started this."""
        line = json.dumps(told).encode() + b"\n"
        with self._lock:
            self._replies.write(line)
            self._replies.flush()


def adopt_orphans() -> None:
    """On Linux, have processes that environments started and whose parents have ended come back to this one."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with(pipe: int) -> None:
    """Have a process beside this one end it, and all that it started, once nobody can write to a pipe any more."""
    worker = os.getpid()
    if os.fork():
        return
    os.closerange(1, 3)  # whoever reads there must see this one's end
    closed = select.poll()
    closed.register(pipe, 0)  # that it hung up is told all the same
    closed.poll()
    end(worker)


def end(worker: int) -> None:
    """End a worker with whatever hangs in it, and what it started, in sessions of their own too; this process with it."""
    with suppress(psutil.Error):
        for process in psutil.Process(worker).children(recursive=True):
            if process.pid != os.getpid():
                with suppress(psutil.Error):
                    process.kill()
    os.killpg(worker, signal.SIGKILL)


def main() -> None:
    """Answer until stdin closes."""
    end_with(0)
    adopt_orphans()
    asked, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # programs that tools start read nothing of what is asked here
    os.dup2(2, 1)  # what an environment prints is not an answer
    worker = EnvironmentWorker(json.loads(asked.readline()), replies)
    for line in asked:
        worker.take(json.loads(line))
    end(os.getpid())


if __name__ == "__main__":
    main()
