"""Each domain's learnability (mean |advantage|) as a posterior over the draws so far, and the slope of its reward.

PAC, arXiv:2608.30528: a domain starts at N(0, 1); a draw in which it had a share c of the groups adds precision c K,
means are weighted by precision, then every variance grows by 0.02, so that early evidence loses its weight.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyphony.curricula.records import Evidence, null_of

INFLATION = 0.02
"""Variance added to every domain at each draw (PAC)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnability:
    """Posterior mean and variance of each domain [K], and the last draws' rewards; state as JSON."""

    mean: list[float]
    variance: list[float]
    rewards: list[list[float | None]]
    """[K, up to window], oldest first; None where the domain was not drawn."""

    @classmethod
    def of(
        cls,
        state: Mapping[str, Any] | None,
        evidence: Evidence,
        *,
        window: int,
        start: tuple[float, float] = (0.0, 1.0),
    ) -> Learnability:
        """Return the posteriors after the last draw; `start` is their mean and variance before any.

        The observation of a domain is its mean |advantage| in the last draw.
        """
        size = len(evidence.domains)
        if state is None:
            empty: list[list[float | None]] = [[] for _ in range(size)]
            return cls(mean=[start[0]] * size, variance=[start[1]] * size, rewards=empty)
        rewards = _push(state["rewards"], [s.reward for s in evidence.last], window)
        total = sum(stats.groups for stats in evidence.last)
        means, variances = [], []
        for m, v, stats in zip(state["mean"], state["variance"], evidence.last, strict=True):
            advantage = stats.abs_advantage
            share = stats.groups / total * size if total and not math.isnan(advantage) else 0.0
            precision = 1 / v + share
            means.append((m / v + share * advantage) / precision if share else m)
            variances.append(1 / precision + INFLATION)
        return cls(mean=means, variance=variances, rewards=rewards)

    def as_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "variance": self.variance, "rewards": self.rewards}

    def sample(self, rng: random.Random) -> np.ndarray:
        """Return one sample of every domain's posterior, [K]."""
        return np.array([rng.gauss(m, math.sqrt(v)) for m, v in zip(self.mean, self.variance, strict=True)])

    def progress(self) -> np.ndarray:
        """Return each domain's slope of the reward over the window, over the sum of their sizes, [K] in [-1, 1]."""
        slopes = np.array([_slope(each) for each in self.rewards])
        total = np.abs(slopes).sum()
        return slopes / total if total else slopes


def _push(history: list[list[float | None]], newest: list[float], window: int) -> list[list[float | None]]:
    return [[*each, null_of(value)][-window:] for each, value in zip(history, newest, strict=True)]


def _slope(values: list[float | None]) -> float:
    """Return the least-squares slope per draw; 0 below three values, where two points would always show one."""
    known = [(n, value) for n, value in enumerate(values) if value is not None]
    if len(known) < 3:
        return 0.0
    x, y = np.array(known, dtype=float).T
    x -= x.mean()
    return float(x @ y / (x @ x))
