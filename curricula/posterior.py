"""What a prompt's past visits say about its pass rate, and the five states that follow from it.

Prior Beta(1, 1); a visit of G graded completions adds their successes and failures after what was known is discounted, so
that old evidence about an old policy fades (MoPPS, arXiv:2507.04632, uses the same posterior). A reward counts as that
share of a success, cut to [0, 1]. N prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from scipy.special import betainc

CONFIDENCE = 0.95
"""One-sided confidence that a pass rate lies below `impossible_below`."""

FEWEST_VISITS = 2
"""A prompt is never called impossible after one visit, however many completions it had."""


class State(IntEnum):
    """Where a prompt stands; every state has a way back."""

    UNSEEN = 0
    ACTIVE = 1
    DEFERRED = 2
    """Too hard for now."""
    IMPOSSIBLE = 3
    """Too hard with confidence: a wrong reference answer is the likeliest reason."""
    MASTERED = 4


RETRIED = (State.DEFERRED, State.MASTERED, State.IMPOSSIBLE)
"""States that are practised by schedule only, the least bad first: nearest to a pass rate that teaches something."""

WAITING = (State.ACTIVE, *RETRIED)
"""States in which a prompt may have to wait; an ACTIVE one only rests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """The pass rates between which a prompt is worth its rollouts."""

    impossible_below: float = 0.05
    """Below it with confidence: IMPOSSIBLE. 64 failures in a row say so, 8 visits of 8."""
    defer_below: float = 0.125
    """Posterior mean below it: DEFERRED. One visit of 8 failures says so (1/10)."""
    mastered_above: float = 0.9
    """Posterior mean above it: MASTERED. Two visits of 8 successes say so (17/18), one does not (9/10)."""

    def __post_init__(self) -> None:
        if not 0 < self.impossible_below <= self.defer_below < self.mastered_above < 1:
            raise ValueError(
                "pool: expected 0 < impossible_below <= defer_below < mastered_above < 1, got "
                f"{self.impossible_below}, {self.defer_below}, {self.mastered_above}"
            )

    def classify(self, successes: Any, failures: Any, visits: Any) -> np.ndarray:
        """Return the state of each prompt, [N], from its discounted counts and its visits, [N] each."""
        a, b = 1.0 + np.asarray(successes, dtype=float), 1.0 + np.asarray(failures, dtype=float)
        mean = a / (a + b)
        states = np.where(mean > self.mastered_above, State.MASTERED, State.ACTIVE)
        states = np.where(mean < self.defer_below, State.DEFERRED, states)
        hopeless = (betainc(a, b, self.impossible_below) >= CONFIDENCE) & (np.asarray(visits) >= FEWEST_VISITS)
        states = np.where(hopeless, State.IMPOSSIBLE, states)
        return np.where(np.asarray(visits) == 0, State.UNSEEN, states).astype(np.uint8)
