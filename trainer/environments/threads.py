"""Instances of environments that a script hands over: they live in this process, where rewards can look at them.

Each has a thread of its own, so that one that hangs holds up nobody. A thread cannot be ended: one that is past its limit is
abandoned with its instance, and counted for as long as it hangs. What is asynchronous shares one event loop, as in TRL:
where that does not answer, somebody's call holds it up, and all that wait there begin again, each with a loop of its own. A
call that computes for long holds the interpreter's lock, and nothing tells it from those that it makes late: such tools
belong into processes (an environment that is named by its import path).
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Collection
from functools import partial
from typing import Any

from polyphony.rewards.registry import blocked, end_loop
from polyphony.trainer.environments.acting import Acting
from polyphony.trainer.environments.calls import Ask, Instance
from polyphony.trainer.environments.hosts import Event, Events
from polyphony.trainer.environments.keeper import Keeper

AT_ONCE = 32
"""Instances that are at work: enough for tools that mostly wait, few enough for those that share the interpreter's lock."""
MOST_ABANDONED = 32
"""Threads that may hang; each keeps what it holds until it comes back."""


class Threads:
    """Where the instances of a script live.

    Example: `seat = threads.open(acting); threads.ask(seat, "reset", {}); events.get().seat == seat`
    """

    def __init__(self, events: Events, numbers: itertools.count) -> None:
        self._events, self._numbers = events, numbers
        self._at_once = threading.Semaphore(AT_ONCE)
        self._idle: dict[str, list[Keeper]] = {}
        self._used: dict[int, tuple[str, Keeper]] = {}
        """By seat: the domain and its instance; kept until `release`, as rewards look at them."""
        self._alone: set[int] = set()
        """Seats of those with an event loop of their own."""
        self._abandoned: list[threading.Thread] = []

    def open(self, acting: Acting, *, alone: bool = False) -> int:
        """Return a seat for an episode, with an instance that was used before or a new one; `alone`, with its own loop."""
        idle = self._idle.setdefault(acting.name, [])
        seat = next(self._numbers)
        if alone:
            self._alone.add(seat)
            keeper = Keeper(partial(_with_own_loop, acting, seat), self._at_once)
        else:
            keeper = idle.pop() if idle else Keeper(acting.made, self._at_once)
        self._used[seat] = acting.name, keeper
        return seat

    def ask(self, seat: int, what: Ask, given: Any) -> None:
        """Ask an instance; what comes back are events. It gets a copy: what it changes is its own."""
        tell = lambda **told: self._events.put(Event(seat=seat, **told))  # noqa: E731
        self._used[seat][1].ask(what, partial(copy.deepcopy, given), tell)

    def beside(self, seat: int) -> Collection[int]:
        """Return all other seats."""
        return self._used.keys() - {seat}

    def environment(self, seat: int) -> Any:
        """Return the environment itself, for rewards; None where it could not be made."""
        instance = self._used[seat][1].instance
        return instance and instance.environment

    def drop(self, seat: int) -> Collection[int]:
        """Abandon an instance that does not come back, and those that wait for a loop that it may be holding up; return
        these. Raises RuntimeError where too many hang."""
        lost = self._held_up_with(seat)
        for one in (seat, *lost):
            self._used[one][1].abandon()
        self._abandoned.append(self._used[seat][1].thread)
        for one in (seat, *lost):
            del self._used[one]
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if (hanging := len(self._abandoned)) > MOST_ABANDONED:
            raise RuntimeError(
                f"{hanging} calls of tools or environments hang in threads of this process, which cannot be ended: "
                "give them limits of their own, or name the environment by its import path, which runs it in processes"
            )
        return lost

    def _held_up_with(self, seat: int) -> list[int]:
        """Return who else waits for the loop that a call waits for, if that does not answer; they wait no more."""
        waiting = {s: k.instance.loop for s, (_, k) in self._used.items() if k.instance and k.instance.is_waiting}
        if (loop := waiting.pop(seat, None)) is None or (thread := blocked(loop)) is None:
            return []
        self._abandoned.append(thread)
        return [other for other, where in waiting.items() if where == loop]

    def close(self, seat: int) -> None:
        """Let an episode be over; its instance stays for rewards."""

    def release(self) -> None:
        """Take back the instances of episodes that are over and graded."""
        for seat, (name, keeper) in self._used.items():
            if seat in self._alone:
                keeper.end()
                end_loop(_own_loop(seat))
            else:
                self._idle[name].append(keeper)
        self._used, self._alone = {}, set()

    def end(self) -> None:
        """Let go of all instances."""
        self.release()
        for keeper in itertools.chain.from_iterable(self._idle.values()):
            keeper.end()
        self._idle = {}


def _own_loop(seat: int) -> str:
    return f"tools of {seat}"


def _with_own_loop(acting: Acting, seat: int) -> Instance:
    instance = acting.made()
    instance.loop = _own_loop(seat)
    return instance
