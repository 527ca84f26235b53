"""Replay: the share of a draw that goes to domains whose stage is over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from polyphony.curricula.declarations import settings

MOST = 0.5
"""Largest share of a draw that all earlier domains get together, so that a stage stays the stage of its domain."""


@settings
class Replay:
    """q_j = fraction age_j^-exponent / sum over earlier domains of the same, age_j in draws since its stage ended.

    Power-law rehearsal matches or beats regularisation in domain-incremental learning (arXiv:2401.10393); there the
    age counts from the last practice, which under constant replay would be the last draw.
    """

    kind: Literal["power_law"] = "power_law"
    """The only kind."""
    fraction: float = Field(default=0.25, ge=0, le=MOST)
    """Share of a draw for all earlier domains together; the paper uses 1 to 10 %, in our lab 25 % still lost the worst
    one, at a learning rate of 5e-4."""
    exponent: float = Field(default=1.0, ge=0)
    """0 spreads the fraction evenly, 1 gives a domain twice as old half as much; 0.5 to 1.5 are usual."""

    def shares(self, ages: Mapping[str, int]) -> dict[str, float]:
        """Return the share of each earlier domain; `ages` in draws, at least 1. Empty without any."""
        weights = {name: age**-self.exponent for name, age in ages.items()}
        total = sum(weights.values())
        return {name: self.fraction * weight / total for name, weight in weights.items()}


@settings
class Protection:
    """More replay for a past domain while its measured backward transfer is below `-max_drop` with 95 % confidence."""

    max_drop: float = Field(default=0.02, ge=0, le=1)
    """Tolerated loss of held-out score since the end of the domain's stage."""
    share: float = Field(default=0.25, ge=0, le=MOST)
    """Share of a draw for each protected domain; all replay and protection together get half of a draw at most."""


@settings
class Plateau:
    """A stage has plateaued when the mean score of its last `window` evaluations is less than `gain` above that of the
    `window` before.
    """

    window: int = Field(default=2, ge=1)
    """Evaluations averaged on each side; with 2 of 200 items the difference has a standard error of about 0.025."""
    gain: float = Field(default=0.01, ge=-1, le=1)
    """Rise of the score below which the stage ends; 0 or less waits until the score falls."""

    def is_reached(self, scores: list[float]) -> bool:
        """Return whether the scores of a stage's evaluations, oldest first, have stopped rising."""
        recent, earlier = scores[-self.window :], scores[-2 * self.window : -self.window]
        return len(earlier) == self.window and sum(recent) - sum(earlier) < self.gain * self.window


def combine(replay: Mapping[str, float], protected: Mapping[str, float]) -> dict[str, float]:
    """Return the shares of earlier domains, scaled down together where they would exceed `MOST`."""
    shares = {name: share + protected.get(name, 0.0) for name, share in replay.items()}
    total = sum(shares.values())
    return {name: share * min(1.0, MOST / total) if total else 0.0 for name, share in shares.items()}
