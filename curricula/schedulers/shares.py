"""Shares of a draw: from scores to probabilities, and from numbers to words.

And the checks of schedulers' settings: they come from a recipe, so each is checked where the scheduler is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


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


def check_numbers(settings: Any, **intervals: str) -> None:
    """Raise ValueError unless each named field is a number in its interval.

    Example: `check_numbers(self, temperature="(0, inf)", step="(0, 1]")`; a round bracket leaves the bound out.
    """
    for field, interval in intervals.items():
        value = getattr(settings, field)
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        inside = is_number and low <= value <= high
        if not inside or (interval[0] == "(" and value == low) or (interval[-1] == ")" and value == high):
            raise ValueError(f"{_name(settings)}: {field} must be a number in {interval}, got {value!r}")


def check_counts(settings: Any, **least: int) -> None:
    """Raise ValueError unless each named field is a whole number not below its least value."""
    for field, low in least.items():
        value = getattr(settings, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{_name(settings)}: {field} must be a whole number >= {low}, got {value!r}")


def _name(settings: Any) -> str:
    return type(settings).__name__
