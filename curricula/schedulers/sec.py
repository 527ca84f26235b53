"""`sec`: a bandit whose reward is learnability (Self-Evolving Curriculum, arXiv:2505.14970)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curricula.boltzmann import softmax
from curricula.records import Decision, Evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class Sec:
    """p = softmax(Q / temperature);   Q_k <- (1 - rate) Q_k + rate mean |A|_k for the domains of the last draw.

    Q starts at 0, A is the advantage normalised by the group's standard deviation: for binary rewards its mean size
    is 2 sqrt(p (1 - p)), largest at a pass rate of one half. Changed: an arm is a domain (SEC: category and level);
    and an arm that was not drawn keeps its Q, where the released code gives it the target 0 and lets it decay.
    """

    rate: float = 0.5
    """Step of the moving average (SEC's alpha); 0.5 forgets half at each draw."""
    temperature: float = 0.2
    """SEC's tau: an arm 0.2 better is drawn e times as often."""

    def __post_init__(self) -> None:
        if not (0 < self.rate <= 1 and self.temperature > 0):
            raise ValueError(f"sec: expected 0 < rate <= 1 and temperature > 0, got {self.rate}, {self.temperature}")

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        old = state.get("value", [0.0] * len(evidence.domains))
        value = [
            q if math.isnan(stats.abs_advantage) else (1 - self.rate) * q + self.rate * stats.abs_advantage
            for q, stats in zip(old, evidence.last, strict=True)
        ]
        reason = "mean |A|: " + ", ".join(f"{n} {q:.2f}" for n, q in zip(evidence.domains, value, strict=True))
        return Decision(mixture=softmax(value, temperature=self.temperature), reason=reason, state={"value": value})
