"""What entropy was traded for: R = b - a exp(H), score against entropy in nats per token (arXiv:2505.22617).

A policy that follows the law ends at b - a when its entropy is used up; what lies between that and the score now is the
headroom left without new entropy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyphony.curricula.intervals import UNDEFINED, Interval, student

FEWEST = 4
"""Evaluations a fit needs: two parameters, and two degrees of freedom for its interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """The law fitted to one domain's evaluations."""

    a: float
    """Score bought per unit of exp(H); with its interval in `a_interval`."""
    b: float
    a_interval: Interval
    headroom: Interval
    """b - a minus the score that the law gives at the last entropy: what using up the rest would still buy."""

    @property
    def is_trade(self) -> bool:
        """True where score rose as entropy fell beyond what noise explains."""
        return self.a_interval.low > 0


def fit_exchange(entropy: Sequence[float], score: Sequence[float], *, level: float = 0.95) -> Exchange | None:
    """Return the least-squares fit over evaluations [T] in order; None for fewer than four or an entropy that stood.

    Intervals are those of ordinary least squares with T - 2 degrees of freedom: residuals only, not the items behind
    each score.
    """
    if len(entropy) != len(score):
        raise ValueError(f"entropies and scores must come in pairs, got {len(entropy)} and {len(score)}")
    if len(entropy) < FEWEST:
        return None
    x, y = np.exp(np.asarray(entropy, dtype=float)), np.asarray(score, dtype=float)
    spread = float(((x - x.mean()) ** 2).sum())
    if spread < 1e-12:
        return None
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    residual = y - y.mean() - slope * (x - x.mean())
    error = math.sqrt(float((residual**2).sum()) / (len(x) - 2) / spread)
    half = student(level, len(x) - 2) * error
    a = Interval(-slope - half, -slope, -slope + half)
    left = float(x[-1]) - 1  # exp(H) falls to exp(0)
    headroom = Interval(*(left * bound for bound in a)) if left > 0 else UNDEFINED
    return Exchange(a=a.mid, b=float(y.mean()) + a.mid * float(x.mean()), a_interval=a, headroom=headroom)
