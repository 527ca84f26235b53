"""How the prompts of a domain are judged, waited for and chosen: the thresholds and the schedule of its pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from polyphony.curricula.learnability import find_sampling
from polyphony.curricula.posterior import Band, State


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSettings:
    """How prompts are judged, waited for and chosen."""

    band: Band = field(default_factory=Band)
    discount: float = 0.99
    """What earlier evidence is multiplied with at each visit; 0.99 keeps 64 failures in 8 visits convincing (62)."""
    sampling: str = "uniform"
    """Which of the open prompts: a name of `polyphony.curricula.learnability.SAMPLINGS` or an import path."""
    retry_share: float = 0.1
    """Largest share of a domain's draws that goes to prompts whose turn to be tried again has come."""
    retry_deferred: int = 10
    """Draws before a DEFERRED prompt at the band's edge is tried again; a policy changes noticeably in about ten. Below the
    edge it waits in inverse proportion to its mean pass rate, as the chance that a visit shows a success falls: 12, 22,
    32, .. draws after one, two, three groups of eight failures, but no longer than an IMPOSSIBLE one. An ACTIVE prompt
    rests so long after a group that was all alike: the posterior takes visits to see that it has been learned."""
    retry_mastered: int = 50
    """Draws before a MASTERED one is; forgetting is slower than learning."""
    retry_impossible: int = 100
    """Draws before an IMPOSSIBLE one is: it took eight visits to be called so."""
    when_exhausted: Literal["continue", "stop"] = "continue"
    """What happens when no domain has anything left to learn: the least bad prompts, or an end with a message."""
    look: int | None = None
    """Completions of a group that are sampled first; where they are all worth the same, the others are not sampled."""
    refill_rounds: int = 2
    """Most rounds in which the dead groups of a draw are replaced; with half of them dead, two leave one in eight."""

    def __post_init__(self) -> None:
        find_sampling(self.sampling)
        for name, low, high in (("discount", 0.5, 1.0), ("retry_share", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"pool: expected {low} <= {name} <= {high}, got {getattr(self, name)}")
        for name in ("retry_deferred", "retry_mastered", "retry_impossible"):
            if getattr(self, name) < 1:
                raise ValueError(f"pool: {name} must be at least 1 draw, got {getattr(self, name)}")
        if self.look is not None and self.look < 2:
            raise ValueError(f"pool: look must be at least 2 completions, got {self.look}")
        if self.refill_rounds < 0:
            raise ValueError(f"pool: refill_rounds must be at least 0, got {self.refill_rounds}")

    def delay(self, state: State, pass_rate: float, rewards: Sequence[float]) -> int:
        """Return the draws that a prompt of this state and posterior mean waits after a group with these rewards."""
        if state is State.DEFERRED and max(rewards) > 0:
            return 1  # too hard so far, but it has just succeeded
        backed_off = min(self.retry_impossible, int(self.retry_deferred * self.band.defer_below / pass_rate))
        waits = {
            State.DEFERRED: max(self.retry_deferred, backed_off),
            State.MASTERED: self.retry_mastered,
            State.IMPOSSIBLE: self.retry_impossible,
        }
        return waits.get(state, self.retry_deferred if min(rewards) == max(rewards) else 0)
