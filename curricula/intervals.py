"""How sure: 95 % intervals of means, ratios and paired differences, where both scores come from the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

from scipy.special import stdtrit


class Interval(NamedTuple):
    """A value between its bounds; all three NaN where it is undefined."""

    low: float
    mid: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        return self.high < 0


UNDEFINED = Interval(math.nan, math.nan, math.nan)


def paired(now: Sequence[float], before: Sequence[float], *, level: float = 0.95) -> Interval:
    """Return the mean difference `now - before` over the same items, with its interval; UNDEFINED without items.

    Scores lie in [0, 1]. The interval is Agresti and Min's for matched pairs (Statistics in Medicine 24, 2005): two
    pseudo-items with differences -1, +1 and 0 (weights 1/2, 1/2, 1) join the n real ones, so that ten items which did
    not move are not taken for certainty. `mid` is the plain mean.
    """
    if len(now) != len(before):
        raise ValueError(f"paired scores must come from the same items, got {len(now)} and {len(before)}")
    n = len(now)
    if n == 0:
        return UNDEFINED
    differences = [a - b for a, b in zip(now, before, strict=True)]
    total, squares = sum(differences), sum(d * d for d in differences)
    centre = total / (n + 2)
    spread = math.sqrt(max(0.0, (squares + 1) / (n + 2) - centre**2) / (n + 2))
    z = quantile(level)
    return Interval(centre - z * spread, total / n, centre + z * spread)


def average(first: Interval, second: Interval) -> Interval:
    """Return the mean of two independent estimates; their half-widths add in quadrature."""
    low = math.hypot(first.mid - first.low, second.mid - second.low) / 2
    high = math.hypot(first.high - first.mid, second.high - second.mid) / 2
    mid = (first.mid + second.mid) / 2
    return Interval(mid - low, mid, mid + high)


def quantile(level: float) -> float:
    """Return z with P(|N(0, 1)| < z) = level."""
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies strictly between 0 and 1, got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)


def ratio(totals: Sequence[float], counts: Sequence[float], *, level: float = 0.95) -> Interval:
    """Return sum(totals) / sum(counts) with its interval; UNDEFINED without counts, bounds infinite for one cluster.

    Each place is one independent cluster (a draw, a held-out item), so what varies together stays together. Linearised
    variance of a ratio (Cochran, Sampling Techniques, 1977, section 6.3) and Student's t with one cluster less.
    """
    n, size = len(totals), sum(counts)
    if not size:
        return UNDEFINED
    mid = sum(totals) / size
    if n < 2:
        return Interval(-math.inf, mid, math.inf)
    squares = sum((total - mid * count) ** 2 for total, count in zip(totals, counts, strict=True))
    spread = student(level, n - 1) * math.sqrt(n / (n - 1) * squares) / size
    return Interval(mid - spread, mid, mid + spread)


def student(level: float, freedom: int) -> float:
    """Return t with P(|T| < t) = level under Student's distribution with `freedom` degrees of freedom."""
    return float(stdtrit(freedom, (1 + level) / 2))
