"""`mt_grpo`: more of what improves least, with quotas that survive dead groups (MT-GRPO, arXiv:2602.05547)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curricula.boltzmann import softmax
from curricula.records import Decision, Evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class MtGrpo:
    """z = softmax(xi);   g_k = z_k (s_k - sum_j z_j s_j);   xi <- xi - rate g;   s_k = I_k + level J_k

    J_k: mean reward of the domain's last draw, I_k: its change since the draw before. So shares move away from domains
    that are high and rising: descent on the worst domain. Ratio-preserving: a share rho_k of dead groups would leave
    the update with less of k than z_k says, so p_k is proportional to z_k min(1 / (1 - rho_k), `most`), rho_k a moving
    average. Changed: MT-GRPO draws post-filter counts from a multinomial and refills until they are met; here quotas
    are exact and refilling is the trainer's: where it refills dead groups with quotas kept, set `most` to 1.
    """

    rate: float = 0.025
    """Step of the logits (the paper's beta)."""
    level: float = 0.6
    """Weight of the level against its change (the paper's lambda, used from 0.2 to 1.2)."""
    most: float = 4.0
    """Largest oversampling of a domain with dead groups."""
    memory: float = 0.9
    """Weight of the old average of rho at each draw; 0.9 forgets half in 7."""

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.level >= 0 and self.most >= 1 and 0 <= self.memory < 1):
            raise ValueError(
                "mt_grpo: expected rate > 0, level >= 0, most >= 1 and 0 <= memory < 1, got "
                f"{self.rate}, {self.level}, {self.most}, {self.memory}"
            )

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        size = len(evidence.domains)
        logits = state.get("logits", [0.0] * size)
        rewards: list[float | None] = state.get("rewards", [None] * size)
        dead = state.get("dead", [0.0] * size)
        now = [old if math.isnan(s.reward) else s.reward for old, s in zip(rewards, evidence.last, strict=True)]
        shares = softmax(logits)
        scores = [
            0.0 if new is None else (new - (new if old is None else old)) + self.level * new
            for new, old in zip(now, rewards, strict=True)
        ]
        average = sum(z * s for z, s in zip(shares, scores, strict=True))
        logits = [xi - self.rate * z * (s - average) for xi, z, s in zip(logits, shares, scores, strict=True)]
        dead = [
            old if math.isnan(s.frac_dead) else self.memory * old + (1 - self.memory) * s.frac_dead
            for old, s in zip(dead, evidence.last, strict=True)
        ]
        wanted = softmax(logits)
        drawn = [
            z * min(1 / (1 - rho) if rho < 1 else self.most, self.most) for z, rho in zip(wanted, dead, strict=True)
        ]
        reason = "wanted in the update: " + ", ".join(
            f"{name} {z:.2f} (dead {rho:.0%})" for name, z, rho in zip(evidence.domains, wanted, dead, strict=True)
        )
        next_state = {"logits": logits, "rewards": now, "dead": dead}
        return Decision(mixture=tuple(d / sum(drawn) for d in drawn), reason=reason, state=next_state)
