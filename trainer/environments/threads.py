"""Instances of environments that a script hands over: they live in this process, where rewards can look at them.

Each thing that one is asked runs in a thread of its own, so that one that hangs holds up nobody. A thread cannot be ended:
one that is past its limit is abandoned with its instance, and counted.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

from polyphony.trainer.environments.acting import Acting, Event, Events
from polyphony.trainer.environments.calls import Ask, Instance

MOST_ABANDONED = 32
"""Threads that may hang; each keeps what it holds until the run ends."""


class Threads:
    """Where the instances of a script live.

    Example: `seat = threads.open(acting); threads.ask(seat, "reset", {}); events.get().seat == seat`
    """

    def __init__(self, events: Events, numbers: itertools.count) -> None:
        self._events, self._numbers = events, numbers
        self._idle: dict[str, list[Instance]] = {}
        self._used: dict[int, tuple[str, Instance]] = {}
        """By seat: the domain and its instance; kept until `release`, as rewards look at them."""
        self.abandoned = 0

    def open(self, acting: Acting, *, alone: bool = False) -> int:
        """Return a seat for an episode, with an instance that was used before or a new one; `alone` they always are."""
        idle = self._idle.setdefault(acting.name, [])
        seat = next(self._numbers)
        self._used[seat] = acting.name, idle.pop() if idle else acting.made()
        return seat

    def is_ready(self, seat: int) -> bool:
        """Whether the instance is there: it always is."""
        return True

    def ask(self, seat: int, what: Ask, given: Any) -> None:
        """Ask an instance; what comes back is an event."""
        arguments = (seat, self._used[seat][1], what, given)
        threading.Thread(target=self._answer, args=arguments, name=f"environment-{seat}", daemon=True).start()

    def _answer(self, seat: int, instance: Instance, what: Ask, given: Any) -> None:
        try:
            event = Event(seat=seat, value=instance.ask(what, given))
        except BaseException as error:  # a user's may raise anything; the episode ends with it
            event = Event(seat=seat, error=f"{type(error).__name__}: {error}")
        self._events.put(event)

    def environment(self, seat: int) -> Any:
        """Return the environment itself, for rewards."""
        return self._used[seat][1].environment

    def drop(self, seat: int) -> list[int]:
        """Abandon an instance that does not come back. Raises RuntimeError where too many hang."""
        del self._used[seat]
        self.abandoned += 1
        if self.abandoned > MOST_ABANDONED:
            raise RuntimeError(
                f"{self.abandoned} calls of tools or environments hang in threads of this process, which cannot be ended: "
                "give them limits of their own, or name the environment by its import path, which runs it in processes"
            )
        return []

    def close(self, seat: int) -> None:
        """Let an episode be over; its instance stays for rewards."""

    def release(self) -> None:
        """Take back the instances of episodes that are over and graded."""
        for name, instance in self._used.values():
            self._idle[name].append(instance)
        self._used = {}

    def end(self) -> None:
        """Let go of all instances."""
        self._idle, self._used = {}, {}
