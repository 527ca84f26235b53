"""`mt_grpo`: more to domains with low reward and low improvement, oversampled by their share of dead groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.records import Decision, DomainStats, Evidence, nan_of
from polyphony.curricula.schedulers.shares import listed, normalised, softmax, uniform


@settings
class MTGRPO:
    """p_k = z_k m_k / sum_j z_j m_j, with z = softmax(xi) what the update should see, m what filtering will take away:

        s_k = I_k + lam J_k,   g_k = z_k (s_k - sum_j z_j s_j),   xi <- xi - Adam(g) at rate beta
        m_k = min(1 / (1 - rho_k), cap)

    J_k: mean reward of domain k, smoothed: J <- (J + reward) / 2. I_k: how J_k changed with the last draw, clipped to
    +-0.1 as released. rho_k: share of dead groups, discounted sums of dead and of all groups. lam: `balance`. beta:
    `step_size`. Low s (poor, or not improving) raises a domain's share.

    Source: arXiv:2602.05547 and its code. The paper writes xi <- xi - beta g; the released code runs Adam at that rate,
    and at beta = 0.025 the plain step would stay uniform over any run, so Adam it is. Changed: the paper's
    ratio-preserving sampler draws until the groups left after filtering have the shares z; our draw fixes prompts, not
    what survives, so m makes up for filtering in expectation (a variant in their code does the same). I_k comes from
    rewards of successive draws, not from the policies' importance ratios. A domain that was not drawn, or not graded,
    keeps J and rho and has I = 0; one never seen has g = 0 and does not enter the mean (the code takes its J as 0).
    Rewards are expected in [0, 1].
    """

    balance: float = Field(default=0.2, ge=0)
    """lam; 0.2 in the paper's main run with 3 tasks, up to 1.2 with 9: larger weighs the level more than the change."""
    step_size: float = Field(default=0.025, gt=0)
    """beta, Adam's rate for xi; 0.025 as released: under a steady g a logit moves by that much a draw."""
    cap: float = Field(default=5.0, ge=1)
    """Largest oversampling; 5 as released. 1 turns it off: where dead groups are refilled within their domain."""
    smoothing: float = Field(default=0.9, ge=0, lt=1)
    """Discount of dead and total groups per draw of a domain; 0.9 as released: the last ten draws count."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        k = len(evidence.domains)
        old = state or {"logits": [0.0] * k, "reward": [None] * k, "groups": [[0.0, 0.0]] * k, "adam": None}
        reward, change = _improvement(old["reward"], evidence.last)
        groups = [self._dead_and_all(pair, stats) for pair, stats in zip(old["groups"], evidence.last, strict=True)]
        if all(j is None for j in reward):
            return Decision(mixture=uniform(k), reason="no draw has been graded yet: uniform", state=dict(old))
        gradient = self._gradient(softmax(old["logits"]), reward, change)
        steps, adam = _adam(gradient, old["adam"])
        logits = [xi - self.step_size * step for xi, step in zip(old["logits"], steps, strict=True)]
        wanted = softmax(logits)
        rates = [dead / total if total else 0.0 for dead, total in groups]
        factors = [self.cap if rho >= 1 else min(1 / (1 - rho), self.cap) for rho in rates]
        mixture = normalised([z * m for z, m in zip(wanted, factors, strict=True)])
        names = evidence.domains
        reason = (
            f"wanted shares {listed(names, wanted)}: more to low reward ({listed(names, map(nan_of, reward))}) and low "
            f"improvement ({listed(names, change)}); oversampled for dead groups (share {listed(names, rates)})"
        )
        return Decision(
            mixture=mixture,
            reason=reason,
            state={"logits": logits, "reward": reward, "groups": groups, "adam": adam},
        )

    def _dead_and_all(self, sums: Sequence[float], stats: DomainStats) -> list[float]:
        """Return the discounted sums of dead and of all groups with the last draw's added."""
        if math.isnan(stats.reward):
            return list(sums)
        dead, total = (self.smoothing * old for old in sums)
        return [dead + stats.frac_dead * stats.groups, total + stats.groups]

    def _gradient(
        self, z: Sequence[float], reward: Sequence[float | None], change: Sequence[float]
    ) -> tuple[float, ...]:
        """Return g [K], with the mean over z taken among the domains seen so far."""
        s = [None if j is None else i + self.balance * j for i, j in zip(change, reward, strict=True)]
        seen = [(share, signal) for share, signal in zip(z, s, strict=True) if signal is not None]
        mean = sum(share * signal for share, signal in seen) / sum(share for share, _ in seen)
        return tuple(0.0 if signal is None else share * (signal - mean) for share, signal in zip(z, s, strict=True))


def _improvement(before: Sequence[float | None], last: Sequence[DomainStats]) -> tuple[list[float | None], list[float]]:
    """Return J and I [K] after the last draw; J is None for a domain never seen."""
    reward, change = list(before), [0.0] * len(last)
    for k, stats in enumerate(last):
        if math.isnan(stats.reward):
            continue
        previous = before[k]
        reward[k] = stats.reward if previous is None else (previous + stats.reward) / 2
        change[k] = 0.0 if previous is None else max(-0.1, min(0.1, (stats.reward - previous) / 2))
    return reward, change


def _adam(gradient: Sequence[float], state: Mapping[str, Any] | None) -> tuple[list[float], dict[str, Any]]:
    """Return Adam's steps [K] at rate 1 and its state (arXiv:1412.6980, with its default constants)."""
    state = state or {"count": 0, "first": [0.0] * len(gradient), "second": [0.0] * len(gradient)}
    count = state["count"] + 1
    first = [0.9 * m + 0.1 * g for m, g in zip(state["first"], gradient, strict=True)]
    second = [0.999 * v + 0.001 * g * g for v, g in zip(state["second"], gradient, strict=True)]
    steps = [
        m / (1 - 0.9**count) / (math.sqrt(v / (1 - 0.999**count)) + 1e-8) for m, v in zip(first, second, strict=True)
    ]
    return steps, {"count": count, "first": first, "second": second}
