"""An instance in a thread of its own, where it is made and asked: the same in the trainer and in a worker process.

What an environment holds may belong to one thread (a database, a browser). Of all that are asked at once a few are at work,
the others wait and have not begun: a limit measures the clock, and they would use up each other's.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from polyphony.trainer.environments.calls import Ask, Instance, in_words


class Keeper:
    """A thread with one instance.

    Example: `Keeper(make, threading.Semaphore(16)).ask("reset", lambda: columns, tell)`
    """

    def __init__(self, make: Callable[[], Instance], at_once: threading.Semaphore) -> None:
        """`at_once`: how many of those that share it are at work."""
        self.instance: Instance | None = None
        """None until it is made, which the first that it is asked waits for."""
        self._make, self._at_once = make, at_once
        self._is_at_work, self._lock = False, threading.Lock()
        self._asked: queue.SimpleQueue[tuple[Ask, Callable[[], Any], Callable[..., None]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="environment", daemon=True)
        self.thread.start()

    def ask(self, what: Ask, given: Callable[[], Any], tell: Callable[..., None]) -> None:
        """Ask the instance; `tell` hears, as of an `Event`, what has `begun`, and then a `value` or an `error`."""
        self._asked.put((what, given, tell))

    def end(self) -> None:
        """Let the thread end, after what it is at."""
        self._asked.put(None)

    def abandon(self) -> None:
        """Let others be at work in its place, as it does not come back; should it, its thread ends."""
        self._rest()
        self.end()

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            self._at_once.acquire()
            self._is_at_work = True
            self._answer(*asked)
            self._rest()

    def _rest(self) -> None:
        with self._lock:
            if self._is_at_work:
                self._at_once.release()
            self._is_at_work = False

    def _answer(self, what: Ask, given: Callable[[], Any], tell: Callable[..., None]) -> None:
        try:
            if self.instance is None:
                tell(begun="making")
                self.instance = self._make()
            tell(begun="asking")
            came = {"value": self.instance.ask(what, given())}
        except BaseException as error:  # a user's may raise anything; the episode ends with it
            came = {"error": in_words(error)}
        tell(**came)
