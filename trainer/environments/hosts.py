"""Where instances of environments live, as whoever leads episodes sees it: what is asked there, and what comes back."""

from __future__ import annotations

import queue
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from polyphony.trainer.environments.acting import Acting
from polyphony.trainer.environments.calls import Ask


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What came back of one thing that an instance was asked, or what became of the instance."""

    seat: int
    begun: Literal["making", "asking"] | None = None
    """That its turn has come, to be made or to be asked: nothing has come back yet."""
    value: Any = None
    error: str | None = None
    """What the environment raised, in words."""
    lost: Literal["its_own", "maybe", "others"] | None = None
    """The instance is gone with its process: whose doing that was."""


Events = queue.SimpleQueue[Event]


class Host(Protocol):
    """Where instances of environments live."""

    def open(self, acting: Acting, *, alone: bool = False) -> int:
        """Return a seat: an instance for one episode; with `alone` no other's call can take it down."""
        ...

    def ask(self, seat: int, what: Ask, given: Any) -> None:
        """Ask an instance; what comes back are events."""
        ...

    def beside(self, seat: int) -> Collection[int]:
        """Return the other seats of its process."""
        ...

    def environment(self, seat: int) -> Any:
        """Return the environment itself, where it lives in this process."""
        ...

    def drop(self, seat: int) -> Collection[int]:
        """Give up an instance that does not come back; return the seats that are lost with it."""
        ...

    def close(self, seat: int) -> None:
        """Let an episode be over."""
        ...
