"""`dump`: an upper confidence bound on learnability for each distribution (DUMP, arXiv:2504.09710)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curricula.boltzmann import softmax
from curricula.records import Decision, Evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class Dump:
    """p = softmax((advantage_k + sqrt(2 ln(N + 1) / (n_k + 1))) / temperature)

    advantage_k: mean |A| over the domain's last `window` groups; n_k: prompts drawn of it, N of all. Changed: updated
    from training groups, where the released code takes the validation rollouts; the window holds whole draws, the
    newest ones that fit, at least one.
    """

    window: int = 300
    """Groups whose |A| is averaged (DUMP: 300 rollouts)."""
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if not (self.window >= 1 and self.temperature > 0):
            raise ValueError(f"dump: expected window >= 1 and temperature > 0, got {self.window}, {self.temperature}")

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        old = state.get("history", [[] for _ in evidence.domains])
        history = [
            each if math.isnan(stats.abs_advantage) else self._push(each, stats.groups, stats.abs_advantage)
            for each, stats in zip(old, evidence.last, strict=True)
        ]
        total = sum(evidence.drawn)
        advantage = [sum(n * a for n, a in each) / sum(n for n, _ in each) if each else 0.0 for each in history]
        bonus = [math.sqrt(2 * math.log(total + 1) / (n + 1)) for n in evidence.drawn]
        bounds = [a + b for a, b in zip(advantage, bonus, strict=True)]
        parts = zip(evidence.domains, advantage, bonus, strict=True)
        reason = "mean |A| + bonus: " + ", ".join(f"{name} {a:.2f} + {b:.2f}" for name, a, b in parts)
        return Decision(
            mixture=softmax(bounds, temperature=self.temperature), reason=reason, state={"history": history}
        )

    def _push(self, history: list, groups: int, advantage: float) -> list:
        kept, room = [[groups, advantage]], self.window - groups
        for entry in reversed(history):
            room -= entry[0]
            if room < 0:
                break
            kept.insert(0, entry)
        return kept
