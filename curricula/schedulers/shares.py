"""Shares of a draw: from scores to probabilities, and from numbers to words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def uniform(k: int) -> tuple[float, ...]:
    """Return k equal shares."""
    return (1 / k,) * k


def normalised(weights: Sequence[float]) -> tuple[float, ...]:
    """Return shares in proportion to weights that are >= 0 and not all 0."""
    total = sum(weights)
    return tuple(w / total for w in weights)


def softmax(scores: Sequence[float], *, temperature: float = 1.0) -> tuple[float, ...]:
    """Return exp(score_k / temperature), normalised (Boltzmann)."""
    top = max(scores)  # subtracted so that exp cannot overflow
    return normalised([math.exp((score - top) / temperature) for score in scores])


def listed(domains: Sequence[str], values: Iterable[float]) -> str:
    """Return `math 0.41, code 0.22`, leaving out what is NaN; `-` where nothing is left."""
    pairs = zip(domains, values, strict=True)
    return ", ".join(f"{name} {value:.2f}" for name, value in pairs if not math.isnan(value)) or "-"
