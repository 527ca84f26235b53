"""Monitors of a run: entropy, loss of held-out score (guardrails), signs of shortcuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """Something about a domain, or about the run as a whole, changed for the worse: what every monitor rings.

    Example: `Alarm(step=12, domain="math", kind="collapse", message="entropy fell ..").as_line()["kind"]`
    """

    step: int
    domain: str
    """Empty for the whole run."""
    kind: str
    """One of `polyphony.trainer.run.signals.SIGNALS`."""
    message: str
    drawn: Mapping[str, float] | None = None
    """Share of each domain in the prompts drawn since all was well; None where nobody counted."""

    @property
    def title(self) -> str:
        return f"{self.kind} of {self.domain}" if self.domain else self.kind

    def as_line(self) -> dict[str, Any]:
        """Return the alarm's line of the run's ledger."""
        line = {"step": self.step, "domain": self.domain, "kind": self.kind, "message": self.message}
        return line if self.drawn is None else line | {"drawn": dict(self.drawn)}
