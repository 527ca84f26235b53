"""Recoveries: draws in which a domain that was hurt is practised alone, while the scheduler waits.

To the scheduler they have not happened: it is not asked, its state stays, and it counts its own draws, prompts and
evaluations. The run is not longer for them: what recoveries take, the end of the schedule lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from polyphony.curricula.records import Decision


@dataclass(kw_only=True, slots=True)
class Recovery:
    """One that goes on.

    Example: `Recovery(domain="math", most=20, teacher="checkpoint-40").reason`
    """

    domain: str
    most: int
    """Draws that it may take."""
    drawn: int = 0
    """Draws that it has taken."""
    teacher: str = ""
    """The checkpoint that is distilled from; empty where the domain is practised by its own reward."""

    @property
    def reason(self) -> str:
        """Why its draws are as they are, in words."""
        how = f"distilled from {self.teacher}" if self.teacher else "practised by its own reward"
        return f"recovery: {self.domain} is {how} for at most {self.most} draws"

    def decision(self, names: Sequence[str], state: Mapping[str, Any]) -> Decision:
        """Return what is drawn, over the trainable domains `names`: it alone, and nothing of these if it is only watched."""
        return Decision(mixture=tuple(float(name == self.domain) for name in names), reason=self.reason, state=state)


@dataclass(kw_only=True, slots=True)
class Recoveries:
    """What the recoveries of a run have taken; at most one is open."""

    open: Recovery | None = None
    begun: dict[str, int] = field(default_factory=dict)
    """How many there were, by domain."""
    draws: dict[str, int] = field(default_factory=dict)
    """Draws that they have taken, by domain."""
    prompts: dict[str, int] = field(default_factory=dict)
    """Prompts in these, by domain."""

    def begin(self, domain: str, *, most: int, teacher: str = "") -> None:
        """Let the next draws be of this domain alone, until `end`."""
        self.open = Recovery(domain=domain, most=most, teacher=teacher)
        self.begun[domain] = self.begun.get(domain, 0) + 1

    def count(self, n: int) -> None:
        """Take in a draw of `n` prompts of the one that is open."""
        assert self.open is not None
        self.open.drawn += 1
        for of, more in ((self.draws, 1), (self.prompts, n)):
            of[self.open.domain] = of.get(self.open.domain, 0) + more

    def end(self) -> None:
        """Let the scheduler go on."""
        self.open = None

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on; JSON-able."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; of a checkpoint without one, nothing has been recovered yet."""
        self.open = Recovery(**state["open"]) if state.get("open") else None
        self.begun, self.draws, self.prompts = (dict(state.get(key, {})) for key in ("begun", "draws", "prompts"))
