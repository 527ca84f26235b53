"""`pac`: more to domains with a large |advantage| and a rising reward, by Thompson sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.records import Decision, DomainStats, Evidence, mean, null_of
from polyphony.curricula.schedulers.shares import listed, uniform


@settings
class PAC:
    """p_k = share of `samples` draws theta ~ N(mu, v) in which theta_k is the largest; after each draw of domain k

        u_k  = (1 + g_k) A_k,   g_k = b_k / sum_j |b_j|
        1/v_k <- 1/v_k + rho_k, mu_k <- the mean of mu_k and u_k weighted by 1/v_k and rho_k,   then v_k <- v_k + drift

    A_k: mean |advantage| over the last `window` draws. b_k: least-squares slope of mean reward over the same draws (g_k
    is 0 where no reward moved). rho_k: groups of k in the last draw over the mean per domain. mu, v start at 0, 1.
    The first `cold_start` draws are uniform; what they show is learned from.

    Source: arXiv:2608.30528. Changed: the paper draws theta once per prompt of the batch, we give the share of draws
    each domain wins as its mixture and let quotas round it; and the cold start is at most a quarter of the run, or a
    short run would be all cold start. A domain that was not drawn, or not graded, has no u and rho = 0: mu stays and v
    grows by the drift, so it is tried again. Whether the paper learns during its cold start we could not read.
    """

    window: int = Field(default=16, ge=2)
    """Draws over which advantage and slope are taken; 16 as in the paper."""
    drift: float = Field(default=0.02, ge=0)
    """Variance added each draw, 0.02 as in the paper: at a steady rho of 1 the posterior keeps v near 0.15."""
    cold_start: int = Field(default=50, ge=1)
    """Uniform draws at the start; 50 as in the paper, capped at a quarter of the run."""
    samples: int = Field(default=256, ge=1)
    """Samples of theta per draw: the paper's 256 prompts a batch; a share of .25 then has a standard error of .03."""
    seed: int = Field(default=0, ge=0)
    """Seed of the samples of theta, together with the draw's index."""

    def decide(self, evidence: Evidence, state: Mapping[str, Any]) -> Decision:
        k = len(evidence.domains)
        history = self._history(state.get("history", []), evidence)
        means, variances = state.get("means", [0.0] * k), state.get("variances", [1.0] * k)
        if evidence.draw > 0:
            means, variances = self._posterior(means, variances, _utilities(history, k), _rates(evidence.last))
        new_state = {"history": history, "means": means, "variances": variances}
        cold = max(1, min(self.cold_start, evidence.total_draws // 4))
        if evidence.draw < cold:
            reason = f"cold start, draw {evidence.draw + 1} of {cold}: uniform"
            return Decision(mixture=uniform(k), reason=reason, state=new_state)
        mixture = self._share_of_wins(means, variances, draw=evidence.draw)
        reason = (
            f"how often each domain was best in {self.samples} samples from the posterior of (1 + progress) x "
            f"|advantage|: mean {listed(evidence.domains, means)}, sd {listed(evidence.domains, map(math.sqrt, variances))}"
        )
        return Decision(mixture=mixture, reason=reason, state=new_state)

    def _history(self, history: Sequence[Mapping[str, Any]], evidence: Evidence) -> list[Mapping[str, Any]]:
        """Return what the draws in the window showed, oldest first; None where a domain was not drawn or graded."""
        now = {
            "draw": evidence.draw - 1,
            "advantage": [null_of(stats.abs_advantage) for stats in evidence.last],
            "reward": [null_of(stats.reward) for stats in evidence.last],
        }
        kept = [old for old in history if old["draw"] >= evidence.draw - self.window]
        return [*kept, now] if any(a is not None for a in now["advantage"]) else kept

    def _posterior(
        self, means: Sequence[float], variances: Sequence[float], utilities: Sequence[float], rates: Sequence[float]
    ) -> tuple[list[float], list[float]]:
        updated = []
        for mu, v, u, rho in zip(means, variances, utilities, rates, strict=True):
            if rho > 0:
                precision = 1 / v + rho
                mu, v = (mu / v + rho * u) / precision, 1 / precision
            updated.append((mu, v + self.drift))
        return [mu for mu, _ in updated], [v for _, v in updated]

    def _share_of_wins(self, means: Sequence[float], variances: Sequence[float], *, draw: int) -> tuple[float, ...]:
        rng = np.random.default_rng([self.seed, draw])
        theta = np.array(means) + np.sqrt(variances) * rng.standard_normal((self.samples, len(means)))
        wins = np.bincount(theta.argmax(axis=1), minlength=len(means))
        return tuple(int(w) / self.samples for w in wins)


def _utilities(history: Sequence[Mapping[str, Any]], k: int) -> list[float]:
    """Return u [K]; NaN where a domain has no graded draw in the window."""
    columns = range(k)
    seen = [[old for old in history if old["advantage"][i] is not None] for i in columns]
    advantages = [mean([old["advantage"][i] for old in seen[i]]) for i in columns]
    slopes = [_slope([(old["draw"], old["reward"][i]) for old in seen[i]]) for i in columns]
    total = sum(abs(b) for b in slopes)
    return [(1 + (b / total if total > 0 else 0.0)) * a for a, b in zip(advantages, slopes, strict=True)]


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope of (draw, reward), a draw; 0 with fewer than two points. The unit cancels in g."""
    if len(points) < 2:
        return 0.0
    x, y = mean([x for x, _ in points]), mean([y for _, y in points])
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def _rates(last: Sequence[DomainStats]) -> list[float]:
    """Return rho [K]: groups over the mean per domain; 0 where nothing was graded."""
    groups = [0 if math.isnan(stats.abs_advantage) else stats.groups for stats in last]
    return [n * len(groups) / max(1, sum(groups)) for n in groups]
