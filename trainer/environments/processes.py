"""Environments of a recipe: they live in worker processes of the rank that owns their episodes, several in each.

A process can be ended, so that what does not come back holds up nobody; the other episodes in it begin again elsewhere. What
a process takes down with it by itself is put on the call that was at work there, where it was the only one; where several
were, each begins again in a process of its own. One that is killed may be so from outside, or for its memory: that is put on
a call where the process was its own.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from polyphony.trainer.environments.acting import Acting
from polyphony.trainer.environments.calls import Ask, in_words
from polyphony.trainer.environments.hosts import Event, Events
from polyphony.trainer.environments.worker_main import packed

MOST_PROCESSES = 16
END_S = 10.0
"""What is waited for processes that were killed, once all is over."""
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""By which somebody else ends a process; what crashes ends by another."""


def started_by(worker: int) -> list[psutil.Process]:
    """Return all processes below a worker, which those of its own that lose their parent come back to."""
    try:
        return psutil.Process(worker).children(recursive=True)
    except psutil.Error:
        return []


class EnvironmentProcess:
    """One worker process; what it answers becomes events."""

    def __init__(self, specs: Mapping[str, Any], events: Events, *, is_alone: bool) -> None:
        self.is_alone = is_alone
        self.seats: dict[int, str] = {}
        """With their domains."""
        self.is_over = False
        """Whether it answers no more."""
        self.is_dropped = False
        """Whether it was told to end."""
        self.is_reaped = threading.Event()
        """Set once it has ended, with what it started."""
        self._events, self._at_work = events, set[int]()
        path = os.pathsep.join(dict.fromkeys(entry or str(Path.cwd()) for entry in sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "polyphony.trainer.environments.worker_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        self._unsent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._send(specs)
        for work in (self._write, self._read, self._watch):
            threading.Thread(target=work, name=f"environments-{self._process.pid}", daemon=True).start()

    def ask(self, seat: int, what: Ask | Literal["close"], given: Any) -> None:
        """Hand over a job; written by a thread, as a process that hangs reads nothing."""
        try:
            self._send({"seat": seat, "domain": self.seats[seat], "what": what, "given": packed(given)})
        except Exception as error:  # a user's column may be anything
            self._events.put(Event(seat=seat, error=f"it cannot be handed to a process: {in_words(error)}"))
        if self.is_over:  # its reader may have told of it before this seat was there
            self._events.put(Event(seat=seat, lost="others"))

    def drop(self) -> None:
        """End it by a thread: to look for all that it started takes a while, and the other episodes go on."""
        self.is_dropped = True
        threading.Thread(target=self.end, name=f"environments-{self._process.pid}", daemon=True).start()

    def end(self) -> None:
        """End it with all that it started, in sessions of their own too; none of its seats hears of it."""
        self.is_dropped = True
        if not self.is_reaped.is_set():
            started = started_by(self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            for process in started:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self._unsent.put(None)

    def _send(self, job: Mapping[str, Any]) -> None:
        self._unsent.put(json.dumps(job).encode() + b"\n")

    def _write(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its reader tells
            while (line := self._unsent.get()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as answers:
            for line in answers:
                if not line.endswith(b"\n"):  # torn off by the end
                    break
                event = Event(**json.loads(line))
                (self._at_work.add if event.begun else self._at_work.discard)(event.seat)
                self._events.put(event)
        self.is_over = True
        self._unsent.put(None)
        self.is_reaped.wait()
        if self.is_dropped:
            return
        is_its_own = self.is_alone or -self._process.wait() not in FROM_OUTSIDE
        blame: Literal["its_own", "maybe"] = "its_own" if len(self._at_work) == 1 else "maybe"
        for seat in list(self.seats):
            self._events.put(Event(seat=seat, lost=blame if is_its_own and seat in self._at_work else "others"))

    def _watch(self) -> None:
        """Wait for its end, and end what it started: that would hold its pipes open."""
        self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.is_reaped.set()


class Processes:
    """Where the instances of a recipe live.

    Example: `seat = processes.open(acting); processes.ask(seat, "reset", {}); events.get().seat == seat`
    """

    def __init__(
        self, acting: Mapping[str, Acting], events: Events, numbers: itertools.count, *, episodes: int | None
    ) -> None:
        self._specs = {
            name: {"environment": one.environment, "tools": list(one.tools)}
            for name, one in acting.items()
            if not one.is_here
        }
        self._events, self._numbers = events, numbers
        self._most = min(os.cpu_count() or 1, MOST_PROCESSES, episodes or MOST_PROCESSES)
        self._all: list[EnvironmentProcess] = []
        self._of: dict[int, EnvironmentProcess] = {}
        atexit.register(self.end)

    def open(self, acting: Acting, *, alone: bool = False) -> int:
        """Return a seat in the process with the fewest episodes, or in a new one."""
        self._all = [process for process in self._all if not process.is_reaped.is_set()]
        shared = sorted(
            (p for p in self._all if not (p.is_alone or p.is_over or p.is_dropped)), key=lambda p: len(p.seats)
        )
        if alone or not shared or (shared[0].seats and len(shared) < self._most):
            self._all.append(EnvironmentProcess(self._specs, self._events, is_alone=alone))
            shared = self._all[-1:]
        seat = next(self._numbers)
        self._of[seat] = shared[0]
        shared[0].seats[seat] = acting.name
        return seat

    def ask(self, seat: int, what: Ask, given: Any) -> None:
        """Ask an instance; what comes back are events."""
        self._of[seat].ask(seat, what, given)

    def beside(self, seat: int) -> Collection[int]:
        """Return the other seats of its process."""
        return self._of[seat].seats.keys() - {seat}

    def environment(self, seat: int) -> Any:
        """Return nothing: it lives elsewhere."""
        return None

    def drop(self, seat: int) -> Collection[int]:
        """End the process of what does not come back; return the other seats there."""
        lost = self.beside(seat)
        self._of[seat].drop()
        for one in (seat, *lost):
            del self._of[one]
        return lost

    def close(self, seat: int) -> None:
        """Free a seat; its instance is used again. A process of one episode's own ends with it."""
        process = self._of.pop(seat, None)
        if process is None:
            return
        if process.is_alone:
            process.drop()
        else:
            process.ask(seat, "close", None)
        del process.seats[seat]

    def end(self) -> None:
        """End all processes, and wait for that; nobody waits before."""
        for process in self._all:
            process.end()
        until = time.monotonic() + END_S
        for process in self._all:
            process.is_reaped.wait(max(0.0, until - time.monotonic()))
        self._all, self._of = [], {}
