"""An evaluation that a step has still to be given, as its grader was gone: kept in the checkpoint of that step.

The run makes it up before the next draw, and goes on as one whose grader was never gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from polyphony.curricula.monitors import Alarm


@dataclass(kw_only=True, slots=True)
class Owed:
    """What waits for an evaluation: the step's line of metrics and its alarms, which stand after what was measured.

    Example: `Owed(step=20).state_dict()`; nothing is owed where `step` is None.
    """

    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    alarms: dict[str, list[Alarm]] = field(default_factory=dict)
    """By who rang them."""

    def state_dict(self) -> dict[str, Any]:
        """Return all of it; JSON-able."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.step, self.metrics = state["step"], dict(state["metrics"])
        self.alarms = {name: [Alarm(**alarm) for alarm in alarms] for name, alarms in state["alarms"].items()}
