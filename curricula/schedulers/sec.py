"""`sec`: more to domains with a larger mean |advantage| (Self-Evolving Curriculum)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.records import Decision, Evidence, nan_of
from polyphony.curricula.schedulers.shares import listed, softmax, uniform


@settings
class SEC:
    """A bandit over domains: after each draw Q_k <- (1 - a) Q_k + a A_k; the next draw has p = softmax(Q / tau).

    Q_k: value of domain k, 0 before it was seen. A_k: mean |advantage| of its groups in the last draw, for binary
    rewards 2 sqrt(p (1 - p)), largest at pass rate p = 0.5. a: `step_size`. tau: `temperature`.

    Source: arXiv:2505.14970 (TD(0), Boltzmann policy). Changed: the bandit's arms are domains, not category x difficulty;
    quotas instead of sampling. A domain that was not drawn, or whose grader failed on everything, keeps its Q as in the
    paper: the released code moves it towards 0 as if nothing could be learned there, which we do not copy.
    """

    step_size: float = Field(default=0.5, gt=0, le=1)
    """a; 0.5 as in the released runs: an observation's weight halves with every draw of its domain."""
    temperature: float = Field(default=0.2, gt=0)
    """tau; 0.2 as in the released runs: a Q larger by 0.14 doubles a domain's share."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        values: list[float | None] = list(state.get("values", [None] * len(evidence.domains)))
        for k, stats in enumerate(evidence.last):
            if not math.isnan(stats.abs_advantage):
                values[k] = (1 - self.step_size) * (values[k] or 0.0) + self.step_size * stats.abs_advantage
        new_state = {"values": values}
        if all(value is None for value in values):
            reason = "no draw has been graded yet: uniform"
            return Decision(mixture=uniform(len(values)), reason=reason, state=new_state)
        seen = [nan_of(value) for value in values]
        reason = f"more to domains with larger |advantage|, smoothed: {listed(evidence.domains, seen)}"
        if unseen := [name for name, value in zip(evidence.domains, values, strict=True) if value is None]:
            reason += f"; not seen yet, counted as 0: {', '.join(unseen)}"
        mixture = softmax([value or 0.0 for value in values], temperature=self.temperature)
        return Decision(mixture=mixture, reason=reason, state=new_state)
