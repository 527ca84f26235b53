"""Environments of a recipe: they live in worker processes of the rank that owns their episodes, several in each.

A process can be ended, so that what does not come back holds up nobody; the other episodes in it begin again elsewhere. What
a process takes down with it by itself is put on the call that was at work there, where it was the only one; where several
were, each begins again in a process of its own.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from polyphony.trainer.environments.acting import Acting, Event, Events
from polyphony.trainer.environments.calls import Ask

MOST_PROCESSES = 16
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""By which somebody else ends a process; what crashes ends by another."""


class EnvironmentProcess:
    """One worker process; what it answers becomes events."""

    def __init__(self, specs: Mapping[str, Any], events: Events, *, is_alone: bool) -> None:
        self.is_alone = is_alone
        self.seats: dict[int, str] = {}
        """With their domains."""
        self.is_ready = False
        self._events, self._at_work = events, set[int]()
        self._is_dropped = False
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
        for work in (self._write, self._read):
            threading.Thread(target=work, name=f"environments-{self._process.pid}", daemon=True).start()

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def ask(self, seat: int, what: Ask | Literal["close"], given: Any) -> None:
        """Hand over a job; written by a thread, as a process that hangs reads nothing."""
        self._at_work |= {seat} if what != "close" else set()
        self._send({"seat": seat, "domain": self.seats[seat], "what": what, "given": given})

    def end(self) -> None:
        """End it with all that it started; none of its seats hears of it."""
        self._is_dropped = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._unsent.put(None)

    def _send(self, job: Mapping[str, Any]) -> None:
        self._unsent.put(json.dumps(job, default=str).encode() + b"\n")

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
        for line in self._process.stdout:
            answer = json.loads(line)
            self.is_ready = True
            if "seat" in answer:
                self._at_work.discard(answer["seat"])
                self._events.put(Event(**answer))
        status = self._process.wait()
        if self._is_dropped:
            return
        is_its_own = -status not in FROM_OUTSIDE
        blame = {seat: "its_own" if len(self._at_work) == 1 else "maybe" for seat in self._at_work if is_its_own}
        for seat in list(self.seats):
            self._events.put(Event(seat=seat, lost=blame.get(seat, "others")))


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
        self._all = [process for process in self._all if not process.is_over]
        shared = sorted((p for p in self._all if not p.is_alone), key=lambda p: len(p.seats))
        if alone or not shared or (shared[0].seats and len(shared) < self._most):
            self._all.append(EnvironmentProcess(self._specs, self._events, is_alone=alone))
            shared = self._all[-1:]
        seat = next(self._numbers)
        self._of[seat] = shared[0]
        shared[0].seats[seat] = acting.name
        return seat

    def is_ready(self, seat: int) -> bool:
        """Whether the process has started."""
        return self._of[seat].is_ready

    def ask(self, seat: int, what: Ask, given: Any) -> None:
        """Ask an instance; what comes back is an event."""
        self._of[seat].ask(seat, what, given)

    def environment(self, seat: int) -> Any:
        """Return nothing: it lives elsewhere."""
        return None

    def drop(self, seat: int) -> list[int]:
        """End the process of what does not come back; return the other seats there."""
        process = self._of[seat]
        process.end()
        lost = [other for other in process.seats if other != seat]
        for other in process.seats:
            self._of.pop(other, None)
        return lost

    def close(self, seat: int) -> None:
        """Free a seat; its instance is used again. A process of one episode's own ends with it."""
        process = self._of.pop(seat, None)
        if process is None:
            return
        if process.is_alone:
            process.end()
            return
        process.ask(seat, "close", None)
        del process.seats[seat]

    def end(self) -> None:
        """End all processes."""
        for process in self._all:
            process.end()
        self._all, self._of = [], {}
