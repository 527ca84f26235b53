"""The order that the evidence asks for, with a prior where it is silent: structured before open-ended.

Structured first is what Omni-Thinker (arXiv:2507.14783) found best; here it only breaks ties. B resamples, J domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from polyphony.curricula.effects import LEVELS
from polyphony.curricula.orders import EntropyTerm, Objective, best_orders, over_mean_order

PRIOR = 1e-6
"""Score by which structured before open-ended is preferred in a tie; below anything that a held-out set can show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chooser:
    """Choose the order of J domains from their transfer, with a prior where the evidence is silent."""

    is_structured: np.ndarray
    """[J]"""
    entropy: EntropyTerm | None = None
    has_prior: bool = True
    """Whether structured goes before open-ended in a tie."""

    def choose(self, transfer: np.ndarray, resampled: np.ndarray) -> np.ndarray:
        """Return the best order [J] under T [J, J]; `resampled` [B, J, J] says which preferences are certain.

        i before j is preferred by T[j -> i] - T[i -> j]. Where its 95 % interval contains zero and the kinds differ,
        both entries become their mean and the structured one goes first unless certain pairs stand against it.
        """
        after, drawn = transfer.T, resampled.transpose(0, 2, 1)
        if not self.has_prior:
            return best_orders(self.objective(after[None]))[0]
        low, high = np.quantile(drawn - drawn.transpose(0, 2, 1), LEVELS, axis=0)
        mixed = self.is_structured[:, None] != self.is_structured[None, :]
        tied = mixed & ~((low > 0) | (high < 0))
        prior = PRIOR * (self.is_structured[:, None] & ~self.is_structured[None, :])
        return best_orders(self.objective(np.where(tied, (after + after.T) / 2 + prior, after)[None]))[0]

    def part(self, kept: Sequence[int]) -> Chooser:
        """Return the chooser for some of the domains."""
        return replace(
            self,
            is_structured=self.is_structured[kept],
            entropy=None if self.entropy is None else self.entropy.part(kept),
        )

    def overruled(self, transfer: np.ndarray, resampled: np.ndarray) -> Chooser:
        """Return the chooser without its prior where all pairs together speak against it, else itself.

        No single pair may be certain while the order as a whole is. Two cases, each against the 95 % point of what noise
        alone lets the best order gain: the best order by evidence beats the one with the prior by more than that; or it
        beats the mean order by more than that, and the one with the prior does not.
        """
        careful = self.choose(transfer, resampled)[None]
        drawn = resampled - transfer
        noise = Objective(after=drawn.transpose(0, 2, 1))
        luckiest = best_orders(noise, start=careful[0])
        problem = self.objective(transfer.T[None])
        best = best_orders(problem)
        gap = problem.value(best) - problem.value(careful)
        is_better = gap[0] > np.quantile(noise.value(luckiest) - noise.value(careful), 0.95)
        q = np.quantile(over_mean_order(drawn, luckiest), 0.95)
        table = transfer[None]
        is_needed = over_mean_order(table, best)[0] > q >= over_mean_order(table, careful)[0]
        return replace(self, has_prior=False) if is_better or is_needed else self

    def objective(self, after: np.ndarray) -> Objective:
        """Return the ordering problems [B, J, J] with this chooser's entropy term."""
        return Objective(after=after, entropy=self.entropy)
