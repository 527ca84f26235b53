"""Probabilities from scores."""

from __future__ import annotations

import math
from collections.abc import Sequence


def softmax(scores: Sequence[float], *, temperature: float = 1.0) -> tuple[float, ...]:
    """Return exp(s_k / temperature), normalised; the largest score is subtracted first, so nothing overflows."""
    highest = max(scores)
    powers = [math.exp((score - highest) / temperature) for score in scores]
    total = sum(powers)
    return tuple(power / total for power in powers)
