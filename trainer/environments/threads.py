"""Instances of environments that a script hands over: they live in this process, where rewards can look at them.

Each has a thread of its own, so that one that hangs holds up nobody. A thread cannot be ended: one that is past its limit is
abandoned with its instance, and counted for as long as it hangs.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Collection
from functools import partial
from typing import Any

from polyphony.trainer.environments.acting import Acting
from polyphony.trainer.environments.calls import Ask
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
        self._abandoned: list[Keeper] = []

    def open(self, acting: Acting, *, alone: bool = False) -> int:
        """Return a seat for an episode, with an instance that was used before or a new one; `alone` they never are."""
        idle = self._idle.setdefault(acting.name, [])
        seat = next(self._numbers)
        self._used[seat] = acting.name, idle.pop() if idle else Keeper(acting.made, self._at_once)
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
        """Abandon an instance that does not come back. Raises RuntimeError where too many hang."""
        _, keeper = self._used.pop(seat)
        keeper.abandon()
        self._abandoned = [*(one for one in self._abandoned if one.is_alive), keeper]
        if (hanging := len(self._abandoned)) > MOST_ABANDONED:
            raise RuntimeError(
                f"{hanging} calls of tools or environments hang in threads of this process, which cannot be ended: "
                "give them limits of their own, or name the environment by its import path, which runs it in processes"
            )
        return []

    def close(self, seat: int) -> None:
        """Let an episode be over; its instance stays for rewards."""

    def release(self) -> None:
        """Take back the instances of episodes that are over and graded."""
        for name, keeper in self._used.values():
            self._idle[name].append(keeper)
        self._used = {}

    def end(self) -> None:
        """Let go of all instances."""
        self.release()
        for keeper in itertools.chain.from_iterable(self._idle.values()):
            keeper.end()
        self._idle = {}
